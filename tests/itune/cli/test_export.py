from __future__ import annotations

import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from itune.cli import common, export
from itune.loading import LoadedCheckpoint, eager_captioner
from itune.runtime import Captioner

ITUNE_EXPORT = [sys.executable, "-m", "itune.cli.export"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the command in this process: arguments -> (exit status, what it said on stderr)."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["itune-export", *map(str, arguments)])
        common.console.cache_clear()
        with pytest.raises(SystemExit) as exit_:
            export.main()
        return exit_.value.code or 0, capsys.readouterr().err

    yield call
    signal.signal(signal.SIGTERM, before)
    common.console.cache_clear()


def test_exported_bundle_captions_as_pytorch_does(clip_checkpoint, photos, tmp_path):
    """The whole command, verification on real files included, from a folder where `itune` is not the package."""
    (tmp_path / "itune").mkdir()
    lines = [json.dumps({"image": photo.name, "captions": ["a dog runs"]}) for photo in photos]
    (tmp_path / "dev.jsonl").write_text("\n".join(lines))
    command = [*ITUNE_EXPORT, clip_checkpoint, "--precision", "fp32", "-o", "b", "--images", photos[0].parent]
    command += ["--dev-data", "dev.jsonl", "--dev-images", "4", "--max-new-tokens", "9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "visual.1.keys" in done.stderr
    assert "10 different of 10" in done.stderr  # six photos, four synthetic
    assert "FAIL" not in done.stderr
    assert re.search(r"captions, dev +\d different, 4 photos +1 +0\.98 +ok", done.stderr)
    assert "CIDEr-D, dev" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"itune", "dev.jsonl", "b"}

    options = {"num_beams": 5, "max_new_tokens": 12}
    found = Captioner.load(tmp_path / "b").caption(photos, **options)
    expected = eager_captioner(LoadedCheckpoint.load(clip_checkpoint)).caption(photos, **options)
    assert [caption.tokens for caption in found] == [caption.tokens for caption in expected]
    assert len({caption.tokens for caption in found}) > 3


def test_int8_and_back(onnx_checkpoint, pixels, tmp_path, run):
    status, said = run(onnx_checkpoint, "--precision", "int8", "--no-verify", "--license", "CC0", "-o", tmp_path / "b")
    assert status == 0, said
    assert f"{tmp_path / 'b'}: " in said.replace("\n", "")
    status, said = run("--restore", tmp_path / "b", "-o", tmp_path / "restored")
    assert status == 0, said
    assert {path.name for path in (tmp_path / "restored").iterdir()} == {"language-model", "vision", "checkpoint"}
    eager = eager_captioner(LoadedCheckpoint.load(tmp_path / "restored" / "checkpoint"))
    assert np.isfinite(eager.caption(pixels[0]).score)


def test_vocabulary(onnx_checkpoint, photos, tmp_path, run):
    (tmp_path / "captions.jsonl").write_text('{"image": "a.jpg", "captions": ["a dog runs", "a red dog"]}\n')
    given = "--vocabulary", 3, "--data", tmp_path / "captions.jsonl"
    status, said = run(onnx_checkpoint, "--no-verify", *given, "-o", tmp_path / "b")
    assert status == 0, said
    captioner = Captioner.load(tmp_path / "b")
    assert 256 < captioner.tokens.shortlist < 262
    assert captioner.caption(photos[0], max_new_tokens=5).tokens


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["c"], ["--output"]),
        (["-o", "b"], ["CHECKPOINT", "--restore"]),
        (["c", "-o", "b"], ["c/itune.json"]),
        (["c", "-o", "b", "--target", "tensor"], ["--target", "'tensor'", "'onnx'", "'tensorrt'"]),
        (["c", "-o", "b", "--precision", "int2"], ["--precision", "'int2'", "'int4'"]),
        (["c", "-o", "b", "--max-batch", "0"], ["--max-batch", "'0'"]),
        (["c", "-o", "b", "--model-card", "card.md"], ["--model-card", "card.md"]),
        (["c", "-o", "b", "--gpu", "sm86"], ["--gpu", "--target tensorrt"]),
        (["c", "-o", "b", "--calibration-data", "x"], ["--calibration-data", "--target tensorrt"]),
        (["c", "-o", "b", "--images", ".", "--no-verify"], ["--images", "--no-verify"]),
        (["c", "-o", "b", "--dev-data", "dev.jsonl", "--no-verify"], ["--dev-data", "--no-verify"]),
        (["c", "-o", "b", "--dev-images", "9"], ["--dev-images", "--dev-data"]),
        (["c", "-o", "b", "--data", "captions.jsonl"], ["--data", "--vocabulary"]),
        (["c", "-o", "b", "--language-model", "gpt2"], ["--language-model", "--import"]),
        (["-o", "b", "--restore", "x"], ["x/bundle.json"]),
        (["-o", "b", "--restore", "x", "--normalize"], ["--normalize", "--import"]),
        (["-o", "b", "--restore", "x", "--import", "f.pt"], ["--import", "--restore"]),
        (["-o", "b", "--import", "f.pt", "--precision", "int8"], ["--precision", "--import"]),
        (["c", "-o", "b", "--import", "f.pt"], ["CHECKPOINT", "--import"]),
        (["c", "-o", "b", "--restore", "x"], ["CHECKPOINT", "--restore"]),
        *(
            (["-o", "b", "--restore", "x", *flags], [flags[0], "--restore"])
            for flags in (
                ["--max-batch", "2"],
                ["--dev-data", "dev.jsonl"],
                ["--vocabulary", "9"],
                ["--precision", "int8"],
                ["--vision-precision", "int8"],
                ["--num-beams", "3"],
                ["--no-verify"],
            )
        ),
    ],
)
def test_errors_are_one_sentence(arguments, named, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, said = run(*arguments)
    assert status == 2
    assert said.startswith("itune-export: error: ")
    assert all(part in said for part in named)
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_missing_libraries_are_named(run, monkeypatch):
    monkeypatch.setattr(common, "find_spec", lambda name: None if name == "onnx" else name)
    status, said = run("c", "-o", "b")
    assert status == 2
    assert "onnx not installed" in said
    assert "itune-captioner[export]" in said


def test_sigterm_leaves_nothing(clip_checkpoint, tmp_path, run, monkeypatch):
    from itune.export import bundle

    monkeypatch.setattr(bundle, "build_decoder", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    status, _ = run(clip_checkpoint, "-o", tmp_path / "b")
    assert status == 143
    assert list(tmp_path.iterdir()) == []


def test_patch_grid(onnx_checkpoint, clip_checkpoint, tmp_path, run):
    status, said = run(onnx_checkpoint, "--no-verify", "--patch-grid", "2x7", "-o", tmp_path / "b")
    assert status == 0, said
    assert Captioner.load(tmp_path / "b").bundle.manifest.patches == (2, 7)
    for checkpoint, grid, named in (
        (onnx_checkpoint, "4x5", "16"),
        (clip_checkpoint, "2x8", "4x4"),
        (clip_checkpoint, "4", "ROWSxCOLUMNS"),
        (clip_checkpoint, "0x4", "ROWSxCOLUMNS"),
    ):
        status, said = run(checkpoint, "--patch-grid", grid, "-o", tmp_path / "c")
        assert (status, said.count("\n")) == (2, 1)
        assert all(part in said for part in ("--patch-grid", grid, named))
        assert not (tmp_path / "c").exists()
