"""The logits processors of transformers, on an engine's k candidates instead of the whole vocabulary.

Why this is exact: every processor here only pushes tokens down (a ban, or a repetition penalty of at
least 1). A row that asks for k = 2 * num_beams + (tokens that can be pushed down) keeps at least 2 *
num_beams candidates untouched. A token that the engine did not return had no higher a raw logit than any
of these (at the same logit, a higher id) and can only have fallen since: it is not among the 2 *
num_beams best of its row, and a search looks no further. Fewer than k candidates must be the whole
vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from ..engines.base import Bool, Int64
from .config import SearchConfig

Float64 = NDArray[np.float64]

NO_TOKEN = -1
"""Fills tables of token ids: left padding in histories, "nothing here" in lists of tokens."""


class Constraints(NamedTuple):
    """The tokens that one step pushes down; NO_TOKEN fills the tables."""

    penalised: Int64  # [rows, n]: under the repetition penalty
    banned: Int64  # [rows, m]: forbidden in this row
    banned_everywhere: Int64  # [w]

    def most_per_row(self) -> int:
        """No row pushes down more tokens than this."""
        banned = int((self.banned != NO_TOKEN).sum(axis=1).max(initial=0))
        return int(self.penalised.shape[1]) + banned + len(self.banned_everywhere)


class Processors:
    """Repetition penalty, n-grams that may not repeat, bad words and minimum length of one search."""

    def __init__(self, config: SearchConfig, end_token: int):
        self._penalty = float(config.repetition_penalty)
        self._ngram_size = config.no_repeat_ngram_size
        self._min_new_tokens = config.min_new_tokens
        # As transformers: the end token alone is no bad word, a sequence that ends with it is one.
        words = set(config.bad_words) - {(end_token,)}
        self._bad_tokens = np.array([word[0] for word in words if len(word) == 1], np.int64)
        self._bad_tokens_and_end = np.append(self._bad_tokens, np.int64(end_token))
        self._bad_sequences = [
            np.array([word for word in words if len(word) == length], np.int64)
            for length in sorted({len(word) for word in words if len(word) > 1})
        ]

    def constraints(self, history: Int64, generated: int) -> Constraints:
        """Find what the next token of each row may not be.

        `history` [rows, length]: prompt and generated tokens of each row, left-padded with NO_TOKEN;
        `generated`: how many of them are generated.
        """
        length = history.shape[1]
        banned = []
        size = self._ngram_size
        if 0 < size <= length:
            windows = sliding_window_view(history, size, axis=1)  # [rows, length - size + 1, size]
            # The padding needs no mask: the last size - 1 tokens recur in no window that holds more padding.
            repeats = (windows[..., :-1] == history[:, None, length + 1 - size :]).all(axis=-1)
            banned.append(np.where(repeats, windows[..., -1], NO_TOKEN))
        for sequences in self._bad_sequences:
            prefix = sequences.shape[1] - 1
            if prefix <= length:
                begun = (history[:, None, length - prefix :] == sequences[:, :-1]).all(axis=-1)
                banned.append(np.where(begun, sequences[:, -1], NO_TOKEN))
        too_short = generated < self._min_new_tokens
        return Constraints(
            penalised=history if self._penalty != 1 else history[:, :0],
            banned=np.concatenate(banned, axis=1) if banned else history[:, :0],
            banned_everywhere=self._bad_tokens_and_end if too_short else self._bad_tokens,
        )

    def apply(self, scores: Float64, token_ids: Int64, constraints: Constraints) -> Float64:
        """Return `scores` [rows, k] of the candidates `token_ids` [rows, k] with the constraints imposed."""
        if constraints.penalised.size:
            penalised = np.where(scores < 0, scores * self._penalty, scores / self._penalty)
            scores = np.where(_contains(constraints.penalised, token_ids), penalised, scores)
        if constraints.banned.size:
            scores = np.where(_contains(constraints.banned, token_ids), -np.inf, scores)
        if constraints.banned_everywhere.size:
            scores = np.where(np.isin(token_ids, constraints.banned_everywhere), -np.inf, scores)
        return scores


def _contains(table: Int64, token_ids: Int64) -> Bool:
    """Which of `token_ids` [rows, k] stand in their row of `table` [rows, n]."""
    found: Bool = (token_ids[:, :, None] == table[:, None, :]).any(axis=-1)
    return found
