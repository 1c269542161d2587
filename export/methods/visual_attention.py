"""What I-Tuning and SmallCap share: keys and values from the vision graph, queries in the decoder.

visual.{i}.keys     float32 [images, heads, w, N]    of every adapted layer i, transposed for Q K^T
visual.{i}.values   float32 [images, heads, N, w]
"""

from __future__ import annotations

import numpy as np

from ...methods.attention import AttendingModel
from ...runtime import graph_names
from ...runtime.bundle import DecoderSettings
from ..graph.builder import Array, Graph, Weights
from ..graph.decoder import Decoder
from ..graph.ops import attention

WEIGHT, BIAS = "visual.weight", "visual.bias"
"""The projections of all layers as one, [d_v, layers * 2 * width]: keys before values in each layer."""


def append_projections(graph: Graph, embeddings: str, model: AttendingModel, tokens: int) -> None:
    """Append the keys and values of all layers, from one matrix product with `embeddings` [images, tokens, d_v]."""
    adapters = model.attending.values()
    linears = [linear for adapter in adapters for linear in (adapter.key, adapter.value)]
    graph.initializer(WEIGHT, np.concatenate([linear.weight.detach().numpy() for linear in linears]).T)
    graph.initializer(BIAS, np.concatenate([linear.bias.detach().numpy() for linear in linears]))
    heads = next(iter(adapters)).heads
    width = linears[0].out_features // heads
    with graph.scope("visual"):
        product = graph.op("Add", graph.op("MatMul", embeddings, WEIGHT), BIAS)
        parts = graph.ops("Split", product, names=[None] * len(linears), axis=-1, num_outputs=len(linears))
        split = graph.constant([0, 0, heads, width])
        for layer, keys, values in zip(model.attending, parts[::2], parts[1::2], strict=True):
            for name, value, perm, shape in (
                (graph_names.keys(layer), keys, (0, 2, 3, 1), (width, tokens)),
                (graph_names.values(layer), values, (0, 2, 1, 3), (tokens, width)),
            ):
                graph.op("Transpose", graph.op("Reshape", value, split), perm=perm, name=name)
                graph.output(name, np.float32, ("images", heads, *shape))


def split_projections(settings: DecoderSettings, weights: Weights) -> dict[str, Array]:
    """The adapters' keys and values in a vision graph, under their checkpoint names and in Linear layout."""
    names = [f"layers.{i}.{part}" for i in settings.adapter_layers for part in ("key", "value")]
    tensors = {}
    for stored, kind in ((WEIGHT, "weight"), (BIAS, "bias")):
        for name, array in zip(names, np.split(weights[stored], len(names), axis=-1), strict=True):
            tensors[f"{name}.{kind}"] = array.T
    return tensors


class VisualDecoder(Decoder):
    """A GPT-2 some of whose layers attend to the image."""

    def __init__(self, model: AttendingModel, weights: dict[str, Array], vocabulary: Array | None, fused: bool) -> None:
        super().__init__(model, weights, vocabulary, fused)
        adapter = next(iter(model.attending.values()))
        self.visual_layers, self.visual_heads = model.adapter_layers, adapter.heads
        self.visual_width = adapter.query.out_features  # all heads together

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
