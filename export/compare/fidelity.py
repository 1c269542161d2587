"""How far one bundle's next-token distributions are from another's, without a search."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.bundle import TokenSettings
from ...runtime.engines.base import Candidates, Engine, Int64, UInt8

_BATCH = 16
Float64 = NDArray[np.float64]
Example = tuple[UInt8, Sequence[int]]
"""Pixels [H, W, 3] of an image, and the token ids of its caption."""


@dataclass(frozen=True)
class Fidelity:
    """Means over all positions of some captions, which both decoders read (teacher forcing)."""

    kl: float
    """KL(reference || other) in nats, over the tokens that the other can write."""
    top1: float
    """Fraction of positions with the same most likely token."""
    covered: float
    """The reference's probability of the tokens that the other can write: 1 without a shortlist."""
    positions: int


def measure_fidelity(
    reference: Engine[Any],
    other: Engine[Any],
    examples: Sequence[Example],
    tokens: TokenSettings,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Fidelity:
    """Compare two engines of the same model on captions, the end token included.

    A caption is read up to the first token that `other` cannot read.
    """
    rows: list[Float64] = []
    for start in range(0, len(examples), _BATCH):
        batch = examples[start : start + _BATCH]
        rows += _compare_batch(reference, other, batch, tokens)
        progress(start + len(batch), len(examples))
    found = np.concatenate(rows)
    kl, top1, covered = found.mean(axis=0).tolist()
    return Fidelity(kl, top1, covered, len(found))


def _compare_batch(
    reference: Engine[Any], other: Engine[Any], examples: Sequence[Example], tokens: TokenSettings
) -> Iterator[Float64]:
    """For each step, the KL, agreement and covered probability of every row that is not at its end: [rows, 3]."""
    pixels = np.stack([image for image, _ in examples])
    states = reference.encode(pixels), other.encode(pixels)
    rows = np.arange(len(examples))
    step = np.tile(np.array(tokens.prompt_tokens), (len(examples), 1))
    captions = [list(caption) for _, caption in examples]
    for place in count():
        expected, found = (
            engine.step(step, rows, state, engine.most_candidates)
            for engine, state in zip((reference, other), states, strict=True)
        )
        if place == 0:
            readable = set(found.token_ids[0].tolist())
            captions = [list(takewhile(readable.__contains__, caption)) for caption in captions]
        yield _compare(expected, found)[[place <= len(caption) for caption in captions]]
        if place == max(map(len, captions)):
            return
        step = np.array([[caption[place] if place < len(caption) else tokens.end] for caption in captions])


def _compare(expected: Candidates, found: Candidates) -> Float64:
    ids, q = _sorted(found)
    all_ids, p = _sorted(expected)
    covered = np.ones(len(p))
    if len(ids) < len(all_ids):
        p = p[:, np.searchsorted(all_ids, ids)]
        covered = np.exp(p).sum(axis=1)
        p = p - np.log(covered)[:, None]
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    same = expected.token_ids[:, 0] == found.token_ids[:, 0]
    return np.stack([kl, same, covered], axis=1)


def _sorted(candidates: Candidates) -> tuple[Int64, Float64]:
    """The ascending ids of all candidates, and their log-probabilities in every row."""
    order = np.argsort(candidates.token_ids, axis=1)
    logits = np.take_along_axis(candidates.logits, order, axis=1).astype(np.float64)
    return candidates.token_ids[0, order[0]], logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
