"""The k best logits and the log-sum-exp of each row, in NumPy: what `native/top_k.cpp` does in one pass."""

from __future__ import annotations

import numpy as np

from ..engines.base import Candidates, Float32


def numpy_top_k(logits: Float32, k: int) -> Candidates:
    """See `core.top_k`."""
    rows, size = logits.shape
    k = min(k, size)
    token_ids = np.empty((rows, k), np.int64)
    # A row with NaN or +inf has no ranking: its logsumexp says so.
    ranked = np.where(np.isnan(logits), -np.inf, logits)
    for row, best in zip(ranked, token_ids, strict=True):
        above = np.flatnonzero(row >= np.partition(row, size - k)[size - k])
        best[:] = above[np.argsort(-row[above], kind="stable")[:k]]  # stable: equal ones by token
    with np.errstate(invalid="ignore", divide="ignore"):
        shift = np.maximum(logits.max(axis=1), np.finfo(np.float32).min)
        sums = np.exp(logits.astype(np.float64) - shift[:, None]).sum(axis=1)
        logsumexp = (shift + np.log(sums)).astype(np.float32)
    return Candidates(np.take_along_axis(logits, token_ids, axis=1), token_ids, logsumexp)
