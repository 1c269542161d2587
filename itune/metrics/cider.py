"""CIDEr-D, the score that selects checkpoints: tf-idf weighted n-gram similarity of a caption to its references.

Vedantam, Zitnick, Parikh, "CIDEr: Consensus-based Image Description Evaluation" (CVPR 2015, arXiv:1411.5726),
equations 1 to 5 with the clipping and length penalty of section 7 (CIDEr-D). Where the paper leaves a choice, this
follows the COCO caption evaluation code.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ..runtime.retrieval.consensus import MAX_ORDER, NGram
from .tokenize import count_ngrams

SIGMA = 6.0  # of the Gaussian length penalty
SCALE = 10.0


@dataclass(frozen=True, slots=True)
class _Vector:
    """A caption's tf-idf weights (g in the paper), their norm for each order, and the caption's length."""

    weights: dict[NGram, float]
    norms: tuple[float, ...]
    length: int


class DocumentFrequencies:
    """How rare n-grams are among the images of a corpus."""

    def __init__(self, images: Iterable[Collection[NGram]]) -> None:
        """`images`: the different n-grams of each image's references."""
        count, frequency = 0, Counter[NGram]()
        for ngrams in images:
            count += 1
            frequency.update(ngrams)
        self._unseen = math.log(count)  # of an n-gram without a reference: as if one image had it
        self._idf = {ngram: self._unseen - math.log(images) for ngram, images in frequency.items()}

    def idf(self, ngram: NGram) -> float:
        """log(images / images with the n-gram)."""
        return self._idf.get(ngram, self._unseen)


class CiderD:
    """CIDEr-D against the references of a set of images, whose document frequencies and vectors are computed once.

    Captions are lists of words. Document frequencies come from these references unless others are given, so the score
    of an image depends on the set that it is evaluated in; in a set of one image it is 0.
    """

    def __init__(
        self, references: Sequence[Sequence[Sequence[str]]], frequencies: DocumentFrequencies | None = None
    ) -> None:
        """`references`: each image's captions."""
        counts = [[count_ngrams(caption) for caption in captions] for captions in references]
        self._frequencies = frequencies or DocumentFrequencies(set().union(*captions) for captions in counts)
        self._references = [[self._vector(caption) for caption in captions] for captions in counts]

    def per_image(self, candidates: Sequence[Sequence[str]]) -> list[float]:
        """Return the CIDEr-D, from 0 to 10, of a caption of each image, in the order of the references."""
        return [
            self._similarity(self._vector(count_ngrams(caption)), own)
            for caption, own in zip(candidates, self._references, strict=True)
        ]

    def score(self, candidates: Sequence[Sequence[str]]) -> float:
        """Return the mean over the images: good captioners reach 0.5 to 1.4."""
        return math.fsum(self.per_image(candidates)) / len(candidates)

    def _vector(self, counts: Counter[NGram]) -> _Vector:
        weights = {ngram: count * self._frequencies.idf(ngram) for ngram, count in counts.items()}
        squares = [0.0] * MAX_ORDER
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight * weight
        # The COCO code uses the number of bigrams as the length.
        length = sum(count for ngram, count in counts.items() if len(ngram) == 2)
        return _Vector(weights, tuple(map(math.sqrt, squares)), length)

    def _similarity(self, candidate: _Vector, references: Sequence[_Vector]) -> float:
        total = 0.0
        for reference in references:
            products = [0.0] * MAX_ORDER
            for ngram, weight in candidate.weights.items():
                other = reference.weights.get(ngram, 0.0)
                products[len(ngram) - 1] += min(weight, other) * other
            cosines = (
                product / (a * b)
                for product, a, b in zip(products, candidate.norms, reference.norms, strict=True)
                if a * b
            )
            penalty = math.exp(-((candidate.length - reference.length) ** 2) / (2 * SIGMA**2))
            total += penalty * sum(cosines)
        return SCALE * total / (MAX_ORDER * len(references))
