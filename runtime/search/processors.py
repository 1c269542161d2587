"""The logits processors of transformers, applied to an engine's k candidates instead of the whole vocabulary.

This is exact because every processor only lowers scores (a ban, or a repetition penalty of at least 1). A row asks for
k = 2 * num_beams + (tokens that can be lowered), so at least 2 * num_beams of its candidates keep their scores. A token
that the engine did not return had no higher logit than those (or the same logit and a higher id), and its score can
only have fallen. It is not among the row's 2 * num_beams best, and the search looks no further.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..engines.base import Int64
from .config import SearchConfig

Float64 = NDArray[np.float64]

NO_TOKEN = -1
"""Left padding in tables of token ids."""


class Processors:
    """Repetition penalty, n-grams that may not repeat, bad words and minimum length."""

    def __init__(self, config: SearchConfig, end_token: int) -> None:
        self._config, self._end_token = config, end_token
        # As in transformers, the end token alone is never a bad word, but a sequence may end with it.
        self._words = {*config.bad_words} - {(end_token,)}

    def banned(self, history: list[int], generated: int) -> list[int]:
        """The tokens that may not follow `history` (prompt and caption); `generated` counts the caption's tokens."""
        banned = [self._end_token] if generated < self._config.min_new_tokens else []
        if size := self._config.no_repeat_ngram_size:
            starts, last = range(len(history) + 1 - size), history[len(history) + 1 - size :]
            banned += [history[i + size - 1] for i in starts if history[i : i + size - 1] == last]
        for *prefix, token in self._words:
            if len(prefix) <= len(history) and history[len(history) - len(prefix) :] == prefix:
                banned.append(token)
        return banned

    def apply(self, scores: Float64, token_ids: Int64, history: list[int], banned: list[int]) -> Float64:
        """The scores [k] of one row's candidates `token_ids` [k] after the processors."""
        penalty = self._config.repetition_penalty
        if penalty != 1:
            penalised = np.where(scores < 0, scores * penalty, scores / penalty)
            scores = np.where(_contains(history, token_ids), penalised, scores)
        return np.where(_contains(banned, token_ids), -np.inf, scores) if banned else scores


def _contains(tokens: list[int], token_ids: Int64) -> list[bool]:
    """Which of `token_ids` are among `tokens`; faster than np.isin for as few as these."""
    wanted = set(tokens)
    return [token in wanted for token in token_ids.tolist()]
