"""Corpus BLEU-1 to BLEU-4 with the smoothing constants and the brevity penalty of the COCO caption evaluation code.

Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation" (ACL 2002).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np

from ..runtime.retrieval.consensus import MAX_ORDER, NGram
from .statistics import Floats, Metric
from .tokenize import Pair, count_ngrams

# The COCO code adds these instead of smoothing: a corpus without a match scores slightly above 0.
TINY = 1e-15
SMALL = 1e-9


def bleu(pairs: Iterable[Pair]) -> Metric:
    """Score captions by BLEU-1 to 4, each from 0 to 1.

    The statistics are matches per order, n-grams per order, the caption's length, and the closest length of a reference
    (the shorter if two are equally close).
    """
    rows = [_count(*pair) for pair in pairs]
    return Metric(("bleu1", "bleu2", "bleu3", "bleu4"), np.array(rows, np.float64).reshape(-1, 10), _bleu)


def _count(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> list[int]:
    most: Counter[NGram] = Counter()
    for reference in references:
        most |= count_ngrams(reference)
    matches = [0] * MAX_ORDER
    for ngram, count in (count_ngrams(candidate) & most).items():
        matches[len(ngram) - 1] += count
    guesses = [max(0, len(candidate) - order) for order in range(MAX_ORDER)]
    closest = min((abs(len(words) - len(candidate)), len(words)) for words in references)[1]
    return [*matches, *guesses, len(candidate), closest]


def _bleu(sums: Floats) -> Floats:
    ratio = (sums[..., 8:9] + TINY) / (sums[..., 9:] + SMALL)
    brevity_penalty = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    precisions = (sums[..., :4] + TINY) / (sums[..., 4:8] + SMALL)
    return cast(Floats, brevity_penalty * np.cumprod(precisions, -1) ** (1 / np.arange(1, MAX_ORDER + 1)))
