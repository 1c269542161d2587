"""The latency benchmark end to end on tiny models: its report, not its speed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from itune import ItuneError
from itune.checkpoint import CONFIG_FILE
from tests.benchmarks.commands import BATCH_SIZE, LATENCY, NEW_TOKENS, Contest, latency
from tests.conftest import make_checkpoint


def test_report(contest: Contest, contestants: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    import latency as command

    result, settings = contest.result, contest.result["settings"]
    assert result.keys() == {"machine", "settings", "summary", "samples"}
    assert {"bundle-fp32", "bundle-int8", "out.json"} <= {path.name for path in contest.work.iterdir()}
    photos = settings["photos"]
    assert photos >= 8
    for name, row in result["summary"].items():
        assert row["peak_mb"] > 50
        for part in ("encode", "decode", "total") if "total" in row else ("decode",):
            assert 0 < row[part]["min_ms"] <= row[part]["median_ms"] <= row[part]["p95_ms"] <= row[part]["max_ms"]
        samples = result["samples"][name]
        assert len(samples) == -(-photos // BATCH_SIZE), "every photo is in a batch"
        assert all(len(sample["tokens"]) == BATCH_SIZE for sample in samples)
        assert all(len(tokens) == NEW_TOKENS for sample in samples for tokens in sample["tokens"]), (
            "the length is forced"
        )
        if "total" in row:
            assert row["images_per_s"] == pytest.approx(1e3 * BATCH_SIZE / row["total"]["median_ms"])
    assert result["summary"]["itune fp32"]["identical_captions"] == photos
    assert result["summary"]["eager"]["distinct_captions"] > 1
    # PyTorch is in one process only; the bundles' memory is their own.
    assert result["summary"]["itune int8"]["peak_mb"] < result["summary"]["eager"]["peak_mb"]
    assert "images/s" in contest.printed
    command.print_table(result | {"settings": settings | {"batch_size": 1}})
    assert "images/s" not in capsys.readouterr().out, "single photos have no throughput"


def test_bundles_are_reused_for_the_same_checkpoint_only(
    artifacts: ModuleType, checkpoint_folder: Path, language_model_folder: Path, clip_folder: Path, contest: Contest
) -> None:
    manifest = contest.work / "bundle-int8" / "bundle.json"
    before = manifest.stat().st_mtime_ns
    assert artifacts.Artifacts(checkpoint_folder, contest.work).bundle("int8") == manifest.parent
    assert manifest.stat().st_mtime_ns == before

    other = make_checkpoint(language_model_folder.parent / "other", language_model_folder, clip_folder, seed=1)
    settings = (checkpoint_folder / CONFIG_FILE).read_text()
    same_weights = checkpoint_folder.parent / "same-weights"
    same_weights.mkdir()
    (same_weights / "adapters.safetensors").write_bytes((checkpoint_folder / "adapters.safetensors").read_bytes())
    assert '"lambda": 2.5' in settings
    (same_weights / CONFIG_FILE).write_text(settings.replace('"lambda": 2.5', '"lambda": 1.5'))
    for checkpoint in (other, same_weights):
        with pytest.raises(ItuneError) as error:
            artifacts.Artifacts(checkpoint, contest.work).bundle("int8")
        assert str(manifest.parent) in str(error.value)
        assert "--work-dir" in str(error.value)


def test_without_a_gpu_tensorrt_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # on machines with a GPU as well
    done = latency("--random-init", "base", "--engine", "tensorrt", "--work-dir", tmp_path / "work")
    assert done.returncode == 2
    assert done.stderr.startswith("latency: error: ")
    assert "GPU" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "work").exists(), "nothing was built for it"


def test_export_options_of_plans(contestants: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import latency as command

    monkeypatch.setattr(command, "CudaDevice", lambda: SimpleNamespace(capability="sm89"))
    arguments = command.parse_arguments(["--random-init", "base", "--engine", "tensorrt", "--batch-size", "16"])
    assert arguments.precisions == "fp16,int8"
    fp16, int8 = map(command.plan_options(arguments), ("fp16", "int8"))
    assert fp16 == ["--gpu", "sm89", "--max-beams", 5, "--max-batch", 16, "--max-new-tokens", 32]
    assert int8 == [*fp16, "--calibration-data", command.EXAMPLES]


@pytest.fixture
def contestants(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(LATENCY.parent))
    import contestants

    return contestants


def task(contestants: ModuleType) -> Any:
    return contestants.Task(num_beams=2, new_tokens=4, prompt=(0,), end=0)


def test_a_waiting_contestant_uses_no_cpu(contestants: ModuleType, checkpoint_folder: Path) -> None:
    worker = contestants.ContestantProcess(contestants.PEERS["eager"], checkpoint_folder, threads=2)
    worker.caption(np.zeros((1, 32, 32, 3), np.uint8), task(contestants))
    time.sleep(0.1)
    process = psutil.Process(worker.process.pid)
    before = sum(process.cpu_times()[:2])
    time.sleep(0.5)
    assert sum(process.cpu_times()[:2]) - before <= 0.05
    worker.close()


def test_peak_memory_is_the_contestants_own(contestants: ModuleType, contest: Contest) -> None:
    parents = np.ones(100_000_000)  # 800 MB, which the kernel would count as the child's (getrusage)
    worker = contestants.ContestantProcess(contestants.BUNDLE, contest.work / "bundle-int8", threads=1)
    assert worker.close() < 400
    assert parents[-1] == 1


def test_a_killed_contestant_is_reported(contestants: ModuleType, contest: Contest) -> None:
    worker = contestants.ContestantProcess(contestants.BUNDLE, contest.work / "bundle-int8", threads=1)
    worker.process.kill()
    worker.process.join()
    with pytest.raises(ItuneError) as error:
        worker.caption(np.zeros((1, 32, 32, 3), np.uint8), task(contestants))
    assert "itune" in str(error.value)
    assert "-9" in str(error.value)


def test_a_contestants_error_is_one_sentence(contestants: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ItuneError) as error:
        contestants.ContestantProcess(contestants.BUNDLE, tmp_path, threads=1)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_stopping_ends_every_process(number: signal.Signals, checkpoint_folder: Path, contest: Contest) -> None:
    command = [sys.executable, str(LATENCY), "--checkpoint", str(checkpoint_folder), "--work-dir", str(contest.work)]
    with subprocess.Popen(
        [*command, "--repeats", "100000"],
        stderr=subprocess.PIPE,
        text=True,
        # A suite that runs in the background inherits a shell's "ignore Ctrl-C", and would pass it on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        started = psutil.Process(process.pid)
        deadline = time.monotonic() + 120
        while len(workers := [p for p in started.children() if "spawn_main" in " ".join(p.cmdline())]) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        time.sleep(1)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    assert "Traceback" not in errors
    assert not psutil.wait_procs(workers, timeout=10)[1]


def test_random_captioners_look_at_their_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(LATENCY.parent))
    from random_init import Geometry, build_checkpoint

    from itune.loading import load_captioner
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
    assert (checkpoint / "adapters.safetensors").stat().st_mtime_ns == before, "the checkpoint is reused"
    captions = load_captioner(checkpoint).caption([random_photo(i) for i in range(10)], max_new_tokens=8)
    assert len({caption.tokens for caption in captions}) >= 9


def test_usage_errors_are_one_sentence(
    contestants: ModuleType, status_of: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import latency as command

    for arguments, message in (
        (("--random-init", "huge"), "'huge'"),
        (("--checkpoint", tmp_path), "itune.json"),
        (("--random-init", "base", "--num-beams", "0"), "--num-beams"),
        (("--random-init", "base", "--json", tmp_path / "no" / "out.json"), str(tmp_path / "no")),
        (("--checkpoint", tmp_path, "--images", tmp_path), f"--images {tmp_path}"),
        (("--checkpoint", tmp_path, "--contestants", "eager,onnx"), "'onnx'"),
        (("--checkpoint", tmp_path, "--batch-size", "0"), "--batch-size"),
    ):
        assert status_of(command.main, *arguments) == 2
        assert message in capsys.readouterr().err
