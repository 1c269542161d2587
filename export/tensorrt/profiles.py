"""Optimisation profiles: the range of sizes of every input that a TensorRT plan is built for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...runtime.bundle import ProfileRange, TensorSpec, TokenSettings
from ...runtime.errors import ItuneError

MAX_K = 3840
"""The maximum number of candidates that TensorRT's TopK returns."""
_OPT_BEAMS = 5


@dataclass(frozen=True)
class PlanLimits:
    """The largest search that the plans have room for."""

    max_beams: int = 8
    max_batch: int = 8
    max_new_tokens: int = 32

    def of(self, tokens: TokenSettings, max_new_tokens: int | None) -> PlanLimits:
        """The limits for a model, by default as many of the new tokens as it has room for.

        Raises:
            ItuneError: the model has no room for them; names the flag.
        """
        limits = replace(self, max_new_tokens=max_new_tokens or min(self.max_new_tokens, tokens.room))
        most_beams = tokens.candidates // 2  # a search compares two candidates for each beam
        for flag, value, most in (
            ("--max-new-tokens", limits.max_new_tokens, tokens.room),
            ("--max-beams", limits.max_beams, most_beams),
        ):
            if value > most:
                raise ItuneError(f"{flag} {value}: the language model allows at most {most}")
        return limits


def plan_profile(
    inputs: Sequence[TensorSpec], limits: PlanLimits, tokens: TokenSettings, visual_tokens: int
) -> dict[str, ProfileRange]:
    """The range of every input's shape; for `k`, which decides shapes by its value, the range of that value.

    Rows range from the first step of one image to a full batch of beams, the past from nothing to the longest caption.
    """
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
    ranges = {}
    for spec in inputs:
        dims = [(size,) * 3 if isinstance(size, int) else sizes[size] for size in spec.shape]
        if spec.name == "k":
            most = min(MAX_K, tokens.candidates)
            dims = [(1, min(2 * beams, most), most)]
        lowest, usual, highest = ([dim[place] for dim in dims] for place in range(3))
        ranges[spec.name] = ProfileRange(min=lowest, opt=usual, max=highest)
    return ranges
