"""ClipCap's graphs: the mapper in the vision graph, a plain GPT-2 that reads its prefix.

visual.prefix   float32 [images, prefix_length, d]    in place of the tokens whose ids follow the vocabulary's

The mapper's weights keep their checkpoint names behind `visual.`; matrices are transposed, and one product gives an
attention's queries, keys and values.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...methods.clipcap.model import ClipCapConfig, ClipCapModel
from ...runtime.graph_names import VISUAL
from ..graph.builder import Array, Graph, Weights
from ..graph.decoder import Decoder
from ..graph.embedding import CLIPCAP_PROJECTION
from ..graph.ops import (
    activation,
    add_residual,
    arrays,
    attention,
    join_heads,
    layer_norm,
    linear,
    normalize,
    pool_cls,
    split_heads,
)

PREFIX = f"{VISUAL}prefix"
_QKV = ".attn.qkv.weight"
_QUERIES, _KEYS_VALUES = ".attn.to_queries.weight", ".attn.to_keys_values.weight"
_NORM_EPSILON = 1e-5  # PyTorch's
SETTINGS: dict[str, Any] = {
    "adapter_layers": [], "bottleneck": None, "adapter_heads": None, "lambda_": None, "score_scale": None
}  # fmt: skip
"""The manifest's fields about attention to the image, which no layer has."""


def fold_mapper(state: Weights) -> dict[str, Array]:
    """The graph's weights, matrices as [in, out], from a ClipCap checkpoint's tensors."""
    weights = {}
    for name, array in state.items():
        if name.endswith(_QUERIES):
            keys_values = state[name.replace(_QUERIES, _KEYS_VALUES)]
            weights[name.replace(_QUERIES, _QKV)] = np.concatenate([array, keys_values]).T
        elif not name.endswith(_KEYS_VALUES):
            weights[name] = array.T if name.endswith(".weight") else array
    return {f"{VISUAL}{name}": array for name, array in weights.items()}


def unfold_mapper(weights: Weights) -> dict[str, Array]:
    """The inverse of `fold_mapper`; other weights of the graph are left out."""
    state: dict[str, Array] = {}
    for name, array in weights.items():
        own = name.removeprefix(VISUAL)
        if name.endswith(_QKV):
            queries, *keys_values = np.split(array.T, 3)
            state[own.replace(_QKV, _QUERIES)] = queries
            state[own.replace(_QKV, _KEYS_VALUES)] = np.concatenate(keys_values)
        elif own != name:
            state[own] = array.T if name.endswith(".weight") else array
    return state


def append_mapper(graph: Graph, embeddings: str, model: ClipCapModel, _tokens: int) -> None:
    """Append the output `visual.prefix` to `embeddings` [images, N, d_v]."""
    for name, array in fold_mapper(arrays(model.adapter_state())).items():
        graph.initializer(name, array)
    config = model.config
    with graph.scope("visual"):
        _append_mapper(graph, _pool(graph, embeddings, config), config)
    graph.output(PREFIX, np.float32, ("images", config.prefix_length, config.hidden_size))


def _pool(g: Graph, embeddings: str, config: ClipCapConfig) -> str:
    """The mapper's input [images, width]."""
    if config.pooling == "mean":
        x = g.op("ReduceMean", embeddings, g.constant([1]), keepdims=0)
    else:
        projection = None if config.projected_width is None else CLIPCAP_PROJECTION
        x = pool_cls(g, embeddings, projection, config.layer_norm_eps)
    return normalize(g, x) if config.normalize else x


def _append_mapper(g: Graph, x: str, config: ClipCapConfig) -> None:
    name = f"{VISUAL}mapper"
    if config.mapper == "mlp":
        hidden = linear(g, g.op("Tanh", linear(g, x, f"{name}.model.0")), f"{name}.model.2")
        g.op("Reshape", hidden, g.constant([0, config.prefix_length, config.hidden_size]), name=PREFIX)
        return
    x = linear(g, x, f"{name}.linear")
    x = g.op("Reshape", x, g.constant([0, config.clip_length, config.hidden_size]))
    images = g.op("Shape", x, start=0, end=1)
    shape = g.op("Concat", images, g.constant([config.prefix_length, config.hidden_size]), axis=0)
    x = g.op("Concat", x, g.op("Expand", f"{name}.prefix_const", shape), axis=1)
    for i in range(config.mapper_layers):
        with g.scope(f"layers.{i}"):
            x = _layer(g, f"{name}.transformer.layers.{i}", x, config)
    ends = (g.constant([value]) for value in (config.clip_length, config.clip_length + config.prefix_length, 1))
    g.op("Slice", x, *ends, name=PREFIX)


def _layer(g: Graph, name: str, x: str, config: ClipCapConfig) -> str:
    width, heads = config.hidden_size, config.mapper_heads
    with g.scope("attn"):
        qkv = g.op("MatMul", layer_norm(g, x, f"{name}.norm1", _NORM_EPSILON), f"{name}{_QKV}")
        query, keys, values = split_heads(g, qkv, heads, width)
        # The scale stays out of the weights, which a restored checkpoint must get back bit for bit.
        query = g.op("Mul", query, g.constant((width // heads) ** -0.5, np.float32))
        context = join_heads(g, attention(g, query, keys, values), width)
        x = add_residual(g, x, linear(g, context, f"{name}.attn.project"))
    with g.scope("mlp"):
        inner = linear(g, layer_norm(g, x, f"{name}.norm2", _NORM_EPSILON), f"{name}.mlp.fc1")
        return add_residual(g, x, linear(g, activation(g, inner, "relu"), f"{name}.mlp.fc2"))


class ClipCapDecoder(Decoder):
    """A plain GPT-2 that reads the image's prefix in place of the prefix ids."""

    def __init__(self, model: ClipCapModel, vocabulary: Array | None, fused: bool) -> None:
        super().__init__(model, arrays(model.language_model_state()), vocabulary, fused)
        self.prefix_length = model.config.prefix_length

    def declare_visual(self, tokens: str) -> None:  # noqa: ARG002 - the prefix has no shape to share
        """Declare the prefix."""
        self.graph.input(PREFIX, np.float32, ["images", self.prefix_length, self.width])

    def embed(self, tokens: str) -> str:
        """The tokens' embeddings, the image's in place of prefix ids.

        An image's rows are side by side, so its prefix is not repeated for them: ids become rows of all prefixes.
        """
        g = self.graph
        vocab_size = g.constant(self.config.vocab_size)
        is_prefix = g.op("GreaterOrEqual", tokens, vocab_size)
        readable = 0 if self.vocabulary is None else int(self.vocabulary[0])
        text = super().embed(g.op("Where", is_prefix, g.constant(readable), tokens))
        place = g.op("Max", g.op("Sub", tokens, vocab_size), g.constant(0))
        images = g.op("Shape", PREFIX, start=0, end=1)
        first = g.op("Range", g.constant(0), g.op("Squeeze", images, g.constant([0])), g.constant(1))
        first = g.op("Unsqueeze", g.op("Mul", first, g.constant(self.prefix_length)), g.constant([1]))
        by_image = g.op("Reshape", place, g.op("Concat", images, g.constant([-1]), axis=0))
        rows = g.op("Reshape", g.op("Add", by_image, first), g.op("Shape", tokens))
        prefixes = g.op("Reshape", PREFIX, g.constant([-1, self.width]))
        image = g.op("Gather", prefixes, rows)
        return g.op("Where", g.op("Unsqueeze", is_prefix, g.constant([-1])), image, text)
