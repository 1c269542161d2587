"""The state of a training run, and the interface that reports it."""

from __future__ import annotations

from typing import Annotated, Protocol

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_Count = Annotated[int, Field(ge=0)]


class Reporter(Protocol):
    """Callbacks of a run; the command line displays them."""

    def step(self, progress: Progress, metrics: dict[str, float], images: int) -> None:
        """An optimizer step over this many images is done."""
        ...

    def evaluating(self, done: int, images: int) -> None:
        """So many images of the dev split have been captioned."""
        ...

    def epoch(self, progress: Progress, metrics: dict[str, float], is_best: bool) -> None:
        """An epoch is done and evaluated."""
        ...


@dataclass(config=ConfigDict(extra="forbid", strict=True))
class Progress:
    """How far a run has come; saved in `trainer.json`."""

    epoch: _Count = 0
    step_in_epoch: _Count = 0
    step: _Count = 0
    best_cider: Annotated[float, Field(ge=-1)] = -1.0
    best_epoch: Annotated[int, Field(ge=-1)] = -1


class Interrupted(Exception):  # noqa: N818 - not an error: the run was asked to stop, and is saved
    """The run stopped between two steps, with everything saved in `last/`."""
