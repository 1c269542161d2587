"""What a training run shows: a live line on a terminal, a line now and then in a log file."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from . import common

if TYPE_CHECKING:
    from ..training.loop import Progress as Standing
    from ..training.loop import Trainer

_LOG_SECONDS = 30.0


class TrainingDisplay:
    """Rate, loss and time left of a run (implements `train.Reporter`)."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.console = common.console()
        self.live = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
        )
        self.task = TaskID(0)
        self._rate: float | None = None  # images/s, smoothed
        self._shown: dict[str, float] = {}  # the objective's metrics, smoothed
        self._entropy = ""
        self._last = self._logged = time.monotonic()

    def __enter__(self) -> Self:
        self.task = self.live.add_task("training", total=self.trainer.total_steps, status="")
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def step(self, progress: Standing, metrics: dict[str, float], images: int) -> None:
        """Show an optimiser step."""
        now = time.monotonic()
        rate = images / max(now - self._last, 1e-9)
        self._last = now
        self._rate = rate if self._rate is None else 0.9 * self._rate + 0.1 * rate
        for name in self.trainer.objective.shown:
            value, before = metrics[name], self._shown.get(name)
            self._shown[name] = value if before is None or progress.step_in_epoch == 1 else 0.95 * before + 0.05 * value
        if "attention_entropy" in metrics:
            self._entropy = f", attention entropy {metrics['attention_entropy']:.2f}"
        images_left = (self.trainer.total_steps - progress.step) * self.trainer.photos_per_epoch
        left = timedelta(seconds=round(images_left / self.trainer.steps_per_epoch / self._rate))
        status = f"{self._metrics(3)}{self._entropy}, {self._rate:.1f} images/s, {left} left"
        epoch = f"epoch {progress.epoch + 1}/{self.trainer.config.epochs}"
        self.live.update(self.task, completed=progress.step, description=epoch, status=status)
        if not self.console.is_terminal and now - self._logged > _LOG_SECONDS:
            self._logged = now
            self.console.print(
                f"{epoch}, step {progress.step}/{self.trainer.total_steps}: {status}", highlight=False, soft_wrap=True
            )

    def _metrics(self, digits: int) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {value:.{digits}f}" for name, value in self._shown.items())

    def untrained(self, metrics: dict[str, float]) -> None:
        """Print the score before the first step."""
        self.console.print(f"before the first step: {_scores(metrics)}", highlight=False)

    def warn(self, message: str) -> None:
        """Print a warning."""
        common.warn(message)

    def evaluating(self, done: int, images: int) -> None:
        """Show how far the dev split is captioned."""
        self._last = time.monotonic()
        self.live.update(self.task, status=f"captioning dev photos: {done}/{images}")

    def epoch(self, progress: Standing, metrics: dict[str, float], is_best: bool) -> None:
        """Print an epoch's result."""
        cider = f", {_scores(metrics)}{' (best)' if is_best else ''}" if metrics else ""
        self.console.print(
            f"epoch {progress.epoch}: {self._metrics(4)}{self._entropy}{cider}", highlight=False, soft_wrap=True
        )


def _scores(metrics: dict[str, float]) -> str:
    """CIDEr-D, of several dev sets with each one's own in brackets."""
    sets = {name.removeprefix("cider_"): score for name, score in metrics.items() if name.startswith("cider_")}
    each = ", ".join(f"{name} {100 * score:.2f}" for name, score in sets.items())
    return f"dev CIDEr-D {100 * metrics['cider']:.2f}" + (f" ({each})" if each else "")
