"""Corpus BLEU-1 to BLEU-4 with the smoothing constants and the brevity penalty of the COCO caption evaluation code.

Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation" (ACL 2002).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from .cider import MAX_ORDER, count_ngrams

# The COCO code adds these instead of smoothing: a corpus without a match scores almost, but not quite, 0.
TINY = 1e-15
SMALL = 1e-9

Bleu = tuple[float, float, float, float]


def corpus_bleu(pairs: Iterable[tuple[Sequence[str], Sequence[Sequence[str]]]]) -> Bleu:
    """BLEU-1..4, each from 0 to 1, of (candidate words, the words of each of its references) pairs.

    Matches and lengths are summed over the corpus; of several references, the length closest to the candidate's counts
    (the shorter one of two as close).
    """
    matches, guesses = [0] * MAX_ORDER, [0] * MAX_ORDER
    candidate_length = reference_length = 0
    for candidate, references in pairs:
        most: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            most |= count_ngrams(reference)
        for ngram, count in (count_ngrams(candidate) & most).items():
            matches[len(ngram) - 1] += count
        for order in range(MAX_ORDER):
            guesses[order] += max(0, len(candidate) - order)
        candidate_length += len(candidate)
        reference_length += min((abs(len(words) - len(candidate)), len(words)) for words in references)[1]

    ratio = (candidate_length + TINY) / (reference_length + SMALL)
    brevity_penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for order, (matched, guessed) in enumerate(zip(matches, guesses, strict=True), start=1):
        product *= (matched + TINY) / (guessed + SMALL)
        scores.append(brevity_penalty * product ** (1 / order))
    bleu1, bleu2, bleu3, bleu4 = scores
    return bleu1, bleu2, bleu3, bleu4
