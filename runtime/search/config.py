"""What a caller may ask of the search, and what comes back, in the words of `transformers.generate`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from ..errors import SearchError
from ..settings import MOST_BEAMS

_SAMPLING = ("temperature", "top_k", "top_p", "seed")


@dataclass(frozen=True)
class SearchConfig:
    """Options of the search, with the meaning they have in `transformers.generate`.

    Raises SearchError for a value that no search can follow.
    """

    num_beams: int = 5
    """1 is greedy search."""
    max_new_tokens: int = 32
    """Counts the end token."""
    min_new_tokens: int = 0
    """The end token is forbidden until so many tokens were generated."""
    length_penalty: float = 1.0
    """Exponent of the length that divides the score: above 0 favours longer captions."""
    early_stopping: bool | Literal["never"] = False
    """True: stop once `num_beams` captions ended. False: stop once the running beams, at their present
    length, score no better than those. "never": the same at the length that favours the beams most."""
    no_repeat_ngram_size: int = 0
    """No n-gram of this size occurs twice, the prompt included; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and the caption so far become less likely; 1 is off."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that are never generated; the end token alone is not one and is ignored."""
    num_return: int | None = None
    """Captions per image; None returns all `num_beams`. When sampling, they are drawn independently."""
    do_sample: bool = False
    """Draw every token at random (see `sampling` for what that promises) instead of searching for the best
    caption; needs `num_beams` 1."""
    temperature: float = 1.0
    """Divides the logits that are drawn from: above 0; below 1 favours likely tokens."""
    top_k: int = 50
    """Draw from so many best tokens; 0 is the whole vocabulary, which is slower."""
    top_p: float = 1.0
    """Draw from the fewest best tokens whose probabilities reach this sum, at least one; 1 is off."""
    seed: int = 0
    """The same seed draws the same captions of an image, whatever else is in its batch."""

    def __post_init__(self) -> None:
        least_values = {"num_beams": 1, "max_new_tokens": 1, "min_new_tokens": 0, "no_repeat_ngram_size": 0}
        least_values |= {"top_k": 0, "seed": 0}
        if self.num_return is not None:
            least_values["num_return"] = 1
        for field, least in least_values.items():
            value = getattr(self, field)
            if field != "seed" and isinstance(value, (int, np.integer)) and value >= 2**31:
                raise SearchError(f"{field} must be below {2**31}, not {value}.")
            if not isinstance(value, (int, np.integer)) or value < least:
                raise SearchError(f"{field} must be a whole number of at least {least}, not {value!r}.")
        if self.num_beams > MOST_BEAMS:
            raise SearchError(f"num_beams must be at most {MOST_BEAMS}, not {self.num_beams}.")
        if self.min_new_tokens > self.max_new_tokens:
            raise SearchError(
                f"min_new_tokens must be at most max_new_tokens ({self.max_new_tokens}), not {self.min_new_tokens}."
            )
        for field in ("length_penalty", "repetition_penalty", "temperature", "top_p"):
            value = getattr(self, field)
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise SearchError(f"{field} must be a finite number, not {value!r}.")
        # Scores are divided by length ** length_penalty, which must be neither 0 nor infinite.
        if abs(self.length_penalty) * math.log2(self.max_new_tokens) > 1000:
            raise SearchError(
                f"length_penalty {self.length_penalty} is out of range for {self.max_new_tokens} tokens: "
                "use a value between -10 and 10."
            )
        if self.repetition_penalty < 1:
            raise SearchError(
                f"repetition_penalty must be at least 1, not {self.repetition_penalty}: below 1 it raises "
                "tokens that the decoder did not return."
            )
        if self.early_stopping not in (True, False, "never"):
            raise SearchError(f'early_stopping must be true, false or "never", not {self.early_stopping!r}.')
        for word in self.bad_words:
            if not word or not all(isinstance(token, (int, np.integer)) and token >= 0 for token in word):
                raise SearchError(f"bad_words must be non-empty sequences of token ids, not {word!r}.")
        if self.do_sample:
            self._check_sampling()
        else:
            self._check_deterministic()

    def _check_sampling(self) -> None:
        if self.num_beams != 1:
            raise SearchError(
                f"num_beams must be 1 when sampling, not {self.num_beams}: num_return gives more captions."
            )
        if self.temperature <= 0:
            raise SearchError(
                f"temperature must be above 0, not {self.temperature}: leave do_sample for the likeliest."
            )
        if not 0 < self.top_p <= 1:
            raise SearchError(f"top_p must be above 0 and at most 1, not {self.top_p}.")
        if self.seed >= 2**64:
            raise SearchError(f"seed must be below 2 ** 64, not {self.seed}.")

    def _check_deterministic(self) -> None:
        if self.num_return is not None and self.num_return > self.num_beams:
            raise SearchError(f"num_return must be at most num_beams ({self.num_beams}), not {self.num_return}.")
        for field in fields(self):
            if field.name in _SAMPLING and getattr(self, field.name) != field.default:
                raise SearchError(
                    f"{field.name} changes nothing without sampling: add do_sample (itune-run: --sample)."
                )

    @property
    def rows_per_image(self) -> int:
        """Rows that an image has from the second step on: its beams, or its samples."""
        return (self.num_return or 1) if self.do_sample else self.num_beams


@dataclass(frozen=True)
class Hypothesis:
    """One caption of one image."""

    tokens: tuple[int, ...]
    """Without the prompt and the end token."""
    score: float
    """Sum of the log-probabilities / their number ** length_penalty; the end token, where produced, counts.

    Beams: `sequences_scores` of transformers, so after the repetition penalty. Greedy and sampling: the model's
    own log-probabilities, since there the processors (and temperature, top_k, top_p) act on logits.
    """
