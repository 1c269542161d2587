"""benchmarks/datastore.py runs and reports its measurements."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY


def test_measures_latency_and_recall(tmp_path: Path) -> None:
    script, report = REPOSITORY / "benchmarks" / "datastore.py", tmp_path / "report.json"
    options = ["--entries", "2000", "--dim", "32", "--queries", "5", "--json", report]
    subprocess.run([sys.executable, script, *options], capture_output=True, text=True, check=True)
    (result,) = json.loads(report.read_text())
    assert (result["index"], result["recall@4"]) == ("flat", 1)
    assert 0 < result["ms_median"] <= result["ms_p95"]
    assert result["similarity_first"] >= result["similarity_last"] > result["similarity_random"]
