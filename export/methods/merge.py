"""Fold I-Tuning adapters into the feed-forward matrices beside them, and take them out again.

The adapter reads the feed-forward block's input X and adds to its output, so both of its products join the block's
own, and an adapted layer has exactly the matrix products of a plain GPT-2 layer:

    X [W_fc | s W_q] + [b_fc | s b_q]                       s = the scale on Q K^T
    [GELU(...) | S U] [W_proj ; lambda W_o] + b_proj + b_o

W_k and W_v see only the image: they belong to the vision graph. Weights here are in the language model's own
layout (Hugging Face's Conv1D, [in, out]) and under its own names; the adapters' are in the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.errors import ItuneError

Array = NDArray[Any]
Weights = Mapping[str, Array]


def merge(language_model: Weights, adapters: Weights, *, score_scale: float, lambda_: float) -> dict[str, Array]:
    """The decoder's weights: the language model's, those of adapted layers merged, and `layers.{i}.output.bias`.

    b_o stays a tensor of its own, since b_proj + b_o could not be told apart again. `language_model` is indexed
    like a GPT2LMHeadModel's state dict, `adapters` like a checkpoint's; neither is changed.

    Raises:
        ItuneError: a weight is not a finite number, or a scale of zero would lose the adapters.
    """
    if not score_scale or not lambda_:
        raise ItuneError(
            f"score_scale {score_scale} and lambda {lambda_} must not be zero: the adapters would do nothing"
        )
    check_finite(language_model)
    check_finite(adapters)
    merged = dict(language_model)
    for i in adapter_layers(adapters):
        mlp, layer = f"transformer.h.{i}.mlp", f"layers.{i}"
        query, query_bias = (adapters[f"{layer}.query.{part}"] * score_scale for part in ("weight", "bias"))
        output = adapters[f"{layer}.output.weight"] * lambda_
        for name, parts in {
            f"{mlp}.c_fc.weight": (query.T, 1),
            f"{mlp}.c_fc.bias": (query_bias, 0),
            f"{mlp}.c_proj.weight": (output.T, 0),
        }.items():
            joined, axis = parts
            merged[name] = np.concatenate([merged[name], joined.astype(np.float32)], axis)
        merged[f"{layer}.output.bias"] = adapters[f"{layer}.output.bias"]
    return merged


def unmerge(
    merged: Weights, *, bottleneck: int, score_scale: float, lambda_: float
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The inverse of `merge`: the language model's weights, and the adapters' but for those of keys and values."""
    language_model = dict(merged)
    adapters: dict[str, Array] = {}
    for i in adapter_layers(merged):
        mlp, layer = f"transformer.h.{i}.mlp", f"layers.{i}"
        inner = len(merged[f"{mlp}.c_fc.bias"]) - bottleneck
        weight, bias, proj = (merged[f"{mlp}.{n}"] for n in ("c_fc.weight", "c_fc.bias", "c_proj.weight"))
        language_model[f"{mlp}.c_fc.weight"] = weight[:, :inner]
        language_model[f"{mlp}.c_fc.bias"] = bias[:inner]
        language_model[f"{mlp}.c_proj.weight"] = proj[:inner]
        adapters[f"{layer}.query.weight"] = weight[:, inner:].T / np.float32(score_scale)
        adapters[f"{layer}.query.bias"] = bias[inner:] / np.float32(score_scale)
        adapters[f"{layer}.output.weight"] = proj[inner:].T / np.float32(lambda_)
        adapters[f"{layer}.output.bias"] = language_model.pop(f"{layer}.output.bias")
    return language_model, adapters


def adapter_layers(weights: Weights) -> list[int]:
    """The decoder layers that carry an adapter, ascending."""
    return sorted(int(name.split(".")[1]) for name in weights if _is_output_bias(name))


def _is_output_bias(name: str) -> bool:
    return name.startswith("layers.") and name.endswith(".output.bias")


def check_finite(weights: Weights) -> None:
    """Raise ItuneError, naming the weight, unless all are finite."""
    for name, weight in weights.items():
        if not np.isfinite(weight).all():
            raise ItuneError(f"weight {name} holds numbers that are not finite: the checkpoint is damaged")
