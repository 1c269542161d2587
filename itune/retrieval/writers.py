"""Write the files of a datastore: rows and texts piece by piece, as they may be larger than memory, and the index.

A large datastore has an approximate index: faiss's inverted lists over 8-bit vectors. Entries are clustered. A query is
compared to the entries of the nearest clusters, then to the exact embeddings of the best of these
(`runtime.retrieval.nearest`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike, NDArray

from ..progress import OnStage
from ..runtime.errors import DatastoreError, reading
from ..runtime.retrieval.datastore import EMBEDDINGS, INDEX, Datastore

_CHUNK = 1 << 16
_TRAINING = 40  # entries per cluster that k-means sees; faiss asks for at least 39
_PROBED = 64
"""A query searches one cluster in 64, and at least `_LEAST_PROBED`."""
_LEAST_PROBED = 16


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


def require_faiss() -> Any:
    """Return the module. Raises DatastoreError if it is not installed."""
    with reading(
        "more than 100,000 entries need faiss", DatastoreError, mend="pip install 'itune-captioner[retrieval]'"
    ):
        import faiss
    return faiss


def write_index(folder: Path, base: Datastore | None, progress: OnStage) -> int:
    """Index the embeddings of `folder`; return how many clusters a query searches.

    Extends the index of `base`, whose entries come first, unless there are now enough entries for more clusters.
    """
    faiss = require_faiss()
    embeddings = np.load(folder / EMBEDDINGS, mmap_mode="r")
    count, dim = embeddings.shape
    clusters = _clusters(count)
    if base is not None and base.manifest.index == "ivf" and _clusters(base.manifest.entries) == clusters:
        index = faiss.read_index(str(base.folder / INDEX))
    else:
        progress("clustering", 0, clusters)
        index = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatIP(dim), dim, clusters, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
        )
        index.cp.niter = 10
        index.cp.max_points_per_centroid = _TRAINING
        sample = np.random.default_rng(0).choice(count, min(count, _TRAINING * clusters), replace=False)
        index.train(np.asarray(embeddings[np.sort(sample)], np.float32))
    for start in range(index.ntotal, count, _CHUNK):
        index.add(np.asarray(embeddings[start : start + _CHUNK], np.float32))
        progress("indexing", index.ntotal, count)
    faiss.write_index(index, str(folder / INDEX))
    return max(_LEAST_PROBED, clusters // _PROBED)


def _clusters(entries: int) -> int:
    """Return the number of clusters: the power of two closest to 4 sqrt(entries) that k-means has entries for."""
    return int(2 ** round(np.log2(min(4 * np.sqrt(entries), entries / _TRAINING))))
