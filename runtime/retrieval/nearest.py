"""Nearest entries by inner product: exact over all of them with NumPy, or approximate by faiss and then exact.

An entry's score is computed for it alone in double precision, so that it does not depend on what else is scored with
it; equal scores stand in order of the entry.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..engines.base import Float32, Int64
from ..errors import DatastoreError

_CHUNK = 1 << 14  # entries that are scored at once
_ROUNDING = 1e-5  # more than what single precision loses in a product of unit vectors
_RERANKED = 4
"""The approximate index is asked for so many times what is wanted: its own scores are of 8-bit vectors."""

Embeddings = NDArray[Any]
"""Entries [N, D], float16 or float32 of length 1, usually memory-mapped."""


class Ranking(Protocol):
    """What is near to some queries."""

    def best(self, query: int, count: int) -> tuple[Int64, Float32]:
        """The `count` nearest entries of a query and their scores, best first; fewer where it finds no more."""
        ...


class FlatRanking:
    """Exact: every entry was scored."""

    def __init__(self, embeddings: Embeddings, queries: Float32) -> None:
        """Score all entries for `queries` [B, D], both of length 1."""
        self.embeddings, self.queries = embeddings, queries
        self.scores = np.empty((len(queries), len(embeddings)), np.float32)
        for start in range(0, len(embeddings), _CHUNK):
            chunk = np.asarray(embeddings[start : start + _CHUNK], np.float32)
            np.matmul(queries, chunk.T, out=self.scores[:, start : start + len(chunk)])

    def best(self, query: int, count: int) -> tuple[Int64, Float32]:
        """See `Ranking.best`."""
        scores = self.scores[query]
        if count < len(scores):
            threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
            entries = np.flatnonzero(scores >= threshold - _ROUNDING)
        else:
            entries = np.arange(len(scores))
        return _exact(self.embeddings, self.queries[query], entries, count)


class IvfRanking:
    """Approximate: entries of the clusters that are nearest to a query (faiss), then scored exactly."""

    def __init__(self, index: Any, embeddings: Embeddings, queries: Float32) -> None:
        self.index, self.embeddings, self.queries = index, embeddings, queries

    def best(self, query: int, count: int) -> tuple[Int64, Float32]:
        """See `Ranking.best`."""
        # One by one, since faiss computes a batch's distances to the clusters in another order.
        wanted = min(_RERANKED * count, len(self.embeddings))
        _, found = self.index.search(self.queries[query : query + 1], wanted)
        known = (found[0] >= 0) & (found[0] < len(self.embeddings))  # -1 where a cluster has no more
        entries = np.sort(found[0][known])
        return _exact(self.embeddings, self.queries[query], entries, count)


def load_ivf(path: Path, entries: int, dim: int, nprobe: int) -> Any:
    """A faiss index whose lists stay on disk, memory-mapped.

    Raises:
        DatastoreError: faiss is not installed, or cannot read the file.
    """
    try:
        import faiss
    except ImportError:
        raise DatastoreError(
            f"{path.parent}: a datastore of {entries:,} entries is searched by faiss: pip install 'itune[retrieval]'"
        ) from None
    try:
        index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        shape = (index.ntotal, index.d)
        index.nprobe = nprobe  # which an index without inverted lists lacks
        index.search(np.zeros((1, index.d), np.float32), 1)
    except Exception as error:  # RuntimeError, with a trace of faiss's own
        raise DatastoreError(f"{path}: faiss cannot read it ({str(error).strip()[-120:]}); build it again") from None
    if shape != (entries, dim):
        raise DatastoreError(
            f"{path}: holds {shape[0]} vectors of {shape[1]} instead of {entries} of {dim}; build it again"
        )
    return index


def _exact(embeddings: Embeddings, query: Float32, entries: Int64, count: int) -> tuple[Int64, Float32]:
    rows = embeddings[entries].astype(np.float64)
    scores = (rows * query.astype(np.float64)).sum(axis=1).astype(np.float32)
    order = np.lexsort((entries, -scores))[:count]
    return entries[order], scores[order]
