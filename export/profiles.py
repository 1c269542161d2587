"""What sizes a TensorRT plan is built for: the range of every input, from the limits that a user gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..runtime.bundle import ProfileRange, TensorSpec, TokenSettings
from ..runtime.errors import ItuneError

MAX_K = 3840
"""The most candidates that TensorRT's TopK returns."""
_OPT_BEAMS = 5


@dataclass(frozen=True)
class PlanLimits:
    """The largest search that the plans have room for."""

    max_beams: int = 8
    max_batch: int = 8
    max_new_tokens: int = 32

    def check(self, tokens: TokenSettings) -> None:
        """Raise ItuneError, naming the flag, if the model has no room for them."""
        for flag, value in (("--max-beams", self.max_beams), ("--max-batch", self.max_batch)):
            if value < 1:
                raise ItuneError(f"{flag} {value}: the profile would be empty; give at least 1")
        room = tokens.max_positions - len(tokens.prompt)
        if not 1 <= self.max_new_tokens <= room:
            raise ItuneError(
                f"--max-new-tokens {self.max_new_tokens}: the profile is impossible, the language model has positions "
                f"for 1 to {room} new tokens"
            )
        if self.max_beams > tokens.candidates // 2:
            raise ItuneError(
                f"--max-beams {self.max_beams}: the profile is impossible, a search with so many beams compares "
                f"{2 * self.max_beams} tokens and the vocabulary has {tokens.candidates}"
            )


def plan_profile(
    inputs: Sequence[TensorSpec], limits: PlanLimits, tokens: TokenSettings, visual_tokens: int
) -> dict[str, ProfileRange]:
    """The optimisation profile of a graph's inputs; for `k`, whose value decides shapes, the range of its value.

    Rows go from one image's first step to a full batch of beams, the past from nothing to the longest caption.
    """
    prompt, rows = 1 + len(tokens.prompt), limits.max_batch * limits.max_beams
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
