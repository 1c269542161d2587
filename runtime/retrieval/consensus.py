"""Which of many captions says what the others say (Devlin et al. 2015, "Exploring Nearest Neighbor Approaches").

There, a photo gets that caption of its nearest neighbours which is most like all their others. The measure here is
the mean cosine of n-gram counts, 1 to 4 words, weighted by an n-gram's rarity: CIDEr's, without clipping and penalty.
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
    """How rare n-grams are in a sample of captions: log((1 + captions) / (1 + those that hold it))."""

    def __init__(self, captions: Iterable[Sequence[str]]) -> None:
        """`captions` are given as words."""
        self._captions = 0
        frequencies: Counter[NGram] = Counter()
        for words in captions:
            self._captions += 1
            for order in range(1, MAX_ORDER + 1):
                frequencies.update(set(_ngrams(words, order)))
        self._unseen = math.log(1 + self._captions)
        self._known = {ngram: self._unseen - math.log(1 + count) for ngram, count in frequencies.items()}

    def of(self, ngrams: Iterable[NGram]) -> NDArray[np.float64]:
        """The weight of each."""
        return np.array([self._known.get(ngram, self._unseen) for ngram in ngrams])


def consensus(
    captions: Sequence[Sequence[str]], votes: NDArray[np.float64], rarity: NGramWeights
) -> NDArray[np.float64]:
    """How much each caption, given as words, agrees with all the others, whose `votes` [captions] count so much."""
    count = len(captions)
    total = np.zeros(count)
    for order in range(1, MAX_ORDER + 1):
        columns: dict[NGram, int] = {}
        cells = [
            (row, columns.setdefault(ngram, len(columns)), times)
            for row, words in enumerate(captions)
            for ngram, times in Counter(_ngrams(words, order)).items()
        ]
        if not cells:
            break
        # The captions' vectors, one a row of a sparse matrix: what is not here is 0.
        rows, places, times = np.array(cells).T
        values = times * rarity.of(columns)[places]
        values /= np.maximum(np.sqrt(np.bincount(rows, np.square(values), count)), 1e-12)[rows]
        electorate = np.bincount(places, votes[rows] * values)
        total += np.bincount(rows, values * electorate[places], count)
        total -= votes * np.bincount(rows, np.square(values), count)
    return total / MAX_ORDER


def _ngrams(words: Sequence[str], order: int) -> Iterator[NGram]:
    return zip(*(words[start:] for start in range(order)), strict=False)
