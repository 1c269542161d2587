"""The training runs that `results.py` compares: same data, frozen parts, number of captions and schedule."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from results_tables import PROMPTED

from itune import ItuneError
from itune.files import write_json

RETRIEVE = 4
BUDGET = {
    "--preset": "small-data",
    "--epochs": "2",
    "--batch-size": "160",
    "--images-per-forward": "32",
    "--precision": "fp32",
    "--num-beams": "3",
    "--max-new-tokens": "24",
    "--dev-images": "300",
    "--seed": "0",
}
"""The settings of all runs."""


@dataclass(frozen=True)
class Run:
    """One row of the table."""

    name: str
    title: str
    flags: dict[str, str] = field(default_factory=dict)
    retrieves: bool = False
    language_model: str = "language-model"
    """The language model's folder in the work folder; runs whose folder is missing are skipped."""


_PROMPTED = "prompted/language-model"
_SMALLCAP = {"--method": "smallcap", "--heads": "4", "--attention-width": "64", "--learning-rate": "1e-3"}
_ADAPTERS = {"--heads": "4", "--bottleneck": "256", "--learning-rate": "1e-3"}
RUNS = (
    Run("i-tuning", "I-Tuning", _ADAPTERS),
    Run("i-tuning-drop3", "I-Tuning, dropping 3 of 6 layers", _ADAPTERS | {"--first-adapter-layer": "3"}),
    Run("i-tuning-retrieval", "I-Tuning + retrieval", _ADAPTERS, retrieves=True),
    Run(
        "clipcap",
        "ClipCap, transformer mapper",
        {
            "--method": "clipcap",
            "--mapper": "transformer",
            "--clip-length": "4",
            "--mapper-layers": "3",
            "--pooling": "mean",
            "--learning-rate": "5e-4",
        },
    ),
    Run("smallcap", "SmallCap", _SMALLCAP, retrieves=True),
    Run("smallcap-prompted", f"SmallCap {PROMPTED}", _SMALLCAP, retrieves=True, language_model=_PROMPTED),
)


@dataclass(frozen=True)
class Resources:
    """The resources of a training run, summed over its interruptions."""

    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    peak_mib: float = 0.0
    """Private memory, without the memory-mapped embeddings."""

    def plus(self, other: Resources) -> Resources:
        """The resources of this run followed by another."""
        return Resources(
            self.cpu_seconds + other.cpu_seconds,
            self.wall_seconds + other.wall_seconds,
            max(self.peak_mib, other.peak_mib),
        )


@dataclass(frozen=True)
class WorkFolder:
    """The work folder, with the recipe's `train.jsonl`, `dev.jsonl`, `language-model/` and `vision/`."""

    path: Path

    @property
    def datastore(self) -> Path:
        """The datastore of the training captions."""
        return self.path / "datastore"

    @property
    def features(self) -> Path:
        """The cache of the photos' embeddings."""
        return self.path / "features"

    def checkpoint(self, run: Run) -> Path:
        """The output folder of a training run."""
        return self.path / "methods" / run.name

    def resources(self, run: Run) -> Resources:
        """The resources that a run has used so far."""
        path = self._resources(run)
        return Resources(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else Resources()

    def train(self, run: Run) -> None:
        """Train a run or resume it, unless it is complete."""
        output = self.checkpoint(run)
        if self.is_trained(run):
            return
        flags = {
            "--data": self.path / "train.jsonl",
            "--dev-data": self.path / "dev.jsonl",
            "--language-model": self.path / run.language_model,
            "--vision": self.path / "vision",
            "--cache-features": self.features,
            "--output": output,
            **BUDGET,
            **run.flags,
            **({"--datastore": self.datastore, "--retrieve": RETRIEVE} if run.retrieves else {}),
        }
        switches = ["--lower", "--strip-period", *(["--resume"] if (output / "last").exists() else [])]
        command = [
            sys.executable,
            "-m",
            "itune.cli.train",
            *(str(part) for pair in flags.items() for part in pair),
        ]
        start = time.monotonic()
        process = subprocess.Popen([*command, *switches])
        pid, peak = 0, 0.0
        while not pid:
            peak = max(peak, _own_mib(process.pid))
            with suppress(KeyboardInterrupt):  # the training process saves and stops
                time.sleep(0.2)
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        took = Resources(usage.ru_utime + usage.ru_stime, time.monotonic() - start, peak)
        process.returncode = os.waitstatus_to_exitcode(status)  # wait4 has reaped the process
        write_json(self._resources(run), vars(self.resources(run).plus(took)), indent=None)
        if process.returncode:
            raise ItuneError(f"{run.title}: training stopped; start again to resume")

    def is_trained(self, run: Run) -> bool:
        """Whether a run has completed its last epoch."""
        progress = self.checkpoint(run) / "last" / "trainer.json"
        return progress.exists() and json.loads(progress.read_text("utf-8"))["epoch"] >= int(BUDGET["--epochs"])

    def _resources(self, run: Run) -> Path:
        return self.path / "methods" / f"{run.name}.resources.json"


def _own_mib(pid: int) -> float:
    """A process's memory without mapped files."""
    try:
        memory = psutil.Process(pid).memory_info()
    except psutil.Error:  # the process has ended
        return 0.0
    return float(memory.rss - getattr(memory, "shared", 0)) / 2**20
