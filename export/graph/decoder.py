"""The decoder graph: one step of a GPT-2 that a captioning method builds on.

    tokens, positions   int64 [rows, T]           parents   int64 [rows]   row of the previous step
    mask                bool [rows, P + T]        k         int64 [1]
    past_key_values.{i}.key|value                 float32 [past rows, heads, P, head_dim], P may be 0
    visual.NAME         the method's inputs from the vision graph [images, ...]
    -> logits float32, token_ids int64 [rows, k]; logsumexp float32 [rows]; present.{i}.key|value

All operators are standard ones; a `fused` graph replaces the thirteen small operators of each layer's self-attention
by ONNX Runtime's `GroupQueryAttention`. Rows are grouped by image. Initializers keep the language model's own names,
from which a bundle is restored.
"""

from __future__ import annotations

import numpy as np
import onnx

from ...methods.base import CaptionModel
from ...runtime import graph_names
from .builder import MICROSOFT, Array, Graph
from .ops import Config, activation, add_residual, attention, join_heads, layer_norm, linear

EMBEDDINGS = "transformer.wte.weight"
UNTIED_HEAD = "lm_head.weight"


class Decoder:
    """Builds the decoder graph of a plain GPT-2; every value is float32 [rows, T, width] unless stated otherwise.

    A method overrides the places where the image enters.
    """

    def __init__(self, model: CaptionModel, weights: dict[str, Array], vocabulary: Array | None, fused: bool) -> None:
        """A decoder with these weights; for `vocabulary` and `fused`, see `methods.registry.build_decoder`."""
        config: Config = model.language_model.config
        self.config, self.vocabulary = config, vocabulary
        self.heads, self.width, self.epsilon = config.n_head, config.n_embd, config.layer_norm_epsilon
        self.head_dim = self.width // self.heads
        self.fused = fused and self.head_dim % 8 == 0  # GroupQueryAttention requires it
        self.graph = Graph("decoder")
        for name, array in weights.items():
            by_token = vocabulary is not None and name in (EMBEDDINGS, UNTIED_HEAD)
            self.graph.initializer(name, array[vocabulary] if by_token else array)

    def build(self) -> Graph:
        """Build the whole graph."""
        g = self.graph
        tokens = g.input(graph_names.TOKENS, np.int64, ["rows", "T"])
        positions = g.input(graph_names.POSITIONS, np.int64, ["rows", "T"])
        mask = g.input(graph_names.MASK, np.bool_, ["rows", "P + T"])
        parents = g.input(graph_names.PARENTS, np.int64, ["rows"])
        k = g.input(graph_names.K, np.int64, [1])
        with g.scope("step"):
            bias = self.mask_bias(tokens, mask)
            self.declare_visual(tokens)
            if self.fused:
                self.declare_lengths(mask)
        with g.scope("embeddings"):
            hidden = add_residual(g, self.embed(tokens), g.op("Gather", "transformer.wpe.weight", positions))
        for i in range(self.config.n_layer):
            with g.scope(f"h.{i}"):
                hidden = add_residual(g, hidden, self.self_attention(i, hidden, parents, bias))
                hidden = self.attend_visual(i, hidden)
                hidden = add_residual(g, hidden, self.feed_forward(i, hidden))
        with g.scope(graph_names.HEAD.rstrip("/")):
            self.head(hidden, k)
        return g

    def declare_visual(self, tokens: str) -> None:
        """Declare the inputs `visual.NAME`, and compute the shapes that all layers share."""

    def embed(self, tokens: str) -> str:
        """The tokens' embeddings, without those of their positions."""
        if self.vocabulary is not None:
            # The row of a token outside the vocabulary does not exist, which stops the runtime: a wrong embedding
            # would go unnoticed.
            rows = np.full(self.config.vocab_size, len(self.vocabulary), np.int32)
            rows[self.vocabulary] = np.arange(len(self.vocabulary))
            tokens = self.graph.op("Gather", self.graph.initializer("vocabulary.rows", rows), tokens)
        return self.graph.op("Gather", EMBEDDINGS, tokens)

    def attend_visual(self, i: int, hidden: str) -> str:  # noqa: ARG002 - a plain GPT-2 has nothing here
        """The hidden states after attention to the image, between self-attention and feed-forward block."""
        return hidden

    def declare_lengths(self, mask: str) -> None:
        """Compute the inputs of the fused attention: the longest row, and every row's length without its last token."""
        g = self.graph
        length = g.op("Gather", g.op("Shape", mask), g.constant(1))
        self.length = g.op("Cast", length, to=onnx.TensorProto.INT32)
        others = g.op("Sub", self.length, g.constant(1, np.int32))
        self.lengths = g.op("Expand", others, g.op("Shape", mask, start=0, end=1))

    def mask_bias(self, tokens: str, mask: str) -> str:
        """The bias on attention scores [rows, 1, T, P + T]: 0 at visible positions, the lowest float elsewhere.

        Not minus infinity: a padded position sees nothing at all, and must not become NaN.
        """
        g = self.graph
        zero, one = g.constant(0), g.constant(1)
        end = g.op("Gather", g.op("Shape", mask), one)
        start = g.op("Sub", end, g.op("Gather", g.op("Shape", tokens), one))
        queries = g.op("Unsqueeze", g.op("Range", start, end, one), g.constant([1]))
        causal = g.op("GreaterOrEqual", queries, g.op("Range", zero, end, one))
        visible = g.op("And", g.op("Unsqueeze", mask, g.constant([1, 2])), causal)
        lowest = g.constant(np.finfo(np.float32).min, np.float32)
        return g.op("Where", visible, g.constant(0, np.float32), lowest)

    def self_attention(self, i: int, hidden: str, parents: str, bias: str) -> str:
        """A layer's self-attention, without its residual."""
        g, name = self.graph, f"transformer.h.{i}"
        with g.scope("attn"):
            qkv = linear(g, layer_norm(g, hidden, f"{name}.ln_1", self.epsilon), f"{name}.attn.c_attn")
            scaling = self.head_dim**-0.5 if self.config.scale_attn_weights else 1.0
            if self.config.scale_attn_by_inverse_layer_idx:
                scaling /= i + 1
            past = []
            for part in ("key", "value"):  # [rows, heads, P, head_dim] of the row that each row continues
                cache = g.input(graph_names.past(i, part), np.float32, ["past_rows", self.heads, "P", self.head_dim])
                past.append(g.op("Gather", cache, parents))
                g.output(graph_names.present(i, part), np.float32, ["rows", self.heads, "P + T", self.head_dim])
            attend = self.attend_fused if self.fused else self.attend
            context = attend(i, qkv, past, bias, scaling)
            return linear(g, context, f"{name}.attn.c_proj")

    def attend(self, i: int, qkv: str, past: list[str], bias: str, scaling: float) -> str:
        """Self-attention in standard operators, from `qkv` [rows, T, 3 * width] to [rows, T, width]."""
        g = self.graph
        # [rows, 3 heads, T, head_dim]: one transposition for all three
        split = g.op("Reshape", qkv, g.constant([0, 0, 3 * self.heads, self.head_dim]))
        split = g.op("Transpose", split, perm=[0, 2, 1, 3])
        query, *new = g.ops("Split", split, names=[None] * 3, axis=1, num_outputs=3)
        keys, values = (
            g.op("Concat", old, state, axis=2, name=graph_names.present(i, part))
            for part, old, state in zip(("key", "value"), past, new, strict=True)
        )
        query = g.op("Mul", query, g.constant(scaling, np.float32))
        keys = g.op("Transpose", keys, perm=[0, 1, 3, 2])
        return join_heads(g, attention(g, query, keys, values, bias), self.width)

    def attend_fused(self, i: int, qkv: str, past: list[str], bias: str, scaling: float) -> str:
        """The same in one operator."""
        inputs = [qkv, "", "", *past, self.lengths, self.length, "", "", "", bias]
        names = [None, graph_names.present(i, "key"), graph_names.present(i, "value")]
        shape = {"num_heads": self.heads, "kv_num_heads": self.heads, "scale": scaling}
        return self.graph.ops("GroupQueryAttention", *inputs, names=names, domain=MICROSOFT, **shape)[0]

    def feed_forward(self, i: int, hidden: str) -> str:
        """A layer's feed-forward block, without its residual."""
        g, name = self.graph, f"transformer.h.{i}"
        with g.scope("mlp"):
            inner = linear(g, layer_norm(g, hidden, f"{name}.ln_2", self.epsilon), f"{name}.mlp.c_fc")
            return linear(g, activation(g, inner, self.config.activation_function), f"{name}.mlp.c_proj")

    def head(self, hidden: str, k: str) -> None:
        """The k best next tokens of the last position, and the log-sum-exp over all tokens."""
        g = self.graph
        last = layer_norm(g, g.op("Gather", hidden, g.constant(-1), axis=1), "transformer.ln_f", self.epsilon)
        logits = g.op("Gemm", last, UNTIED_HEAD if UNTIED_HEAD in g.weights else EMBEDDINGS, transB=1)
        # TopK takes the first of equal logits: the lower id, with a vocabulary as well, since it ascends.
        if self.vocabulary is None:
            best, _ = g.ops("TopK", logits, k, names=["logits", "token_ids"], axis=-1)
        else:
            best, rows = g.ops("TopK", logits, k, names=["logits", None], axis=-1)
            g.op("Gather", g.initializer("vocabulary.token_ids", self.vocabulary), rows, name="token_ids")
        largest = g.op("Slice", best, g.constant([0]), g.constant([1]), g.constant([1]))
        total = g.op("ReduceSum", g.op("Exp", g.op("Sub", logits, largest)), g.constant([1]), keepdims=0)
        g.op("Add", g.op("Log", total), g.op("Squeeze", largest, g.constant([1])), name="logsumexp")
        g.output("logits", np.float32, ["rows", "k"])
        g.output("token_ids", np.int64, ["rows", "k"])
        g.output("logsumexp", np.float32, ["rows"])
