"""benchmarks/search.py runs and prints its measurements."""

from __future__ import annotations

import re
import subprocess
import sys

from itune.runtime.search.loop import NATIVE
from tests.conftest import REPOSITORY


def test_prints_microseconds() -> None:
    script = REPOSITORY / "benchmarks" / "search.py"
    done = subprocess.run([sys.executable, script, "--repeats", "1"], capture_output=True, text=True, check=True)
    assert len(re.findall(r"│ +\d+\.\d", done.stdout)) == 6 * (2 if NATIVE else 1)
