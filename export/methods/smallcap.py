"""SmallCap's share of the graphs: keys and values in the vision graph, cross-attention in every block of the decoder.

visual.{i}.keys     float32 [images, heads, w, N]    of every block i, as Q K^T takes them
visual.{i}.values   float32 [images, heads, N, w]

The decoder's weights keep their checkpoint names, transposed for products; 1/sqrt(w) is in the queries'.
"""

from __future__ import annotations

import math

import numpy as np

from ...methods.smallcap.model import SmallCapModel
from ..graph.builder import Array, Graph
from ..graph.decoder import Decoder, arrays, language_model_weights
from .ituning import append_projections
from .merge import Weights, check_finite

_IN_VISION = ("key", "value")


def fold_cross_attention(state: Weights, score_scale: float) -> dict[str, Array]:
    """The decoder's weights, products in [in, out] layout, of a SmallCap checkpoint's tensors."""
    check_finite(state)
    weights = {}
    for name, array in state.items():
        part, parameter = name.split(".")[2:]
        if part in _IN_VISION:
            continue
        scaled = array * np.float32(score_scale) if part == "query" else array
        weights[name] = scaled.T if _is_product(part, parameter) else scaled
    return weights


def unfold_cross_attention(weights: Weights, score_scale: float) -> tuple[dict[str, Array], dict[str, Array]]:
    """The inverse of `fold_cross_attention` in a decoder's weights: the language model's, and the adapters'."""
    language_model, adapters = {}, {}
    for name, array in weights.items():
        if not name.startswith("layers."):
            language_model[name] = array
            continue
        part, parameter = name.split(".")[2:]
        scaled = array / np.float32(score_scale) if part == "query" else array
        adapters[name] = scaled.T if _is_product(part, parameter) else scaled
    return language_model, adapters


def _is_product(part: str, parameter: str) -> bool:
    return part != "norm" and parameter == "weight"


def append_cross_keys_values(graph: Graph, embeddings: str, model: SmallCapModel, tokens: int) -> None:
    """Append K and U of all blocks to a vision graph with `embeddings` [images, tokens, d_v]."""
    linears = {i: (layer.key, layer.value) for i, layer in enumerate(model.layers)}
    append_projections(graph, embeddings, linears, model.config.heads, tokens)


class SmallCapDecoder(Decoder):
    """A GPT-2 whose blocks attend to the image between self-attention and feed-forward."""

    def __init__(self, model: SmallCapModel, vocabulary: Array | None, fused: bool) -> None:
        self.cross_heads, self.head_width = model.config.heads, model.config.head_width
        cross = fold_cross_attention(arrays(model.adapter_state()), 1 / math.sqrt(self.head_width))
        super().__init__(model, language_model_weights(model) | cross, vocabulary, fused)

    def declare_visual(self) -> None:
        """See `Decoder.declare_visual`."""
        heads, width = self.cross_heads, self.head_width
        for i in range(self.layers):
            self.graph.input(f"visual.{i}.keys", np.float32, ["images", heads, width, "N"])
            self.graph.input(f"visual.{i}.values", np.float32, ["images", heads, "N", width])

    def declare_shapes(self, tokens: str) -> None:
        """Q grouped by image, and what was retrieved, grouped by row again."""
        g = self.graph
        images = g.op("Shape", "visual.0.keys", start=0, end=1)
        self.by_image = g.op("Concat", images, g.constant([-1, self.cross_heads, self.head_width]), axis=0)
        width = g.constant([self.cross_heads * self.head_width])
        self.by_row = g.op("Concat", g.op("Shape", tokens), width, axis=0)

    def attend_visual(self, i: int, hidden: str) -> str:
        """Cross-attention: an image's rows are its queries side by side, so K and U are never repeated."""
        g, name = self.graph, f"layers.{i}"
        with g.scope("cross_attn"):
            query = self.linear(f"{name}.query", self.layer_norm(f"{name}.norm", hidden))
            query = g.op("Transpose", g.op("Reshape", query, self.by_image), perm=[0, 2, 1, 3])
            weights = g.op("Softmax", g.op("MatMul", query, f"visual.{i}.keys"), axis=-1)
            retrieved = g.op("MatMul", weights, f"visual.{i}.values")
            retrieved = g.op("Reshape", g.op("Transpose", retrieved, perm=[0, 2, 1, 3]), self.by_row)
            return g.op("Add", hidden, self.linear(f"{name}.output", retrieved))
