"""Published state dicts: read them without running their code, and check that they fit the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...backbones import LanguageModel
from ...backbones.weight_files import Shapes, misfit, read_tensors
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
        state = {name: tensor for name, tensor in read_tensors(file).items() if tensor.ndim}
        for name, tensor in state.items():
            if tensor.layout is torch.strided and tensor.nbytes > tensor.untyped_storage().nbytes():
                raise ValueError(f"tensor {name} has shape {list(tensor.shape)}, but fewer values")
        return state


def fitted(file: Path, found: State, shapes: Shapes) -> dict[str, Tensor]:
    """`found` in float32, with exactly the names and shapes of `shapes`; both use the file's names.

    Raises:
        CheckpointError: a tensor is missing, unknown, misshapen, not floating-point or not finite.
    """
    if problem := misfit(found, shapes):
        mend = "name the models it was trained with: --language-model, --vision"
        raise CheckpointError(f"--import {file}: {problem}; {mend}")
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
