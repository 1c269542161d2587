"""Every peer that is installed writes eager PyTorch's captions; one that is not is named, with the mend."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from itune import ItuneError
from itune.eager import candidates
from itune.runtime.engines.onnxruntime import has_vnni
from tests.clipcap import SHAPES, save_clipcap
from tests.conftest import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
EXACT = ("onnx-plain", "openvino-f32")
ROUNDED = ("eager-bf16", "onnx-plain-int8", "openvino-bf16", "openvino-int8")
DECODING = ("ctranslate2-int8",)


@pytest.fixture(scope="module")
def artifacts() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))  # for the module: a latency run imports from there, too
    try:
        import artifacts
    finally:
        sys.path.remove(str(BENCHMARKS))
    return artifacts


@pytest.fixture(scope="module")
def report(artifacts: ModuleType, checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Everybody that can run here, in one run: what `--json` and the terminal say."""
    names = [name for name in (*EXACT, *ROUNDED, *DECODING) if not artifacts.PEERS[name].lacks("clip")]
    return latency(checkpoint_folder, tmp_path_factory.mktemp("peers"), names, "--batch-size", "2")


def latency(checkpoint: Path, work: Path, names: list[str], *options: str) -> Any:
    command = [sys.executable, BENCHMARKS / "latency.py", "--checkpoint", checkpoint, "--work-dir", work, *options]
    command += ["--repeats", 1, "--warmup", 1, "--threads", 1, "--new-tokens", 6, "--precisions", "fp32"]
    command += ["--contestants", ",".join(names), "--json", work / "out.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((work / "out.json").read_text()) | {"stdout": done.stdout}


@pytest.mark.parametrize("name", [*EXACT, *ROUNDED, *DECODING])
def test_captions(name: str, artifacts: ModuleType, report: Any) -> None:
    reason = artifacts.PEERS[name].lacks("clip")
    if reason:
        pytest.skip(f"{name} {reason}")
    assert all(len(tokens) == 6 for sample in report["samples"][name] for tokens in sample["tokens"])
    row, photos = report["summary"][name], report["settings"]["photos"]
    if name in DECODING:
        assert row.keys() == {"decode", "peak_mb"}
        assert all(sample["encode"] is None for sample in report["samples"][name])
        assert "without adapters and image" in report["stdout"]
    elif name in EXACT:
        assert row["identical_captions"] == photos
    else:
        assert row["distinct_captions"] > photos / 2, "it looks at the photos"
        # On random weights rounding changes most captions; on x86 without VNNI some round more, or saturate.
        assert row["identical_captions"] >= 1 or not has_vnni()


def test_order(report: Any) -> None:
    names = list(report["summary"])
    assert (names[0], names[-1]) == ("eager", "itune fp32")


@pytest.mark.slow
def test_compiled_captions(artifacts: ModuleType, checkpoint_folder: Path, tmp_path: Path) -> None:
    result = latency(checkpoint_folder, tmp_path, ["compile"])
    assert result["summary"]["compile"]["identical_captions"] == result["settings"]["photos"]


def test_what_cannot_run_is_named(artifacts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = artifacts.Entry("Absent", "peers.absent:Absent", requires=("there_is_no_such_module",))
    monkeypatch.setitem(artifacts.PEERS, "absent", absent)
    with pytest.raises(ItuneError, match=r"absent needs there_is_no_such_module: pip install 'itune\[benchmark\]'"):
        artifacts.choose_peers("absent")
    chosen = artifacts.choose_peers("all")
    assert chosen[0] == "eager"
    assert "absent" not in chosen
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ItuneError, match="compile needs a C\\+\\+ compiler"):
        artifacts.choose_peers("compile")


def test_the_best_candidates_of_whole_rows(artifacts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from peers.plain_onnx import best

    logits = np.random.default_rng(0).integers(-6, 6, (4, 300)).astype(np.float32)  # many ties
    logits[:, 0] = 9
    for k in (1, 7, 300):
        found, expected = best(logits, k), candidates(torch.from_numpy(logits), k)
        np.testing.assert_array_equal(found.logits, expected.logits)
        np.testing.assert_allclose(found.logsumexp, expected.logsumexp, rtol=1e-6)


def test_an_onnx_tower_has_no_plain_export(artifacts: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = artifacts.choose_peers("all", "onnx")
    assert "eager" in chosen
    assert not {"onnx-plain", "onnx-plain-int8"} & set(chosen)
    with pytest.raises(ItuneError, match="--contestants: onnx-plain needs a CLIP tower"):
        artifacts.choose_peers("onnx-plain", "onnx")


@pytest.mark.slow
def test_clipcap_has_a_baseline_and_peers(
    artifacts: ModuleType, language_model_folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    """`generate` reads the prefix ids through the model's hook; exporters write it down."""
    checkpoint = save_clipcap(tmp_path / "c", language_model_folder, clip_folder, **SHAPES["transformer"])
    names = [name for name in ("onnx-plain", "ctranslate2-int8") if not artifacts.PEERS[name].lacks("clip")]
    result = latency(checkpoint, tmp_path, names, "--batch-size", "2")
    photos = result["settings"]["photos"]
    assert result["summary"]["eager"]["distinct_captions"] > 1
    for name in ("itune fp32", *(name for name in names if name in EXACT)):
        assert result["summary"][name]["identical_captions"] == photos
