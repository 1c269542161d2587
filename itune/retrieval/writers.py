"""Write the files of a datastore piece by piece, so that they may be larger than memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike, NDArray


def write_rows(path: Path, dtype: DTypeLike, shape: tuple[int, ...], chunks: Iterable[NDArray[Any]]) -> None:
    """Write a .npy file of `shape` from `chunks` of its rows.

    Not through a memory map: on a full disk that kills the process instead of raising OSError.
    """
    with path.open("wb") as file:
        header = {"descr": npy.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(file, header)
        for rows in chunks:
            file.write(np.ascontiguousarray(rows, dtype).tobytes())


class TextWriter:
    """Writes NAME.txt, one text per line, and NAME.npy, the byte offset of each line."""

    def __init__(self, folder: Path, name: str) -> None:
        self._file = (folder / f"{name}.txt").open("wb")
        self._path = folder / f"{name}.npy"
        self._offsets = array("q", [0])

    @property
    def count(self) -> int:
        """The number of texts so far."""
        return len(self._offsets) - 1

    def extend(self, texts: Iterable[str]) -> None:
        """Append texts, which must not contain line breaks."""
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
