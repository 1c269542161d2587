"""Recovery after a killed run, and the lock on a run's folder."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from itune.backbones import load_language_model, load_vision_tower
from itune.checkpoint import CheckpointError
from itune.cli.common import ENDING, on_ending
from itune.cli.train import main
from itune.data.records import Record
from itune.files import atomic_folder, recover_folder
from itune.loading import check_hashes, load_captioner
from itune.methods import base as captioning
from itune.methods.base import write_tensors
from itune.methods.schemas import load_config
from itune.runtime.errors import ItuneError
from itune.training.run_folder import fingerprint, holds_run, log_epoch, only_run
from tests.conftest import make_checkpoint, make_clip, make_language_model, refused


class Killed(BaseException):
    """Not an Exception, like a kill signal."""


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_folder_is_whole_wherever_its_writer_was_killed(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system cannot exchange two folders in one step."""

    def write(content: str) -> None:
        with atomic_folder(tmp_path / "last") as folder:
            (folder / "state").write_text(content)

    write("old")
    rename, renamed = Path.rename, []

    def killed(self: Path, target: Path) -> Path:
        renamed.append(target)
        if len(renamed) >= at:
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        patched.setattr("itune.files._exchange", lambda *_folders: False)
        patched.setattr("shutil.rmtree", lambda *_args, **_options: None)
        with pytest.raises(Killed):
            write("new")
    assert (tmp_path / "last").exists() == (at != 2)
    recover_folder(tmp_path / "last")
    assert (tmp_path / "last" / "state").read_text() == ("old" if at == 1 else "new")
    write("newer")
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_one_run_at_a_time(tmp_path: Path) -> None:
    output = tmp_path / "run"
    with only_run(output):
        with refused(ItuneError, output), only_run(output):
            pass
        assert (output / ".lock").exists()
    assert not output.exists(), "nothing came of it"
    (tmp_path / "file").write_text("mine")
    with refused(ItuneError, tmp_path / "file"), only_run(tmp_path / "file"):
        pass
    assert not holds_run(tmp_path)
    for name in ("best", "last"):
        (tmp_path / name / name).mkdir(parents=True)
        assert holds_run(tmp_path / name)


def test_epochs_are_logged_once(tmp_path: Path) -> None:
    for epoch, step in ((1, 5), (2, 9), (2, 10), (3, 15)):
        log_epoch(tmp_path, epoch, {"step": step})
    lines = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(lines + '{"epoch": 4, "st')
    log_epoch(tmp_path, 4, {"step": 20})
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(each["epoch"], each["step"]) for each in found] == [(1, 5), (2, 10), (3, 15), (4, 20)]


def test_fingerprints_tell_splits_and_captions() -> None:
    one, two = Record(Path("a"), ("a dog",), "a"), Record(Path("b"), ("a cat",), "b")
    changed = Record(Path("a"), ("a dog", "dogs"), "a")
    found = [
        fingerprint([one, two], []),
        fingerprint([one], [two]),
        fingerprint([changed, two], []),
        fingerprint([one], []),
    ]
    assert len(set(found)) == 4
    assert fingerprint([Record(Path("elsewhere/a"), ("a dog",), "a")]) == fingerprint([one])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left")])
