"""Rewrite an fp32 graph so that it states its own types, as TensorRT's strongly typed networks require.

- fp16: matrix products, caches, visual keys and values in half precision. In fp32 stay the sums that grow over the
  layers (the residual stream), LayerNorm, every softmax, the adapters' Q K^T (an unbounded sum over up to 640
  products), and the head: its logits and their log-sum-exp.
- int8: the same, with products with a constant matrix between QuantizeLinear and DequantizeLinear: symmetric, zero
  point 0, weights per output channel, activations per tensor with a scale from calibration. Attention, caches and
  depthwise convolutions stay in fp16.

All operators are standard ones, so the same graph runs on ONNX Runtime. Weights keep their names; a quantised one is
`NAME.int8` and `NAME.scales`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from ...runtime import graph_names
from ...runtime.errors import ItuneError
from ..graph.builder import Array, Graph, attributes, value_info
from ..graph.onnx_tower import PREFIX as TOWER
from ..options import Precision
from ..quantize.integer_matmul import INT8, SCALES
from ..quantize.rewrite import DEQUANTIZED, FP16, FP32
from ..quantize.weights import QMAX, to_half

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
Kind = int
"""FLOAT or HALF."""
_SUFFIX: dict[Kind, str] = {FLOAT: FP32, HALF: FP16}
_MATMULS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_FLOAT_OPS = (
    "LayerNormalization", "InstanceNormalization", "GroupNormalization", "BatchNormalization", "LpNormalization",
    "Softmax", "LogSoftmax", "Exp", "Log", "Pow", "Sqrt", "Reciprocal", "ReduceSum", "ReduceMean", "ReduceL2",
    "ReduceLogSumExp", "QuantizeLinear", "DequantizeLinear", "TopK",
)  # fmt: skip
_ONE_FLOAT_INPUT = ("Resize",)  # its other inputs are float32 in any precision
_LARGE = 1024
"""From this many values on, weights are stored in half precision, whatever they are computed in."""
_TINY = np.float16(2**-24)


def type_graph(graph: Graph, precision: Precision, ranges: Mapping[str, float] | None = None) -> None:
    """Turn an fp32 graph into one in fp32, fp16 or int8 that TensorRT accepts.

    `ranges`, for int8: the largest magnitude of each value that `quantized_inputs` names.

    Raises:
        ItuneError: a weight is too large for half precision, or an operator contains a subgraph.
    """
    cast_pixels_first(graph)
    if precision != "fp32":
        _Typer(graph, ranges if precision == "int8" else None).run()


def cast_outputs(graph: Graph, kind: Kind) -> None:
    """Cast the float outputs of a typed graph to `kind`: the decoder's inputs and the vision graph's outputs agree."""
    source = FLOAT if kind == HALF else HALF
    other = {value.name: value for value in graph.outputs if value.type.tensor_type.elem_type == source}
    before = {name: f"{name}{_SUFFIX[source]}" for name in other}
    for node in graph.nodes:
        for names in (node.input, node.output):
            names[:] = [before.get(name, name) for name in names]
    for name, value in other.items():
        graph.nodes.append(helper.make_node("Cast", [before[name]], [name], name=f"{name}.cast", to=kind))
        value.type.tensor_type.elem_type = kind


def cast_pixels_first(graph: Graph) -> None:
    """Move a vision graph's cast of bytes to its beginning: TensorRT can only cast uint8."""
    pixels = [v.name for v in graph.inputs if v.type.tensor_type.elem_type == TensorProto.UINT8]
    floats = {name: f"{name}{FP32}" for name in pixels}
    nodes = [helper.make_node("Cast", [old], [new], name=new, to=FLOAT) for old, new in floats.items()]
    for node in graph.nodes:
        of_bytes = bool(floats.keys() & set(node.input))
        node.input[:] = [floats.get(name, name) for name in node.input]
        if of_bytes and node.op_type == "Cast":
            floats[node.output[0]] = node.input[0]
            continue
        if of_bytes and node.op_type != "Shape":
            floats |= {name: name for name in node.output}
        nodes.append(node)
    graph.nodes = nodes


def quantized_inputs(graph: Graph) -> list[str]:
    """The activations of an fp32 graph that int8 quantises: the input of every product with a constant matrix."""
    return list(dict.fromkeys(node.input[0] for node in graph.nodes if _weight_axis(node, graph.weights) is not None))


def _weight_axis(node: onnx.NodeProto, weights: Mapping[str, Array]) -> int | None:
    """The axis of the output channels in a product's constant weight; None if it is not quantised."""
    weight = weights.get(node.input[1]) if len(node.input) > 1 else None
    if weight is None or weight.dtype != np.float32 or node.input[0] in weights:
        return None
    options = attributes(node)
    if node.op_type == "Conv":
        return 0 if options.get("group", 1) == 1 else None
    if weight.ndim != 2 or options.get("transA"):
        return None
    return {"MatMul": 1, "Gemm": 0 if options.get("transB") else 1}.get(node.op_type)


def float_values(graph: Graph) -> set[str]:
    """The names of all float32 values of a graph."""
    weights = [value_info(name, array.dtype, array.shape) for name, array in graph.weights.items()]
    found = onnx.shape_inference.infer_shapes(graph.to_model([*graph.inputs, *weights])).graph
    values = [*found.input, *found.output, *found.value_info]
    return {value.name for value in values if value.type.tensor_type.elem_type == FLOAT}


