"""itune-run, most of it within this process, and as a process where signals, pipes and terminals matter."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image

from itune import __version__
from itune.cli.photos import expand
from itune.runtime.bundle import MANIFEST
from itune.runtime.engines.native import KERNELS
from itune.runtime.search.loop import NATIVE
from tests.itune.cli.conftest import BLUE, GREEN, RED, Paint, Result, process


def test_one_image_prints_its_caption(run: Callable[..., Result], paint: Paint) -> None:
    result = run(paint("green"))
    assert (result.status, result.out, result.err) == (0, f"{GREEN}\n", "")


def test_several_images_print_their_names(run: Callable[..., Result], paint: Paint) -> None:
    red, blue = paint("red"), paint("blue")
    result = run(blue, red, "--batch-size", 1)
    assert (result.status, result.out, result.err) == (0, f"{blue}\t{BLUE}\n{red}\t{RED}\n", "")


def test_json(run: Callable[..., Result], paint: Paint) -> None:
    red, missing = paint("red"), "missing \udce9.jpg"  # a name that is not UTF-8
    result = run("--json", red, missing, "--num-beams", 2)
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert result.status == 1
    assert result.err == ""
    caption, error = lines
    assert list(caption) == ["image", "caption", "score", "tokens", "candidates", "ms", "engine"]
    assert caption["image"] == str(red)
    assert caption["caption"] == RED
    assert caption["tokens"] == [1, 2, 3, 4, 5]
    assert caption["candidates"][0] == {"caption": RED, "score": caption["score"]}
    assert len(caption["candidates"]) == 2
    assert list(caption["ms"]) == ["decode_image", "encode", "search"]
    assert error == {"image": missing, "error": "missing \\udce9.jpg: No such file or directory"}


def test_unreadable_images_do_not_stop_the_others(run: Callable[..., Result], paint: Paint) -> None:
    red, bad = paint("red"), paint("red", "bad.png")
    bad.write_bytes(b"")
    result = run(bad, red, "missing.jpg", red)
    assert result.status == 1
    assert result.out == f"{red}\t{RED}\n" * 2
    assert [line.split(": ")[:2] for line in result.err.splitlines()] == [
        ["itune-run", str(bad)],
        ["itune-run", "missing.jpg"],
    ]
    result = run(bad)
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith(f"itune-run: {bad}: ")


def test_folders_and_globs(run: Callable[..., Result], paint: Paint, tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.PNG", "b/.hidden.png", "b/deeper/3.png", "a.png", "[x].png"):
        paint("red", name)
    (tmp_path / "b" / "notes.txt").write_text("no photo")
    (tmp_path / "empty").mkdir()

    def found(*arguments: str) -> list[str]:
        absolute = [argument if argument == "-" else str(tmp_path / argument) for argument in arguments]
        return [source.removeprefix(f"{tmp_path}/") for source in expand(absolute)]

    assert found("b") == ["b/1.PNG", "b/2.png"]
    assert found("a.png", "b", "a.png") == ["a.png", "b/1.PNG", "b/2.png", "a.png"]
    assert found("*.png") == ["[x].png", "a.png"]
    assert found("[x].png") == ["[x].png"]  # a file of that name comes before the pattern
    assert found("b/**/*.png") == ["b/2.png", "b/deeper/3.png"]
    assert found("*") == ["[x].png", "a.png"]
    assert found("*.gif", "absent", "empty", "-") == ["*.gif", "absent", "empty", "-"]
    assert found("x" * 300) == ["x" * 300]
    assert run(tmp_path / "b").out == f"{tmp_path}/b/1.PNG\t{RED}\n{tmp_path}/b/2.png\t{RED}\n"
    assert run(tmp_path / "b" / "2*").out == f"{tmp_path}/b/2.png\t{RED}\n"  # the name is news
    assert run(tmp_path / "empty").err.startswith(f"itune-run: {tmp_path}/empty: ")


def test_what_blocks_is_no_image_of_a_folder(run: Callable[..., Result], paint: Paint, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    paint("red").rename(tmp_path / "folder" / "b.png")
    os.mkfifo(tmp_path / "folder" / "a.png")
    result = run(tmp_path / "folder")
    assert (result.status, result.out) == (0, f"{tmp_path / 'folder' / 'b.png'}\t{RED}\n")


def test_stdin(run: Callable[..., Result], paint: Paint, monkeypatch: pytest.MonkeyPatch) -> None:
    def feed(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    feed(paint("blue").read_bytes())
    assert run("-").out == f"{BLUE}\n"
    feed(paint("blue").read_bytes())
    assert json.loads(run("--json", "-").out)["image"] == "-"
    feed(b"")
    result = run("-")
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith("itune-run: standard input: ")


def test_search_options(run: Callable[..., Result], paint: Paint) -> None:
    red = paint("red")
    assert run(red, "--max-new-tokens", 3).out == "a dog runs\n"
    assert len(run(red, "--min-new-tokens", 8).out.split()) >= 8
    assert len(json.loads(run(red, "--json", "--num-beams", 3).out)["candidates"]) == 3
    plain, penalised = (json.loads(run(red, "--json", "--length-penalty", p).out)["score"] for p in (0, 1))
    assert penalised == pytest.approx(plain / 6)
    again = run(red, "--min-new-tokens", 30, "--num-beams", 1).out.split()
    without = run(red, "--min-new-tokens", 30, "--num-beams", 1, "--no-repeat-ngram-size", 1).out.split()
    assert len(set(again)) < len(again)
    assert len(set(without)) == len(without)
    penalty = run(red, "--min-new-tokens", 30, "--num-beams", 1, "--repetition-penalty", 9).out.split()
    assert penalty != again
    assert run(red, "--engine", "onnxruntime", "--threads", 1).out == f"{RED}\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], ["IMAGE", "--help"]),
        (["a.jpg", "--beams", "3"], ["--beams", "Did you mean --num-beams?"]),
        (["a.jpg", "--num-beams", "many"], ["--num-beams", "'many'"]),
        (["a.jpg", "--num-beams", "0"], ["--num-beams", "'0'"]),
        (["a.jpg", "--num-beams", "1000000"], ["--num-beams", "1024", "'1000000'"]),
        (["a.jpg", "--no-repeat-ngram-size", "99999999999999999999"], ["--no-repeat-ngram-size", "2147483648"]),
        (["a.jpg", "--sample", "--top-k", "99999999999999999999"], ["--top-k", "2147483648"]),
        (["a.jpg", "--top-p", "0.5"], ["top_p", "--sample"]),
        (["a.jpg", "--batch-size", "99999999999999999999"], ["batch_size", "4096"]),
        (["a.jpg", "--threads", "100000"], ["threads", "4096", "100000"]),
        (["a.jpg", "--workers", "100000"], ["workers", "4096", "100000"]),
        (["a.jpg", "--heatmap", ""], ["--heatmap", "empty"]),
        (["a.jpg", "--heatmap="], ["--heatmap", "empty"]),
        (["a.jpg", "--heatmap-json", "-"], ["--heatmap-json -"]),
        (["a.jpg", "--max-new-tokens", "99"], ["max_new_tokens", "40"]),
        (["a.jpg", "--engine", "cuda"], ["engine", "onnxruntime-cuda", "'cuda'"]),
        (["a.jpg", "--batch-size", "0"], ["--batch-size", "0"]),
        (["a.jpg", "--threads", "0"], ["--threads", "0"]),
        (["a.jpg", "--workers", "-1"], ["--workers", "-1"]),
        ([""], ["argument 1", "empty"]),
        (["a.jpg", " "], ["argument 2", "empty"]),
        (["a.jpg", "--model", "x"], ["--model", "--bundle"]),
        (["a.jpg", "--mnt", "3"], ["--mnt", "--max-new-tokens"]),
    ],
)
def test_usage_errors(run: Callable[..., Result], arguments: list[str], named: list[str]) -> None:
    result = run(*arguments)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("itune-run: error: ")
    assert all(part in result.err for part in named)
    assert result.err.count("\n") == 1


def test_the_last_of_a_repeated_flag_wins(run: Callable[..., Result], paint: Paint) -> None:
    assert run(paint("red"), "--max-new-tokens", 9, "--max-new-tokens=3").out == "a dog runs\n"


def test_bundle_errors(run: Callable[..., Result], bundle: Path, paint: Paint, tmp_path: Path) -> None:
    result = run(paint("red"), model=tmp_path / "absent")
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith(f"itune-run: error: {tmp_path / 'absent'}")
    broken = shutil.copytree(bundle, tmp_path / "broken")
    content = json.loads((broken / MANIFEST).read_text()) | {"schema_version": 9}
    (broken / MANIFEST).write_text(json.dumps(content))
    result = run(paint("red"), model=broken)
    assert result.status == 2
    assert "schema_version" in result.err
    assert result.err.count("\n") == 1


def test_sampling(run: Callable[..., Result], paint: Paint) -> None:
    arguments = ("--json", "--sample", "--temperature", 5, "--top-k", 0, "--num-return", 4, paint("red"))
    first, again, other = (json.loads(run(*arguments, "--seed", seed).out)["candidates"] for seed in (1, 1, 2))
    assert first == again != other
    assert len({candidate["caption"] for candidate in first}) > 1


def test_version_and_help(run: Callable[..., Result]) -> None:
    result = run("--version", model=None)
    search = f"native search, native engine ({KERNELS[0]})" if NATIVE else "NumPy search"
    expected = f"itune {__version__}, {search}, onnxruntime {version('onnxruntime')}\n"
    assert (result.status, result.out, result.err) == (0, expected, "")
    result = run("--help", model=None)
    assert result.status == 0
    assert "--num-beams" in result.out


def test_a_locale_that_cannot_spell_a_name(bundle: Path, paint: Paint) -> None:
    path = paint("red", "déjà.png")
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = process(bundle, path, path, env=environment)
    out, err = done.communicate(timeout=60)
    assert (done.returncode, err) == (0, b"")
    assert out.count(rb"d\xe9j\xe0.png") == 2


def test_ctrl_c_is_quiet_and_what_was_captioned_is_out(bundle: Path, paint: Paint) -> None:
    running = process(bundle, "--batch-size", 1, paint("red"), "-", stdin=subprocess.PIPE)
    assert running.stdout is not None
    assert running.stdout.readline().endswith(f"{RED}\n".encode())  # now it waits for stdin
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=60) == 130
    assert running.stderr is not None
    assert running.stderr.read() == b""
    for stream in (running.stdin, running.stdout, running.stderr):
        assert stream is not None
        stream.close()


def test_ctrl_c_among_many_images_prints_whole_lines(bundle: Path, paint: Paint) -> None:
    path = paint("red")
    running = process(bundle, "--workers", 2, *[path] * 3000)
    assert running.stdout is not None
    assert running.stdout.readline() == f"{path}\t{RED}\n".encode()
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=10)
    assert (running.returncode, err) == (130, b"")
    lines = out.decode().splitlines(keepends=True)
    assert set(lines) <= {f"{path}\t{RED}\n"}
    assert len(lines) < 2900


def test_workers_change_nothing(run: Callable[..., Result], paint: Paint) -> None:
    bad = paint("red", "bad.png")
    bad.write_bytes(b"")
    paths = [paint("red"), bad, *[paint("blue"), paint("green")] * 5]
    results = [run(*paths, "--workers", workers, "--batch-size", 3) for workers in (0, 1, 3)]
    assert [result.status for result in results] == [1, 1, 1]
    assert len({result.out for result in results}) == len({result.err for result in results}) == 1
    assert results[0].out.count("\n") == 11


def test_a_reader_that_leaves_is_no_error(bundle: Path, paint: Paint) -> None:
    running = process(bundle, "--batch-size", 1, *[paint("red")] * 50)
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.readline()
    running.stdout.close()
    assert running.wait(timeout=60) == 1
    assert running.stderr.read() == b""
    running.stderr.close()


@pytest.mark.parametrize("name", ["run", "train", "evaluate", "export", "datastore"])
def test_a_program_without_any_argument(name: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"itune.cli.{name}"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("itune-")
    assert done.stderr.count("\n") == 1


def test_no_standard_output_at_all(bundle: Path, paint: Paint) -> None:
    line = [sys.executable, "-m", "itune.cli.run", str(paint("red")), "--bundle", str(bundle)]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *line], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("itune-run: error: ")
    assert done.stderr.count("\n") == 1


def read_terminal(end: int) -> str:
    try:
        return os.read(end, 100_000).decode()
    except OSError:  # Linux: nothing was written and the other end is closed
        return ""
    finally:
        os.close(end)


@pytest.mark.parametrize(("count", "shown"), [(1, False), (3, True)])
def test_progress_on_a_terminal(bundle: Path, paint: Paint, count: int, shown: bool) -> None:
    ours, theirs = pty.openpty()
    path = paint("red")
    running = process(bundle, *[path] * count, stderr=theirs, env=os.environ | {"TERM": "xterm"})
    out, _ = running.communicate(timeout=60)
    os.close(theirs)
    assert running.returncode == 0
    assert out.decode() == (f"{path}\t{RED}\n" * count if count > 1 else f"{RED}\n")
    assert (f"{count}/{count}" in read_terminal(ours)) == shown


def test_captions_and_progress_share_a_terminal(bundle: Path, paint: Paint) -> None:
    ours, theirs = pty.openpty()
    running = process(bundle, *[paint("red")] * 3, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm"})
    assert running.wait(timeout=60) == 0
    os.close(theirs)
    terminal = read_terminal(ours)
    assert terminal.count(RED) == 3
    assert "3/3" in terminal


def test_what_else_a_folder_holds_is_counted(run: Callable[..., Result], paint: Paint, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for name in ("a.png", "deep/b.png", "album.jpg/c.png"):
        paint("red", f"folder/{name}")
    for name in ("x.psd", "y.psd", "notes.txt", "captions.json", ".hidden"):
        (folder / name).touch()
    result = run(folder)
    assert result.status == 0
    assert result.out == f"{folder}/a.png\t{RED}\n"
    assert "2 .psd files" in result.err
    assert ".txt" not in result.err
    assert "2 sub-folders (add --recursive)" in result.err
    result = run(folder, "--recursive")
    assert [line.split("\t")[0] for line in result.out.splitlines()] == [
        f"{folder}/{name}" for name in ("a.png", "album.jpg/c.png", "deep/b.png")
    ]
    (tmp_path / "empty").mkdir()
    assert "no photos" in run(tmp_path / "empty").err


def test_heic_photos(run: Callable[..., Result], paint: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heif = pytest.importorskip("pillow_heif")
    photo = tmp_path / "photo.heic"
    heif.from_pillow(Image.open(paint("red")).convert("RGB").resize((64, 64))).save(photo)
    assert run(photo).out == f"{RED}\n"
    monkeypatch.setattr("itune.runtime.image._HEIF", False)
    monkeypatch.setattr("itune.runtime.image.SUFFIXES", frozenset({".png"}))
    assert "itune-captioner[heif]" in run(photo).err
    (tmp_path / "folder").mkdir()
    photo.rename(tmp_path / "folder" / "photo.heic")
    assert "1 .heic file" in run(tmp_path / "folder").err


def test_names_can_neither_forge_rows_nor_reach_the_terminal(
    run: Callable[..., Result], paint: Paint, tmp_path: Path
) -> None:
    paint("red", "folder/a\nb\tc\x1b[2J.png")
    paint("red", "folder/d.png")
    out = run(tmp_path / "folder").out
    assert len(out.splitlines()) == 2
    assert "\x1b" not in out
    assert all(line.count("\t") == 1 for line in out.splitlines())


@pytest.mark.parametrize("program", ["run", "train", "evaluate", "export", "datastore"])
@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_a_full_or_closed_standard_output_is_an_error(program: str, argument: str) -> None:
    for redirection in (">/dev/full", ">&-"):
        line = [sys.executable, "-m", f"itune.cli.{program}", argument]
        done = subprocess.run(
            ["sh", "-c", f'"$@" {redirection}', "sh", *line], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2, (redirection, done.stderr)
        assert done.stderr.startswith("itune-")
        assert done.stderr.count("\n") == 1


def test_errors_never_reach_standard_output(bundle: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "itune.cli.run", str(tmp_path / "missing.jpg"), "--bundle", str(bundle)]
    done = subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    done = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *line[:3], "-"], capture_output=True, text=True, check=False)
    assert done.returncode in (1, 2)
    assert done.stderr.count("\n") == 1


def test_sigterm_keeps_the_heatmaps_that_are_done(paint: Paint, tmp_path: Path) -> None:
    paths = [str(paint("red", f"many/{i}.png")) for i in range(100)]
    target = tmp_path / "out" / "heat.jsonl"
    target.parent.mkdir()
    line = [sys.executable, "-m", "itune.cli.run", *paths, "--heatmap-json", str(target)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(5):
            process.stdout.readline()
        process.terminate()
        _, stderr = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert [path.name for path in target.parent.iterdir()] == ["heat.jsonl"]
    assert all(json.loads(each)["image"] for each in target.read_text().splitlines())
