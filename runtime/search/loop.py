"""The loop between an engine and the search's core."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..engines.base import Engine, Int64, S
from ..errors import SearchError
from .config import Hypothesis, SearchConfig
from .core import MakeCore, make_core
from .processors import NO_TOKEN

PADDING = 8
"""What the lengths of padded prompts are a multiple of, so that a caption depends on no other prompt (see `search`)."""


def search(
    engine: Engine[S],
    state: S,
    prompts: Sequence[Sequence[int]],
    config: SearchConfig,
    end_token: int,
    *,
    core: MakeCore = make_core,
    multiple: int = 1,
) -> list[list[Hypothesis]]:
    """Caption the images of `state`: one list of `config.num_return` hypotheses per image, best first.

    Samples stand in the order of drawing: the first is the same however many are asked for.

    `prompts`: one per image, token ids with the begin token; different lengths are left-padded with a mask, to a
    multiple of `multiple`. Where that is PADDING, the padding that its batch gives a prompt does not even move the last
    bit of a sum, which vector instructions add up in their width, and which an int8 graph rounds to another integer.
    Finished images leave `state`. A list is shorter only where no more captions are possible. `core`: what carries
    the search, the fastest that is installed. Raises SearchError if an image has no caption at all, for logits that
    are not numbers, or fewer candidates than were asked for.
    """
    if len(prompts) != state.images:
        raise SearchError(f"prompts must be one per image: {len(prompts)} prompts, {state.images} images.")
    if not all(len(prompt) for prompt in prompts):
        raise SearchError("A prompt must hold at least the begin token, one of them is empty.")
    if not prompts:
        return []
    padded = _left_pad(prompts, multiple)
    running = core(padded, config, end_token, engine.most_candidates)
    real = padded != NO_TOKEN
    tokens, parents = np.where(real, padded, end_token), np.arange(len(prompts))
    mask = None if real.all() else real
    while True:
        candidates = engine.step(tokens, parents, state, running.k, mask=mask)
        tokens, parents, kept = running.advance(*candidates)
        if kept is not None:
            if not len(kept):
                break
            state.keep(kept)
        mask = None
    return [
        [Hypothesis(tuple(caption), score) for caption, score in captions[: config.num_return]]
        for captions in running.captions()
    ]


def _left_pad(prompts: Sequence[Sequence[int]], multiple: int) -> Int64:
    length = -(-max(map(len, prompts)) // multiple) * multiple
    padded = np.full((len(prompts), length), NO_TOKEN, np.int64)
    for row, prompt in zip(padded, prompts, strict=True):
        row[len(row) - len(prompt) :] = prompt
    return padded
