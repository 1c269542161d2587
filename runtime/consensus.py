"""Which of many captions says what the others say (Devlin et al. 2015, "Exploring Nearest Neighbor Approaches").

There, a photo gets that caption of its nearest neighbours which is most like all their others. The measure here is the
mean cosine of n-gram counts, 1 to 4 words, weighted by how few of these captions hold an n-gram: CIDEr's, with document
frequencies of the captions at hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MAX_ORDER = 4


def consensus(captions: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """How much each caption, given as words, agrees with all the others: from 0 to their number less one."""
    total = np.zeros(len(captions))
    for order in range(1, MAX_ORDER + 1):
        columns: dict[tuple[str, ...], int] = {}
        places = [
            (row, columns.setdefault(ngram, len(columns)))
            for row, words in enumerate(captions)
            for ngram in zip(*(words[start:] for start in range(order)), strict=False)
        ]
        if not places:
            break
        counts = np.zeros((len(captions), len(columns)))
        np.add.at(counts, tuple(np.array(places).T), 1)
        weights = counts * np.log(1 + len(captions) / (counts > 0).sum(axis=0))
        weights /= np.maximum(np.linalg.norm(weights, axis=1, keepdims=True), 1e-12)
        total += weights @ weights.sum(axis=0) - np.square(weights).sum(axis=1)
    return total / MAX_ORDER
