"""The loop between an engine and `advance`: which rows run, what they continue, who leaves the batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..engines.base import Engine, Int64, S
from ..errors import SearchError
from .beams import Beams, advance
from .config import Hypothesis, SearchConfig
from .processors import NO_TOKEN, Processors


def search(
    engine: Engine[S], state: S, prompts: Sequence[Sequence[int]], config: SearchConfig, end_token: int
) -> list[list[Hypothesis]]:
    """Caption the images of `state`: one list of `config.num_return` hypotheses per image, best first.

    `prompts`: one per image, token ids with the begin token; different lengths are left-padded with a mask.
    Finished images leave `state`. A list is shorter only where no more captions are possible. Raises
    SearchError if an image has none at all, or for logits that are not numbers.
    """
    if len(prompts) != state.images:
        raise SearchError(f"prompts must be one per image: {len(prompts)} prompts, {state.images} images.")
    if not all(len(prompt) for prompt in prompts):
        raise SearchError("A prompt must hold at least the begin token, one of them is empty.")
    if not prompts:
        return []
    processors = Processors(config, end_token)
    padded = _left_pad(prompts)
    beams = Beams.start(padded, config)
    results: list[list[Hypothesis]] = [[] for _ in prompts]
    numbers = np.arange(len(prompts))  # of the images still running, in the caller's order

    real = padded != NO_TOKEN
    tokens, parents = np.where(real, padded, end_token), numbers
    mask = None if real.all() else real
    while True:
        constraints = processors.constraints(beams.rows, beams.generated)
        k = 2 * config.num_beams + constraints.most_per_row()
        candidates = engine.step(tokens, parents, state, k, mask=mask)
        beams_before = beams.scores.shape[1]
        moves = advance(beams, candidates, constraints, processors, config, end_token)
        running = np.flatnonzero(~moves.done)
        if len(running) < len(numbers):
            for image in np.flatnonzero(moves.done).tolist():
                results[numbers[image]] = _results(beams, image, int(numbers[image]), config)
            if not len(running):
                return results
            numbers = numbers[running]
            state.keep(running)
            beams.keep(running)
        tokens = moves.tokens[running].reshape(-1, 1)
        # Rows of the step that just ran, finished images included.
        parents = (running[:, None] * beams_before + moves.parents[running]).reshape(-1)
        mask = None


def _results(beams: Beams, image: int, number: int, config: SearchConfig) -> list[Hypothesis]:
    hypotheses = beams.hypotheses(image, config.num_return or config.num_beams)
    if not hypotheses:
        raise SearchError(
            f"No caption is possible for image {number}, every next token is forbidden after "
            f"{beams.generated - 1}: loosen bad_words, no_repeat_ngram_size or min_new_tokens."
        )
    return hypotheses


def _left_pad(prompts: Sequence[Sequence[int]]) -> Int64:
    padded = np.full((len(prompts), max(map(len, prompts))), NO_TOKEN, np.int64)
    for row, prompt in zip(padded, prompts, strict=True):
        row[len(row) - len(prompt) :] = prompt
    return padded
