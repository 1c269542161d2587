"""Activation functions as standard ONNX operators, under the names that transformers gives them."""

from __future__ import annotations

import numpy as np

from ...runtime.errors import ItuneError
from .builder import Graph

_EXACT_GELUS = ("gelu", "gelu_python")
_TANH_GELUS = ("gelu_new", "gelu_accurate", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh")


def append_activation(graph: Graph, x: str, name: str) -> str:
    """Append an activation function.

    Raises:
        ItuneError: the function has no operator here.
    """
    if name in _EXACT_GELUS:
        return graph.op("Gelu", x)
    if name in _TANH_GELUS:
        return graph.op("Gelu", x, approximate="tanh")
    if name == "quick_gelu":
        gate = graph.op("Sigmoid", graph.op("Mul", x, graph.constant(1.702, np.float32)))
        return graph.op("Mul", x, gate)
    if name in ("silu", "swish"):
        return graph.op("Mul", x, graph.op("Sigmoid", x))
    if name == "relu":
        return graph.op("Relu", x)
    raise ItuneError(f"the activation function {name!r} of config.json cannot be exported; GELU, ReLU and SiLU can")
