"""Scores as functions of per-image statistics that add up, so that a bootstrap is a matrix product."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_CHUNK = 1 << 21  # weights in memory at a time


@dataclass(frozen=True, eq=False)
class Metric:
    """One or several scores of a set of captions.

    `statistics` is [images, S]; `corpus` turns sums of its rows, [..., S], into scores, [..., len(names)].
    """

    names: tuple[str, ...]
    statistics: Floats
    corpus: Callable[[Floats], Floats]

    def scores(self) -> Floats:
        """Return the corpus scores, [len(names)]."""
        return self.corpus(self.statistics.sum(0))

    def per_image(self) -> Floats:
        """Return the scores of each image's caption alone, [images, len(names)]."""
        return self.corpus(self.statistics)

    def select(self, rows: Sequence[int]) -> Metric:
        """Return the metric of a subset of the images."""
        return Metric(self.names, self.statistics[list(rows)], self.corpus)


def mean_metric(name: str, values: Sequence[float]) -> Metric:
    """Make a metric that is the mean of the images' scores."""
    column = np.asarray(values, np.float64)
    return Metric((name,), np.stack([column, np.ones_like(column)], 1), _mean)


def _mean(sums: Floats) -> Floats:
    return sums[..., :1] / sums[..., 1:]


def bootstrap(metrics: Sequence[Metric], *, samples: int = 1000, seed: int = 0) -> Floats:
    """Return the scores of `samples` resampled sets of images: [samples, all names].

    Each set has as many images as the original, drawn with replacement, the same for every metric. Statistics that
    depend on the whole set, as CIDEr-D's on document frequencies, are not recomputed.
    """
    images = len(metrics[0].statistics)
    rng = np.random.default_rng(seed)
    drawn = []
    for count in _chunks(samples, images):
        cells = np.repeat(np.arange(count), images) * images + rng.integers(0, images, count * images)
        weights = np.bincount(cells, minlength=count * images).reshape(count, images).astype(np.float64)
        drawn.append(np.concatenate([metric.corpus(weights @ metric.statistics) for metric in metrics], 1))
    return np.concatenate(drawn)


def interval(drawn: Floats) -> Floats:
    """Return the 95 % percentile interval [n, 2] of each column of `drawn` [samples, n]."""
    return np.quantile(drawn, [(1 - 0.95) / 2, (1 + 0.95) / 2], axis=0).T


@dataclass(frozen=True)
class Difference:
    """Second minus first captioner on one score.

    `low` and `high` bound its 95 % interval (paired bootstrap). `p` is from the two-sided paired randomisation test,
    `p_holm` corrects it for all scores that were compared.
    """

    difference: float
    low: float
    high: float
    p: float
    p_holm: float = 1.0
    significant: bool = False


def compare(
    first: Sequence[Metric], second: Sequence[Metric], *, samples: int = 1000, permutations: int = 10_000, seed: int = 0
) -> dict[str, Difference]:
    """Compare two captioners on the same images, in the same order; p-values are not yet corrected (`holm`).

    The test swaps the two captions of each image at random: between equally good captioners, this gives differences
    like the observed one (Riezler and Maxwell 2005). The smallest p is 1 / (permutations + 1).
    """
    found = np.concatenate([b.scores() - a.scores() for a, b in zip(first, second, strict=True)])
    images = len(first[0].statistics)
    rng = np.random.default_rng(seed)
    extreme = np.zeros(len(found))
    for count in _chunks(permutations, images):
        bits = np.frombuffer(rng.bytes(-(-count * images // 8)), np.uint8)
        exchange = np.unpackbits(bits, count=count * images).reshape(count, images).astype(np.float64)
        differences = []
        for a, b in zip(first, second, strict=True):
            moved = exchange @ (b.statistics - a.statistics)
            differences.append(b.corpus(b.statistics.sum(0) - moved) - a.corpus(a.statistics.sum(0) + moved))
        # Swapping all captions gives the same difference; rounding must not make it smaller.
        extreme += (np.abs(np.concatenate(differences, 1)) >= np.abs(found) - 1e-12).sum(0)
    drawn = bootstrap(second, samples=samples, seed=seed) - bootstrap(first, samples=samples, seed=seed)
    bounds, p = interval(drawn), (extreme + 1) / (permutations + 1)
    names = [name for metric in first for name in metric.names]
    return {
        name: Difference(float(found[i]), float(bounds[i, 0]), float(bounds[i, 1]), float(p[i]))
        for i, name in enumerate(names)
    }


def holm(p: Sequence[float]) -> list[float]:
    """Correct the p-values of a family of tests by the procedure of Holm (1979)."""
    corrected, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = largest
    return corrected


def _chunks(total: int, images: int) -> Iterator[int]:
    """Divide `total` rows of weights, one weight per image, into counts that fit in memory."""
    size = max(1, _CHUNK // images)
    return (min(size, total - start) for start in range(0, total, size))
