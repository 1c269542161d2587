"""I-Tuning's graphs: adapters merged into the feed-forward matrices beside them, and taken out again.

The adapter reads the feed-forward block's input X and adds to its output, so both of its products join the block's
own, and an adapted layer has exactly the matrix products of a plain GPT-2 layer:

    X [W_fc | s W_q] + [b_fc | s b_q]                       s = the scale on Q K^T
    [GELU(...) | S U] [W_proj ; lambda W_o] + b_proj + b_o

W_k and W_v see only the image: they belong to the vision graph. The language model's weights keep their own layout
(Hugging Face's Conv1D, [in, out]) and names; the adapters' are as in the checkpoint.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...methods.ituning.model import ITuningModel
from ...runtime.bundle import MANIFEST, DecoderSettings
from ...runtime.errors import BundleError
from ..graph.builder import Array, Weights
from ..graph.ops import activation, arrays, layer_norm, linear
from .visual_attention import VisualDecoder


def merge(language_model: Weights, adapters: Weights, *, score_scale: float, lambda_: float) -> dict[str, Array]:
    """The decoder's weights: the language model's, those of adapted layers merged, and `layers.{i}.output.bias`.

    b_o stays a tensor of its own: b_proj + b_o could not be separated again. `language_model` has the names of a
    GPT2LMHeadModel's state dict, `adapters` those of a checkpoint; neither is changed.
    """
    merged = dict(language_model)
    for i in sorted({int(name.split(".")[1]) for name in adapters}):
        mlp, layer = f"transformer.h.{i}.mlp", f"layers.{i}"
        for name, weight, axis in (
            (f"{mlp}.c_fc.weight", adapters[f"{layer}.query.weight"].T * score_scale, 1),
            (f"{mlp}.c_fc.bias", adapters[f"{layer}.query.bias"] * score_scale, 0),
            (f"{mlp}.c_proj.weight", adapters[f"{layer}.output.weight"].T * lambda_, 0),
        ):
            merged[name] = np.concatenate([merged[name], weight.astype(np.float32)], axis)
        merged[f"{layer}.output.bias"] = adapters[f"{layer}.output.bias"]
    return merged


def unmerge(settings: DecoderSettings, merged: Weights) -> tuple[dict[str, Array], dict[str, Array]]:
    """The inverse of `merge`: the language model's weights, and the adapters' without keys and values."""
    bottleneck, score_scale, lambda_ = settings.bottleneck, settings.score_scale, settings.lambda_
    if bottleneck is None or score_scale is None or lambda_ is None:
        raise BundleError(f"{MANIFEST}: decoder: bottleneck, score_scale or lambda is null; export the bundle again")
    language_model, adapters = dict(merged), {}
    for i in settings.adapter_layers:
        mlp, layer = f"transformer.h.{i}.mlp", f"layers.{i}"
        weight, bias, proj = (merged[f"{mlp}.{name}"] for name in ("c_fc.weight", "c_fc.bias", "c_proj.weight"))
        inner = len(bias) - bottleneck
        language_model[f"{mlp}.c_fc.weight"] = weight[:, :inner]
        language_model[f"{mlp}.c_fc.bias"] = bias[:inner]
        language_model[f"{mlp}.c_proj.weight"] = proj[:inner]
        adapters[f"{layer}.query.weight"] = weight[:, inner:].T / np.float32(score_scale)
        adapters[f"{layer}.query.bias"] = bias[inner:] / np.float32(score_scale)
        adapters[f"{layer}.output.weight"] = proj[inner:].T / np.float32(lambda_)
        adapters[f"{layer}.output.bias"] = language_model.pop(f"{layer}.output.bias")
    return language_model, adapters


def merged_input(layer: int) -> str:
    """The node of an adapted layer that joins GELU(...) and S U."""
    return f"h.{layer}/mlp/Concat"


class ITuningDecoder(VisualDecoder):
    """A GPT-2 with merged adapters."""

    def __init__(self, model: ITuningModel, vocabulary: Array | None, fused: bool) -> None:
        config = model.config
        assert config.score_scale is not None
        state, adapters = arrays(model.language_model_state()), arrays(model.adapter_state())
        weights = merge(state, adapters, score_scale=config.score_scale, lambda_=config.lambda_)
        super().__init__(model, weights, vocabulary, fused)

    def feed_forward(self, i: int, hidden: str) -> str:
        """The feed-forward block, and the adapter inside it where the layer has one."""
        if i not in self.visual_layers:
            return super().feed_forward(i, hidden)
        g, name = self.graph, f"transformer.h.{i}"
        with g.scope("mlp"):
            inner = linear(g, layer_norm(g, hidden, f"{name}.ln_2", self.epsilon), f"{name}.mlp.c_fc")
            sizes = g.constant([self.config.n_inner or 4 * self.width, self.visual_width])
            inner, query = g.ops("Split", inner, sizes, names=[None, None], axis=-1)
            inner = activation(g, inner, self.config.activation_function)
            with g.scope("adapter"):
                found = self.attend_image(i, query)
            joined = g.op("Concat", inner, found, axis=-1)
            bias = g.op("Add", f"{name}.mlp.c_proj.bias", f"layers.{i}.output.bias")
            return g.op("Add", g.op("MatMul", joined, f"{name}.mlp.c_proj.weight"), bias)


def settings(model: ITuningModel) -> dict[str, Any]:
    """The manifest's fields about attention to the image."""
    config = model.config
    return {
        "adapter_layers": model.adapter_layers,
        "bottleneck": config.bottleneck,
        "adapter_heads": config.heads,
        "lambda_": config.lambda_,
        "score_scale": config.score_scale,
    }
