"""Find, download and check the folders from which transformers loads a model."""

from __future__ import annotations

import glob
import logging
import posixpath
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from ..files import hash_files, read_json
from ..runtime.errors import ItuneError, reading
from ..runtime.onnx_files import external_files
from .config_mismatch import config_mismatch
from .weight_files import read_shapes

# Otherwise transformers reports every weight of a CLIP checkpoint's text tower as unused.
transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where transformers looks for weights, in this order."""
_UNUSED = ("post_layernorm.weight", "post_layernorm.bias", "logit_scale")
"""Endings of weights that a CLIP may lack: V comes before its last layer norm."""


class BackboneError(ItuneError):
    """A language model or vision tower cannot be loaded."""


def fetch(source: str, revision: str | None = None) -> Path:
    """The path of a backbone: an existing one, or the snapshot of a hub repository."""
    path = Path(source)
    if source and path.exists():
        return path
    if not source or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise BackboneError(f"{source!r} does not exist: give a folder with the model, or a hub id such as gpt2")
    from huggingface_hub import snapshot_download

    command = f"hf download {source} --local-dir FOLDER"
    mend = f"check the name; without a network, run `{command}` on another machine and give that folder"
    with reading(f"{source} (hub)", BackboneError, mend):
        files = ["*.json", "*.txt", "*.safetensors", "*.onnx"]
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=files, ignore_patterns="*/*"))
        graphs = list(folder.glob("*.onnx"))
        more = [glob.escape(posixpath.normpath(name)) for graph in graphs for name in external_files(graph)]
        if (folder / "config.json").is_file() and not any((folder / name).is_file() for name in _WEIGHTS[:2]):
            more.append("pytorch_model*.bin")
        if more:  # of the same commit, which is the folder's name
            snapshot_download(source, revision=folder.name, allow_patterns=more)
    return folder


def read_config(folder: Path, *model_types: str) -> dict[str, Any]:
    """A backbone's `config.json`, which must name one of the model types."""
    path = folder / "config.json"
    with reading(path, BackboneError, f"give the folder of a {model_types[0]} model"):
        config: dict[str, Any] = read_json(path, BackboneError)
        found = {name: config.get(name) for name in ("model_type", "add_cross_attention")}
    if found["model_type"] not in model_types or found["add_cross_attention"]:
        raise BackboneError(f"{path}: {found}; give the folder of a plain {model_types[0]} model")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The files from which transformers loads a folder's weights."""
    with reading(folder, BackboneError, "copy the model again"):
        named = read_json(folder / "config.json").get("transformers_weights")
        for name in [named] if named else _WEIGHTS:
            path = folder / name
            if path.is_file() and name.endswith(".index.json"):
                return sorted({folder / shard for shard in read_json(path)["weight_map"].values()})
            if path.is_file():
                return [path]
    raise BackboneError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin")


def hash_weights(folder: Path) -> str:
    """The SHA-256 of a folder's weights, which is a model's identity."""
    files = weight_files(folder)
    pattern = "*.safetensors" if files[0].suffix == ".safetensors" else "pytorch_model*.bin"
    with reading(folder, BackboneError, "copy the model again"):
        # Earlier versions hashed all files with such names.
        return hash_files(list({*files, *folder.glob(pattern)}))


def load_pretrained(model: Any, folder: Path, what: str) -> Any:
    """Load a transformers class in float32 and evaluation mode; `what` names the right kind of checkpoint in errors."""
    path, mend = folder / "config.json", f"give the folder of {what}"
    if (folder / "adapter_config.json").exists():  # transformers applies it if peft is installed
        raise BackboneError(
            f"{folder / 'adapter_config.json'}: merge the adapter into the model, then delete this file"
        )
    with reading(folder, BackboneError, mend):
        shapes = {name: shape for file in weight_files(folder) for name, shape in read_shapes(file).items()}
    with reading(path, BackboneError, mend):
        if problem := config_mismatch(model, model.config_class.from_pretrained(folder, local_files_only=True), shapes):
            raise BackboneError(f"{path}: {problem}; put back the config.json of these weights")
    with reading(folder, BackboneError, mend):
        loaded, info = model.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    # transformers fills missing weights with random numbers.
    if missing := sorted(name for name in info["missing_keys"] if not name.endswith(_UNUSED)):
        raise BackboneError(f"{folder}: the weight files lack {missing[0]}: {mend}")
    return loaded.train(False)
