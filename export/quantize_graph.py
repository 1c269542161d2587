"""Rewrite an fp32 graph to int8 weights, and read the weights of either back.

- Products with a constant matrix become `MatMulNBits` (8 bits, blocks of 64), which quantises activations as they
  come, by row and block: an image never depends on its batch neighbours. Its kernels do not saturate without VNNI
  (`tests/export/test_quantize_avx2.py`).
- A Gather from such a matrix (the token embedding, tied to the language-model head) reads the same int8 tensor.
- Convolutions keep their fp32 arithmetic and store int8 weights by output channel, dequantised at load.

A quantised tensor is named after its weight: `NAME.int8`, or `NAME.T.int8` when it is stored transposed, and
`NAME.scales`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from .graph import CONSTANT, MICROSOFT, Array, Graph
from .quantize import (
    BLOCK_SIZE,
    dequantize_blockwise,
    dequantize_per_channel,
    quantize_blockwise,
    quantize_per_channel,
)

_INT8, _TRANSPOSED, _SCALES, _DEQUANTIZED = ".int8", ".T.int8", ".scales", ".dequantized"


def quantize_graph(source: Path, target: Path) -> list[Path]:
    """Write the int8 variant of the fp32 graph `source` to `target`; returns its files, the graph first."""
    graph = Graph.load(source)
    rewriter = _Rewriter(graph)
    nodes, graph.nodes = graph.nodes, []
    uses = Counter(name for node in nodes for name in node.input)
    for node in nodes:
        inputs = list(node.input)
        new = rewriter.rewrite(node)
        graph.nodes += new
        uses.update(name for replacement in new for name in replacement.input)
        uses.subtract(inputs)
        for name in inputs:
            if not uses[name]:
                graph.weights.pop(name, None)  # mapped from disk: what was read of it leaves memory
    return graph.save(target)


def read_weights(path: Path) -> dict[str, Array]:
    """The weights of an exported graph under the names that they had in fp32, int8 ones dequantised."""
    graph = Graph.load(path)
    weights = {name: array for name, array in graph.weights.items() if not name.startswith(CONSTANT)}
    for node in graph.nodes:
        if node.op_type == "MatMulNBits" and _is_quantized(node.input[1], weights):
            codes, scales = node.input[1:3]
            k = next(attribute.i for attribute in node.attribute if attribute.name == "K")
            weight = dequantize_blockwise(weights.pop(codes), weights.pop(scales), k)
            if codes.endswith(_TRANSPOSED):
                weights[codes.removesuffix(_TRANSPOSED)] = weight.T
            else:
                weights[codes.removesuffix(_INT8)] = weight
        elif node.op_type == "DequantizeLinear" and _is_quantized(node.input[0], weights):
            codes, scales = node.input[:2]
            weight = dequantize_per_channel(weights.pop(codes), weights.pop(scales))
            weights[codes.removesuffix(_INT8)] = weight
    return weights


def dequantize_graph(path: Path) -> Graph:
    """The fp32 graph that `quantize_graph` was given, its weights as the integers stand for them."""
    graph, floats = Graph.load(path), read_weights(path)
    nodes = []
    for node in graph.nodes:
        if node.op_type == "DequantizeLinear" and node.input[0].endswith(_INT8):
            continue
        if node.op_type == "MatMulNBits" and node.input[1].endswith(_INT8):
            x, codes = node.input[:2]
            if codes.endswith(_TRANSPOSED):
                weight = codes.removesuffix(_TRANSPOSED)
                node = helper.make_node("MatMul", [x, weight], node.output, name=node.name)
            else:
                weight = codes.removesuffix(_INT8)
                node = helper.make_node("Gemm", [x, weight], node.output, name=node.name, transB=1)
        elif node.op_type == "Conv":
            node.input[1] = node.input[1].removesuffix(_DEQUANTIZED)
        nodes.append(node)
    used = {name for node in nodes for name in node.input}
    graph.nodes, weights = nodes, graph.weights | floats
    graph.weights = {name: array for name, array in weights.items() if name in used}
    domains = {node.domain for node in nodes} | {""}
    graph.opsets = {domain: version for domain, version in graph.opsets.items() if domain in domains}
    return graph


class _Rewriter:
    """Turns one node after the other into what takes its place; the weights of the graph follow."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.shared = {n.input[1] for n in graph.nodes if self.is_product(n) and _is_transposed(n)}

    def rewrite(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        if self.is_product(node):
            return self.product(node)
        if node.op_type == "Gather" and node.input[0] in self.shared:
            return self.embedding(node)
        if node.op_type == "Conv" and node.input[1] in self.graph.weights:
            return self.convolution(node)
        return [node]

    def is_product(self, node: onnx.NodeProto) -> bool:
        """Whether the node is x W or x W^T, perhaps with a bias, for a constant float32 W."""
        weight = self.graph.weights.get(node.input[1]) if len(node.input) > 1 else None
        if weight is None or weight.ndim != 2 or weight.dtype != np.float32:
            return False
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = all(attributes.get(name, value) == value for name, value in _PLAIN_GEMM.items())
        return node.op_type == "MatMul" or (node.op_type == "Gemm" and plain)

    def product(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        codes, scales, (n, k) = self.blockwise(node.input[1], transpose=not _is_transposed(node))
        bias = node.input[2] if len(node.input) > 2 else ""
        output = f"{node.output[0]}.product" if bias else node.output[0]
        product = helper.make_node(
            "MatMulNBits",
            [node.input[0], codes, scales],
            [output],
            name=node.name,
            domain=MICROSOFT,
            N=n,
            K=k,
            bits=8,
            block_size=BLOCK_SIZE,
            accuracy_level=4,  # int8 products: without it the weights are dequantised at every step
        )
        self.graph.opsets[MICROSOFT] = 1
        if not bias:
            return [product]
        return [product, helper.make_node("Add", [output, bias], node.output, name=f"{node.name}.bias")]

    def embedding(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        codes, scales, (_, width) = self.blockwise(node.input[0], transpose=False)
        g, indices, first = self.graph, node.input[1], len(self.graph.nodes)
        with g.scope(node.name):
            rows = g.op("Cast", g.op("Gather", codes, indices), to=onnx.TensorProto.FLOAT)
            rows = g.op("Sub", rows, g.constant(128, np.float32))
            scale = g.op("Unsqueeze", g.op("Gather", scales, indices), g.constant([-1]))
            rows = g.op("Reshape", g.op("Mul", rows, scale), g.constant([0, 0, -1]))
            if width % BLOCK_SIZE:
                g.op("Slice", rows, g.constant([0]), g.constant([width]), g.constant([-1]))
        new = g.nodes[first:]
        del g.nodes[first:]
        new[-1].output[:] = node.output
        return new

    def convolution(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        name = node.input[1]
        dequantized, nodes = f"{name}{_DEQUANTIZED}", []
        if f"{name}{_INT8}" not in self.graph.weights:
            codes, scales = quantize_per_channel(self.graph.weights[name])
            inputs = [
                self.graph.initializer(f"{name}{_INT8}", codes),
                self.graph.initializer(f"{name}{_SCALES}", scales),
            ]
            nodes.append(helper.make_node("DequantizeLinear", inputs, [dequantized], name=dequantized, axis=0))
        node.input[1] = dequantized
        return [*nodes, node]

    def blockwise(self, name: str, transpose: bool) -> tuple[str, str, tuple[int, int]]:
        """The codes and scales of a weight, and its shape [N, K]."""
        weight = self.graph.weights[name]
        weight = weight.T if transpose else weight
        codes_name = f"{name}{_TRANSPOSED if transpose else _INT8}"
        if codes_name not in self.graph.weights:
            codes, scales = quantize_blockwise(weight)
            self.graph.initializer(codes_name, codes)
            self.graph.initializer(f"{name}{_SCALES}", scales)
        return codes_name, f"{name}{_SCALES}", (weight.shape[0], weight.shape[1])


_PLAIN_GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0}


def _is_quantized(name: str, weights: dict[str, Array]) -> bool:
    """Whether a tensor is of this file's making, and not yet taken by another node with the same weight."""
    return name.endswith(_INT8) and name in weights


def _is_transposed(node: onnx.NodeProto) -> bool:
    return any(a.name == "transB" and a.i == 1 for a in node.attribute)
