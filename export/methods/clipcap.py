"""ClipCap's share of the graphs: the mapper in the vision graph, a plain GPT-2 that reads its prefix.

visual.prefix   float32 [images, prefix_length, d]    in place of the tokens whose ids follow the vocabulary's

The mapper's weights keep their checkpoint names behind `visual.`, transposed for products; an attention's
queries, keys and values come from one product.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...methods.clipcap.model import ClipCapModel
from ..graph.builder import Array, Graph
from ..graph.decoder import Decoder, arrays, language_model_weights
from ..graph.ops import append_activation

PREFIX = "visual."
_INPUT = "visual.prefix"
_QKV = ".attn.qkv.weight"
_ATTENTION = (".attn.to_queries.weight", ".attn.to_keys_values.weight")
_NORM_EPSILON = 1e-5  # PyTorch's
_SMALLEST = 1e-12  # what `normalize` divides by at least, as in PyTorch


def fold_mapper(state: Mapping[str, Array]) -> dict[str, Array]:
    """The graph's weights, products in [in, out] layout, of a ClipCap checkpoint's tensors."""
    weights = {}
    for name, array in state.items():
        if name.endswith(_ATTENTION[0]):
            layer = name.removesuffix(_ATTENTION[0])
            weights[layer + _QKV] = np.concatenate([array, state[layer + _ATTENTION[1]]]).T
        elif not name.endswith(_ATTENTION[1]):
            weights[name] = array.T if _is_product(name) else array
    return {PREFIX + name: array for name, array in weights.items()}


def unfold_mapper(weights: Mapping[str, Array]) -> dict[str, Array]:
    """The inverse of `fold_mapper`; other weights of the graph are left out."""
    state: dict[str, Array] = {}
    for full_name, array in weights.items():
        name = full_name.removeprefix(PREFIX)
        if name == full_name:
            continue
        if name.endswith(_QKV):
            parts = array.T[: array.shape[0]], array.T[array.shape[0] :]
            state |= {name.removesuffix(_QKV) + end: part for end, part in zip(_ATTENTION, parts, strict=True)}
        else:
            state[name] = array.T if _is_product(name) else array
    return state


def tower_weights(adapters: Mapping[str, Array]) -> dict[str, Array]:
    """What a restored CLIP tower has of the projection, under transformers' names; nothing without one."""
    names = {
        "vision_model.post_layernorm.weight": "projection.norm_weight",
        "vision_model.post_layernorm.bias": "projection.norm_bias",
        "visual_projection.weight": "projection.weight",
    }
    return {there: adapters[here] for there, here in names.items() if here in adapters}


def _is_product(name: str) -> bool:
    return name.endswith(".weight") and ".norm" not in name


def append_prefix(graph: Graph, embeddings: str, model: ClipCapModel) -> None:
    """Append pooling and mapper to a vision graph with `embeddings` [images, N, d_v]."""
    weights = fold_mapper(arrays(model.adapter_state()))
    for name, array in weights.items():
        graph.initializer(name, array)
    mapper = _Mapper(graph, model)
    with graph.scope("visual"):
        mapper.append(mapper.pool(embeddings))
    graph.output(_INPUT, np.float32, ("images", model.config.prefix_length, model.config.hidden_size))


