"""The approximate index of a large datastore: faiss's inverted lists over 8-bit vectors.

Entries are clustered; a query is compared with those in the clusters that are nearest to it, and the best of them once
more with their embeddings themselves (`runtime.nearest`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.errors import DatastoreError
from ..runtime.retrieval.datastore import EMBEDDINGS, INDEX, Datastore

_CHUNK = 1 << 16
_TRAINING = 40  # entries for each cluster that k-means sees: faiss asks for 39 at least
_PROBED = 64
"""A query looks through one cluster in so many, and through `_LEAST_PROBED` at least."""
_LEAST_PROBED = 16


def clusters(entries: int) -> int:
    """How many clusters: the power of two next to 4 sqrt(entries), if k-means finds enough entries for each."""
    return int(2 ** round(np.log2(min(4 * np.sqrt(entries), entries / _TRAINING))))


def require_faiss() -> Any:
    """The module. Raises DatastoreError where it is not installed."""
    try:
        import faiss
    except ImportError:
        raise DatastoreError(
            "faiss not installed, and more than 100,000 entries need it: pip install 'itune[retrieval]'"
        ) from None
    return faiss


def write_index(folder: Path, base: Datastore | None, report: Callable[[str, int, int], None]) -> int:
    """Index the embeddings of `folder`; returns how many clusters a query has to look through.

    The index of `base`, whose entries come first, is extended unless there are now enough for more clusters.

    Raises:
        DatastoreError: faiss is not installed.
    """
    faiss = require_faiss()
    embeddings = np.load(folder / EMBEDDINGS, mmap_mode="r")
    count, dim = embeddings.shape
    lists = clusters(count)
    if base is not None and base.manifest.index == "ivf" and clusters(base.manifest.entries) == lists:
        index = faiss.read_index(str(base.folder / INDEX))
    else:
        index = _trained(faiss, embeddings, lists, dim, report)
    for start in range(index.ntotal, count, _CHUNK):
        index.add(np.asarray(embeddings[start : start + _CHUNK], np.float32))
        report("indexing", index.ntotal, count)
    faiss.write_index(index, str(folder / INDEX))
    return max(_LEAST_PROBED, lists // _PROBED)


def _trained(faiss: Any, embeddings: Any, lists: int, dim: int, report: Callable[[str, int, int], None]) -> Any:
    report("clustering", 0, lists)
    quantizer = faiss.IndexFlatIP(dim)
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, dim, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.niter = 10
    index.cp.max_points_per_centroid = _TRAINING
    rng = np.random.default_rng(0)
    sample = np.sort(rng.choice(len(embeddings), min(len(embeddings), _TRAINING * lists), replace=False))
    index.train(np.asarray(embeddings[sample], np.float32))
    return index
