"""Tiny random ClipCap checkpoints, and the paper's mapper to compare with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from itune.backbones import load_language_model, load_vision_tower
from itune.checkpoint import WEIGHTS_FILE, ModelSource, VisionSource, save_config
from itune.methods.clipcap.model import ClipCapConfig, ClipCapModel
from itune.methods.clipcap.settings import ClipCapCheckpoint
from itune.runtime.settings import TextSettings
from tests.conftest import make_clip

SHAPES: dict[str, dict[str, Any]] = {
    "transformer": {"mapper": "transformer", "prefix_length": 4, "clip_length": 3, "mapper_layers": 2},
    "mlp": {"mapper": "mlp", "prefix_length": 5, "normalize": True},
    "projected": {"prefix_length": 3, "clip_length": 2, "mapper_layers": 1, "pooling": "projected"},
}


def save_clipcap(folder: Path, language_model: Path, tower: Path, prompt: str = "", **shape: Any) -> Path:
    """Write a checkpoint whose prefix depends strongly on the image."""
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
        language_model=ModelSource.of_language_model(language, str(language_model), folder),
        vision=VisionSource.of_tower(vision, str(tower), folder),
        image=vision.image,
        text=TextSettings(begin=None, prompt=prompt),
        training={"epochs": 3},
        **model.describe(),
    )
    save_config(checkpoint, folder)
    return folder


def make_projecting_clip(folder: Path) -> Path:
    """A CLIP with its projection, of width 20."""
    make_clip(folder)
    config = CLIPVisionConfig.from_pretrained(folder)
    config.projection_dim, config.layer_norm_eps = 20, 1e-3
    torch.manual_seed(3)
    model = CLIPVisionModelWithProjection(config)
    with torch.no_grad():
        norm = model.vision_model.post_layernorm
        norm.weight.normal_(1, 0.2), norm.bias.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder


def papers_transformer(w: dict[str, Tensor], x: Tensor, heads: int, clip_length: int) -> Tensor:
    """The mapper, position by position and head by head, from the paper's description and its code's conventions."""
    d = w["prefix_const"].shape[1]
    positions = [*(x @ w["linear.weight"].T + w["linear.bias"]).split(d), *w["prefix_const"]]
    h = torch.stack(positions)

    def norm(name: str, t: Tensor) -> Tensor:
        centred = t - t.mean(-1, keepdim=True)
        return w[f"{name}.weight"] * centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() + w[f"{name}.bias"]

    for i in range(1 + max(int(n.split(".")[2]) for n in w if n.startswith("transformer."))):
        name, n = f"transformer.layers.{i}", len(h)
        a = norm(f"{name}.norm1", h)
        q = (a @ w[f"{name}.attn.to_queries.weight"].T).reshape(n, heads, -1)
        both = (a @ w[f"{name}.attn.to_keys_values.weight"].T).reshape(n, 2, heads, -1)
        scores = torch.einsum("qhc,khc->qkh", q, both[:, 0]) / math.sqrt(d // heads)
        mixed = torch.einsum("qkh,khc->qhc", scores.softmax(1), both[:, 1]).reshape(n, d)
        h = h + mixed @ w[f"{name}.attn.project.weight"].T + w[f"{name}.attn.project.bias"]
        a = norm(f"{name}.norm2", h) @ w[f"{name}.mlp.fc1.weight"].T + w[f"{name}.mlp.fc1.bias"]
        h = h + a.clamp(min=0) @ w[f"{name}.mlp.fc2.weight"].T + w[f"{name}.mlp.fc2.bias"]
    return h[clip_length:]
