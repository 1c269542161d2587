"""Sampling: one step of drawing captions at random, in NumPy; `native/sampling.h` is the same in C++.

What it promises: given its prefix, a token is drawn with exactly the probability that `transformers` gives it, the
softmax over the processed logits / temperature, restricted to the top_k best tokens and then to the top_p
nucleus (in float64, by a number of 53 random bits). That takes top_k candidates untouched by the processors, so the
search asks the engine for as many more as can be pushed down, and for the whole vocabulary if top_k is 0.
Where transformers keeps all tokens that tie for the last of the top_k places, the lower token ids get them here.

The random numbers are a function of (seed, sample, step): an image's samples depend neither on the other images
of its batch nor on how many samples are asked for. Different images share them.
"""

from __future__ import annotations

import numpy as np

from ..engines.base import Int64
from .beams import Beams, Moves
from .config import SearchConfig
from .processors import NO_TOKEN, Float64


def draw(beams: Beams, logits: Float64, log_probs: Float64, token_ids: Int64, config: SearchConfig, end: int) -> Moves:
    """Draw the next token of every sample, bringing `beams` up to date.

    `logits` (processed), `log_probs` (the model's own), `token_ids` [images, beams, k]. A sample that ended, or for
    which no token is possible, has a score of -inf and goes on as a row of end tokens until its image is done.
    """
    images, samples = len(beams.scores), config.rows_per_image
    parents = np.tile(np.arange(samples) % beams.scores.shape[1], (images, 1))
    tokens = np.full((images, samples), end, np.int64)
    scores = np.full((images, samples), -np.inf)
    step, beams.generated = beams.generated, beams.generated + 1
    for image, sample in np.ndindex(images, samples):
        parent = parents[image, sample]
        if beams.scores[image, parent] == -np.inf:
            continue
        choice = _choose(logits[image, parent], token_ids[image, parent], config, uniform(config.seed, sample, step))
        if choice is None:
            continue
        tokens[image, sample] = token = token_ids[image, parent, choice]
        score = beams.scores[image, parent] + log_probs[image, parent, choice]
        if token != end and beams.generated < config.max_new_tokens:
            scores[image, sample] = score
            continue
        caption = beams.finished_tokens[image, sample]
        if step > 0:
            caption[:step] = beams.history[image, parent, -step:]
        caption[step] = NO_TOKEN if token == end else token
        beams.finished_scores[image, sample] = score / float(beams.generated) ** config.length_penalty
    beams.scores = scores
    beams.history = np.concatenate([beams.history[np.arange(images)[:, None], parents], tokens[:, :, None]], axis=2)
    return Moves(tokens, parents, (scores == -np.inf).all(axis=1))


def _choose(logits: Float64, token_ids: Int64, config: SearchConfig, number: float) -> int | None:
    """The index of the candidate that `number`, in [0, 1), stands for; None if none is possible."""
    order = np.lexsort((token_ids, -logits))
    if config.top_k:
        order = order[: config.top_k]
    best = logits[order[0]]
    if best == -np.inf:
        return None
    cumulative = np.cumsum(exp((logits[order] - best) / config.temperature))  # sequential, as in C++
    if config.top_p < 1:
        cumulative = cumulative[: np.searchsorted(cumulative, config.top_p * cumulative[-1]) + 1]
    return int(order[np.searchsorted(cumulative, number * cumulative[-1], side="right")])


def uniform(seed: int, sample: int, step: int) -> float:
    """A number in [0, 1): Philox 4x64-10 (Salmon et al. 2011) with `seed` as key and (step, sample) as counter."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[step, sample, 0, 0])).random()


_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 6.93147180369123816490e-01, 1.90821492927058770002e-10
_COEFFICIENTS = [1 / factorial for factorial in np.cumprod([1.0, 1, *range(2, 14)])[::-1]]  # 1/13! ... 1/0!


def exp(x: Float64) -> Float64:
    """Return e ** x for x <= 0, within 2 units in the last place; 0 below -700.

    Libraries round the last bit as they please; this is the same sequence of operations here and in C++.
    """
    x = np.maximum(x, -701.0)
    n = np.rint(x * _LOG2_E)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    series = np.full_like(r, _COEFFICIENTS[0])
    for coefficient in _COEFFICIENTS[1:]:
        series = series * r + coefficient
    return np.where(x < -700, 0.0, np.ldexp(series, n.astype(np.int32)))
