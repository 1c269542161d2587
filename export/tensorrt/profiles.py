"""What sizes a TensorRT plan is built for: the range of every input, from the limits that a user gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...runtime.bundle import ProfileRange, TensorSpec, TokenSettings
from ...runtime.errors import ItuneError

MAX_K = 3840
"""The most candidates that TensorRT's TopK returns."""
MAX_BEAMS = MAX_BATCH = 8
_OPT_BEAMS = 5
_NEW_TOKENS = 32


@dataclass(frozen=True)
class PlanLimits:
    """The largest search that the plans have room for."""

    max_beams: int = MAX_BEAMS
    max_batch: int = MAX_BATCH
    max_new_tokens: int | None = None
    """None: 32, or as many as the model has positions for."""

    def of(self, tokens: TokenSettings) -> PlanLimits:
        """The limits for a model, all of them numbers.

        Raises:
            ItuneError: the model has no room for them; the sentence names the flag.
        """
        for flag, value in (("--max-beams", self.max_beams), ("--max-batch", self.max_batch)):
            if value < 1:
                raise ItuneError(f"{flag} {value}: the profile would be empty; give at least 1")
        room = tokens.room
        longest = min(_NEW_TOKENS, room) if self.max_new_tokens is None else self.max_new_tokens
        if not 1 <= longest <= room:
            raise ItuneError(
                f"--max-new-tokens {longest}: the profile is impossible, the language model has positions "
                f"for 1 to {room} new tokens"
            )
        if self.max_beams > tokens.candidates // 2:
            raise ItuneError(
                f"--max-beams {self.max_beams}: the profile is impossible, a search with so many beams compares "
                f"{2 * self.max_beams} tokens and the vocabulary has {tokens.candidates}"
            )
        return PlanLimits(self.max_beams, self.max_batch, longest)


def plan_profile(
    inputs: Sequence[TensorSpec], limits: PlanLimits, tokens: TokenSettings, visual_tokens: int
) -> dict[str, ProfileRange]:
    """The optimisation profile of a graph's inputs; for `k`, whose value decides shapes, the range of its value.

    Rows go from one image's first step to a full batch of beams, the past from nothing to the longest caption.
    """
    limits = limits.of(tokens)
    assert limits.max_new_tokens is not None
    prompt, rows = len(tokens.prompt_tokens), limits.max_batch * limits.max_beams
    past = prompt + limits.max_new_tokens
    beams = min(_OPT_BEAMS, limits.max_beams)
    step = min(prompt + 8, past)  # the middle of a caption
    sizes = {
        "images": (1, 1, limits.max_batch),
        "rows": (1, beams, rows),
        "past_rows": (1, beams, rows),
        "T": (1, 1, prompt),
        "P": (0, step, past),
        "P + T": (1, step + 1, past + prompt),
        "N": (visual_tokens,) * 3,
    }
    most = min(MAX_K, tokens.candidates)
    ranges = {}
    for spec in inputs:
        if spec.name == "k":
            ranges["k"] = ProfileRange(min=[1], opt=[min(2 * beams, most)], max=[most])
            continue
        dims = [(size,) * 3 if isinstance(size, int) else sizes[size] for size in spec.shape]
        lowest, usual, highest = ([dim[place] for dim in dims] for place in range(3))
        ranges[spec.name] = ProfileRange(min=lowest, opt=usual, max=highest)
    return ranges
