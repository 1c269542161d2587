from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from itune.cli import common, export
from itune.export.compare import comparison as compare_module
from itune.export.compare.comparison import parse_variants
from itune.export.compare.stopwatch import measure_latency
from itune.export.options import CompareOptions
from itune.runtime.bundle import MANIFEST, Bundle
from itune.runtime.errors import ItuneError

ITUNE_EXPORT = Path(sys.executable).with_name("itune-export")


@pytest.fixture(scope="module")
def captions(photos, tmp_path_factory):
    """A caption file with a train and a dev split of the random photos."""
    path = tmp_path_factory.mktemp("data") / "captions.jsonl"
    lines = [
        {"image": str(photo), "captions": ["a dog runs", f"two men in red shirts {i}"], "split": split}
        for i, photo in enumerate(photos)
        for split in ["train" if i < 3 else "dev"]
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """itune-export CHECKPOINT --compare in this process: arguments -> (exit status, stdout, stderr)."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments):
        options = ["--compare", "--num-beams", 2, "--max-new-tokens", 6, "--threads", 1, "--no-verify", *arguments]
        monkeypatch.setattr(sys, "argv", ["itune-export", *map(str, options)])
        common.console.cache_clear()
        with pytest.raises(SystemExit) as exit_:
            export.main()
        out, err = capsys.readouterr()
        return exit_.value.code or 0, out, err

    yield call
    signal.signal(signal.SIGTERM, before)
    common.console.cache_clear()


def test_compares_and_takes_up_again(onnx_checkpoint, captions, tmp_path, run, monkeypatch):
    arguments = onnx_checkpoint, "--data", captions, "--precisions", "int8,int4+fp32,fp32@5", "-o", tmp_path / "c"
    status, table, said = run(*arguments)
    assert status == 0, said
    assert [line.split()[0] for line in table.splitlines()[-5:-1]] == ["fp32", "int8", "int4+fp32", "fp32@5"]
    assert "covered" in table
    assert {path.name for path in (tmp_path / "c").iterdir()} == {
        *("fp32", "int8", "int4+fp32", "fp32@5", "comparison.json", "comparison.png"),
        *("fp32.json", "int8.json", "int4+fp32.json", "fp32@5.json"),
    }
    with Image.open(tmp_path / "c" / "comparison.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (960, 600))
    result = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert result["settings"]["photos"] == 3
    assert result["settings"]["search"] == {"num_beams": 2, "max_new_tokens": 6}
    graphs = Bundle.load(tmp_path / "c" / "int4+fp32").manifest.graphs
    assert [(graph.role, graph.precision) for graph in graphs] == [("vision", "fp32"), ("decoder", "int4")]
    fp32, int8, int4, few = result["rows"]
    assert fp32["same_captions"] == fp32["fidelity"]["top1"] == 1
    assert fp32["megabytes"] > int8["megabytes"]
    assert fp32["megabytes"] > few["megabytes"]
    assert 0 < int8["fidelity"]["kl"] < int4["fidelity"]["kl"] < 0.1
    assert int8["fidelity"]["covered"] == 1 > few["fidelity"]["covered"]
    assert all(row["cider"] is not None for row in result["rows"])
    for row in result["rows"]:
        assert row["latency"]["total"] >= row["latency"]["encode"] + row["latency"]["search"] > 0

    def unexpected(*_arguments, **_options):
        raise AssertionError("computed twice")

    for name in ("export_bundle", "measure_fidelity"):
        monkeypatch.setattr(compare_module, name, unexpected)
    (tmp_path / "c" / "comparison.json").unlink()
    status, _, said = run(*arguments)
    assert status == 0, said
    assert said.splitlines()[0] == "measuring latency"
    again = json.loads((tmp_path / "c" / "comparison.json").read_text())["rows"]
    assert [row | {"latency": None} for row in again] == [row | {"latency": None} for row in result["rows"]]
    status, _, said = run(*arguments[:4], "fp32", *arguments[5:], "--length-penalty", "-4")
    assert said.splitlines()[0] == "fp32: captioning"


def test_photos_without_captions(clip_checkpoint, photos, tmp_path, run):
    broken = tmp_path / "photos"
    broken.mkdir()
    for photo in photos[:2]:
        (broken / photo.name).symlink_to(photo)
    (broken / "broken.jpg").write_bytes(b"no photo")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "int8.json").write_text("{damaged")
    (tmp_path / "c" / "fp32.json").write_text('{"captions": []}')
    status, table, said = run(clip_checkpoint, "--images", broken, "--precisions", "int8", "-o", tmp_path / "c")
    assert status == 0, said
    assert "CIDEr" not in table
    assert "covered" not in table
    rows = json.loads((tmp_path / "c" / "comparison.json").read_text())["rows"]
    assert [(row["name"], row["cider"], row["bleu4"]) for row in rows] == [("fp32", None, None), ("int8", None, None)]
    assert [row["photos"] for row in rows] == [2, 2]
    assert "1 of 3 photos" in said
    written = json.loads((tmp_path / "c" / "fp32.json").read_text())["captions"]["result"]
    assert rows[1]["fidelity"]["positions"] == sum(len(each["tokens"]) + 1 for each in written.values())


def test_reference_captions_by_hand(clip_checkpoint, captions, tmp_path, run):
    """The scores are those of itune-eval."""
    status, _, said = run(clip_checkpoint, "--data", captions, "--precisions", "fp32", "-o", tmp_path / "c")
    assert status == 0, said
    (row,) = json.loads((tmp_path / "c" / "comparison.json").read_text())["rows"]
    command = ["-m", "itune.cli.evaluate", tmp_path / "c" / "fp32", "--data", captions, "--json"]
    options = ["--num-beams", "2", "--max-new-tokens", "6", "--threads", "1"]
    done = subprocess.run([sys.executable, *command, *options], capture_output=True, text=True, check=True)
    scores = json.loads(done.stdout)
    assert (row["cider"], row["bleu4"]) == (scores["cider"], scores["bleu4"])


def test_variants_are_read():
    options = CompareOptions(precisions="int8, int8+fp32,fp32,fp32@5000,int8+int8@a/words.txt", data="captions.jsonl")
    assert {
        name: (each.precision, each.vision_precision, each.vocabulary, each.data is not None)
        for name, each in parse_variants(options).items()
    } == {
        "fp32": ("fp32", None, None, False),
        "int8": ("int8", None, None, False),
        "int8+fp32": ("int8", "fp32", None, False),
        "fp32@5000": ("fp32", None, "5000", True),
        "int8+int8@words.txt": ("int8", "int8", "a/words.txt", True),
    }


@pytest.mark.parametrize("text", ["", "int9", "int8+", "int8+x", "+int8", "int8@"])
def test_other_variants_are_refused(text):
    with pytest.raises(ItuneError) as error:
        parse_variants(CompareOptions(precisions=text))
    assert f"--precisions {text}:" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["c", "-o", "o"], ["--compare", "--data", "--images"]),
        (["c", "-o", "o", "--images", "."], ["--images ."]),
        (["c"], ["--output"]),
        (["c", "-o", "o", "--images", "photos", "--limit", "0"], ["--limit", "'0'"]),
        (["c", "-o", "o", "--images", "photos", "--precisions", "int8,x"], ["--precisions", "'x'"]),
        (["c", "-o", "o", "--images", "photos", "--precisions", "int8,int8"], ["--precisions", "int8"]),
        (["c", "-o", "o", "--images", "photos"], ["c/itune.json"]),
    ],
)
def test_errors_are_one_sentence(arguments, named, run, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(photos[0].parent)
    status, out, said = run(*arguments)
    assert status == 2
    assert said.splitlines()[-1].startswith("itune-export: error: ")
    assert all(part in said.splitlines()[-1] for part in named)
    assert out == ""


def test_bundles_of_something_else_are_not_measured(clip_checkpoint, onnx_checkpoint, photos, tmp_path, run):
    arguments = "--images", photos[0].parent, "--limit", 1, "--precisions", "fp32", "-o", tmp_path / "c"
    status, _, said = run(clip_checkpoint, *arguments)
    assert status == 0, said
    status, _, said = run(onnx_checkpoint, *arguments)
    assert status == 2
    assert str(tmp_path / "c" / "fp32") in said.replace("\n", "")
    assert "--output" in said


def test_matplotlib_is_named_before_anything_is_done(run, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "find_spec", lambda name: None if name == "matplotlib" else name)
    status, _, said = run("c", "-o", tmp_path / "c")
    assert status == 2
    assert "matplotlib" in said
    assert "itune-captioner[plot]" in said


def test_a_bundle_that_cannot_be_loaded_is_named(tmp_path, photos):
    with pytest.raises(ItuneError) as error:
        measure_latency({"a": tmp_path}, photos)
    assert str(tmp_path) in str(error.value)


def test_ctrl_c_ends_every_process(clip_checkpoint, photos, tmp_path):
    command = [ITUNE_EXPORT, clip_checkpoint, "--compare", "--no-verify", "--images", photos[0].parent]
    command += ["--precisions", "fp32", "--latency-photos", "6", "--num-beams", "2", "-o", tmp_path / "c"]
    # A suite that runs in the background inherits a shell's "ignore Ctrl-C", and would pass it on.
    process = subprocess.Popen(
        list(map(str, command)),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("measuring latency"):
            break
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == common.INTERRUPTED
    process.stderr.close()
    deadline = time.monotonic() + 20
    while _alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(process.pid)
    assert (tmp_path / "c" / "fp32" / MANIFEST).is_file()  # what was done is kept


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
