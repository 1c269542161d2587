"""The decoder graph: one step of a GPT-2 that a captioning method builds on.

    tokens, positions   int64 [rows, T]           parents   int64 [rows]   row of the previous step
    mask                bool [rows, P + T]        k         int64 [1]
    past_key_values.{i}.key|value                 float32 [past rows, heads, P, head_dim], P may be 0
    visual.NAME         what the method gives the language model of the images [images, ...]
    -> logits float32, token_ids int64 [rows, k]; logsumexp float32 [rows]; present.{i}.key|value

All operators are standard ones; with `fused`, each layer's attention is ONNX Runtime's `GroupQueryAttention`, in
place of thirteen small operators. Rows are grouped by image. Initializers keep the language model's own names, so
that a bundle can be restored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch

from ...methods.base import CaptionModel
from .builder import MICROSOFT, Array, Graph
from .ops import append_activation


def arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    """PyTorch's tensors in NumPy."""
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def language_model_weights(model: CaptionModel) -> dict[str, Array]:
    """The language model's weights under its own names; a head that is the embedding is left out."""
    tensors = model.language_model.state_dict()
    if model.language_model.lm_head.weight is model.language_model.transformer.wte.weight:
        del tensors["lm_head.weight"]
    return arrays(tensors)


class Decoder:
    """Appends the decoder's parts to a graph; every value is float32 [rows, T, width] unless stated.

    A method overrides where the image comes in.
    """

    def __init__(self, model: CaptionModel, weights: dict[str, Array], vocabulary: Array | None, fused: bool) -> None:
        """A plain GPT-2 with these weights; see `methods.build_decoder` for `vocabulary` and `fused`."""
        config: Any = model.language_model.config
        self.layers, self.heads = config.n_layer, config.n_head
        self.width, self.inner = config.n_embd, config.n_inner or 4 * config.n_embd
        self.head_dim = self.width // self.heads
        self.epsilon = config.layer_norm_epsilon
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        self.inverse_layer_scaling = config.scale_attn_by_inverse_layer_idx
        self.activation = config.activation_function
        self.weights, self.vocabulary = weights, vocabulary
        self.fused = fused and self.head_dim % 8 == 0  # GroupQueryAttention takes no other
        self.vocab_size = config.vocab_size
        self.graph = Graph("decoder")

    def build(self) -> Graph:
        """The whole graph."""
        g = self.graph
        tokens = g.input("tokens", np.int64, ["rows", "T"])
        positions = g.input("positions", np.int64, ["rows", "T"])
        mask = g.input("mask", np.bool_, ["rows", "P + T"])
        parents = g.input("parents", np.int64, ["rows"])
        k = g.input("k", np.int64, [1])
        self.declare_visual()
        with g.scope("step"):
            bias = self.mask_bias(tokens, mask)
            self.declare_shapes(tokens)
            if self.fused:
                self.declare_lengths(mask)
        with g.scope("embeddings"):
            hidden = g.op("Add", self.embed(tokens), g.op("Gather", self.weight("transformer.wpe.weight"), positions))
        for i in range(self.layers):
            with g.scope(f"h.{i}"):
                hidden = g.op("Add", hidden, self.attention(i, hidden, parents, bias))
                hidden = self.attend_visual(i, hidden)
                hidden = g.op("Add", hidden, self.feed_forward(i, hidden))
        with g.scope("head"):
            self.head(hidden, k)
        return g

    def declare_visual(self) -> None:
        """Declare the inputs `visual.*`."""

    def declare_shapes(self, tokens: str) -> None:
        """Make the shapes that all layers share."""

    def embed(self, tokens: str) -> str:
        """The tokens' embeddings, without those of their positions."""
        return self.graph.op("Gather", self.by_token("transformer.wte.weight"), self.row(tokens))

    def attend_visual(self, i: int, hidden: str) -> str:  # noqa: ARG002 - what a plain GPT-2 does without
        """What comes between a layer's self-attention and its feed-forward block, residuals included."""
        return hidden

    def declare_lengths(self, mask: str) -> None:
        """What the fused attention wants to know: the length of all rows, and of each but its last token."""
        g = self.graph
        length = g.op("Gather", g.op("Shape", mask), g.constant(1))
        self.length = g.op("Cast", length, to=onnx.TensorProto.INT32)
        others = g.op("Sub", self.length, g.constant(1, np.int32))
        self.lengths = g.op("Expand", others, g.op("Shape", mask, start=0, end=1))

    def mask_bias(self, tokens: str, mask: str) -> str:
        """What attention scores gain [rows, 1, T, P + T]: 0 at visible positions, the lowest float elsewhere.

        Not minus infinity: a padded position sees nothing at all, and must not turn into NaN.
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

    def attention(self, i: int, hidden: str, parents: str, bias: str) -> str:
        """A layer's self-attention, without its residual."""
        name = f"transformer.h.{i}.attn"
        with self.graph.scope("attn"):
            qkv = self.linear(f"{name}.c_attn", self.layer_norm(f"transformer.h.{i}.ln_1", hidden))
            scaling = self.scaling / (i + 1) if self.inverse_layer_scaling else self.scaling
            past = [self.past(i, part, parents) for part in ("key", "value")]
            attend = self.attend_fused if self.fused else self.attend
            context = attend(i, qkv, past, bias, scaling)
            for part in ("key", "value"):
                self.graph.output(f"present.{i}.{part}", np.float32, ["rows", self.heads, "P + T", self.head_dim])
            return self.linear(f"{name}.c_proj", context)

    def past(self, i: int, part: str, parents: str) -> str:
        """The cached keys or values [rows, heads, P, head_dim] of what each row continues."""
        shape = ["past_rows", self.heads, "P", self.head_dim]
        return self.graph.op("Gather", self.graph.input(f"past_key_values.{i}.{part}", np.float32, shape), parents)

    def attend(self, i: int, qkv: str, past: list[str], bias: str, scaling: float) -> str:
        """Self-attention in standard operators, from `qkv` [rows, T, 3 width] to [rows, T, width]."""
        g = self.graph
        # [rows, 3 heads, T, head_dim]: one transposition for all three
        split = g.op("Reshape", qkv, g.constant([0, 0, 3 * self.heads, self.head_dim]))
        split = g.op("Transpose", split, perm=[0, 2, 1, 3])
        query, *new = g.ops("Split", split, names=[None] * 3, axis=1, num_outputs=3)
        key, value = (
            g.op("Concat", old, state, axis=2, name=f"present.{i}.{part}")
            for part, old, state in zip(("key", "value"), past, new, strict=True)
        )
        query = g.op("Mul", query, g.constant(scaling, np.float32))
        scores = g.op("MatMul", query, g.op("Transpose", key, perm=[0, 1, 3, 2]))
        scores = g.op("Softmax", g.op("Add", scores, bias), axis=-1)
        context = g.op("Transpose", g.op("MatMul", scores, value), perm=[0, 2, 1, 3])
        return g.op("Reshape", context, g.constant([0, 0, self.width]))

    def attend_fused(self, i: int, qkv: str, past: list[str], bias: str, scaling: float) -> str:
        """The same in one operator."""
        inputs = [qkv, "", "", *past, self.lengths, self.length, "", "", "", bias]
        return self.graph.ops(
            "GroupQueryAttention",
            *inputs,
            names=[None, f"present.{i}.key", f"present.{i}.value"],
            domain=MICROSOFT,
            num_heads=self.heads,
            kv_num_heads=self.heads,
            scale=scaling,
        )[0]

    def feed_forward(self, i: int, hidden: str) -> str:
        """A layer's feed-forward block, without its residual."""
        name = f"transformer.h.{i}.mlp"
        with self.graph.scope("mlp"):
            inner = self.linear(f"{name}.c_fc", self.layer_norm(f"transformer.h.{i}.ln_2", hidden))
            return self.linear(f"{name}.c_proj", append_activation(self.graph, inner, self.activation))

    def head(self, hidden: str, k: str) -> None:
        """The k best next tokens of the last position, and the log-sum-exp of all."""
        g = self.graph
        last = self.layer_norm("transformer.ln_f", g.op("Gather", hidden, g.constant(-1), axis=1))
        name = "lm_head.weight" if "lm_head.weight" in self.weights else "transformer.wte.weight"
        logits = g.op("Gemm", last, self.by_token(name), transB=1)
        # Of equal logits TopK takes the first: as the vocabulary ascends, that is the lower id here, too.
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

    def row(self, tokens: str) -> str:
        """Where the embeddings of `tokens` stand."""
        if self.vocabulary is None:
            return tokens
        # A row that does not exist stops the runtime: a wrong embedding would go unnoticed.
        rows = np.full(self.vocab_size, len(self.vocabulary), np.int32)
        rows[self.vocabulary] = np.arange(len(self.vocabulary))
        return self.graph.op("Gather", self.graph.initializer("vocabulary.rows", rows), tokens)

    def by_token(self, name: str) -> str:
        """A weight with a row for every token of the vocabulary."""
        if self.vocabulary is None or name in self.graph.weights:
            return self.weight(name)
        return self.graph.initializer(name, self.weights[name][self.vocabulary])

    def layer_norm(self, name: str, x: str) -> str:
        """A layer norm by its weights' name."""
        weight, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.graph.op("LayerNormalization", x, weight, bias, epsilon=self.epsilon)

    def linear(self, name: str, x: str) -> str:
        """A product and its bias, by their weights' name."""
        product = self.graph.op("MatMul", x, self.weight(f"{name}.weight"))
        return self.graph.op("Add", product, self.weight(f"{name}.bias"))

    def weight(self, name: str) -> str:
        """A weight by its name, in the graph from the first time on."""
        if name not in self.graph.weights:
            self.graph.initializer(name, self.weights[name])
        return name
