"""Matrix products with a constant weight in integers: two schemes for a graph's `MatMul` and `Gemm` nodes.

Both quantise activations dynamically and row by row, so an image never depends on its neighbours in a batch.

- `Blocks`, blockwise: ONNX Runtime's `MatMulNBits`, weights of 8 or 4 bits with a scale for every block of a row.
  Activations are quantised by block too, which a language model's outliers need. Fastest for a handful of rows: the
  decoder's step.
- `Rows`, per channel: one scale for each output channel of the weight and one for each row of activations, around
  `MatMulIntegerToFloat`. Fastest from twenty rows on (twice as fast at eighty): the vision tower.

A quantised tensor is named after its weight: `NAME.int8`, or `NAME.T.int8` if it is stored transposed (int4 alike),
and `NAME.scales`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from ..graph.builder import MICROSOFT, Graph, attributes
from .weights import (
    BLOCK_SIZES,
    QMAX,
    dequantize_blockwise,
    dequantize_per_channel,
    quantize_blockwise,
    quantize_per_channel,
)

INT8, SCALES = ".int8", ".scales"
"""Suffixes of the codes and the scales of a quantised weight."""
_TRANSPOSED = ".T"
_ROUNDING = ".rounding"
"""In the names of the nodes that quantise activations for `Rows`."""
_PLAIN_GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0}
_TINY = np.finfo(np.float32).tiny  # a row of zeros must not divide by zero


@dataclass(frozen=True)
class Blocks:
    """Blockwise weights of `bits` 8 or 4."""

    bits: int = 8

    def append(self, graph: Graph, product: onnx.NodeProto) -> None:
        """Append a product of `is_product`, without its bias, to a graph that has its weight; the weight stays."""
        x, weight = product.input[:2]
        codes, (n, k) = self.store(graph, weight, transpose=not is_transposed(product))
        # Accuracy level 4 computes in integers; the default dequantises the weights at every step.
        options: dict[str, Any] = {"bits": self.bits, "block_size": BLOCK_SIZES[self.bits], "accuracy_level": 4}
        options |= {"N": n, "K": k, "name": product.name, "domain": MICROSOFT}
        graph.nodes.append(helper.make_node("MatMulNBits", [x, codes, weight + SCALES], product.output, **options))
        graph.opsets[MICROSOFT] = 1

    def store(self, graph: Graph, weight: str, *, transpose: bool) -> tuple[str, tuple[int, int]]:
        """The name of a weight's codes, stored once for all nodes, and its shape [N, K]."""
        array = graph.weights[weight]
        array = array.T if transpose else array
        name = f"{weight}{_TRANSPOSED if transpose else ''}.int{self.bits}"
        if name not in graph.weights:
            codes, scales = quantize_blockwise(array, self.bits)
            graph.initializer(name, codes)
            graph.initializer(weight + SCALES, scales)
        return name, (array.shape[0], array.shape[1])


@dataclass(frozen=True)
class Rows:
    """Per-channel int8 weights, and activations divided by the largest absolute value of their row."""

    def append(self, graph: Graph, product: onnx.NodeProto) -> None:
        """Append a product of `is_product`, without its bias, to a graph that has its weight; the weight stays."""
        x, weight = product.input[:2]
        transposed = is_transposed(product)
        codes_name = f"{weight}{_TRANSPOSED if transposed else ''}{INT8}"
        if codes_name not in graph.weights:
            array = graph.weights[weight]
            codes, scales = quantize_per_channel(array if transposed else array.T)
            graph.initializer(codes_name, np.ascontiguousarray(codes.T))  # [K, N]
            graph.initializer(weight + SCALES, scales)
        zero, step = graph.constant(128, np.uint8), graph.constant(1 / QMAX, np.float32)
        with graph.scope(product.name + _ROUNDING):
            largest = graph.op("ReduceMax", graph.op("Abs", x), graph.constant([-1]), keepdims=1)
            largest = graph.op("Max", largest, graph.constant(_TINY, np.float32))
            rounded = graph.op("QuantizeLinear", graph.op("Div", x, largest), step, zero)
        raw = f"{product.output[0]}.raw"
        inputs = [rounded, codes_name, step, weight + SCALES, zero]
        graph.nodes += [
            helper.make_node("MatMulIntegerToFloat", inputs, [raw], name=product.name, domain=MICROSOFT),
            helper.make_node("Mul", [raw, largest], product.output, name=f"{product.name}{_ROUNDING}/Mul"),
        ]
        graph.opsets[MICROSOFT] = 1


Scheme = Blocks | Rows


def is_product(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a node computes x W or x W^T, perhaps with a bias, for a constant float32 W."""
    weight = graph.weights.get(node.input[1]) if len(node.input) > 1 else None
    if weight is None or weight.ndim != 2 or weight.dtype != np.float32:
        return False
    plain = (_PLAIN_GEMM | attributes(node)).items() >= _PLAIN_GEMM.items()
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and plain)


def is_transposed(product: onnx.NodeProto) -> bool:
    """Whether a product's weight is [N, K]: x W^T."""
    return attributes(product).get("transB") == 1


def restore_products(graph: Graph) -> None:
    """Replace integer products by float ones, whose float32 weights the graph gains under their own names."""
    nodes, graph.nodes = graph.nodes, []
    inputs = {node.name: node.input[0] for node in nodes if node.name.endswith(f"{_ROUNDING}/Abs")}
    outputs = {node.name: node.output[0] for node in nodes if node.name.endswith(f"{_ROUNDING}/Mul")}
    for node in nodes:
        if f"{_ROUNDING}/" in node.name:
            continue
        stored = node.input[1].rpartition(".")[0] if len(node.input) > 1 else ""
        weight = stored.removesuffix(_TRANSPOSED)
        place = {"MatMulNBits": 2, "MatMulIntegerToFloat": 3}.get(node.op_type)
        # An ONNX tower may have integer products of its own.
        if place is None or node.input[place] != f"{weight}{SCALES}":
            graph.nodes.append(node)
            continue
        codes, scales = graph.weights[node.input[1]], graph.weights[node.input[place]]
        if node.op_type == "MatMulNBits":
            shape = attributes(node)
            array = dequantize_blockwise(codes, scales, shape["K"], shape["bits"])
        else:
            array = dequantize_per_channel(codes.T, scales)
        # Blocks are stored as [N, K], per-channel weights as [K, N].
        was_matmul = (stored != weight) == (node.op_type == "MatMulNBits")
        graph.weights.setdefault(weight, array.T if was_matmul else array)
        x = inputs.get(f"{node.name}{_ROUNDING}/Abs", node.input[0])
        output = outputs.get(f"{node.name}{_ROUNDING}/Mul", node.output[0])
        if was_matmul:
            graph.nodes.append(helper.make_node("MatMul", [x, weight], [output], name=node.name))
        else:
            graph.nodes.append(helper.make_node("Gemm", [x, weight], [output], name=node.name, transB=1))
