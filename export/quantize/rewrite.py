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

from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from ...runtime.graph_names import HEAD
from ..graph.builder import CONSTANT, Array, Graph, attributes
from .integer_matmul import INT8, SCALES, Blocks, Scheme, is_product, is_transposed, restore_products
from .weights import BLOCK_SIZES, dequantize_per_channel, quantize_per_channel, to_half

DEQUANTIZED, FP16, FP32 = ".dequantized", ".fp16", ".fp32"
"""Suffixes of dequantised values, and of what was cast to half or single precision."""
_TYPE_CHANGES = {"Cast": (FP16, FP32), "QuantizeLinear": (INT8,), "DequantizeLinear": (DEQUANTIZED,)}
"""Operators that change a value's type in a typed graph, and the suffixes of their outputs."""


def quantize_graph(source: Path, target: Path, scheme: Scheme) -> list[Path]:
    """Write the int8 variant (int4 for `Blocks(4)`) of the fp32 graph `source`; returns its files, the graph first."""
    graph = Graph.load(source)

    def own_scheme(node: onnx.NodeProto) -> Scheme | None:
        if not is_product(graph, node):
            return None
        return Blocks() if node.name.startswith(HEAD) else scheme

    nodes = [(node, own_scheme(node)) for node in graph.nodes]
    embeddings = {node.input[1] for node, own in nodes if own == Blocks() and is_transposed(node)}
    graph.nodes = []
    for node, own in nodes:
        if own is not None:
            _append_product(graph, node, own)
        elif node.op_type == "Gather" and node.input[0] in embeddings:
            _append_embedding(graph, node)
        else:
            if node.op_type == "Conv" and node.input[1] in graph.weights:
                _store_convolution(graph, node)
            graph.nodes.append(node)
    graph.drop_unused_weights()
    return graph.save(target)


def _append_product(graph: Graph, node: onnx.NodeProto, scheme: Scheme) -> None:
    (output,), biases = node.output, [name for name in node.input[2:] if name]
    if biases:
        node.output[0] = f"{output}.product"
    scheme.append(graph, node)
    if biases:
        add = helper.make_node("Add", [node.output[0], *biases], [output], name=f"{node.name}.bias")
        graph.nodes.append(add)


def _append_embedding(graph: Graph, node: onnx.NodeProto) -> None:
    table, indices = node.input
    codes, (_, width) = Blocks().store(graph, table, transpose=False)
    with graph.scope(node.name):
        rows = graph.op("Cast", graph.op("Gather", codes, indices), to=onnx.TensorProto.FLOAT)
        rows = graph.op("Sub", rows, graph.constant(128, np.float32))
        scale = graph.op("Unsqueeze", graph.op("Gather", table + SCALES, indices), graph.constant([-1]))
        rows = graph.op("Reshape", graph.op("Mul", rows, scale), graph.constant([0, 0, -1]))
        if width % BLOCK_SIZES[8]:
            graph.op("Slice", rows, graph.constant([0]), graph.constant([width]), graph.constant([-1]))
    graph.nodes[-1].output[:] = node.output


def _store_convolution(graph: Graph, node: onnx.NodeProto) -> None:
    name = node.input[1]
    dequantized = node.input[1] = f"{name}{DEQUANTIZED}"
    if f"{name}{INT8}" not in graph.weights:
        codes, scales = quantize_per_channel(graph.weights[name])
        inputs = [graph.initializer(f"{name}{INT8}", codes), graph.initializer(f"{name}{SCALES}", scales)]
        graph.nodes.append(helper.make_node("DequantizeLinear", inputs, [dequantized], name=dequantized, axis=0))


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
                axis = attributes(node).get("axis", 0)
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
    graph.drop_unused_weights()
    graph.weights = {n: a.astype(np.float32) if a.dtype == np.float16 else a for n, a in graph.weights.items()}
    domains = {node.domain for node in graph.nodes} | {""}
    graph.opsets = {domain: version for domain, version in graph.opsets.items() if domain in domains}
    return graph


def read_weights(path: Path) -> dict[str, Array]:
    """The weights of an exported graph in float32, under their names in the fp32 graph."""
    weights = {name: array for name, array in float_graph(path).weights.items() if not name.startswith(CONSTANT)}
    # The lookup in an int8 embedding reads codes and scales of a weight that is there already.
    stored = {f"{name}{suffix}" for name in weights for suffix in (INT8, SCALES)}
    return {name: array for name, array in weights.items() if name not in stored}
