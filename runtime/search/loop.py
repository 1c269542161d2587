"""The loop between an engine and the search's core, which is C++ where the extension was built, else NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..engines.base import NOT_NUMBERS, Candidates, Engine, Int64, S, SearchingEngine
from ..errors import SearchError
from .config import Hypothesis, SearchConfig
from .numpy_search import NO_TOKEN, NumpySearch

try:
    import _itune_native
except ImportError:  # built without a compiler
    NATIVE = False
else:
    NATIVE = True

CORE: type[NumpySearch] = _itune_native.Search if NATIVE else NumpySearch
"""The core that runs here; the two have the same interface and find the same captions."""
PADDING = 8
"""Pad prompts of different lengths to a multiple of this, so that no caption depends on another prompt."""


def search(
    engine: Engine[S],
    state: S,
    prompts: Sequence[Sequence[int]],
    config: SearchConfig,
    end_token: int,
    *,
    core: type[NumpySearch] = CORE,
    multiple: int = 1,
) -> list[list[Hypothesis]]:
    """Caption the images of `state`: at most `config.num_return` hypotheses for each image.

    Beam search returns them best first, sampling in the order of drawing. Finished images leave `state`.

    `prompts`: token ids for each image, begin token included. Prompts of different lengths are left-padded with a mask,
    to a multiple of `multiple`. With PADDING, the other prompts of a batch do not change even the last bit of a sum:
    vector instructions add in their own width, and an int8 graph would round the difference to another integer.

    Raises:
        SearchError: the engine's logits are not numbers or its candidates too few; an image has no caption at all.
    """
    if not prompts:
        return []
    padded = _left_pad(prompts, multiple)
    if core is CORE and isinstance(engine, SearchingEngine):
        found = engine.captions(state, padded, config, end_token)
    else:
        running = core(padded, config, end_token, engine.most_candidates)
        found = _search_by_steps(engine, state, padded, running, end_token)
    if [] in found:
        raise SearchError(
            f"no caption is possible for image {found.index([])} of the batch: bad_words, no_repeat_ngram_size or "
            "min_new_tokens forbid every next token"
        )
    return [[Hypothesis(tuple(caption), score) for caption, score in each[: config.num_return]] for each in found]


def _search_by_steps(
    engine: Engine[S], state: S, padded: Int64, running: NumpySearch, end_token: int
) -> list[list[tuple[list[int], float]]]:
    """The captions of each image, found by the core `running`."""
    real = padded != NO_TOKEN
    tokens, parents = np.where(real, padded, end_token), np.arange(len(padded))
    mask = None if real.all() else real
    while True:
        candidates = engine.step(tokens, parents, state, running.k, mask=mask)
        _check(candidates, len(tokens), running.k)
        tokens, parents, kept = running.advance(*candidates)
        if kept is not None:
            if not len(kept):
                break
            state.keep(kept)
        mask = None
    return running.captions()


def _check(candidates: Candidates, rows: int, k: int) -> None:
    logits, token_ids, logsumexp = candidates
    if logits.shape != token_ids.shape or len(logits) != rows or logsumexp.shape != (rows,) or logits.shape[1] < k:
        raise SearchError(
            f"the decoder returned logits {logits.shape}, token_ids {token_ids.shape} and logsumexp {logsumexp.shape}, "
            f"but an exact search needs {k} candidates in each of {rows} rows"
        )
    # A NaN or +inf anywhere in the vocabulary shows in the logsumexp. A NaN compares false.
    if not ((logsumexp < np.inf).all() and (logits < np.inf).all()):
        raise SearchError(NOT_NUMBERS)


def _left_pad(prompts: Sequence[Sequence[int]], multiple: int) -> Int64:
    length = -(-max(map(len, prompts)) // multiple) * multiple
    padded = np.full((len(prompts), length), NO_TOKEN, np.int64)
    for row, prompt in zip(padded, prompts, strict=True):
        row[len(row) - len(prompt) :] = prompt
    return padded
