"""Rewrite an fp32 graph to a smaller precision, and read the weights of any precision back.

- int8: products with a constant matrix run in integers (`export.products`); a Gather from such a matrix (the token
  embedding, tied to the language-model head) reads the same int8 tensor. Convolutions keep their fp32 arithmetic and
  store int8 weights by output channel, dequantised at load.
- int4: the same with 4-bit products, but for the language-model head: it decides between 50,257 tokens, and the
  embedding shares it.
- fp16: all matrices are stored in half precision and cast to fp32 when the session loads: half the file, the speed of
  fp32. x86 CPUs have no half-precision products in ONNX Runtime.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import helper

from ...runtime.errors import ItuneError
from ..graph.builder import CONSTANT, Array, Graph
from .products import SCALES, Blocks, Form, Product, in_floats, take_weight
from .weights import BLOCK_SIZES, dequantize_per_channel, quantize_per_channel

Precision = Literal["fp32", "fp16", "int8", "int4"]

HEAD = "head/"
"""Begins the names of the language-model head's nodes."""
INT8, DEQUANTIZED = ".int8", ".dequantized"
_HALF = ".fp16"
_TYPING = {"Cast": (_HALF, ".fp32"), "QuantizeLinear": (INT8,), "DequantizeLinear": (DEQUANTIZED,)}
"""Operators that stand between the types of a typed graph, and what their outputs' names end with."""


def quantize_graph(source: Path, target: Path, form: Form) -> list[Path]:
    """Write the int8 (or, for `Blocks(4)`, int4) variant of the fp32 graph `source` to `target`.

    Returns its files, the graph first.
    """
    graph = Graph.load(source)
    rewriter = _Rewriter(graph, form)
    nodes, graph.nodes = graph.nodes, []
    uses = Counter(name for node in nodes for name in node.input)
    for node in nodes:
        inputs, first = list(node.input), len(graph.nodes)
        rewriter.rewrite(node)
        uses.update(name for new in graph.nodes[first:] for name in new.input)
        uses.subtract(inputs)
        for name in inputs:
            if not uses[name]:
                graph.weights.pop(name, None)  # mapped from disk: what was read of it leaves memory
    return graph.save(target)


def halve_graph(source: Path, target: Path) -> list[Path]:
    """Write the fp16 variant of the fp32 graph `source` to `target`; returns its files, the graph first.

    Raises:
        ItuneError: a weight is too large for half precision.
    """
    graph = Graph.load(source)
    casts = []
    for name, array in list(graph.weights.items()):
        if array.ndim < 2 or array.dtype != np.float32:
            continue
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if not np.isfinite(half).all():
            raise ItuneError(f"weight {name} has values beyond 65504, too large for fp16: export it in int8 or fp32")
        del graph.weights[name]
        graph.weights[name + _HALF] = half
        casts.append(helper.make_node("Cast", [name + _HALF], [name], name=name + _HALF, to=onnx.TensorProto.FLOAT))
    graph.nodes = casts + graph.nodes
    return graph.save(target)


def read_weights(path: Path) -> dict[str, Array]:
    """The weights of an exported graph in float32, under the names that they had there."""
    graph = Graph.load(path)
    weights = {name: array for name, array in graph.weights.items() if not name.startswith(CONSTANT)}
    for node in graph.nodes:
        take_weight(node, weights)
        if node.op_type == "DequantizeLinear" and _is_ours(node, INT8, weights):
            codes, scales = node.input[:2]
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            channels_first = np.moveaxis(weights.pop(codes), axis, 0)
            weight = np.moveaxis(
                dequantize_per_channel(channels_first, weights.pop(scales).astype(np.float32)), 0, axis
            )
            weights.setdefault(codes.removesuffix(INT8), weight)  # an embedding may be there in fp16, too
        elif node.op_type == "Cast" and _is_ours(node, _HALF, weights):
            weights[node.output[0]] = weights.pop(node.input[0]).astype(np.float32)
    for name in [name for name in weights if name.endswith(_HALF)]:  # small ones of a typed graph, which need no cast
        weights.setdefault(name.removesuffix(_HALF), weights.pop(name))
    return {name: a.astype(np.float32) if a.dtype == np.float16 else a for name, a in weights.items()}


