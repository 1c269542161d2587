"""Time bundles against each other, each in a process of its own, in turns at every photo.

Turns spread a drift of the machine's speed over all bundles; in separate processes, no bundle's threads disturb
another's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import sleep
from typing import Any

from ...runtime.caption import Timings
from ...runtime.captioner import Captioner
from .worker import Worker

_WARMUP = 2
_PAUSE = 0.05  # seconds, after which spinning threads sleep


@dataclass(frozen=True)
class Latency:
    """Median milliseconds from a photo's file to its caption, one photo at a time."""

    encode: float
    search: float
    total: float
    """Decoding of the file included."""


def measure_latency(
    bundles: Mapping[str, Path],
    photos: Sequence[Path],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    **search_options: Any,
) -> dict[str, Latency]:
    """Caption every photo with every bundle; returns the medians by the bundles' names.

    `search_options` are those of `Captioner.caption`. Raises ItuneError if a bundle's process dies.
    """
    samples: dict[str, list[Timings]] = {name: [] for name in bundles}
    workers: dict[str, Worker] = {}
    rounds = [*photos[:_WARMUP], *photos]
    try:
        for name, folder in bundles.items():
            workers[name] = Worker(name, partial(Captioner.load, folder, threads=threads))
        for number, photo in enumerate(rounds, 1):
            for name, worker in workers.items():
                samples[name].append(worker.call("caption", photo, **search_options).ms)
                sleep(_PAUSE)
            progress(number, len(rounds))
    finally:
        for worker in workers.values():
            worker.kill()
    return {name: _medians(own[-len(photos) :]) for name, own in samples.items()}


def _medians(samples: Sequence[Timings]) -> Latency:
    return Latency(
        encode=median(sample.encode for sample in samples),
        search=median(sample.search for sample in samples),
        total=median(sum(asdict(sample).values()) for sample in samples),
    )
