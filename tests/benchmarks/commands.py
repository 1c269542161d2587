"""Runs the latency benchmark as a user would."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
LATENCY = BENCHMARKS / "latency.py"
BATCH_SIZE, NEW_TOKENS = 3, 6


@dataclass(frozen=True)
class Contest:
    """A run: its work folder with bundles and conversions, its JSON, and what it printed."""

    work: Path
    result: dict[str, Any]
    printed: str


def latency(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(LATENCY), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
