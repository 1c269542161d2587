"""Where a training stands, and what it tells while it goes on."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol


class Reporter(Protocol):
    """What a run tells while it goes on; the command line shows it."""

    def step(self, progress: Progress, metrics: dict[str, float], images: int) -> None:
        """An optimiser step was made, over this many images."""
        ...

    def evaluating(self, done: int, images: int) -> None:
        """The dev split is being captioned."""
        ...

    def epoch(self, progress: Progress, metrics: dict[str, float], is_best: bool) -> None:
        """An epoch ended and was evaluated."""
        ...


@dataclass
class Progress:
    """Where a run stands."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    best_cider: float = -1.0
    best_epoch: int = -1

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Progress:
        """What was saved as JSON; raises ValueError for anything else."""
        progress = cls(**values)
        for field in fields(cls):
            value = values[field.name]
            kinds = (int, float) if field.name == "best_cider" else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds) or value < -1:
                raise ValueError(f"{field.name} is {value!r}")
        return progress


class Interrupted(Exception):  # noqa: N818 - not an error: the run was asked to stop, and is saved
    """The run stopped at a step boundary, with everything saved in `last/`."""
