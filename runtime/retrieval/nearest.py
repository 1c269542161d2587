"""Nearest entries by inner product: exact with NumPy, or candidates from faiss that are then scored exactly.

The score of an entry is computed in double precision, row by row, so that it does not depend on the other entries.
Entries with equal scores keep their order in the datastore.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..engines.base import Float32, Int64

_CHUNK = 1 << 14  # entries that are scored at once
_ROUNDING = 1e-5  # more than the error of single precision in a product of unit vectors
_RERANKED = 4
"""faiss is asked for this multiple of the wanted entries, since its own scores are of 8-bit vectors."""

Embeddings = NDArray[Any]
"""Entries [N, D], float16 or float32 of length 1, usually memory-mapped."""


class Ranking(Protocol):
    """Finds the entries nearest to each of some queries."""

    def best(self, query: int, count: int) -> tuple[Int64, Float32]:
        """The `count` nearest entries of a query and their scores, best first; an approximate index may find fewer."""
        ...


class FlatRanking:
    """Exact: scores every entry."""

    def __init__(self, embeddings: Embeddings, queries: Float32) -> None:
        """Score all entries for `queries` [B, D], both of length 1."""
        self.embeddings, self.queries = embeddings, queries
        self.scores = np.empty((len(queries), len(embeddings)), np.float32)
        for start in range(0, len(embeddings), _CHUNK):
            chunk = np.asarray(embeddings[start : start + _CHUNK], np.float32)
            np.matmul(queries, chunk.T, out=self.scores[:, start : start + len(chunk)])

    def best(self, query: int, count: int) -> tuple[Int64, Float32]:
        """The nearest entries, from those whose single-precision score is close enough."""
        scores, entries = self.scores[query], np.arange(len(self.embeddings))
        if count < len(scores):
            threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
            entries = np.flatnonzero(scores >= threshold - _ROUNDING)
        return _exact(self.embeddings, self.queries[query], entries, count)


class IvfRanking:
    """Approximate: scores entries of the clusters (inverted lists) nearest to a query."""

    def __init__(self, index: Any, embeddings: Embeddings, queries: Float32) -> None:
        self.index, self.embeddings, self.queries = index, embeddings, queries

    def best(self, query: int, count: int) -> tuple[Int64, Float32]:
        """The nearest entries of those that faiss finds."""
        # One by one: faiss computes a batch's distances to the clusters in another order.
        _, found = self.index.search(self.queries[query : query + 1], min(_RERANKED * count, len(self.embeddings)))
        known = (found[0] >= 0) & (found[0] < len(self.embeddings))  # -1 where the clusters have no more
        return _exact(self.embeddings, self.queries[query], np.sort(found[0][known]), count)


def load_ivf(path: Path, dim: int, nprobe: int) -> Any:
    """A faiss index with memory-mapped lists, which looks through `nprobe` of them for a query."""
    import faiss

    index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    faiss.extract_index_ivf(index).nprobe = nprobe
    index.search(np.zeros((1, dim), np.float32), 1)  # fails for another width
    return index


def _exact(embeddings: Embeddings, query: Float32, entries: Int64, count: int) -> tuple[Int64, Float32]:
    rows = embeddings[entries].astype(np.float64)
    scores = (rows * query.astype(np.float64)).sum(axis=1).astype(np.float32)
    order = np.lexsort((entries, -scores))[:count]
    return entries[order], scores[order]