class _Typer:
    """Gives every float value of a graph its type, and casts where types meet."""

    def __init__(self, graph: Graph, ranges: Mapping[str, float] | None) -> None:
        self.graph, self.ranges = graph, ranges
        self.floats = float_values(graph)
        self.source = dict(graph.weights)
        self.kinds: dict[str, Kind] = {}  # of every float activation so far
        self.casts: dict[tuple[str, Kind], str] = {}

    def run(self) -> None:
        g = self.graph
        nodes, g.nodes = g.nodes, []
        for value in g.inputs:
            if value.type.tensor_type.elem_type == FLOAT:
                value.type.tensor_type.elem_type = self.kinds[value.name] = HALF
        for node in nodes:
            self.rewrite(node)
        for value in g.outputs:
            if value.name in self.kinds:
                value.type.tensor_type.elem_type = self.kinds[value.name]
        g.drop_unused_weights()

    def rewrite(self, node: onnx.NodeProto) -> None:
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise ItuneError(f"node {node.name}: TensorRT plans support no {node.op_type}; export the tower without it")
        if not self.floats.intersection((*node.input, *node.output)):
            self.graph.nodes.append(node)
            return
        kind, inputs = self.kind(node), list(node.input)
        axis = None if self.ranges is None else _weight_axis(node, self.source)
        if axis is not None:
            inputs[:2] = self.quantized(inputs[0], kind), self.quantized_weight(inputs[1], kind, axis)
        last = 1 if node.op_type in _ONE_FLOAT_INPUT else len(inputs)
        inputs[:last] = [self.cast(name, kind) if name in self.floats else name for name in inputs[:last]]
        node.input[:] = inputs
        self.graph.nodes.append(node)
        self.kinds |= dict.fromkeys(self.floats.intersection(node.output), kind)

    def kind(self, node: onnx.NodeProto) -> Kind:
        """The type that a node computes in."""
        if node.op_type in (*_FLOAT_OPS, "Cast") or node.name.startswith(graph_names.HEAD):
            return FLOAT
        if node.op_type in _MATMULS:
            visual = node.input[1].startswith(graph_names.VISUAL)
            return FLOAT if visual and node.input[1].endswith(".keys") else HALF
        activations = [name for name in node.input if name in self.floats and name not in self.source]
        if node.op_type == "Concat":
            return HALF
        if graph_names.RESIDUAL in node.name.split("/") and not node.name.startswith(TOWER):
            return FLOAT
        if not activations:
            table = self.source.get(node.input[0]) if node.input else None
            return HALF if node.op_type == "Gather" and table is not None and table.size >= _LARGE else FLOAT
        return HALF if all(self.kinds[name] == HALF for name in activations) else FLOAT

    def cast(self, name: str, kind: Kind) -> str:
        """The name of the value in that type."""
        weights, array = self.graph.weights, self.source.get(name)
        if array is None:
            return name if self.kinds[name] == kind else self.append_cast(name, kind)
        if array.size >= _LARGE:
            if weights[name].dtype == np.float32:
                weights[name] = to_half(name, array)
            return name if kind == HALF else self.append_cast(name, FLOAT)
        if kind == FLOAT:
            return name
        small = f"{name}{FP16}"
        if small not in weights:  # clipped: it may be a mask's value, or the end of a Clip
            self.graph.initializer(small, to_half(name, array, clip=True))
        return small

    def append_cast(self, name: str, kind: Kind) -> str:
        if (name, kind) not in self.casts:
            cast = self.casts[name, kind] = f"{name}{_SUFFIX[kind]}"
            self.graph.nodes.append(helper.make_node("Cast", [name], [cast], name=cast, to=kind))
        return self.casts[name, kind]

    def quantized(self, name: str, kind: Kind) -> str:
        """The name of an activation, quantised to int8 and dequantised."""
        assert self.ranges is not None
        x = self.cast(name, kind)
        if (x, TensorProto.INT8) not in self.casts:
            g, scale = self.graph, f"{x}.scale"
            g.initializer(scale, _scales(np.array(self.ranges[name] / QMAX), kind))
            zero = g.constant(0, np.int8)
            codes, back = f"{x}{INT8}", f"{x}{DEQUANTIZED}"
            g.nodes += [
                helper.make_node("QuantizeLinear", [x, scale, zero], [codes], name=codes),
                helper.make_node("DequantizeLinear", [codes, scale, zero], [back], name=back),
            ]
            self.casts[x, TensorProto.INT8] = back
        return self.casts[x, TensorProto.INT8]

    def quantized_weight(self, name: str, kind: Kind, axis: int) -> str:
        """The name of a weight, stored in int8 with a scale for each index of `axis`, and dequantised."""
        codes, scales, back = f"{name}{INT8}", f"{name}{SCALES}", f"{name}{DEQUANTIZED}"
        if codes not in self.graph.weights:
            weight = self.source[name]
            others = tuple(i for i in range(weight.ndim) if i != axis)
            steps = _scales(np.abs(weight).max(axis=others, keepdims=True) / QMAX, kind)
            # Divided by the rounded scale, whose rounding then costs no precision.
            rounded = np.rint(weight / steps.astype(np.float32)).clip(-QMAX, QMAX)
            self.graph.weights[codes], self.graph.weights[scales] = rounded.astype(np.int8), steps.ravel()
            self.graph.nodes.append(helper.make_node("DequantizeLinear", [codes, scales], [back], name=back, axis=axis))
        return back


def _scales(steps: Array, kind: Kind) -> Array:
    """Scales that are at least `steps`, so that nothing is clipped."""
    if kind == FLOAT:
        return np.where(steps > 0, steps, 1).astype(np.float32)
    half = steps.astype(np.float16)
    half = np.where(half.astype(np.float32) < steps, np.nextafter(half, np.float16(np.inf)), half)
    return np.maximum(half, _TINY).astype(np.float16)
