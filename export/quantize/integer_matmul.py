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
from typing import NamedTuple

import numpy as np
from onnx import helper

from ..graph.builder import MICROSOFT, Graph
from .weights import (
    BLOCK_SIZES,
    QMAX,
    dequantize_blockwise,
    dequantize_per_channel,
    quantize_blockwise,
    quantize_per_channel,
)

SCALES = ".scales"
_TRANSPOSED = ".T"
_ROUNDING = ".rounding"
"""In the names of the nodes that quantise activations for `Rows`."""
_TINY = np.finfo(np.float32).tiny  # a row of zeros must not divide by zero


class MatMul(NamedTuple):
    """A node that computes x W or x W^T for a constant W."""

    name: str
    x: str
    weight: str
    output: str
    transposed: bool
    """Whether the weight is [N, K]: x W^T."""


@dataclass(frozen=True)
class Blocks:
    """Blockwise weights of `bits` 8 or 4."""

    bits: int = 8

    def append(self, graph: Graph, matmul: MatMul) -> None:
        """Append the product to a graph that has its weight; the weight stays."""
        codes, (n, k) = self.store(graph, matmul.weight, transpose=not matmul.transposed)
        node = helper.make_node(
            "MatMulNBits",
            [matmul.x, codes, matmul.weight + SCALES],
            [matmul.output],
            name=matmul.name,
            domain=MICROSOFT,
            N=n,
            K=k,
            bits=self.bits,
            block_size=BLOCK_SIZES[self.bits],
            accuracy_level=4,  # integer arithmetic; the default dequantises the weights at every step
        )
        graph.nodes.append(node)
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

    def append(self, graph: Graph, matmul: MatMul) -> None:
        """Append the product to a graph that has its weight; the weight stays."""
        name = f"{matmul.weight}{_TRANSPOSED if matmul.transposed else ''}.int8"
        if name not in graph.weights:
            array = graph.weights[matmul.weight]
            codes, scales = quantize_per_channel(array if matmul.transposed else array.T)
            graph.initializer(name, np.ascontiguousarray(codes.T))  # [K, N]
            graph.initializer(matmul.weight + SCALES, scales)
        zero, step = graph.constant(128, np.uint8), graph.constant(1 / QMAX, np.float32)
        with graph.scope(matmul.name + _ROUNDING):
            largest = graph.op("ReduceMax", graph.op("Abs", matmul.x), graph.constant([-1]), keepdims=1)
            largest = graph.op("Max", largest, graph.constant(_TINY, np.float32))
            rounded = graph.op("QuantizeLinear", graph.op("Div", matmul.x, largest), step, zero)
        raw = f"{matmul.output}.raw"
        inputs = [rounded, name, step, matmul.weight + SCALES, zero]
        graph.nodes += [
            helper.make_node("MatMulIntegerToFloat", inputs, [raw], name=matmul.name, domain=MICROSOFT),
            helper.make_node("Mul", [raw, largest], [matmul.output], name=f"{matmul.name}{_ROUNDING}/Mul"),
        ]
        graph.opsets[MICROSOFT] = 1


Scheme = Blocks | Rows


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
            attributes = {a.name: a.i for a in node.attribute}
            array = dequantize_blockwise(codes, scales, attributes["K"], attributes["bits"])
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
