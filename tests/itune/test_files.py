"""Files and folders appear whole or not at all, whatever happens to their writers, and nobody else's are lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from itune.files import (
    atomic_folder,
    atomic_path,
    only_writer,
    staged_folder,
    sweep_small,
    write_json,
    write_small,
)
from itune.runtime.bundle import Bundle
from itune.runtime.errors import BundleError, ItuneError
from itune.runtime.recovery import lock, recover_folder
from tests.conftest import refused

WRITER = """
import sys, time
from pathlib import Path
from itune.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "a").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_what_dead_processes_left_is_swept_and_what_living_ones_write_is_not(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "out")], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("whole")
        assert len(list(tmp_path.glob(".out.*.tmp"))) == 1
        os.kill(writer.pid, signal.SIGKILL)
    with atomic_path(tmp_path / "out.json") as path:
        path.write_text("{}")
    assert len(list(tmp_path.glob(".out.*.tmp"))) == 1, "another file's writer does not sweep it"
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.json"]
    assert contents(tmp_path / "out") == {"a": "new"}


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    loop = WRITER.replace('"half"', "str(i)").replace("    time.sleep(60)\n", '    (folder / "b").write_text(str(i))\n')
    body = loop.index("with atomic_folder")
    indented = "".join(f"    {line}\n" for line in loop[body:].splitlines())
    program = f"{loop[:body]}for i in range(10**9):\n{indented}"
    for kill in range(30):
        with subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "out")], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(0.002 * kill)
            os.kill(writer.pid, signal.SIGKILL)
        found = contents(tmp_path / "out")
        assert found.get("a") == found.get("b")
    assert len(list(tmp_path.iterdir())) <= 2


def test_files_of_others_survive(tmp_path: Path) -> None:
    own = {"a", "deep/b"}
    output = tmp_path / "out"
    with staged_folder(output, force=False, written=lambda _folder: ()) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "b").write_text("old")
    (output / "deep" / "mine").write_text("precious")
    with refused(ItuneError, "deep/mine"), staged_folder(output, force=True, written=lambda _folder: own):
        pass
    (output / "deep" / "mine").unlink()
    with staged_folder(output, force=True, written=lambda _folder: own) as folder:
        (folder / "a").write_text("new")
        (output / "deep" / "late").write_text("precious")
    assert contents(output) == {"a": "new", "deep/late": "precious"}


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_json(path, {"old": 1})
    program = (
        "import resource, signal, sys; from pathlib import Path; from itune.files import write_json\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "write_json(Path(sys.argv[1]), list(range(1000)))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False)
    assert f"NoSpaceError: {path}: File too large" in done.stderr
    assert contents(tmp_path) == {"out.json": '{\n  "old": 1\n}\n'}


def test_links_are_replaced_or_refused_and_never_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("out.json", "lock"):
        (tmp_path / name).symlink_to(victim)
    write_json(tmp_path / "out.json", {})
    with refused(ItuneError, tmp_path / "lock"), only_writer(tmp_path / "lock", "busy"):
        pass
    assert victim.read_text() == "precious"
    assert not (tmp_path / "out.json").is_symlink()


def test_files_have_the_usual_mode(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a") as path:
        path.touch(mode=0o600)
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_full_disks_in_a_folder_name_the_folder(tmp_path: Path) -> None:
    program = (
        "import resource, signal, sys, numpy as np; from pathlib import Path; from itune.files import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "with atomic_folder(Path(sys.argv[1])) as folder:\n    "
    )
    for body in ("np.save(folder / 'a.npy', np.zeros(1000))", "write_json(folder / 'a.json', list(range(1000)))"):
        command = [sys.executable, "-c", program + body, str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stderr.splitlines()[-1].startswith(f"itune.files.NoSpaceError: {tmp_path / 'out'}")
        assert list(tmp_path.iterdir()) == []


def test_every_program_recovers_what_a_killed_writer_left(tmp_path: Path) -> None:
    """As where folders cannot be exchanged in one step; what a living writer has is left to it."""
    old, new = tmp_path / ".out.01234567.old", tmp_path / ".out.01234567.tmp"
    for folder, content in ((old, "old"), (new, "new")):
        folder.mkdir()
        (folder / "a").write_text(content)
    held = lock(new)
    assert held is not None
    recover_folder(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    os.close(held)
    with staged_folder(tmp_path / "out", force=True, written=lambda folder: [path.name for path in folder.iterdir()]):
        assert contents(tmp_path / "out") == {"a": "new"}
    old.mkdir(exist_ok=True)
    (tmp_path / "out").rename(new)
    with pytest.raises(BundleError):
        Bundle.load(tmp_path / "out")  # which has no manifest
    assert (tmp_path / "out").exists()


def test_small_files_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o640)
    write_small(path, b"new")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o640)
    assert list(tmp_path.iterdir()) == [path]
    for bad in (tmp_path / "none" / "b.txt", tmp_path / ("x" * 300), tmp_path):
        with refused(ItuneError, bad):
            write_small(bad, b"new")
    assert list(tmp_path.iterdir()) == [path]


def test_small_files_of_the_dead_are_swept(tmp_path: Path) -> None:
    dead, living = (tmp_path / f".{name}.txt.0123abcd.itune-tmp" for name in ("dead", "living"))
    mine = tmp_path / ".mine.tmp"
    for path in (dead, living, mine):
        path.touch()
    held = lock(living)
    sweep_small(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([living, mine])
    assert held is not None
    os.close(held)
