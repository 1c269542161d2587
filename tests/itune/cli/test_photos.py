"""Which photos itune-run finds: in lists, and in folders that it watches."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from itune.cli.photos import watch
from itune.runtime.errors import ItuneError
from tests.conftest import refused
from tests.itune.cli.conftest import BLUE, RED, Paint, process
from tests.itune.cli.test_outputs import Run

# Lists


def test_lists(run: Run, paint: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["red.png", "*.png", "-", "--json", "d\udce9j\udce0.png", " a b\t.png"]
    for name in names:
        shutil.copy(paint("red"), name) if name != "red.png" else paint("red")
    content = b"\r\n".join(os.fsencode(name) for name in names) + b"\n\n"
    Path("list").write_bytes(content)
    result = run("--json", "--from-file", "list")
    assert [json.loads(line)["image"] for line in result.out.splitlines()] == [*names[:2], "./-", *names[3:]]
    assert (result.status, result.err) == (0, "")
    assert run("red.png", "--from-file", "list").out.count("\n") == 1 + len(names)

    def feed(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    feed(b"\xef\xbb\xbf" + content.replace(b"\r\n", b"\n"))  # with a byte order mark, as some editors write
    assert run("--from-file", "-").out.count("\n") == len(names)
    odd = shutil.copy("red.png", "x\ny\r.png")
    feed(f"red.png\0{odd}\0".encode())
    out = run("--json", "--from-file", "-", "--null").out
    assert [json.loads(line)["image"] for line in out.splitlines()] == ["red.png", odd]
    feed(b"")
    assert (run("--from-file", "-").status, run("--from-file", "-").out) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--from-file", "none"], ["--from-file none"]),
        (["--from-file", "."], ["--from-file ."]),
        (["--from-file", "nul.txt"], ["--from-file nul.txt", "--null"]),
        (["--null", "a.jpg"], ["--null", "--from-file"]),
        (["-", "--from-file", "-"], ["--from-file"]),
        (["a.jpg", "--watch"], ["--watch"]),
        ([".", "--watch", "--from-file", "nul.txt"], ["--watch"]),
        ([".", "--watch", "--heatmap", "x"], ["--watch", "--heatmap"]),
    ],
)
def test_mistakes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], named: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nul.txt").write_bytes(b"a\0b")
    result = run(*arguments)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert all(part in result.err for part in named)


# Watched folders


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    folder = tmp_path / "inbox"
    folder.mkdir()
    return folder


def following(folder: Path, recursive: bool = False) -> Iterator[list[str]]:
    return ([Path(name).name for name in names] for names in watch([str(folder)], recursive=recursive, seconds=0.05))


def test_photos_that_appear(inbox: Path, paint: Paint) -> None:
    paint("red", "inbox/a.png")
    found = following(inbox)
    assert next(found) == ["a.png"]
    (inbox / "notes.txt").write_text("no photo")
    (inbox / "empty.png").touch()
    (inbox / "later").mkdir()
    paint("red", "inbox/later/c.png")
    paint("blue", "inbox/b.png")
    assert next(found) == ["b.png"]
    (inbox / "a.png").unlink()
    threading.Timer(0.3, paint, ("red", "inbox/a.png")).start()
    assert next(found) == ["a.png"]  # a new photo of an old name
    assert next(following(inbox, recursive=True)) == ["a.png", "b.png", "c.png"]


def test_a_photo_that_is_being_written_is_waited_for(inbox: Path, paint: Paint) -> None:
    content = paint("red").read_bytes()
    found = following(inbox)
    paint("blue", "inbox/first.png")
    next(found)

    def write() -> None:
        with (inbox / "slow.png").open("wb") as file:
            for i in range(0, len(content), 10):
                file.write(content[i : i + 10])
                file.flush()
                time.sleep(0.02)

    writer = threading.Thread(target=write)
    writer.start()
    assert next(found) == ["slow.png"]
    assert not writer.is_alive() or (inbox / "slow.png").stat().st_size == len(content)
    writer.join()


def test_a_watched_folder_that_goes(inbox: Path, paint: Paint) -> None:
    paint("red", "inbox/a.png")
    found = following(inbox)
    next(found)
    shutil.rmtree(inbox)
    with refused(ItuneError, inbox):
        next(found)


def test_watch_until_ctrl_c(bundle: Path, inbox: Path, paint: Paint, tmp_path: Path) -> None:
    """Captions what is there and what comes, with several outputs; another start skips what is done."""
    outputs = ["--csv", "-o", tmp_path / "out.csv", "--sidecar", "txt", "--sidecar", "xmp", "--resume"]
    for number, (colour, caption) in enumerate({"red": RED, "blue": BLUE}.items()):
        paint(colour, f"inbox/{colour}1.png")
        running = process(bundle, inbox, "--watch", *outputs)
        wait_for(inbox / f"{colour}1.png.xmp")
        Image.new("RGB", (9, 9), colour).save(tmp_path / "moved.png")
        (tmp_path / "moved.png").rename(inbox / f"{colour}2.png")
        wait_for(inbox / f"{colour}2.png.xmp")
        while (tmp_path / "out.csv").read_bytes().count(b"\n") < 3 + 2 * number:
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=30)
        assert (running.returncode, out, err) == (130, b"", b"")
        assert (inbox / f"{colour}2.txt").read_text() == f"{caption}\n"
    lines = (tmp_path / "out.csv").read_text().splitlines()[1:]
    assert [Path(line.split(",")[0]).name for line in lines] == ["red1.png", "red2.png", "blue1.png", "blue2.png"]


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.01)
