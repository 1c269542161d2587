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
from .integer_matmul import SCALES, Blocks, MatMul, Scheme, in_floats, take_weight
from .weights import BLOCK_SIZES, dequantize_per_channel, quantize_per_channel, to_half

INT8, DEQUANTIZED, HALF = ".int8", ".dequantized", ".fp16"
"""Suffixes of quantised weights, of dequantised values, and of weights and values in half precision."""
_TYPE_CHANGES = {"Cast": (HALF, ".fp32"), "QuantizeLinear": (INT8,), "DequantizeLinear": (DEQUANTIZED,)}
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
            stored = name + HALF
            graph.weights[stored] = to_half(name, graph.weights.pop(name))
            casts.append(helper.make_node("Cast", [stored], [name], name=stored, to=onnx.TensorProto.FLOAT))
    graph.nodes = casts + graph.nodes
    return graph.save(target)


def read_weights(path: Path) -> dict[str, Array]:
    """The weights of an exported graph in float32, under their names in the fp32 graph."""
    graph = Graph.load(path)
    weights = {name: array for name, array in graph.weights.items() if not name.startswith(CONSTANT)}
    for node in graph.nodes:
        take_weight(node, weights)
        if not _is_storage(node, weights):
            continue
        if node.op_type == "Cast":
            weights[node.output[0]] = weights.pop(node.input[0]).astype(np.float32)
            continue
        codes, scales = node.input[:2]
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        channels_first = np.moveaxis(weights.pop(codes), axis, 0)
        weight = dequantize_per_channel(channels_first, weights.pop(scales).astype(np.float32))
        # An embedding may be there in fp16 as well, which is more precise.
        weights.setdefault(codes.removesuffix(INT8), np.moveaxis(weight, 0, axis))
    for name in [name for name in weights if name.endswith(HALF)]:  # small weights of a typed graph need no cast
        weights.setdefault(name.removesuffix(HALF), weights.pop(name))
    return {name: a.astype(np.float32) if a.dtype == np.float16 else a for name, a in weights.items()}


def float_graph(path: Path) -> Graph:
    """The fp32 graph from which an exported one was made, with the weights as they were rounded."""
    graph, floats = Graph.load(path), read_weights(path)
    nodes: list[onnx.NodeProto] = []
    sources = {f"{name}{suffix}": name for name in floats for suffix in (HALF, DEQUANTIZED)}
    inputs = {value.name for value in graph.inputs}
    for node in in_floats(graph.nodes):
        if _is_storage(node, graph.weights):
            continue
        changes_type = node.name == node.output[0] and node.name.endswith(_TYPE_CHANGES.get(node.op_type, ()))
        if changes_type and node.input[0] not in inputs:
            sources[node.output[0]] = sources.get(node.input[0], node.input[0])
            continue
        node.input[:] = [sources.get(name, name) for name in node.input]
        nodes.append(node)
    used = {name for node in nodes for name in node.input}
    graph.nodes = nodes
    graph.weights = {name: array for name, array in (graph.weights | floats).items() if name in used}
    domains = {node.domain for node in nodes} | {""}
    graph.opsets = {domain: version for domain, version in graph.opsets.items() if domain in domains}
    return graph


def _is_storage(node: onnx.NodeProto, weights: dict[str, Array]) -> bool:
    """Whether a node turns one of `weights` that this module stored into floats."""
    suffix = {"DequantizeLinear": INT8, "Cast": HALF}.get(node.op_type)
    return suffix is not None and node.input[0].endswith(suffix) and node.input[0] in weights


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
