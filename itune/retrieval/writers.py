"""The files of a datastore as they are written: arrays and texts that grow, of any length, in little memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike, NDArray


class ArrayWriter:
    """A .npy file that grows; its length is written at the end, into the room that NumPy leaves for it."""

    def __init__(self, path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape, self.count = np.dtype(dtype), shape, 0
        self._file = path.open("wb")
        self._begin = self._header()

    def append(self, rows: NDArray[Any]) -> None:
        """Add `rows` [n, *shape]."""
        self._file.write(np.ascontiguousarray(rows, self.dtype).tobytes())
        self.count += len(rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        if kind is None:
            self._file.seek(0)
            assert self._header() == self._begin
        self._file.close()

    def _header(self) -> int:
        content = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.count, *self.shape)}
        npy.write_array_header_1_0(self._file, content)
        return self._file.tell()


class TextWriter:
    """NAME.txt, a text a line, and NAME.npy, where each begins."""

    def __init__(self, folder: Path, name: str) -> None:
        self._file = (folder / f"{name}.txt").open("wb")
        self._path = folder / f"{name}.npy"
        self._offsets = array("q", [0])

    @property
    def count(self) -> int:
        """How many texts there are."""
        return len(self._offsets) - 1

    def extend(self, texts: Iterator[str] | Sequence[str]) -> None:
        """Add texts."""
        for text in texts:
            line = f"{text}\n".encode()
            self._file.write(line)
            self._offsets.append(self._offsets[-1] + len(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        self._file.close()
        if kind is None:
            np.save(self._path, np.frombuffer(self._offsets, np.int64))
