"""Every installed peer writes eager PyTorch's captions; the error for a missing one says how to install it."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from itune import ItuneError
from itune.eager import candidates
from itune.export.bundle import export_bundle
from itune.export.options import ExportOptions
from itune.runtime.engines.onnxruntime import has_vnni
from tests.benchmarks.commands import BENCHMARKS, NEW_TOKENS, Contest, latency
from tests.clipcap import SHAPES, save_clipcap

EXACT = ("onnx-plain", "openvino-f32")
ROUNDED = ("eager-bf16", "onnx-plain-int8", "openvino-bf16", "openvino-int8")
DECODING = ("ctranslate2-int8", "llama-q8", "llama-q4")
OTHER_MODELS = ("optimum",)


@pytest.mark.parametrize("name", [*EXACT, *ROUNDED, *DECODING, *OTHER_MODELS])
def test_captions(name: str, artifacts: ModuleType, contest: Contest) -> None:
    reason = artifacts.PEERS[name].lacks("clip")
    if reason:
        pytest.skip(f"{name} {reason}")
    row, photos = contest.result["summary"][name], contest.result["settings"]["photos"]
    if name in DECODING:
        assert row.keys() == {"decode", "peak_mb"}
        assert all(sample["encode"] is None for sample in contest.result["samples"][name])
        assert "without adapters and image" in contest.printed
    elif name in OTHER_MODELS:
        assert {len(tokens) for sample in contest.result["samples"][name] for tokens in sample["tokens"]} == {
            NEW_TOKENS
        }
    elif name in EXACT:
        assert row["identical_captions"] == photos
    else:
        assert row["distinct_captions"] > photos / 2, "it looks at the photos"
        # On random weights rounding changes most captions; on x86 without VNNI some round more, or saturate.
        assert row["identical_captions"] >= 1 or not has_vnni()


def test_order(contest: Contest) -> None:
    names = list(contest.result["summary"])
    assert (names[0], *names[-2:]) == ("eager", "itune fp32", "itune int8")


@pytest.mark.slow
def test_compiled_captions(checkpoint_folder: Path, tmp_path: Path) -> None:
    export_bundle(checkpoint_folder, tmp_path / "bundle-fp32", ExportOptions(verify=False))
    options = ("--work-dir", tmp_path, "--repeats", 1, "--warmup", 1, "--threads", 1, "--precisions", "fp32")
    options += ("--contestants", "compile", "--new-tokens", NEW_TOKENS, "--json", tmp_path / "out.json")
    done = latency("--checkpoint", checkpoint_folder, *options)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["summary"]["compile"]["identical_captions"] == result["settings"]["photos"]


def test_what_cannot_run_is_named(artifacts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = artifacts.Entry("Absent", "peers.absent:Absent", requires=("there_is_no_such_module",))
    monkeypatch.setitem(artifacts.PEERS, "absent", absent)
    with pytest.raises(ItuneError) as error:
        artifacts.choose_peers("absent")
    assert "there_is_no_such_module" in str(error.value)
    assert "itune-captioner[benchmark]" in str(error.value)
    chosen = artifacts.choose_peers("all")
    assert chosen[0] == "eager"
    assert "absent" not in chosen
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ItuneError) as error:
        artifacts.choose_peers("compile")
    assert "C++" in str(error.value)


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
    with pytest.raises(ItuneError) as error:
        artifacts.choose_peers("onnx-plain", "onnx")
    assert "onnx-plain" in str(error.value)
    assert "CLIP" in str(error.value)


@pytest.mark.slow
def test_clipcap_has_a_baseline_and_peers(
    artifacts: ModuleType, language_model_folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    """ClipCap's prefix ids go through `generate` and through a plain export."""
    checkpoint = save_clipcap(tmp_path / "c", language_model_folder, clip_folder, **SHAPES["transformer"])
    names = [name for name in ("onnx-plain", "ctranslate2-int8") if not artifacts.PEERS[name].lacks("clip")]
    options = ("--work-dir", tmp_path, "--repeats", 1, "--warmup", 1, "--threads", 1, "--precisions", "fp32")
    options += ("--contestants", ",".join(names), "--new-tokens", NEW_TOKENS, "--json", tmp_path / "out.json")
    done = latency("--checkpoint", checkpoint, "--batch-size", 2, *options)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    photos = result["settings"]["photos"]
    assert result["summary"]["eager"]["distinct_captions"] > 1
    for name in ("itune fp32", *(name for name in names if name in EXACT)):
        assert result["summary"][name]["identical_captions"] == photos
