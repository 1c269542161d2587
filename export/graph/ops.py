"""Layers that several graphs share, as standard ONNX operators on weights that the graph already has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...runtime.errors import ItuneError
from ...runtime.graph_names import RESIDUAL
from ...runtime.settings import ACTIVATIONS
from .builder import Array, Graph

Config = Any
"""A transformers configuration, whose fields are typed as optional."""
_MIN_LENGTH = 1e-12  # as in torch.nn.functional.normalize


def arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    """PyTorch tensors as NumPy arrays.

    Raises:
        ItuneError: a tensor contains NaN or infinity.
    """
    found = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    for name, array in found.items():
        if not np.isfinite(array).all():
            raise ItuneError(f"weight {name} contains NaN or infinity: the checkpoint is damaged")
    return found


def linear(graph: Graph, x: str, name: str) -> str:
    """Compute x W + b, with NAME.weight [in, out] and NAME.bias."""
    return graph.op("Add", graph.op("MatMul", x, f"{name}.weight"), f"{name}.bias")


def layer_norm(graph: Graph, x: str, name: str, epsilon: float) -> str:
    """Layer normalisation with NAME.weight and NAME.bias."""
    return graph.op("LayerNormalization", x, f"{name}.weight", f"{name}.bias", epsilon=epsilon)


def add_residual(graph: Graph, x: str, y: str) -> str:
    """Add two values as part of the residual stream, which half-precision graphs keep in fp32."""
    with graph.scope(RESIDUAL):
        return graph.op("Add", x, y)


def split_heads(graph: Graph, qkv: str, heads: int, width: int) -> tuple[str, str, str]:
    """Q [rows, heads, T, w], K^T [rows, heads, w, T] and V [rows, heads, T, w] of `qkv` [rows, T, 3 * width]."""
    parts = graph.ops("Split", qkv, names=[None] * 3, axis=-1, num_outputs=3)
    shape = graph.constant([0, 0, heads, width // heads])
    query, key, value = (
        graph.op("Transpose", graph.op("Reshape", part, shape), perm=perm)
        for part, perm in zip(parts, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True)
    )
    return query, key, value


def attention(graph: Graph, query: str, keys: str, values: str, bias: str = "") -> str:
    """softmax(Q K^T + bias) V [rows, heads, T, w], for transposed keys [rows, heads, w, N]."""
    scores = graph.op("MatMul", query, keys)
    if bias:
        scores = graph.op("Add", scores, bias)
    return graph.op("MatMul", graph.op("Softmax", scores, axis=-1), values)


def join_heads(graph: Graph, x: str, width: int) -> str:
    """[rows, heads, T, w] to [rows, T, width]."""
    return graph.op("Reshape", graph.op("Transpose", x, perm=[0, 2, 1, 3]), graph.constant([0, 0, width]))


def pool_cls(graph: Graph, embeddings: str, projection: Sequence[str] | None, epsilon: float) -> str:
    """The CLS embedding [images, d_v] of `embeddings` [images, N, d_v].

    With `projection`, CLIP's image feature: post-layernorm (weight, bias), then the matrix [d_v, D].
    """
    cls = graph.op("Gather", embeddings, graph.constant(0), axis=1)
    if projection is None:
        return cls
    norm_weight, norm_bias, weight = projection
    return graph.op("MatMul", graph.op("LayerNormalization", cls, norm_weight, norm_bias, epsilon=epsilon), weight)


def normalize(graph: Graph, x: str, name: str | None = None) -> str:
    """Vectors [images, D] scaled to length 1."""
    length = graph.op("ReduceL2", x, graph.constant([1]), keepdims=1)
    return graph.op("Div", x, graph.op("Max", length, graph.constant(_MIN_LENGTH, np.float32)), name=name)


def activation(graph: Graph, x: str, name: str) -> str:
    """An activation function of `settings.ACTIVATIONS`, by the name that transformers gives it."""
    match ACTIVATIONS[name]:
        case "gelu":
            return graph.op("Gelu", x)
        case "gelu_tanh":
            return graph.op("Gelu", x, approximate="tanh")
        case "quick_gelu":
            gate = graph.op("Sigmoid", graph.op("Mul", x, graph.constant(1.702, np.float32)))
            return graph.op("Mul", x, gate)
        case "silu":
            return graph.op("Mul", x, graph.op("Sigmoid", x))
        case _:
            return graph.op("Relu", x)
