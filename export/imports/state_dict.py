"""Published state dicts: read them without running their code, and check that they fit the model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...backbones import LanguageModel
from ...checkpoint import CheckpointError
from ...methods.base import CaptionModel
from ...runtime.errors import reading
from ...runtime.settings import RetrievalSettings, SearchDefaults, TextSettings

_BUFFERS = (".attn.bias", ".attn.masked_bias")
"""Causal masks that old releases of transformers saved with the weights."""
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Imported:
    """A model of ours and the weights to save for it."""

    model: CaptionModel
    tensors: State
    """The adapters' weights under our checkpoint names."""
    text: TextSettings
    fine_tuned: bool
    """The file's language model is not the one that `ImportOptions` names."""
    retrieval: RetrievalSettings | None = None
    search: SearchDefaults = field(default_factory=SearchDefaults)


def read_state(file: Path) -> State:
    """The tensors of a .pt, .bin or .safetensors file, without scalars, which are buffers of old releases."""
    with reading(file, CheckpointError, mend="give --import the model's state_dict() alone; code is never loaded"):
        if file.suffix == ".safetensors":
            content = load_file(file)
        else:
            with warnings.catch_warnings(action="ignore"):  # about pickles that torch did not write
                content = torch.load(file, map_location="cpu", weights_only=True)
        return {
            name: tensor
            for name, tensor in content.items()
            if isinstance(name, str) and isinstance(tensor, Tensor) and tensor.ndim
        }


def fitted(file: Path, found: State, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """`found` in float32, with exactly the names and shapes of `shapes`; both use the file's names.

    Raises:
        CheckpointError: a tensor is missing, unknown, misshapen, not floating-point or not finite.
    """
    for name in (*sorted(found.keys() ^ shapes.keys()), *sorted(found)):
        tensor = found.get(name)
        if tensor is None:
            problem = "is missing"
        elif name not in shapes:
            problem = "is unknown"
        elif list(tensor.shape) != list(shapes[name]):
            problem = f"has shape {list(tensor.shape)}, expected {list(shapes[name])}"
        elif tensor.layout is not torch.strided or not tensor.is_floating_point():
            problem = f"has type {tensor.dtype}, {tensor.layout}"
        elif not tensor.isfinite().all():
            problem = "has values that are not finite"
        else:
            continue
        raise CheckpointError(
            f"--import {file}: tensor {name} {problem}; name the models it was trained with: --language-model, --vision"
        )
    return {name: tensor.float() for name, tensor in found.items()}


def load_gpt2(file: Path, state: State, language: LanguageModel, prefix: str) -> bool:
    """Load the GPT-2 whose tensors' names begin with `prefix`, if any; returns whether that changed `language`."""
    found = {name: t for name, t in state.items() if name.startswith(prefix) and not name.endswith(_BUFFERS)}
    if not found:
        return False
    embedding = found.get(f"{prefix}transformer.wte.weight")
    if embedding is not None:
        found.setdefault(f"{prefix}lm_head.weight", embedding)  # safetensors stores tied weights once
    own = language.model.state_dict()
    weights = fitted(file, found, {f"{prefix}{name}": tensor.shape for name, tensor in own.items()})
    changed = any(not torch.equal(weights[f"{prefix}{name}"], tensor) for name, tensor in own.items())
    language.model.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in weights.items()})
    return changed
