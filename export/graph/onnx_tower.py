"""Splice an ONNX vision tower into the vision graph, behind its normalisation, and cut it out again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnxruntime as ort
from onnx import compose, helper, inliner, numpy_helper, version_converter

from ...backbones import OnnxTower
from ...backbones.pretrained import BackboneError
from ...runtime.engines.onnxruntime import session_options
from ...runtime.errors import reading
from .builder import OPSET, Graph, read_tensor

PREFIX = "tower/"
_INPUT, _OUTPUT = f"{PREFIX}pixel_values", f"{PREFIX}last_hidden_state"


def append_onnx(graph: Graph, pixels: str, tower: OnnxTower) -> str:
    """Append the tower; returns its embeddings [images, N, d_v] for pixels uint8 [images, H, W, 3].

    All its names get the prefix `tower/`, by which a restore finds them.
    """
    with graph.scope("normalize"):
        x = graph.op("Transpose", pixels, perm=[0, 3, 1, 2])
        x = graph.op("Cast", x, to=onnx.TensorProto.FLOAT)
        # Folded into the first convolution, this would be wrong at padded borders.
        mean, std = np.array(tower.image.mean), np.array(tower.image.std)
        scale, shift = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
        x = graph.op("Mul", x, graph.initializer("normalize.scale", scale[:, None, None]))
        graph.op("Add", x, graph.initializer("normalize.shift", shift[:, None, None]), name=_INPUT)
    spliced = Graph.from_model(_prefixed(load_graph(tower)), tower.folder)
    graph.nodes += spliced.nodes
    graph.weights |= spliced.weights
    graph.opsets = spliced.opsets | graph.opsets
    return _OUTPUT


def load_graph(tower: OnnxTower) -> onnx.ModelProto:
    """The tower's graph in opset 20, for any number of images.

    Raises:
        BackboneError: the operators cannot be converted to opset 20, or the graph takes one image at a time.
    """
    model = inliner.inline_local_functions(onnx.load(tower.file, load_external_data=False))
    for tensor in _tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.CopyFrom(numpy_helper.from_array(read_tensor(tensor, tower.folder), tensor.name))
    version = next(opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx"))
    if version != OPSET:
        mend = f"export the tower with opset {OPSET} instead of {version}"
        with reading(tower.file, BackboneError, mend=mend):
            model = version_converter.convert_version(model, OPSET)
    batch = _source(model).type.tensor_type.shape.dim[0]
    if batch.HasField("dim_value"):
        batch.dim_param = "images"
        del model.graph.value_info[:]
        for output in model.graph.output:
            output.type.tensor_type.ClearField("shape")
        # Only a run shows whether a graph that was declared for one image works for two.
        options = session_options(1)
        options.log_severity_level = 4
        images = np.zeros((2, 3, *tower.image.output_size), np.float32)
        with reading(tower.file, BackboneError, mend="export the tower with a dynamic batch axis"):
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            session.run(None, {_source(model).name: images})
    return model


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)


def _source(model: onnx.ModelProto) -> onnx.ValueInfoProto:
    weights = {tensor.name for tensor in model.graph.initializer}
    source: onnx.ValueInfoProto = next(value for value in model.graph.input if value.name not in weights)
    return source


def _prefixed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with every name prefixed, its input and output under canonical names."""
    source, outputs = _source(model).name, [output.name for output in model.graph.output]
    output = "last_hidden_state" if "last_hidden_state" in outputs else outputs[0]
    model = compose.add_prefix(model, PREFIX)
    nodes = model.graph.node
    for i, node in enumerate(nodes):
        if node.name == PREFIX:  # it had no name
            node.name = f"{PREFIX}{node.op_type}_{i}"
    if PREFIX + source != _INPUT:
        nodes.insert(0, helper.make_node("Identity", [_INPUT], [PREFIX + source], f"{PREFIX}input"))
    if PREFIX + output != _OUTPUT:
        nodes.append(helper.make_node("Identity", [PREFIX + output], [_OUTPUT], f"{PREFIX}output"))
    return model


def extract_tower(vision: Graph) -> Graph:
    """The inverse of `append_onnx`: the tower in a vision graph, from float32 [images, 3, H, W] to embeddings."""
    tower = Graph("tower")
    tower.opsets = vision.opsets
    tower.nodes = [node for node in vision.nodes if node.name.startswith(PREFIX)]
    tower.weights = {_bare(name): array for name, array in vision.weights.items() if name.startswith(PREFIX)}
    for node in tower.nodes:
        _strip_prefix(node)
    height, width = (dim.dim_value for dim in vision.inputs[0].type.tensor_type.shape.dim[1:3])
    tower.input(_bare(_INPUT), np.float32, ("images", 3, height, width))
    tower.output(_bare(_OUTPUT), np.float32, ("images", "tokens", "width"))
    return tower


def _strip_prefix(node: onnx.NodeProto) -> None:
    node.name = _bare(node.name)
    for names in (node.input, node.output):
        names[:] = map(_bare, names)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for value in (*graph.initializer, *graph.input, *graph.output, *graph.value_info):
                value.name = _bare(value.name)
            for inner in graph.node:
                _strip_prefix(inner)


def _bare(name: str) -> str:
    return name.removeprefix(PREFIX)
