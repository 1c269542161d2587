"""The latency benchmark end to end on tiny models: what it reports, not how fast anything is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

LATENCY = REPOSITORY / "benchmarks" / "latency.py"


def latency(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(LATENCY), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("latency")


def test_report(checkpoint_folder: Path, work: Path) -> None:
    options = ("--work-dir", work, "--repeats", "2", "--warmup", "1", "--threads", "1", "--new-tokens", "6")
    done = latency("--checkpoint", checkpoint_folder, *options, "--json", work / "out.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((work / "out.json").read_text())
    assert result.keys() == {"machine", "settings", "summary", "samples"}
    assert result["summary"].keys() == {"eager", "ONNX fp32", "ONNX int8"}
    photos = result["settings"]["photos"]
    assert photos >= 8
    for name, row in result["summary"].items():
        assert row["peak_mb"] > 50
        for part in ("encode", "decode", "total"):
            assert 0 < row[part]["min_ms"] <= row[part]["median_ms"] <= row[part]["p95_ms"] <= row[part]["max_ms"]
        assert all(len(sample["tokens"]) == 6 for sample in result["samples"][name]), "the length is forced"
    assert result["summary"]["ONNX fp32"]["identical_captions"] == photos
    assert result["summary"]["eager"]["distinct_captions"] > 1
    # PyTorch is in one process only; the bundles' memory is their own.
    assert result["summary"]["ONNX int8"]["peak_mb"] < result["summary"]["eager"]["peak_mb"]
    assert {path.name for path in work.iterdir()} == {"bundle-fp32", "bundle-int8", "out.json"}


def test_bundles_of_another_checkpoint_are_refused(language_model_folder: Path, clip_folder: Path, work: Path) -> None:
    from tests.conftest import make_checkpoint

    other = make_checkpoint(language_model_folder.parent / "other", language_model_folder, clip_folder, seed=1)
    if not (work / "bundle-fp32").exists():
        pytest.skip("needs the bundles of the test before")
    done = latency("--checkpoint", other, "--work-dir", work)
    assert done.returncode == 2
    assert "was exported from another checkpoint: give another --work-dir" in done.stderr


def test_random_captioners_look_at_their_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(LATENCY.parent))
    from random_init import Geometry, build_checkpoint

    from itune.evaluate import load_captioner
    from tests.conftest import random_photo

    tiny = Geometry(
        width=64,
        layers=3,
        heads=4,
        vocab_size=600,
        positions=64,
        vision_width=48,
        vision_layers=2,
        vision_heads=4,
        image_size=32,
        patch_size=8,
    )
    checkpoint = build_checkpoint(tiny, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"language-model", "vision", "checkpoint"}
    before = (checkpoint / "adapters.safetensors").stat().st_mtime_ns
    assert build_checkpoint(tiny, tmp_path) == checkpoint
    assert (checkpoint / "adapters.safetensors").stat().st_mtime_ns == before, "what is there is reused"
    captions = load_captioner(checkpoint).caption([random_photo(i) for i in range(10)], max_new_tokens=8)
    assert len({caption.tokens for caption in captions}) >= 9


def test_usage_errors_are_one_sentence(tmp_path: Path) -> None:
    for arguments, message in (
        (("--random-init", "huge"), "invalid choice"),
        (("--checkpoint", tmp_path), "not an adapter checkpoint"),
        (("--random-init", "base", "--num-beams", "0"), "--num-beams must be at least 1"),
    ):
        done = latency(*arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
