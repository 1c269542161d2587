"""Tiny random ClipCap checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from itune.backbones import load_language_model, load_vision_tower
from itune.checkpoint import WEIGHTS_FILE, ClipCapCheckpoint, Source, VisionSource, save_config
from itune.clipcap import ClipCapConfig, ClipCapModel
from itune.runtime.settings import TextSettings

SHAPES: dict[str, dict[str, Any]] = {
    "transformer": {"mapper": "transformer", "prefix_length": 4, "clip_length": 3, "mapper_layers": 2},
    "mlp": {"mapper": "mlp", "prefix_length": 5, "normalize": True},
    "projected": {"prefix_length": 3, "clip_length": 2, "mapper_layers": 1, "pooling": "projected"},
}


def save_clipcap(folder: Path, language_model: Path, tower: Path, prompt: str = "", **shape: Any) -> Path:
    """Write a checkpoint whose prefix depends much on the image."""
    torch.manual_seed(7)
    language, vision = load_language_model(str(language_model)), load_vision_tower(str(tower))
    shape = {"pooling": "mean" if vision.kind == "onnx" else "cls", "mapper_heads": 4} | shape
    if shape["pooling"] == "projected":
        shape["projected_width"] = 20
    config = ClipCapConfig(hidden_size=language.model.config.n_embd, visual_width=vision.width, **shape)
    model = ClipCapModel(language.model, config)
    with torch.no_grad():
        for name, weight in model.adapters.state_dict().items():
            if weight.dim() > 1:
                weight.normal_(0, 1.5 * weight[0].numel() ** -0.5)
            else:
                weight.normal_(float("norm" in name and name.endswith("weight")), 0.2)
    model.save_adapters(folder / WEIGHTS_FILE)
    checkpoint = ClipCapCheckpoint(
        language_model=Source.of_language_model(language, str(language_model), folder),
        vision=VisionSource.of_tower(vision, str(tower), folder),
        image=vision.image,
        text=TextSettings(begin=None, prompt=prompt),
        training={"epochs": 3},
        **model.describe(),
    )
    save_config(checkpoint, folder)
    return folder
