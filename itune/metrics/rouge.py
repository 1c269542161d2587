"""ROUGE-L: the longest common subsequence of a caption and its references, as in the COCO caption evaluation code.

Lin, "ROUGE: A Package for Automatic Evaluation of Summaries" (2004), section 3: F with beta = 1.2, of the best
precision and the best recall over the references.
"""

from __future__ import annotations

from collections.abc import Sequence

BETA = 1.2


def rouge_l(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return ROUGE-L, from 0 to 1, of a caption's words against the words of each reference."""
    # The COCO code splits an empty caption into one empty word.
    candidate, references = candidate or [""], [words or [""] for words in references]
    lengths = [(common_length(candidate, reference), len(reference)) for reference in references]
    precision = max((common / len(candidate) for common, _ in lengths if common), default=0.0)
    recall = max((common / length for common, length in lengths if common), default=0.0)
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if precision else 0.0


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, bit-parallel over `first` (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    everything = row = (1 << len(first)) - 1
    for word in second:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & everything
    return len(first) - row.bit_count()
