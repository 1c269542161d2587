"""Time that the search itself takes, without the model, in microseconds per step.

    python benchmarks/search.py

C++ and NumPy alternate in one process; the table shows medians.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from itune.runtime.engines.base import Candidates
from itune.runtime.search import SearchConfig
from itune.runtime.search.loop import CORE, NATIVE
from itune.runtime.search.numpy_search import NumpySearch

VOCABULARY, END = 50_257, 50_256
STEPS = 24
PROCESSORS: dict[str, Any] = {
    "no_repeat_ngram_size": 3,
    "repetition_penalty": 1.2,
    "min_new_tokens": 8,
    "bad_words": ((11,), (12, 13), (14, 15, 16)),
}


@dataclass
class Case:
    """A timed search."""

    name: str
    config: SearchConfig
    images: int = 1
    us: dict[str, list[float]] = field(default_factory=dict)


def cases() -> list[Case]:
    """The timed searches; no image ends before the last step, so every step is a full one."""
    return [
        Case("greedy", SearchConfig(num_beams=1, max_new_tokens=STEPS)),
        Case("5 beams", SearchConfig(num_beams=5, max_new_tokens=STEPS)),
        Case("5 beams, all processors", SearchConfig(num_beams=5, max_new_tokens=STEPS, **PROCESSORS)),
        Case("5 beams, 16 images", SearchConfig(num_beams=5, max_new_tokens=STEPS), images=16),
        Case("5 beams, 16 images, all processors", SearchConfig(max_new_tokens=STEPS, **PROCESSORS), images=16),
        Case("5 samples", SearchConfig(num_beams=1, max_new_tokens=STEPS, do_sample=True, num_return=5, top_p=0.9)),
    ]


def step_times(make: type[NumpySearch], case: Case, rng: np.random.Generator) -> list[float]:
    """Microseconds of each step but the first, on synthetic candidates."""
    core = make(np.full((case.images, 1), END), case.config, END, VOCABULARY)
    rows, times = case.images, []
    for _ in range(STEPS):
        candidates = synthetic_candidates(rng, rows, core.k)
        start = perf_counter()
        _, parents, kept = core.advance(*candidates)
        _ = core.k
        times.append(1e6 * (perf_counter() - start))
        assert kept is None or not len(kept), "an image ended early"
        rows = len(parents)
    return times[1:]


def synthetic_candidates(rng: np.random.Generator, rows: int, k: int) -> Candidates:
    """Synthetic candidates without the end token."""
    logits = np.sort(rng.normal(0, 2, (rows, k)).astype(np.float32), axis=1)[:, ::-1].copy()
    token_ids = np.stack([rng.choice(END, k, replace=False) for _ in range(rows)])
    return Candidates(logits, token_ids, np.full(rows, 9, np.float32))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="searches of each kind")
    repeats: int = parser.parse_args().repeats
    cores = ({"C++": CORE} if NATIVE else {}) | {"NumPy": NumpySearch}
    console = Console()
    table = Table("microseconds per step", *cores, title="constraints, advance and compaction, as called from Python")
    for case in cases():
        for repeat in range(repeats):
            for name, make in cores.items():
                case.us.setdefault(name, []).extend(step_times(make, case, np.random.default_rng(repeat)))
        table.add_row(case.name, *(f"{statistics.median(us):.1f}" for us in case.us.values()))
    console.print(table)


if __name__ == "__main__":
    main()
