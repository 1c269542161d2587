"""Consensus captions: which of many captions agrees most with the others.

Devlin et al. 2015, "Exploring Nearest Neighbor Approaches for Image Captioning", give a photo the caption of its
nearest neighbours that is most similar to all their captions. The similarity here is the mean cosine of n-gram counts
(1 to 4 words) weighted by rarity: CIDEr's, without clipping and length penalty.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

MAX_ORDER = 4
NGram = tuple[str, ...]


class NGramWeights:
    """Inverse document frequency of n-grams in a sample of captions: log((1 + captions) / (1 + document frequency))."""

    def __init__(self, captions: Iterable[Sequence[str]]) -> None:
        """Each caption is a list of words."""
        sample = list(captions)
        frequencies: Counter[NGram] = Counter()
        for words in sample:
            frequencies.update({ngram for order in range(1, MAX_ORDER + 1) for ngram in ngrams(words, order)})
        self._unseen = math.log(1 + len(sample))
        self._known = {ngram: self._unseen - math.log(1 + found) for ngram, found in frequencies.items()}

    def of(self, ngrams: Iterable[NGram]) -> NDArray[np.float64]:
        """The weight of each n-gram."""
        return np.array([self._known.get(ngram, self._unseen) for ngram in ngrams])


def consensus(
    captions: Sequence[Sequence[str]], votes: NDArray[np.float64], rarity: NGramWeights
) -> NDArray[np.float64]:
    """Sum over all other captions of their similarity times their vote; `captions` are lists of words."""
    count = len(captions)
    total = np.zeros(count)
    for order in range(1, MAX_ORDER + 1):
        columns: dict[NGram, int] = {}
        cells = [
            (row, columns.setdefault(ngram, len(columns)), times)
            for row, words in enumerate(captions)
            for ngram, times in Counter(ngrams(words, order)).items()
        ]
        if not cells:
            break
        # The non-zero cells of a sparse matrix whose rows are the captions' vectors.
        rows, places, times = np.array(cells).T
        values = times * rarity.of(columns)[places]
        values /= np.maximum(np.sqrt(np.bincount(rows, np.square(values), count)), 1e-12)[rows]
        electorate = np.bincount(places, votes[rows] * values)
        total += np.bincount(rows, values * electorate[places], count)
        total -= votes * np.bincount(rows, np.square(values), count)
    return total / MAX_ORDER


def ngrams(words: Sequence[str], order: int) -> Iterator[NGram]:
    """The n-grams of `order` words, in order."""
    return zip(*(words[start:] for start in range(order)), strict=False)
