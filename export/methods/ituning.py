"""I-Tuning's share of the graphs: keys and values in the vision graph, merged adapters in the decoder.

visual.{i}.keys     float32 [images, heads, r / heads, N]    of every adapted layer i, as Q K^T takes them
visual.{i}.values   float32 [images, heads, N, r / heads]
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import nn

from ...methods.ituning.model import ITuningModel
from ..graph.builder import Array, Graph
from ..graph.decoder import Decoder, arrays, language_model_weights
from ..graph.ops import append_activation
from .merge import merge


def projection_weights(model: ITuningModel) -> tuple[Array, Array]:
    """Equation 2 of all layers as one product: weight [d_v, layers * 2 r] and bias [layers * 2 r].

    The columns are layer after layer, the keys' before the values'.
    """
    return _join(_linears(model))


def split_projections(weight: Array, bias: Array, layers: list[int]) -> dict[str, Array]:
    """The inverse of `projection_weights`: tensors under their checkpoint names, in Linear layout."""
    names = [f"layers.{i}.{part}" for i in layers for part in ("key", "value")]
    weights = np.split(weight, len(names), axis=1)
    biases = np.split(bias, len(names))
    tensors = {f"{name}.weight": np.ascontiguousarray(w.T) for name, w in zip(names, weights, strict=True)}
    return tensors | {f"{name}.bias": b for name, b in zip(names, biases, strict=True)}


def append_keys_values(graph: Graph, embeddings: str, model: ITuningModel, tokens: int) -> None:
    """Append equation 2 of all layers to a vision graph with `embeddings` [images, tokens, d_v]."""
    append_projections(graph, embeddings, _linears(model), model.config.heads, tokens)


def append_projections(
    graph: Graph, embeddings: str, linears: Mapping[int, tuple[nn.Linear, nn.Linear]], heads: int, tokens: int
) -> None:
    """Append `visual.{i}.keys` and `.values` for each layer's two projections, all in one product."""
    weight, bias = _join(linears)
    width = len(bias) // (2 * len(linears) * heads)
    with graph.scope("visual"):
        product = graph.op("MatMul", embeddings, graph.initializer("visual.weight", weight))
        product = graph.op("Add", product, graph.initializer("visual.bias", bias))
        count = 2 * len(linears)
        parts = graph.ops("Split", product, names=[None] * count, axis=-1, num_outputs=count)
        split = graph.constant([0, 0, heads, width])
        for layer, keys, values in zip(linears, parts[::2], parts[1::2], strict=True):
            for part, value, perm, last in (
                ("keys", keys, (0, 2, 3, 1), (width, tokens)),
                ("values", values, (0, 2, 1, 3), (tokens, width)),
            ):
                value = graph.op("Reshape", value, split)
                name = graph.op("Transpose", value, perm=perm, name=f"visual.{layer}.{part}")
                graph.output(name, np.float32, ("images", heads, *last))


def _linears(model: ITuningModel) -> dict[int, tuple[nn.Linear, nn.Linear]]:
    return {i: (model.adapter(i).key, model.adapter(i).value) for i in model.adapter_layers}


def _join(linears: Mapping[int, tuple[nn.Linear, nn.Linear]]) -> tuple[Array, Array]:
    flat = [linear for pair in linears.values() for linear in pair]
    weight = np.concatenate([linear.weight.detach().numpy() for linear in flat]).T
    return weight, np.concatenate([linear.bias.detach().numpy() for linear in flat])


class ITuningDecoder(Decoder):
    """A GPT-2 whose feed-forward products are joined by the adapters' (see `merge`)."""

    def __init__(self, model: ITuningModel, vocabulary: Array | None, fused: bool) -> None:
        adapter = model.config
        assert adapter.score_scale is not None
        weights = merge(
            language_model_weights(model),
            arrays(model.adapter_state()),
            score_scale=adapter.score_scale,
            lambda_=adapter.lambda_,
        )
        super().__init__(model, weights, vocabulary, fused)
        self.adapter_layers = model.adapter_layers
        self.adapter_heads, self.bottleneck = adapter.heads, adapter.bottleneck

    def declare_visual(self) -> None:
        """See `Decoder.declare_visual`."""
        width = self.bottleneck // self.adapter_heads
        for i in self.adapter_layers:
            self.graph.input(f"visual.{i}.keys", np.float32, ["images", self.adapter_heads, width, "N"])
            self.graph.input(f"visual.{i}.values", np.float32, ["images", self.adapter_heads, "N", width])

    def declare_shapes(self, tokens: str) -> None:
        """Q grouped by image, and what was retrieved, grouped by row again."""
        g = self.graph
        images = g.op("Shape", f"visual.{self.adapter_layers[0]}.keys", start=0, end=1)
        heads, width = self.adapter_heads, self.bottleneck // self.adapter_heads
        grouped = [1, -1, width] if heads == 1 else [-1, heads, width]
        self.by_image = g.op("Concat", images, g.constant(grouped), axis=0)
        self.by_row = g.op("Concat", g.op("Shape", tokens), g.constant([self.bottleneck]), axis=0)

    def feed_forward(self, i: int, hidden: str) -> str:
        """The feed-forward block, and the adapter inside it where the layer has one."""
        if i not in self.adapter_layers:
            return super().feed_forward(i, hidden)
        g, name = self.graph, f"transformer.h.{i}.mlp"
        with g.scope("mlp"):
            normed = self.layer_norm(f"transformer.h.{i}.ln_2", hidden)
            inner = self.linear(f"{name}.c_fc", normed)
            sizes = g.constant([self.inner, self.bottleneck])
            inner, query = g.ops("Split", inner, sizes, names=[None, None], axis=-1)
            joined = g.op("Concat", append_activation(g, inner, self.activation), self.retrieve(i, query), axis=-1)
            bias = g.op(
                "Add",
                self.weight(f"{name}.c_proj.bias"),
                self.weight(f"layers.{i}.output.bias"),
            )
            return g.op("Add", g.op("MatMul", joined, self.weight(f"{name}.c_proj.weight")), bias)

    def retrieve(self, i: int, query: str) -> str:
        """S U [rows, T, r]: an image's rows are its queries side by side, so K and U are never repeated."""
        g, several = self.graph, self.adapter_heads > 1
        with g.scope("adapter"):
            query = g.op("Reshape", query, self.by_image)
            if several:
                query = g.op("Transpose", query, perm=[0, 2, 1, 3])
            weights = g.op("Softmax", g.op("MatMul", query, f"visual.{i}.keys"), axis=-1)
            retrieved = g.op("MatMul", weights, f"visual.{i}.values")
            if several:
                retrieved = g.op("Transpose", retrieved, perm=[0, 2, 1, 3])
            return g.op("Reshape", retrieved, self.by_row)