def float_graph(path: Path) -> Graph:
    """The fp32 graph that an exported one was made from, its weights as they were rounded."""
    graph, floats = Graph.load(path), read_weights(path)
    nodes: list[onnx.NodeProto] = []
    sources = {f"{name}{_HALF}": name for name in floats} | {f"{name}{DEQUANTIZED}": name for name in floats}
    given = {value.name for value in graph.inputs}
    for node in in_floats(graph.nodes):
        is_storage = (node.op_type == "DequantizeLinear" and _is_ours(node, INT8, graph.weights)) or (
            node.op_type == "Cast" and _is_ours(node, _HALF, graph.weights)
        )
        if is_storage:
            continue
        typing = node.name == node.output[0] and node.name.endswith(_TYPING.get(node.op_type, ()))
        if typing and node.input[0] not in given:
            sources[node.output[0]] = sources.get(node.input[0], node.input[0])
            continue
        node.input[:] = [sources.get(name, name) for name in node.input]
        nodes.append(node)
    used = {name for node in nodes for name in node.input}
    weights = graph.weights | floats
    graph.nodes, graph.weights = nodes, {name: array for name, array in weights.items() if name in used}
    domains = {node.domain for node in nodes} | {""}
    graph.opsets = {domain: version for domain, version in graph.opsets.items() if domain in domains}
    return graph


class _Rewriter:
    """Appends what takes the place of one node after the other to a graph; the weights follow."""

    def __init__(self, graph: Graph, form: Form) -> None:
        self.graph, self.form = graph, form
        products = (product for node in graph.nodes if (product := self.product(node)))
        self.embeddings = {p.weight for p in products if p.transposed and self.form_of(p) == Blocks()}

    def rewrite(self, node: onnx.NodeProto) -> None:
        product = self.product(node)
        if product:
            self.rewrite_product(node, product)
        elif node.op_type == "Gather" and node.input[0] in self.embeddings:
            self.rewrite_embedding(node)
        else:
            if node.op_type == "Conv" and node.input[1] in self.graph.weights:
                self.store_convolution(node)
            self.graph.nodes.append(node)

    def product(self, node: onnx.NodeProto) -> Product | None:
        """The node as x W or x W^T, perhaps with a bias, for a constant float32 W; None if it is not one."""
        weight = self.graph.weights.get(node.input[1]) if len(node.input) > 1 else None
        if weight is None or weight.ndim != 2 or weight.dtype != np.float32:
            return None
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = all(attributes.get(name, value) == value for name, value in _PLAIN_GEMM.items())
        if node.op_type != "MatMul" and not (node.op_type == "Gemm" and plain):
            return None
        return Product(node.name, node.input[0], node.input[1], node.output[0], attributes.get("transB") == 1)

    def form_of(self, product: Product) -> Form:
        return Blocks() if product.name.startswith(HEAD) else self.form

    def rewrite_product(self, node: onnx.NodeProto, product: Product) -> None:
        bias = node.input[2] if len(node.input) > 2 else ""
        if not bias:
            self.form_of(product).append(self.graph, product)
            return
        without = product._replace(output=f"{product.output}.product")
        self.form_of(product).append(self.graph, without)
        add = helper.make_node("Add", [without.output, bias], [product.output], name=f"{product.name}.bias")
        self.graph.nodes.append(add)

    def rewrite_embedding(self, node: onnx.NodeProto) -> None:
        g, (table, indices) = self.graph, node.input
        codes, (_, width) = Blocks().store(g, table, transpose=False)
        with g.scope(node.name):
            rows = g.op("Cast", g.op("Gather", codes, indices), to=onnx.TensorProto.FLOAT)
            rows = g.op("Sub", rows, g.constant(128, np.float32))
            scale = g.op("Unsqueeze", g.op("Gather", table + SCALES, indices), g.constant([-1]))
            rows = g.op("Reshape", g.op("Mul", rows, scale), g.constant([0, 0, -1]))
            if width % BLOCK_SIZES[8]:
                g.op("Slice", rows, g.constant([0]), g.constant([width]), g.constant([-1]))
        g.nodes[-1].output[:] = node.output

    def store_convolution(self, node: onnx.NodeProto) -> None:
        g, name = self.graph, node.input[1]
        dequantized = f"{name}{DEQUANTIZED}"
        if f"{name}{INT8}" not in g.weights:
            codes, scales = quantize_per_channel(g.weights[name])
            inputs = [g.initializer(f"{name}{INT8}", codes), g.initializer(f"{name}{SCALES}", scales)]
            g.nodes.append(helper.make_node("DequantizeLinear", inputs, [dequantized], name=dequantized, axis=0))
        node.input[1] = dequantized


_PLAIN_GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0}


def _is_ours(node: onnx.NodeProto, suffix: str, weights: dict[str, Array]) -> bool:
    """Whether a node reads a weight that this file stored, which no other node has taken yet."""
    return node.input[0].endswith(suffix) and node.input[0] in weights