class _Mapper:
    """Appends a mapper's operators, as `itune.methods.clipcap` has them in PyTorch."""

    def __init__(self, graph: Graph, model: ClipCapModel) -> None:
        self.graph, self.config = graph, model.config

    def pool(self, embeddings: str) -> str:
        """The embedding that the mapper reads [images, width]."""
        g, config = self.graph, self.config
        if config.pooling == "mean":
            x = g.op("ReduceMean", embeddings, g.constant([1]), keepdims=0)
        else:
            x = g.op("Gather", embeddings, g.constant(0), axis=1)
        if config.projected_width is not None:
            norm = (f"{PREFIX}projection.norm_{part}" for part in ("weight", "bias"))
            x = g.op("LayerNormalization", x, *norm, epsilon=config.layer_norm_eps)
            x = g.op("MatMul", x, f"{PREFIX}projection.weight")
        if config.normalize:
            length = g.op("ReduceL2", x, g.constant([-1]), keepdims=1)
            x = g.op("Div", x, g.op("Max", length, g.constant(_SMALLEST, np.float32)))
        return x

    def append(self, x: str) -> None:
        """The prefix of the images' embeddings."""
        g, config = self.graph, self.config
        if config.mapper == "mlp":
            hidden = self.linear("mapper.model.2", g.op("Tanh", self.linear("mapper.model.0", x)))
            g.op("Reshape", hidden, g.constant([0, config.prefix_length, config.hidden_size]), name=_INPUT)
            return
        x = g.op("Reshape", self.linear("mapper.linear", x), g.constant([0, config.clip_length, config.hidden_size]))
        images = g.op("Shape", x, start=0, end=1)
        shape = g.op("Concat", images, g.constant([config.prefix_length, config.hidden_size]), axis=0)
        x = g.op("Concat", x, g.op("Expand", f"{PREFIX}mapper.prefix_const", shape), axis=1)
        for i in range(config.mapper_layers):
            with g.scope(f"layers.{i}"):
                x = self.layer(f"mapper.transformer.layers.{i}", x)
        ends = (g.constant([value]) for value in (config.clip_length, config.clip_length + config.prefix_length, 1))
        g.op("Slice", x, *ends, name=_INPUT)

    def layer(self, name: str, x: str) -> str:
        """A transformer layer."""
        g = self.graph
        with g.scope("attn"):
            x = g.op("Add", x, self.attention(f"{name}.attn", self.layer_norm(f"{name}.norm1", x)))
        with g.scope("mlp"):
            inner = self.linear(f"{name}.mlp.fc1", self.layer_norm(f"{name}.norm2", x))
            return g.op("Add", x, self.linear(f"{name}.mlp.fc2", append_activation(g, inner, "relu")))

    def attention(self, name: str, x: str) -> str:
        """Self-attention over all positions."""
        g, config = self.graph, self.config
        head_dim = config.hidden_size // config.mapper_heads
        qkv = g.op("MatMul", x, f"{PREFIX}{name}.qkv.weight")
        split = g.constant([0, 0, config.mapper_heads, head_dim])
        q, k, v = (
            g.op("Transpose", g.op("Reshape", part, split), perm=perm)
            for part, perm in zip(
                g.ops("Split", qkv, names=[None] * 3, axis=-1, num_outputs=3),
                ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]),
                strict=True,
            )
        )
        # The scale stays out of the weights, which a restored checkpoint is to have as they were.
        scores = g.op("MatMul", g.op("Mul", q, g.constant(head_dim**-0.5, np.float32)), k)
        context = g.op("Transpose", g.op("MatMul", g.op("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
        return self.linear(f"{name}.project", g.op("Reshape", context, g.constant([0, 0, config.hidden_size])))

    def linear(self, name: str, x: str) -> str:
        """A product and its bias."""
        product = self.graph.op("MatMul", x, f"{PREFIX}{name}.weight")
        return self.graph.op("Add", product, f"{PREFIX}{name}.bias")

    def layer_norm(self, name: str, x: str) -> str:
        """A layer norm by its weights' name."""
        weights = (f"{PREFIX}{name}.{part}" for part in ("weight", "bias"))
        return self.graph.op("LayerNormalization", x, *weights, epsilon=_NORM_EPSILON)


class ClipCapDecoder(Decoder):
    """A plain GPT-2 that reads the image's prefix where its ids stand."""

    def __init__(self, model: ClipCapModel, vocabulary: Array | None, fused: bool) -> None:
        super().__init__(model, language_model_weights(model), vocabulary, fused)
        self.prefix_length = model.config.prefix_length

    def declare_visual(self) -> None:
        """See `Decoder.declare_visual`."""
        self.graph.input(_INPUT, np.float32, ["images", self.prefix_length, self.width])

    def embed(self, tokens: str) -> str:
        """The tokens' embeddings, the image's where a prefix id stands.

        An image's rows are side by side, so its prefix is not repeated for them: ids become rows of all prefixes.
        """
        g = self.graph
        is_prefix = g.op("GreaterOrEqual", tokens, g.constant(self.vocab_size))
        readable = 0 if self.vocabulary is None else int(self.vocabulary[0])
        text = super().embed(g.op("Where", is_prefix, g.constant(readable), tokens))
        place = g.op("Max", g.op("Sub", tokens, g.constant(self.vocab_size)), g.constant(0))
        images = g.op("Shape", _INPUT, start=0, end=1)
        first = g.op("Range", g.constant(0), g.op("Squeeze", images, g.constant([0])), g.constant(1))
        first = g.op("Unsqueeze", g.op("Mul", first, g.constant(self.prefix_length)), g.constant([1]))
        by_image = g.op("Reshape", place, g.op("Concat", images, g.constant([-1]), axis=0))
        rows = g.op("Reshape", g.op("Add", by_image, first), g.op("Shape", tokens))
        prefixes = g.op("Reshape", _INPUT, g.constant([-1, self.width]))
        image = g.op("Gather", prefixes, rows)
        return g.op("Where", g.op("Unsqueeze", is_prefix, g.constant([-1])), image, text)
