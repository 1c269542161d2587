"""Write the files of a datastore piece by piece, so that they may be larger than memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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


def write_texts(folder: Path, name: str, texts: Iterable[str]) -> None:
    """Write NAME.txt, one text per line, and NAME.npy, the byte offsets of the lines. Texts contain no line breaks."""
    offsets = array("q", [0])
    with (folder / f"{name}.txt").open("wb") as file:
        for text in texts:
            offsets.append(offsets[-1] + file.write(f"{text}\n".encode()))
    np.save(folder / f"{name}.npy", np.frombuffer(offsets, np.int64))
