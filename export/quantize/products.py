"""Products with a constant matrix in integers: the two forms that a graph's `MatMul` and `Gemm` nodes can take.

In both, activations are rounded as they come, row by row, so that an image never depends on its batch neighbours.

- `Blocks`: ONNX Runtime's `MatMulNBits`, weights of 8 or 4 bits with a scale for every block of a row; activations are
  rounded by block too, which outliers of a language model need. Fastest for a handful of rows: the decoder's step.
- `Rows`: one scale for each output channel and one for each row of activations around `MatMulIntegerToFloat`.
  Fastest from twenty rows on (twice as fast at eighty): the vision tower.

A quantised tensor is named after its weight: `NAME.int8`, or `NAME.T.int8` when it is stored transposed (int4 alike),
and `NAME.scales`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx
from onnx import helper

from ..graph.builder import MICROSOFT, Array, Graph
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
_ROUNDING = ".rounding/"
"""In the names of the nodes that round the activations of a `Rows` product."""
_TINY = np.finfo(np.float32).tiny  # a row of zeros must not divide by zero


class Product(NamedTuple):
    """x W or x W^T of a graph, under the name of the node that computes it."""

    name: str
    x: str
    weight: str
    output: str
    transposed: bool
    """Whether the weight is [N, K]: x W^T."""


@dataclass(frozen=True)
class Blocks:
    """`MatMulNBits` with `bits` 8 or 4."""

    bits: int = 8

    def append(self, graph: Graph, product: Product) -> None:
        """Append the product to a graph that has its weight; the weight stays."""
        codes, (n, k) = self.store(graph, product.weight, transpose=not product.transposed)
        node = helper.make_node(
            "MatMulNBits",
            [product.x, codes, product.weight + SCALES],
            [product.output],
            name=product.name,
            domain=MICROSOFT,
            N=n,
            K=k,
            bits=self.bits,
            block_size=BLOCK_SIZES[self.bits],
            accuracy_level=4,  # int8 products: without it the weights are dequantised at every step
        )
        graph.nodes.append(node)
        graph.opsets[MICROSOFT] = 1

    def store(self, graph: Graph, weight: str, *, transpose: bool) -> tuple[str, tuple[int, int]]:
        """The name of a weight's codes, and its shape [N, K]; they may be there already, for another node."""
        array = graph.weights[weight]
        array = array.T if transpose else array
        codes_name = f"{weight}{_TRANSPOSED if transpose else ''}.int{self.bits}"
        if codes_name not in graph.weights:
            codes, scales = quantize_blockwise(array, self.bits)
            graph.initializer(codes_name, codes)
            graph.initializer(weight + SCALES, scales)
        return codes_name, (array.shape[0], array.shape[1])


@dataclass(frozen=True)
class Rows:
    """`MatMulIntegerToFloat` of int8 weights and rows of activations, each divided by its largest size."""

    def append(self, graph: Graph, product: Product) -> None:
        """Append the product to a graph that has its weight; the weight stays."""
        transpose = product.transposed  # to [K, N]
        codes_name = f"{product.weight}{_TRANSPOSED if transpose else ''}.int8"
        if codes_name not in graph.weights:
            array = graph.weights[product.weight]
            codes, scales = quantize_per_channel(array if transpose else array.T)
            graph.initializer(codes_name, np.ascontiguousarray(codes.T))
            graph.initializer(product.weight + SCALES, scales)
        zero, step = graph.constant(128, np.uint8), graph.constant(1 / QMAX, np.float32)
        with graph.scope(product.name + _ROUNDING.rstrip("/")):
            largest = graph.op("ReduceMax", graph.op("Abs", product.x), graph.constant([-1]), keepdims=1)
            largest = graph.op("Max", largest, graph.constant(_TINY, np.float32))
            rounded = graph.op("QuantizeLinear", graph.op("Div", product.x, largest), step, zero)
        inputs = [rounded, codes_name, step, product.weight + SCALES, zero]
        raw = f"{product.output}.raw"
        graph.nodes += [
            helper.make_node("MatMulIntegerToFloat", inputs, [raw], name=product.name, domain=MICROSOFT),
            helper.make_node("Mul", [raw, largest], [product.output], name=f"{product.name}{_ROUNDING}Mul"),
        ]
        graph.opsets[MICROSOFT] = 1


Form = Blocks | Rows


def take_weight(node: onnx.NodeProto, weights: dict[str, Array]) -> None:
    """Replace a product's codes and scales in `weights` by the float32 weight, under its own name.

    Does nothing for other nodes, and for products whose weight another node has taken already.
    """
    if not _is_ours(node) or node.input[1] not in weights:
        return
    name, transposed = _weight_name(node)
    codes, scales = weights.pop(node.input[1]), weights.pop(f"{name}{SCALES}")
    if node.op_type == "MatMulNBits":
        attributes = {a.name: a.i for a in node.attribute}
        weight = dequantize_blockwise(codes, scales, attributes["K"], attributes["bits"])
    else:
        weight = dequantize_per_channel(codes.T, scales)
    # Both are [N, K] here. Blocks are stored so, rows are stored [K, N]: transposed says how that differs from before.
    before = transposed == (node.op_type == "MatMulNBits")
    weights[name] = weight.T if before else weight


def in_floats(nodes: Iterable[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes of a graph with its integer products as plain ones again, for the weights of `take_weight`."""
    nodes, kept = list(nodes), []
    rounded = {n.name: n.input[0] for n in nodes if n.name.endswith(f"{_ROUNDING}Abs")}
    outputs = {n.name: n.output[0] for n in nodes if n.name.endswith(f"{_ROUNDING}Mul")}
    for node in nodes:
        if _ROUNDING in node.name:
            continue
        if not _is_ours(node):
            kept.append(node)
            continue
        x = rounded.get(f"{node.name}{_ROUNDING}Abs", node.input[0])
        output = outputs.get(f"{node.name}{_ROUNDING}Mul", node.output[0])
        name, transposed = _weight_name(node)
        if transposed == (node.op_type == "MatMulNBits"):
            kept.append(helper.make_node("MatMul", [x, name], [output], name=node.name))
        else:
            kept.append(helper.make_node("Gemm", [x, name], [output], name=node.name, transB=1))
    return kept


def _is_ours(node: onnx.NodeProto) -> bool:
    """Whether `Blocks` or `Rows` made the node: a tower may have integer products of its own."""
    scales = {"MatMulNBits": 2, "MatMulIntegerToFloat": 3}.get(node.op_type)
    return scales is not None and node.input[scales] == f"{_weight_name(node)[0]}{SCALES}"


def _weight_name(node: onnx.NodeProto) -> tuple[str, bool]:
    """The name of a product's weight, and whether its codes are stored transposed."""
    stored = node.input[1].rpartition(".")[0]
    return stored.removesuffix(_TRANSPOSED), stored.endswith(_TRANSPOSED)
