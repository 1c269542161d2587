"""CIDEr-D, the score that selects checkpoints: tf-idf weighted n-gram similarity of a caption to its references.

Vedantam, Zitnick, Parikh, "CIDEr: Consensus-based Image Description Evaluation" (CVPR 2015, arXiv:1411.5726),
equations 1 to 5 with the clipping and the length penalty of section 7 (CIDEr-D); the choices that the paper leaves
open follow the COCO caption evaluation code.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..runtime.errors import ItuneError
from .tokenize import words

MAX_ORDER = 4
SIGMA = 6.0  # of the Gaussian length penalty
SCALE = 10.0

NGram = tuple[str, ...]


def count_ngrams(tokens: Sequence[str]) -> Counter[NGram]:
    """How often each n-gram of 1 to 4 words occurs in a caption."""
    return Counter(
        tuple(tokens[start : start + order])
        for order in range(1, MAX_ORDER + 1)
        for start in range(len(tokens) - order + 1)
    )


@dataclass(frozen=True, slots=True)
class _Vector:
    """The tf-idf weights of one caption (g in the paper), their norm for each order, the caption's length."""

    weights: dict[NGram, float]
    norms: tuple[float, ...]
    length: int


class CiderD:
    """CIDEr-D against fixed references, whose document frequencies and vectors are computed once.

    `references` maps an image id to its captions, as text or, if `tokenized`, as words joined by white space; the
    candidates are given the same way. Document frequencies come from these references alone: the score of an image
    depends on the set that it is evaluated in, and is 0 where that set is a single image.
    """

    def __init__(self, references: Mapping[str, Sequence[str]], *, tokenized: bool = False) -> None:
        self._tokenized = tokenized
        counts = {
            image: [count_ngrams(words(caption, tokenized=tokenized)) for caption in captions]
            for image, captions in check_references(references).items()
        }
        frequency = Counter(ngram for captions in counts.values() for ngram in set().union(*captions))
        self._unseen = math.log(len(counts))  # the idf of an n-gram that no reference holds: as if it occurred once
        self._idf = {ngram: self._unseen - math.log(images) for ngram, images in frequency.items()}
        self._references = {
            image: [self._vector(caption) for caption in captions] for image, captions in counts.items()
        }

    def score(self, candidates: Mapping[str, str]) -> float:
        """Mean CIDEr-D of one caption for every image: from 0 to 10, good captioners reach 0.5 to 1.4."""
        scores = self.per_image(candidates)
        return math.fsum(scores.values()) / len(scores)

    def per_image(self, candidates: Mapping[str, str]) -> dict[str, float]:
        """CIDEr-D of each image's caption. Raises ItuneError unless the images are those of the references."""
        check_same_images(candidates, self._references)
        return {
            image: self._similarity(
                self._vector(count_ngrams(words(caption, tokenized=self._tokenized))), self._references[image]
            )
            for image, caption in candidates.items()
        }

    def _vector(self, counts: Counter[NGram]) -> _Vector:
        weights = {ngram: count * self._idf.get(ngram, self._unseen) for ngram, count in counts.items()}
        squares = [0.0] * MAX_ORDER
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight * weight
        # The COCO code takes the number of bigrams for the length.
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


def check_references(references: Mapping[str, Sequence[str]]) -> Mapping[str, Sequence[str]]:
    """Return `references` if every image has at least one caption; else raise ItuneError."""
    if not references:
        raise ItuneError("There are no reference captions to score against: give at least one image with captions.")
    for image, captions in references.items():
        if isinstance(captions, str) or not captions:
            raise ItuneError(f"Image {image!r} needs a list with at least one reference caption, not {captions!r}.")
    return references


def check_same_images(candidates: Iterable[str], references: Iterable[str]) -> None:
    """Raise ItuneError, naming an image, unless both hold the same image ids."""
    candidates, references = set(candidates), set(references)
    if extra := sorted(candidates - references):
        raise ItuneError(
            f"{len(extra)} of the captioned images have no reference captions (the first: {extra[0]!r}): "
            "score them against the split that they come from."
        )
    if missing := sorted(references - candidates):
        raise ItuneError(
            f"{len(missing)} of the images with reference captions were not captioned (the first: {missing[0]!r}): "
            "caption every image of the split."
        )
