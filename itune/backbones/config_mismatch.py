"""Find the field of a `config.json` that does not fit the weights beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import torch

_LAYERS = (
    ("h.", "n_layer"),
    ("encoder.layers.", "num_hidden_layers"),
    ("text_model.encoder.layers.", "num_hidden_layers"),
)
"""By the start of its tensors' names: the field that counts the layers."""
_MASKS = (".attn.bias", ".attn.masked_bias")
"""Causal masks that old releases of transformers saved with the weights."""
_FIELDS = (
    ("patch_embedding.weight", -1, "patch_size"),
    ("patch_embedding.weight", 1, "num_channels"),
    ("ln_1.weight", 0, "n_embd"),
    ("layer_norm1.weight", 0, "hidden_size"),
    ("wte.weight", 0, "vocab_size"),
    ("wpe.weight", 0, "n_positions"),
    ("token_embedding.weight", 0, "vocab_size"),
    ("text_model.embeddings.position_embedding.weight", 0, "max_position_embeddings"),
    ("position_embedding.weight", 0, "image_size"),
    ("fc1.weight", 0, "intermediate_size"),
    ("c_fc.weight", 1, "n_inner"),
    ("projection.weight", 0, "projection_dim"),
)
"""By the end of a tensor's name and its dimension: the field that decides the size."""


def config_mismatch(model: Any, config: Any, shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Describe the first mismatch between weights of these shapes and a transformers class built from `config`.

    transformers points to a report that its verbosity hides, and drops the layers that `config` does not count.
    """
    text = hasattr(config, "text_config")
    found = {_bare(name): list(shape) for name, shape in shapes.items()}
    found = {name: shape for name, shape in found.items() if text or not name.startswith("text_model.")}
    for start, field in _LAYERS:
        names = [name.removeprefix(start) for name in sorted(found) if name.startswith(start)]
        number, layers = getattr(_part(config, start), field, None), len({name.split(".")[0] for name in names})
        if names and number != layers:
            tensor = f"{start}{layers}.{names[0].split('.', 1)[-1]}"
            return f"{field} is {number}, but {layers} in the weights, which have no tensor {tensor}"
    with torch.device("meta"):
        expected = {_bare(name): list(tensor.shape) for name, tensor in model(config).state_dict().items()}
    for end, axis, field in _FIELDS:
        for name in sorted(name for name in found.keys() & expected.keys() if name.endswith(end)):
            part, size, wanted = _part(config, name), found[name], expected[name]
            if len(size) != len(wanted) or size[axis] != wanted[axis]:
                value = isqrt(max(size[0] - 1, 0)) * part.patch_size if field == "image_size" else size[axis]
                owner = config if field == "projection_dim" else part
                return (
                    f"{field} is {getattr(owner, field, None)}, but {value} in the weights: "
                    f"tensor {name} has shape {size}, expected {wanted}"
                )
    for name in sorted(found.keys() - expected.keys()):
        if name.startswith(tuple(start for start, _ in _LAYERS)) and not name.endswith(_MASKS):
            return f"tensor {name} belongs to another kind of model"
    for name in sorted(found.keys() & expected.keys()):
        if found[name] != expected[name]:
            return f"tensor {name} has shape {found[name]}, expected {expected[name]}"
    return None


def _part(config: Any, name: str) -> Any:
    """The part of a CLIP's configuration that describes a tensor; any other configuration has one part."""
    return getattr(config, "text_config" if name.startswith("text_model.") else "vision_config", config)


def _bare(name: str) -> str:
    """A tensor's name without the prefixes that only some files have."""
    return name.removeprefix("transformer.").removeprefix("vision_model.")
