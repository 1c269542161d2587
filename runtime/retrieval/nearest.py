"""Nearest entries by inner product: exact with NumPy, or candidates from faiss that are then scored exactly.

The score of an entry is computed in double precision, row by row, so that it does not depend on the other entries.
Entries with equal scores keep their order in the datastore.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.base import Float32, Int64

_CHUNK = 1 << 14  # entries that are scored at once
_ROUNDING = 1e-5  # more than the error of single precision in a product of unit vectors
_RERANKED = 4
"""faiss is asked for this multiple of the wanted entries, since its own scores are of 8-bit vectors."""


class Ranking:
    """Finds the entries nearest to some queries."""

    def __init__(self, embeddings: NDArray[Any], queries: Float32, index: Any = None) -> None:
        """`embeddings` [N, D], float16 or float32, and `queries` [B, D], all of length 1.

        `index` None: exact; a faiss index: only entries of the nearest clusters.
        """
        self.embeddings, self.queries, self.index = embeddings, queries, index
        self.scores = np.empty((0 if index else len(queries), len(embeddings)), np.float32)
        for start in range(0, 0 if index else len(embeddings), _CHUNK):
            chunk = np.asarray(embeddings[start : start + _CHUNK], np.float32)
            np.matmul(queries, chunk.T, out=self.scores[:, start : start + len(chunk)])

    def best(self, query: int, count: int) -> tuple[Int64, Float32]:
        """The `count` nearest entries of a query and their scores, best first; a faiss index may find fewer."""
        total, entries = len(self.embeddings), np.arange(len(self.embeddings))
        if self.index:
            # One query at a time: faiss computes a batch's distances to the clusters in another order.
            _, found = self.index.search(self.queries[query : query + 1], min(_RERANKED * count, total))
            entries = np.sort(found[0][(found[0] >= 0) & (found[0] < total)])  # -1 where the clusters have no more
        elif count < total:
            scores = self.scores[query]
            entries = np.flatnonzero(scores >= np.partition(scores, total - count)[total - count] - _ROUNDING)
        rows = self.embeddings[entries].astype(np.float64)
        exact = (rows * self.queries[query].astype(np.float64)).sum(axis=1).astype(np.float32)
        order = np.lexsort((entries, -exact))[:count]
        return entries[order], exact[order]


def load_ivf(path: Path, shape: tuple[int, int], nprobe: int) -> Any:
    """A faiss index of vectors [N, D] = `shape` in memory-mapped lists; a query looks through `nprobe` of them."""
    import faiss

    index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    faiss.extract_index_ivf(index).nprobe = nprobe
    if (index.ntotal, index.d) != shape:
        raise ValueError(f"{index.ntotal} vectors of {index.d} numbers instead of {shape[0]} of {shape[1]}")
    index.search(np.zeros((1, index.d), np.float32), 1)  # fails for nprobe 0
    return index
