"""The search options, named as in `transformers.generate`, and a finished caption."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, model_validator

from ..settings import SearchDefaults

_SAMPLING = ("temperature", "top_k", "top_p", "seed")
_Token = Annotated[int, Field(ge=0)]


class SearchConfig(SearchDefaults):
    """All options of a search, with the meaning they have in `transformers.generate`."""

    num_return: Annotated[int | None, Field(ge=1, lt=2**31)] = None
    """Candidates per image. Default: all beams, or one sample."""
    do_sample: bool = False
    """Draw captions at random with the model's probabilities instead of searching for the best."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """When sampling: below 1 favours likely tokens."""
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 50
    """When sampling: draw from the best tokens only, this many; 0 is all of them, which is slower."""
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    """When sampling: draw from the smallest set of best tokens whose probabilities reach this sum."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """When sampling: the same seed draws the same captions for an image, whatever else is in its batch."""
    bad_words: tuple[Annotated[tuple[_Token, ...], Field(min_length=1)], ...] = ()
    """Token sequences that are never generated."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        fields, samples, most = type(self).model_fields, self.do_sample, self.max_new_tokens
        sampling = " and ".join(name for name in _SAMPLING if getattr(self, name) != fields[name].default)
        if self.min_new_tokens > most:
            problem = f"min_new_tokens {self.min_new_tokens} exceeds max_new_tokens {most}"
        # Scores are divided by length ** length_penalty, which must be neither 0 nor infinite.
        elif abs(self.length_penalty) * math.log2(most) > 1000:
            problem = f"length_penalty {self.length_penalty}: choose a value between -10 and 10"
        elif samples and self.num_beams != 1:
            problem = f"num_beams must be 1 when sampling, not {self.num_beams}; num_return sets the number of samples"
        elif not samples and (self.num_return or 1) > self.num_beams:
            problem = f"num_return {self.num_return} exceeds num_beams {self.num_beams}"
        elif not samples and sampling:
            problem = f"{sampling} needs do_sample (itune-run: --sample)"
        else:
            return self
        raise ValueError(problem)

    @property
    def rows_per_image(self) -> int:
        """Rows per image from the second step on: its beams or its samples."""
        return (self.num_return or 1) if self.do_sample else self.num_beams


@dataclass(frozen=True)
class Hypothesis:
    """One caption of one image."""

    tokens: tuple[int, ...]
    """Without the prompt and the end token."""
    score: float
    """Sum of the log-probabilities / number of tokens ** length_penalty; a generated end token counts.

    Beam search: `sequences_scores` of transformers, so after the repetition penalty. Greedy search and sampling: the
    model's own log-probabilities, since there the processors, temperature, top_k and top_p act on logits.
    """
