"""Where a backbone's files come from: a folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

from ..runtime.errors import ItuneError, reading


class BackboneError(ItuneError):
    """A language model or vision tower cannot be loaded."""


def fetch(source: str, revision: str | None = None) -> Path:
    """The path of a backbone: an existing one, or the snapshot of a hub repository."""
    path = Path(source)
    if path.exists():
        return path
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise BackboneError(f"{source} does not exist: give a folder with the model, or a hub id such as gpt2")
    from huggingface_hub import snapshot_download

    files = ["*.json", "*.txt", "*.safetensors", "*.onnx", "*.onnx.data"]
    with reading(f"{source} (hub)", BackboneError, "check the name, or download it elsewhere and give its folder"):
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=files, ignore_patterns="*/*"))
        if not list(folder.glob("*.safetensors")) and not list(folder.glob("*.onnx")):
            snapshot_download(source, revision=revision, allow_patterns="pytorch_model*.bin")
    return folder


def vision_kind(source: str, revision: str | None = None) -> Literal["clip", "onnx"]:
    """The kind of vision tower that `load_vision_tower` finds at a source."""
    return "clip" if (fetch(source, revision) / "config.json").is_file() else "onnx"


def read_config(folder: Path, *model_types: str) -> dict[str, Any]:
    """A backbone's `config.json`, which must name one of the model types."""
    path = folder / "config.json"
    with reading(path, BackboneError, f"give the folder of a {model_types[0]} model"):
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = {name: config.get(name) for name in ("model_type", "add_cross_attention")}
    if found["model_type"] not in model_types or found["add_cross_attention"]:
        raise BackboneError(f"{path}: {found}; give the folder of a plain {model_types[0]} model")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The files with a backbone's weights."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not weights:
        raise BackboneError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin")
    return weights


def load_pretrained(model: Any, folder: Path, what: str) -> tuple[Any, list[str]]:
    """A class's `from_pretrained` in float32 and evaluation mode, and the weights that the folder lacks.

    `from_pretrained` fills missing weights with random numbers: see `require_weights`.
    """
    with reading(folder, BackboneError, f"give the folder of {what}"):
        loaded, info = model.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    return loaded.train(False), sorted(info["missing_keys"])


def require_weights(folder: Path, missing: list[str]) -> None:
    """Refuse a folder that lacks weights."""
    if missing:
        raise BackboneError(f"{folder}: the weight files lack {missing[0]}: copy the model again")