def test_a_full_disk_is_one_sentence(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(captioning, "save_file", full)
    with refused(ItuneError, tmp_path / "w", "No space left"):
        write_tensors({"w": torch.zeros(1)}, tmp_path / "w")


def test_other_frozen_parts_are_refused(
    checkpoint_folder: Path, language_model_folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    config = load_config(checkpoint_folder)
    language, tower = load_language_model(str(language_model_folder)), load_vision_tower(str(clip_folder))
    check_hashes(checkpoint_folder, config, language, tower)
    other = load_language_model(str(make_language_model(tmp_path / "lm", seed=5)))
    with refused(CheckpointError, "language_model.sha256", other.sha256):
        check_hashes(checkpoint_folder, config, other, tower)
    check_hashes(checkpoint_folder, config, None, tower)
    with refused(CheckpointError, "vision.sha256", config.vision.sha256):
        check_hashes(checkpoint_folder, config, None, load_vision_tower(str(make_clip(tmp_path / "clip", seed=5))))


def test_a_hang_up_stops_the_run_unless_it_is_ignored() -> None:
    heard: list[int] = []
    before = {each: signal.getsignal(each) for each in ENDING}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        on_ending(lambda number, _frame: heard.append(number))
        for each in ENDING:
            os.kill(os.getpid(), each)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert heard == [signal.SIGTERM]


Run = Callable[..., tuple[object, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run itune-train; returns its exit status and stderr."""

    def runner(*arguments: object) -> tuple[object, str]:
        monkeypatch.setattr("sys.argv", ["itune-train", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return ended.value.code or 0, said

    return runner


def test_a_run_resumes_only_with_its_own_data_and_state(
    run: Run, checkpoint_folder: Path, records: list[Record], tmp_path: Path
) -> None:
    lines = [json.dumps({"image": str(r.image), "captions": r.captions}) for r in records]
    data, output = tmp_path / "captions.jsonl", tmp_path / "run"
    data.write_text("\n".join(lines))
    command = ["--preset", "small-data", "--data", data, "--dev-fraction", "0.3", "--init-from", checkpoint_folder]
    command += ["--epochs", 2, "--num-beams", 1, "--max-new-tokens", 4, "-o", output]
    assert run(*command)[0] == 0
    assert sorted(path.name for path in output.iterdir()) == [
        "best",
        "config.json",
        "last",
        "metrics.jsonl",
        "tensorboard",
    ]
    status, said = run(*command, "--resume")  # as the README says: the same command
    assert status == 0, said
    log = (output / "metrics.jsonl").read_text()
    data.write_text("\n".join(lines[:-1]))
    status, said = run(*command, "--resume")
    assert status == 2
    assert str(output / "last") in "".join(said.split())
    data.write_text("\n".join(lines))
    best = (output / "best" / "adapters.safetensors").read_bytes()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text((output / "config.json").read_text())
    status, said = run(*command[:-1], tmp_path / "begun", "--resume")
    assert (status, "without --resume" in said) == (2, True)
    status, said = run(*command[:-1], tmp_path / "begun", "--epochs", 1)
    assert status == 0, said
    for path in sorted((output / "last").iterdir()):
        path.unlink()
    (output / "last").rmdir()
    status, said = run(*command, "--resume")
    assert (status, "--init-from" in said) == (2, True)
    status, said = run(*command)
    assert status == 2
    assert "--resume" in said
    assert ((output / "best" / "adapters.safetensors").read_bytes(), (output / "metrics.jsonl").read_text()) == (
        best,
        log,
    )


def test_a_prompt_that_leaves_no_position_for_a_caption(
    language_model_folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    prompt = "a dog runs " * 60
    checkpoint = make_checkpoint(tmp_path / "c", language_model_folder, clip_folder, prompt=prompt)
    with refused(CheckpointError, language_model_folder.name, "64"):
        load_captioner(checkpoint)


def test_a_tokenizer_of_another_model(run: Run, clip_folder: Path, records: list[Record], tmp_path: Path) -> None:
    language_model = make_language_model(tmp_path / "lm", vocab_size=40)
    (tmp_path / "c.jsonl").write_text(
        "\n".join(json.dumps({"image": str(r.image), "captions": r.captions}) for r in records)
    )
    options = ["--data", tmp_path / "c.jsonl", "--language-model", language_model, "--vision", clip_folder]
    status, said = run("--preset", "small-data", *options, "--dev-fraction", "0.3", "-o", tmp_path / "run")
    assert status == 2
    assert str(language_model) in "".join(said.split())
    assert " 40" in said
    assert not (tmp_path / "run").exists()
    for fraction in ("0", "1", "-1"):
        status, said = run("--preset", "small-data", *options, "--dev-fraction", fraction, "-o", tmp_path / "run")
        assert (status, fraction in said) == (2, True)
