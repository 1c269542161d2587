"""Fake decoders that look logits up by image and history, for tests of the search."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from itune.runtime.engines.base import Bool, Candidates, Float32, Int64, UInt8
from itune.runtime.search import Hypothesis

Search = Callable[..., list[list[Hypothesis]]]
"""The fixture `search`: itune.runtime.search.search with the core in C++ or in NumPy."""
Logits = Callable[[int, tuple[int, ...]], Float32]
"""(image, prompt and tokens so far) -> logits [vocabulary]."""


class TableState:
    """The images still present, and for each row of the last step its image and its history."""

    embedding = None

    def __init__(self, images: Iterable[int]):
        self.present = list(images)
        self.rows: list[tuple[int, tuple[int, ...]]] = []

    @property
    def images(self) -> int:
        return len(self.present)

    def keep(self, images: Int64) -> None:
        assert 0 < len(images) < self.images
        assert (np.diff(images) > 0).all()
        self.present = [self.present[image] for image in images]


class TableEngine:
    """Looks logits up by image and history, and asserts that the search keeps to the engine protocol."""

    def __init__(self, logits: Logits):
        self.logits = logits
        self.most_candidates = len(logits(0, (0,)))
        self.rows_per_step: list[int] = []
        self.k_per_step: list[int] = []

    def encode(self, pixels: UInt8) -> TableState:
        return TableState(range(len(pixels)))

    def step(self, tokens: Int64, parents: Int64, state: TableState, k: int, *, mask: Bool | None = None) -> Candidates:
        rows = len(tokens)
        assert k <= self.most_candidates
        assert tokens.dtype == parents.dtype == np.int64
        owners = [state.present[row // (rows // state.images)] for row in range(rows)]
        if not self.rows_per_step:
            assert parents.tolist() == list(range(state.images))
            assert mask is None or not mask.all()
            real = np.ones_like(tokens, bool) if mask is None else mask
            histories = [tuple(fed[kept].tolist()) for fed, kept in zip(tokens, real, strict=True)]
        else:
            assert tokens.shape == (rows, 1)
            assert mask is None
            before = [state.rows[parent] for parent in parents]
            assert [owner for owner, _ in before] == owners
            histories = [(*history, token) for (_, history), token in zip(before, tokens[:, 0].tolist(), strict=True)]
        self.rows_per_step.append(rows)
        self.k_per_step.append(k)
        state.rows = list(zip(owners, histories, strict=True))
        return best_of(np.stack([self.logits(*row) for row in state.rows]), k)


def best_of(logits: Float32, k: int) -> Candidates:
    """The k best of logits [rows, vocabulary], equal ones in order of the token id."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return Candidates(np.take_along_axis(logits, order, 1), order, log_sum_exp(logits))


def always(logits: Float32) -> Logits:
    return lambda _image, _history: logits


def log_sum_exp(logits: Float32) -> Float32:
    with np.errstate(divide="ignore"):  # a row that is -inf throughout
        return np.log(np.exp(logits.astype(np.float64)).sum(axis=-1)).astype(np.float32)


def random_logits(seed: int, vocabulary: int, levels: int, impossible: float) -> Logits:
    """Logits on a grid of few levels, so that ties abound; a share of them is -inf."""

    def logits(image: int, history: tuple[int, ...]) -> Float32:
        rng = np.random.default_rng([seed, image, *history])
        values = rng.integers(-levels, levels, vocabulary).astype(np.float32) / 2
        values[rng.random(vocabulary) < impossible] = -np.inf
        return values

    return logits
