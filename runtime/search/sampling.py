"""Sampling: draw the next token at random, in NumPy; `native/sampling.h` is the C++ twin.

Given its prefix, a token is drawn with exactly the probability that `transformers` gives it: the softmax of the
processed logits / temperature, restricted to the top_k best tokens and then to the top_p nucleus. This needs top_k
candidates that no processor lowered, so the search asks the engine for as many more as can be lowered, and for the
whole vocabulary if top_k is 0. Where transformers keeps every token that ties for the last of the top_k places, this
keeps the lower ids.

The random numbers are a function of (seed, sample, step). A sample therefore depends neither on the other images in the
batch nor on the number of samples. Different images use the same numbers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..engines.base import Int64
from .config import SearchConfig

Float64 = NDArray[np.float64]


def choose(logits: Float64, token_ids: Int64, config: SearchConfig, number: float) -> int | None:
    """The index of the candidate that `number`, in [0, 1), selects; None if no candidate is possible."""
    order = np.lexsort((token_ids, -logits))
    if config.top_k:
        order = order[: config.top_k]
    best = logits[order[0]]
    if best == -np.inf:
        return None
    cumulative = np.cumsum(np.exp((logits[order] - best) / config.temperature))
    if config.top_p < 1:
        cumulative = cumulative[: np.searchsorted(cumulative, config.top_p * cumulative[-1]) + 1]
    return int(order[np.searchsorted(cumulative, number * cumulative[-1], side="right")])


def uniform(seed: int, sample: int, step: int) -> float:
    """A number in [0, 1): Philox 4x64-10 (Salmon et al. 2011) with `seed` as key and (step, sample) as counter."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[step, sample, 0, 0])).random()
