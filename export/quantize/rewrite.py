"""Rewrite an fp32 graph to a smaller precision, and read the weights of any precision back.

- int8: products with a constant matrix run in integers (`integer_matmul`); a Gather from such a matrix (the token
  embedding, tied to the language-model head) reads the same int8 tensor. Convolutions keep their fp32 arithmetic and
  store int8 weights per output channel, dequantised at load.
- int4: the same with 4-bit products, except for the language-model head: it chooses between 50,257 tokens, and the
  embedding shares its weights.
- fp16: all matrices are stored in half precision and cast to fp32 when the session loads: half the file, the speed of
  fp32. ONNX Runtime has no half-precision products on x86 CPUs.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from ...runtime.graph_names import HEAD
from ..graph.builder import CONSTANT, Array, Graph
from .integer_matmul import SCALES, Blocks, MatMul, Scheme, restore_products
from .weights import BLOCK_SIZES, dequantize_per_channel, quantize_per_channel, to_half

INT8, DEQUANTIZED, FP16, FP32 = ".int8", ".dequantized", ".fp16", ".fp32"
"""Suffixes of quantised weights, of dequantised values, and of what was cast to half or single precision."""
_TYPE_CHANGES = {"Cast": (FP16, FP32), "QuantizeLinear": (INT8,), "DequantizeLinear": (DEQUANTIZED,)}
"""Operators that change a value's type in a typed graph, and the suffixes of their outputs."""
_PLAIN_GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0}


def quantize_graph(source: Path, target: Path, scheme: Scheme) -> list[Path]:
    """Write the int8 variant (int4 for `Blocks(4)`) of the fp32 graph `source`; returns its files, the graph first."""
    graph = Graph.load(source)
    rewriter = _Rewriter(graph, scheme)
    nodes, graph.nodes = graph.nodes, []
    uses = Counter(name for node in nodes for name in node.input)
    for node in nodes:
        inputs, first = list(node.input), len(graph.nodes)
        rewriter.rewrite(node)
        uses.update(name for new in graph.nodes[first:] for name in new.input)
        uses.subtract(inputs)
        for name in inputs:
            if not uses[name]:
                graph.weights.pop(name, None)  # unmapped, so that it leaves memory
    return graph.save(target)


def halve_graph(source: Path, target: Path) -> list[Path]:
    """Write the fp16 variant of the fp32 graph `source`; returns its files, the graph first.

    Raises:
        ItuneError: a weight is too large for half precision.
    """
    graph = Graph.load(source)
    casts = []
    for name, array in list(graph.weights.items()):
        if array.ndim >= 2 and array.dtype == np.float32:
            stored = name + FP16
            graph.weights[stored] = to_half(name, graph.weights.pop(name))
            casts.append(helper.make_node("Cast", [stored], [name], name=stored, to=onnx.TensorProto.FLOAT))
    graph.nodes = casts + graph.nodes
    return graph.save(target)


def float_graph(path: Path) -> Graph:
    """The fp32 graph from which an exported one was made, with the weights as they were rounded."""
    graph = Graph.load(path)
    restore_products(graph)
    weights, inputs = graph.weights, {value.name for value in graph.inputs}
    halves = {name: name.removesuffix(FP16) for name in weights if name.endswith(FP16)}
    for name, own in halves.items():
        weights.setdefault(own, weights.pop(name))
    sources = dict(halves)  # by a value of another type: its name in the fp32 graph
    nodes, graph.nodes = graph.nodes, []
    for node in nodes:
        stored, *others = node.input or [""]
        changes_type = node.name == node.output[0] and node.name.endswith(_TYPE_CHANGES.get(node.op_type, ()))
        if node.op_type == "DequantizeLinear" and stored.endswith(INT8) and stored in weights:
            own = sources[node.output[0]] = stored.removesuffix(INT8)
            if own not in weights:  # an embedding may be there in fp16 as well, which is more precise
                axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
                scales = weights[others[0]].astype(np.float32)
                weight = dequantize_per_channel(np.moveaxis(weights[stored], axis, 0), scales)
                weights[own] = np.moveaxis(weight, 0, axis)
        elif node.op_type == "Cast" and stored in halves:
            sources[node.output[0]] = halves[stored]
        elif changes_type and stored not in inputs:
            sources[node.output[0]] = sources.get(stored, stored)
        else:
            node.input[:] = [sources.get(name, name) for name in node.input]
            graph.nodes.append(node)
    used = {name: weights[name] for node in graph.nodes for name in node.input if name in weights}
    graph.weights = {n: a.astype(np.float32) if a.dtype == np.float16 else a for n, a in used.items()}
    domains = {node.domain for node in graph.nodes} | {""}
    graph.opsets = {domain: version for domain, version in graph.opsets.items() if domain in domains}
    return graph


def read_weights(path: Path) -> dict[str, Array]:
    """The weights of an exported graph in float32, under their names in the fp32 graph."""
    weights = {name: array for name, array in float_graph(path).weights.items() if not name.startswith(CONSTANT)}
    # The lookup in an int8 embedding reads codes and scales of a weight that is there already.
    stored = {f"{name}{suffix}" for name in weights for suffix in (INT8, SCALES)}
    return {name: array for name, array in weights.items() if name not in stored}


class _Rewriter:
    """Appends the replacement of one node after the other to a graph, with its weights."""

    def __init__(self, graph: Graph, scheme: Scheme) -> None:
        self.graph, self.scheme = graph, scheme
        found = (matmul for node in graph.nodes if (matmul := self.matmul(node)))
        self.embeddings = {m.weight for m in found if m.transposed and self.scheme_of(m) == Blocks()}

    def rewrite(self, node: onnx.NodeProto) -> None:
        matmul = self.matmul(node)
        if matmul:
            self.rewrite_matmul(node, matmul)
        elif node.op_type == "Gather" and node.input[0] in self.embeddings:
            self.rewrite_embedding(node)
        else:
            if node.op_type == "Conv" and node.input[1] in self.graph.weights:
                self.store_convolution(node)
            self.graph.nodes.append(node)

    def matmul(self, node: onnx.NodeProto) -> MatMul | None:
        """The node as x W or x W^T, perhaps with a bias, for a constant float32 W; None for other nodes."""
        weight = self.graph.weights.get(node.input[1]) if len(node.input) > 1 else None
        if weight is None or weight.ndim != 2 or weight.dtype != np.float32:
            return None
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = all(attributes.get(name, value) == value for name, value in _PLAIN_GEMM.items())
        if node.op_type != "MatMul" and not (node.op_type == "Gemm" and plain):
            return None
        return MatMul(node.name, node.input[0], node.input[1], node.output[0], attributes.get("transB") == 1)

    def scheme_of(self, matmul: MatMul) -> Scheme:
        return Blocks() if matmul.name.startswith(HEAD) else self.scheme

    def rewrite_matmul(self, node: onnx.NodeProto, matmul: MatMul) -> None:
        if len(node.input) < 3 or not node.input[2]:
            self.scheme_of(matmul).append(self.graph, matmul)
            return
        product = f"{matmul.output}.product"
        self.scheme_of(matmul).append(self.graph, matmul._replace(output=product))
        add = helper.make_node("Add", [product, node.input[2]], [matmul.output], name=f"{matmul.name}.bias")
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
