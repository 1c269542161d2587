"""Read an ONNX graph's weights, and the files that it refers to, from protobuf's wire format.

onnx.proto has the numbers. The runtime needs no `onnx` library for that.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FIELDS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
"""Of each message, the fields that can contain a tensor, and their types."""
_EXTERNAL_DATA, _DATA_LOCATION, _EXTERNAL = 13, 14, 1
_GRAPH, _TENSOR = 7, 5
_DIMS, _DATA_TYPE, _NAME, _RAW_DATA = 1, 2, 8, 9
_TYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64, 10: np.float16}
_FIXED = {1: 8, 5: 4}
"""Bytes of a value by its wire type."""


def external_files(graph: Path) -> list[str]:
    """The locations, relative to the graph's folder, of its tensors' external data: sorted, each once.

    Initializers, attributes, subgraphs, functions and sparse tensors are searched; weights are not read into memory.

    Raises:
        ValueError: the file is no protobuf, or is cut off.
        OSError: the file cannot be read.
    """
    locations: set[str] = set()
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        waiting = [("model", 0, len(content))]
        while waiting:
            message, start, end = waiting.pop()
            if message == "tensor":
                locations |= _location(content, start, end)
                continue
            for number, value in _fields(content, start, end):
                if (kind := _FIELDS[message].get(number)) and isinstance(value, range):
                    waiting.append((kind, value.start, value.stop))
    return sorted(locations)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, which is read when it is needed."""

    path: Path
    dtype: np.dtype[Any]
    start: int
    shape: tuple[int, ...]

    def load(self) -> NDArray[Any]:
        """Read it; half precision becomes float32.

        Raises:
            OSError, ValueError: the file has changed.
        """
        array = np.fromfile(self.path, self.dtype, prod(self.shape), offset=self.start).reshape(self.shape)
        return array.astype(np.float32) if self.dtype == np.float16 else array


def find_weights(graph: Path) -> dict[str, StoredTensor]:
    """The initializers of a graph by name; those of other types than numbers' are left out.

    The files that the graph refers to were checked by `check_external_files`.

    Raises:
        ValueError: the file is no protobuf, or a tensor lies outside its file.
        OSError: a file cannot be read.
    """
    weights = {}
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        graphs = _messages(content, range(len(content)), _GRAPH)
        for tensor in (each for message in graphs for each in _messages(content, message, _TENSOR)):
            fields = list(_fields(content, tensor.start, tensor.stop))
            name, kind, raw = (dict(fields).get(number) for number in (_NAME, _DATA_TYPE, _RAW_DATA))
            if not isinstance(name, range) or not isinstance(kind, int) or kind not in _TYPES:
                continue
            external = _external_data(content, tensor.start, tensor.stop)
            if external is not None:
                path, start = graph.parent / external[b"location"].decode(), int(external.get(b"offset", b"0"))
                stop = path.stat().st_size
            elif isinstance(raw, range):
                path, start, stop = graph, raw.start, raw.stop
            else:
                continue
            stored = StoredTensor(path, np.dtype(_TYPES[kind]), start, _dims(content, fields))
            if not 0 <= start <= start + prod(stored.shape) * stored.dtype.itemsize <= stop:
                raise ValueError(f"tensor {content[name.start : name.stop]!r} of shape {stored.shape} is cut off")
            weights[content[name.start : name.stop].decode()] = stored
    return weights


def _messages(content: mmap.mmap, outer: range, number: int) -> Iterator[range]:
    """The bytes of the messages in a field of the message `outer`."""
    for found, value in _fields(content, outer.start, outer.stop):
        if found == number and isinstance(value, range):
            yield value


def _dims(content: mmap.mmap, fields: list[tuple[int, int | range]]) -> tuple[int, ...]:
    """The shape of a tensor, whose dimensions are one field or many."""
    dims = []
    for number, value in fields:
        if number == _DIMS and isinstance(value, range):
            start = value.start
            while start < value.stop:
                size, start = _varint(content, start, value.stop)
                dims.append(size)
        elif number == _DIMS and isinstance(value, int):
            dims.append(value)
    return tuple(dims)


def check_external_files(folder: Path, graph: str, listed: Collection[str]) -> None:
    """Check that the tensors of `folder / graph` refer only to files that are `listed`, as paths relative to `folder`.

    Raises:
        ValueError: a tensor refers to another file, or the graph is damaged.
        OSError: the graph cannot be read.
    """
    found = {str(PurePosixPath(graph).parent / location) for location in external_files(folder / graph)}
    if unlisted := found - {str(PurePosixPath(name)) for name in listed}:
        raise ValueError(f"it refers to {min(unlisted)!r}, which is not listed in its external_data")


def _location(content: mmap.mmap, start: int, end: int) -> set[str]:
    """The location of a tensor's data; none if the data is in the tensor."""
    external = _external_data(content, start, end)
    return {external[b"location"].decode()} if external and b"location" in external else set()


def _external_data(content: mmap.mmap, start: int, end: int) -> dict[bytes, bytes] | None:
    """Where the data of a tensor is (location, offset, length); None if it is in the tensor."""
    fields = list(_fields(content, start, end))
    if (_DATA_LOCATION, _EXTERNAL) not in fields:
        return None
    entries = {}
    for number, value in fields:
        if number == _EXTERNAL_DATA and isinstance(value, range):
            pair = {
                key: content[text.start : text.stop]
                for key, text in _fields(content, value.start, value.stop)
                if isinstance(text, range)
            }
            entries[pair.get(1, b"")] = pair.get(2, b"")
    return entries


def _fields(content: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int | range]]:
    """The numbers and values of a message's fields; a value with a length is the range of its bytes."""
    while start < end:
        tag, start = _varint(content, start, end)
        wire = tag & 7
        value: int | range = 0
        if wire == 0:
            value, start = _varint(content, start, end)
        elif wire == 2:
            length, start = _varint(content, start, end)
            value = range(start, start + length)
            start += length
        elif wire in _FIXED:
            start += _FIXED[wire]
        if start > end or wire not in (0, 2, *_FIXED):
            raise ValueError(f"no ONNX graph: damaged protobuf at byte {start}")
        yield tag >> 3, value


def _varint(content: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    """A variable-length integer, and where it ends."""
    value = 0
    for i, position in enumerate(range(start, min(start + 10, end))):
        value |= (content[position] & 127) << 7 * i
        if content[position] < 128:
            return value, position + 1
    raise ValueError(f"no ONNX graph: damaged protobuf at byte {start}")
