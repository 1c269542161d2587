"""A builder of ONNX graphs that keeps weights out of protobuf, whose limit of 2 GB GPT-2 large exceeds.

Weights stay NumPy arrays, never copied, until `Graph.save` streams them to disk one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx
from numpy.typing import ArrayLike, DTypeLike, NDArray
from onnx import helper, numpy_helper

from ...files import atomic_path
from ...runtime.errors import ItuneError, reading

OPSET = 20
IR_VERSION = 10
MICROSOFT = "com.microsoft"
EXTERNAL_BYTES = 256 << 20
"""From this total size on, weights go to a file of their own, which runtimes map instead of parsing."""
_ALIGNMENT = 4096
CONSTANT = "constant."
"""Prefix of the names that `Graph.constant` gives; all other initializers are weights."""

Array = NDArray[Any]
Weights = Mapping[str, Array]


class Graph:
    """A graph under construction, or read from a file: nodes, weights by name, inputs and outputs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Array] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.opsets = {"": OPSET}
        self._scope = ""
        self._taken: dict[str, int] = {}

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a graph; external weights stay on disk, mapped read-only."""
        return cls.from_model(onnx.load(path, load_external_data=False), path.parent)

    @classmethod
    def from_model(cls, model: onnx.ModelProto, folder: Path) -> Self:
        """Take a model of any opset apart; the files of its external weights are in `folder`."""
        graph = cls(model.graph.name)
        graph.nodes = list(model.graph.node)
        graph.weights = {t.name: read_tensor(t, folder) for t in model.graph.initializer}
        graph.inputs = [i for i in model.graph.input if i.name not in graph.weights]
        graph.outputs = list(model.graph.output)
        graph.opsets = {opset.domain: opset.version for opset in model.opset_import}
        names = [*graph.weights, *(i.name for i in graph.inputs)]
        names += [name for node in graph.nodes for name in (node.name, *node.output)]
        graph._taken = dict.fromkeys(names, 0)
        return graph

    def input(self, name: str, dtype: DTypeLike, shape: Sequence[int | str]) -> str:
        """Declare an input; a dimension is a size, or a name if it varies."""
        self.inputs.append(value_info(self._claim(name), dtype, shape))
        return name

    def output(self, name: str, dtype: DTypeLike, shape: Sequence[int | str]) -> None:
        """Declare the value `name`, made by `op(..., name=name)`, an output of the graph."""
        self.outputs.append(value_info(name, dtype, shape))

    def initializer(self, name: str, array: Array) -> str:
        """Add a weight under its full name (the scope does not apply)."""
        self.weights[self._claim(name)] = array
        return name

    def constant(self, values: ArrayLike, dtype: DTypeLike = np.int64) -> str:
        """A small constant (axes, shape, scalar); equal constants share an initializer."""
        array = np.asarray(values, dtype)
        name = f"{CONSTANT}{array.dtype}.{array.tolist()}".replace(" ", "")
        if name not in self.weights:
            self.initializer(name, array)
        return name

    def op(self, op_type: str, *inputs: str, name: str | None = None, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output and return the output's name; "" omits an optional input."""
        return self.ops(op_type, *inputs, names=[name], domain=domain, **attributes)[0]

    def ops(
        self, op_type: str, *inputs: str, names: Sequence[str | None], domain: str = "", **attributes: Any
    ) -> list[str]:
        """Append a node with `len(names)` outputs; None names an output after the node."""
        node_name = self._free(f"{self._scope}{op_type}")
        defaults = [node_name, *(f"{node_name}.{i}" for i in range(1, len(names)))]
        outputs = [
            default if name is None else self._claim(name) for name, default in zip(names, defaults, strict=True)
        ]
        if domain:
            self.opsets.setdefault(domain, 1)
        self.nodes.append(helper.make_node(op_type, inputs, outputs, name=node_name, domain=domain, **attributes))
        return outputs

    def drop_unused_weights(self) -> None:
        """Keep only the weights that a node, or a graph inside it, reads."""
        used = set(_read_names(self.nodes))
        self.weights = {name: array for name, array in self.weights.items() if name in used}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Within the block, nodes are named `name/...` (nested scopes join)."""
        before, self._scope = self._scope, f"{self._scope}{name}/"
        try:
            yield
        finally:
            self._scope = before

    def to_model(self, inputs: Sequence[onnx.ValueInfoProto]) -> onnx.ModelProto:
        """The graph without its weights, and with these inputs."""
        return helper.make_model(
            helper.make_graph(self.nodes, self.name, inputs, self.outputs),
            opset_imports=[helper.make_opsetid(*opset) for opset in sorted(self.opsets.items())],
            ir_version=IR_VERSION,
            producer_name="itune",
        )

    def save(self, path: Path) -> list[Path]:
        """Write the graph, with equal bytes for equal graphs; returns its files, the graph first.

        From `EXTERNAL_BYTES` on, the larger weights go to `<path>.data`. Each file is written atomically.
        """
        model = self.to_model(self.inputs)
        files = [path]
        if sum(array.nbytes for array in self.weights.values()) < EXTERNAL_BYTES:
            model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in self.weights.items())
        else:
            data = path.with_name(path.name + ".data")
            with atomic_path(data) as temporary, temporary.open("wb") as file:
                for name, array in self.weights.items():
                    model.graph.initializer.append(_stream_tensor(name, array, data.name, file))
            files.append(data)
        with atomic_path(path) as temporary:
            temporary.write_bytes(model.SerializeToString(deterministic=True))
        return files

    def _claim(self, name: str) -> str:
        assert name not in self._taken, f"the graph already has a value named {name!r}"
        self._taken[name] = 0
        return name

    def _free(self, stem: str) -> str:
        name = stem
        while name in self._taken:
            self._taken[stem] += 1
            name = f"{stem}_{self._taken[stem]}"
        return self._claim(name)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _read_names(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _read_names(inner.node)


def value_info(name: str, dtype: DTypeLike, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    """An input or output of a graph; a dimension is a size, or a name if it varies."""
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def read_tensor(tensor: onnx.TensorProto, folder: Path) -> Array:
    """A tensor of a graph in `folder`. Unlike onnx itself, takes external data behind a link, as in a hub's cache."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    where = {entry.key: entry.value for entry in tensor.external_data}
    path, offset = folder / where["location"], int(where.get("offset", 0))
    if not path.is_relative_to(folder) or ".." in path.relative_to(folder).parts:
        raise ItuneError(f"{path}: external weights must be in the graph's folder; put them there")
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    with reading(path, mend=f"copy the file again, which contains weight {tensor.name}"):
        mapped: Array = np.memmap(path, dtype, "r", offset, tuple(tensor.dims))
    return mapped


def _stream_tensor(name: str, array: Array, location: str, file: Any) -> onnx.TensorProto:
    if array.nbytes < 1024:  # shape inference reads the constants
        return numpy_helper.from_array(array, name)
    file.write(bytes(-file.tell() % _ALIGNMENT))
    tensor = onnx.TensorProto(
        name=name,
        dims=array.shape,
        data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in (("location", location), ("offset", file.tell()), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    np.ascontiguousarray(array).tofile(file)
    return tensor
