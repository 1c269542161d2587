"""The benchmark of itune-serve end to end on a tiny model: its report, not its speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY


def test_report(bundle: Path, photos: list[Path], tmp_path: Path) -> None:
    program = [sys.executable, str(REPOSITORY / "benchmarks" / "serve.py"), "--bundle", str(bundle), "--threads", "1"]
    times = ["--rounds", "1", "--seconds", "0.5", "--overload-seconds", "0.5"]
    files = ["--images", str(photos[0].parent), "--json", str(tmp_path / "out.json")]
    done = subprocess.run([*program, *times, *files], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    (measured,) = result["rounds"]
    assert measured["ratio"] == measured["served_per_s"] / measured["streamed_per_s"]
    assert result["half_load"]["requests"]["200"] > 0
    assert set(result["overload"]["requests"]) <= {"200", "503"}
    assert result["memory_mb"]["end"]["workers"] > 0
