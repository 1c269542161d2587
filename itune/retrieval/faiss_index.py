"""The approximate index of a large datastore: faiss's inverted lists over 8-bit vectors.

Entries are clustered. A query is compared to the entries of the nearest clusters, and to the exact embeddings of the
best of these (`runtime.retrieval.nearest`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..progress import OnStage
from ..runtime.errors import DatastoreError, reading
from ..runtime.retrieval.datastore import EMBEDDINGS, INDEX, Datastore

_CHUNK = 1 << 16
_TRAINING = 40  # entries per cluster that k-means sees; faiss asks for at least 39
_PROBED = 64
"""A query searches one cluster in 64, and at least `_LEAST_PROBED`."""
_LEAST_PROBED = 16


def clusters(entries: int) -> int:
    """Return the number of clusters: the power of two closest to 4 sqrt(entries) that k-means has entries for."""
    return int(2 ** round(np.log2(min(4 * np.sqrt(entries), entries / _TRAINING))))


def require_faiss() -> Any:
    """Return the module. Raises DatastoreError if it is not installed."""
    with reading("more than 100,000 entries need faiss", DatastoreError, mend="pip install 'itune[retrieval]'"):
        import faiss
    return faiss


def write_index(folder: Path, base: Datastore | None, progress: OnStage) -> int:
    """Index the embeddings of `folder`; return how many clusters a query searches.

    Extends the index of `base`, whose entries come first, unless there are now enough entries for more clusters.
    """
    faiss = require_faiss()
    embeddings = np.load(folder / EMBEDDINGS, mmap_mode="r")
    count = len(embeddings)
    lists = clusters(count)
    if base is not None and base.manifest.index == "ivf" and clusters(base.manifest.entries) == lists:
        index = faiss.read_index(str(base.folder / INDEX))
    else:
        progress("clustering", 0, lists)
        index = _trained(faiss, embeddings, lists)
    for start in range(index.ntotal, count, _CHUNK):
        index.add(np.asarray(embeddings[start : start + _CHUNK], np.float32))
        progress("indexing", index.ntotal, count)
    faiss.write_index(index, str(folder / INDEX))
    return max(_LEAST_PROBED, lists // _PROBED)


def _trained(faiss: Any, embeddings: Any, lists: int) -> Any:
    dim = embeddings.shape[1]
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(dim), dim, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.niter = 10
    index.cp.max_points_per_centroid = _TRAINING
    rng = np.random.default_rng(0)
    sample = np.sort(rng.choice(len(embeddings), min(len(embeddings), _TRAINING * lists), replace=False))
    index.train(np.asarray(embeddings[sample], np.float32))
    return index
