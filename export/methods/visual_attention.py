"""What I-Tuning and SmallCap share: keys and values from the vision graph, queries in the decoder.

visual.{i}.keys     float32 [images, heads, w, N]    of every adapted layer i, transposed for Q K^T
visual.{i}.values   float32 [images, heads, N, w]
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import nn

from ...runtime import graph_names
from ...runtime.bundle import DecoderSettings
from ..graph.builder import Array, Graph
from ..graph.decoder import Decoder
from ..graph.ops import arrays, attention
from .base import Weights

WEIGHT, BIAS = "visual.weight", "visual.bias"
Projections = Mapping[int, tuple[nn.Linear, nn.Linear]]
"""The linear layers of keys and values by decoder layer."""


def join_projections(projections: Projections) -> tuple[Array, Array]:
    """All layers' projections as one: weight [d_v, layers * 2 * width] and bias, keys before values in each layer."""
    linears = [linear for pair in projections.values() for linear in pair]
    parts = [arrays(linear.state_dict()) for linear in linears]
    return np.concatenate([part["weight"] for part in parts]).T, np.concatenate([part["bias"] for part in parts])


def split_projections(settings: DecoderSettings, weights: Weights) -> dict[str, Array]:
    """The inverse of `join_projections`: tensors under their checkpoint names, in Linear layout."""
    names = [f"layers.{i}.{part}" for i in settings.adapter_layers for part in ("key", "value")]
    split = np.split(weights[WEIGHT], len(names), axis=1)
    tensors = {f"{name}.weight": np.ascontiguousarray(w.T) for name, w in zip(names, split, strict=True)}
    biases = np.split(weights[BIAS], len(names))
    return tensors | {f"{name}.bias": bias for name, bias in zip(names, biases, strict=True)}


def append_projections(graph: Graph, embeddings: str, projections: Projections, heads: int, tokens: int) -> None:
    """Append the keys and values of all layers, from one matrix product with `embeddings` [images, tokens, d_v]."""
    weight, bias = join_projections(projections)
    count = 2 * len(projections)
    width = len(bias) // (count * heads)
    with graph.scope("visual"):
        product = graph.op("MatMul", embeddings, graph.initializer(WEIGHT, weight))
        product = graph.op("Add", product, graph.initializer(BIAS, bias))
        parts = graph.ops("Split", product, names=[None] * count, axis=-1, num_outputs=count)
        split = graph.constant([0, 0, heads, width])
        for layer, keys, values in zip(projections, parts[::2], parts[1::2], strict=True):
            for name, value, perm, shape in (
                (graph_names.keys(layer), keys, (0, 2, 3, 1), (width, tokens)),
                (graph_names.values(layer), values, (0, 2, 1, 3), (tokens, width)),
            ):
                graph.op("Transpose", graph.op("Reshape", value, split), perm=perm, name=name)
                graph.output(name, np.float32, ("images", heads, *shape))


class VisualDecoder(Decoder):
    """A GPT-2 some of whose layers attend to the image."""

    def attend_in(self, layers: list[int], heads: int, width: int) -> None:
        """Set the layers that attend, and the shape of that attention; `width` is that of all heads together."""
        self.visual_layers, self.visual_heads, self.visual_width = layers, heads, width

    def declare_visual(self, tokens: str) -> None:
        """Declare all keys and values, and the shapes of queries grouped by image and of results grouped by row."""
        g, heads, width = self.graph, self.visual_heads, self.visual_width // self.visual_heads
        for i in self.visual_layers:
            g.input(graph_names.keys(i), np.float32, ["images", heads, width, "N"])
            g.input(graph_names.values(i), np.float32, ["images", heads, "N", width])
        images = g.op("Shape", graph_names.keys(self.visual_layers[0]), start=0, end=1)
        # A single head needs no transposition.
        by_image = g.constant([1, -1, width] if heads == 1 else [-1, heads, width])
        self.by_image = g.op("Concat", images, by_image, axis=0)
        self.by_row = g.op("Concat", g.op("Shape", tokens), g.constant([self.visual_width]), axis=0)

    def attend_image(self, i: int, query: str) -> str:
        """softmax(Q K^T) U [rows, T, width]: an image's rows are its queries side by side, so K and U never repeat."""
        g, several = self.graph, self.visual_heads > 1
        query = g.op("Reshape", query, self.by_image)
        if several:
            query = g.op("Transpose", query, perm=[0, 2, 1, 3])
        found = attention(g, query, graph_names.keys(i), graph_names.values(i))
        if several:
            found = g.op("Transpose", found, perm=[0, 2, 1, 3])
        return g.op("Reshape", found, self.by_row)
