"""Scores as functions of statistics that add up over images, so that drawing images again costs a matrix product."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_CHUNK = 1 << 21  # weights in memory at a time


@dataclass(frozen=True, eq=False)
class Metric:
    """One score, or several of the same statistics, of a set of captions.

    `statistics` is [images, S]; `corpus` turns sums of its rows, [..., S], into scores, [..., len(names)].
    """

    names: tuple[str, ...]
    statistics: Floats
    corpus: Callable[[Floats], Floats]

    def scores(self) -> Floats:
        """The corpus scores, [len(names)]."""
        return self.corpus(self.statistics.sum(0))

    def per_image(self) -> Floats:
        """The scores of each image's caption by itself, [images, len(names)]."""
        return self.corpus(self.statistics)

    def select(self, rows: Sequence[int]) -> Metric:
        """The same of some of the images."""
        return Metric(self.names, self.statistics[list(rows)], self.corpus)


def mean_metric(name: str, values: Sequence[float]) -> Metric:
    """A score that is the mean of the images' own."""
    column = np.asarray(values, np.float64)
    return Metric((name,), np.stack([column, np.ones_like(column)], 1), _mean)


def _mean(sums: Floats) -> Floats:
    return sums[..., :1] / sums[..., 1:]


def bootstrap(metrics: Sequence[Metric], *, samples: int = 1000, seed: int = 0) -> Floats:
    """Scores of `samples` sets of images, drawn from the images with replacement: [samples, all names].

    A set has as many images as there are, and is the same for every metric. What a statistic owes to the whole set, as
    CIDEr-D's does its document frequencies, stays as it is.
    """
    images = len(metrics[0].statistics)
    rng = np.random.default_rng(seed)

    def draw(count: int) -> Floats:
        rows = np.repeat(np.arange(count), images)
        cells = rows * images + rng.integers(0, images, count * images)
        return np.bincount(cells, minlength=count * images).reshape(count, images).astype(np.float64)

    drawn = [
        np.concatenate([metric.corpus(weights @ metric.statistics) for metric in metrics], 1)
        for weights in _chunks(draw, samples, images)
    ]
    return np.concatenate(drawn)


def interval(drawn: Floats, level: float = 0.95) -> Floats:
    """The percentile interval of each column of `drawn` ([samples, n]): [n, 2]."""
    return np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0).T


@dataclass(frozen=True)
class Difference:
    """Second minus first captioner on one score.

    `low` and `high` bound its 95 % interval (paired bootstrap); `p` is of the two-sided
    paired randomisation test, `p_holm` the same corrected for all scores that were compared.
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
    """Differences of each score of two captioners on the same images, in the same order; not yet corrected (`holm`).

    The test exchanges the two captions of each image or not, at random: if the captioners were equally good, this would
    give differences like the one that was found (Riezler and Maxwell 2005). The smallest p is 1 / (permutations + 1).
    """
    found = np.concatenate([b.scores() - a.scores() for a, b in zip(first, second, strict=True)])
    images = len(first[0].statistics)
    rng = np.random.default_rng(seed)

    def draw(count: int) -> Floats:
        bits = np.frombuffer(rng.bytes(-(-count * images // 8)), np.uint8)
        return np.unpackbits(bits, count=count * images).reshape(count, images).astype(np.float64)

    extreme = np.zeros(len(found))
    for exchange in _chunks(draw, permutations, images):
        differences = []
        for a, b in zip(first, second, strict=True):
            moved = exchange @ (b.statistics - a.statistics)
            differences.append(b.corpus(b.statistics.sum(0) - moved) - a.corpus(a.statistics.sum(0) + moved))
        # Exchanging all gives the same difference in other words: rounding must not make it smaller.
        extreme += (np.abs(np.concatenate(differences, 1)) >= np.abs(found) - 1e-12).sum(0)
    drawn = bootstrap(second, samples=samples, seed=seed) - bootstrap(first, samples=samples, seed=seed)
    bounds, p = interval(drawn), (extreme + 1) / (permutations + 1)
    names = [name for metric in first for name in metric.names]
    return {
        name: Difference(float(found[i]), float(bounds[i, 0]), float(bounds[i, 1]), float(p[i]))
        for i, name in enumerate(names)
    }


def holm(p: Sequence[float]) -> list[float]:
    """The p-values of a family of tests, corrected by the procedure of Holm (1979)."""
    corrected, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = largest
    return corrected


def _chunks(draw: Callable[[int], Floats], total: int, images: int) -> Iterator[Floats]:
    size = max(1, _CHUNK // images)
    for start in range(0, total, size):
        yield draw(min(size, total - start))
