"""Parts of an export in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from itune.export.process import run_module
from itune.runtime.errors import ItuneError


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Writes a program; returns the name of its module."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(text: str) -> str:
        (tmp_path / "program.py").write_text(text)
        return "program"

    return write


def test_lines_are_received(program):
    lines = []
    run_module(
        program("import sys; print(*sys.argv[1:], sep='\\n')"),
        "a",
        1,
        about="it",
        error=ItuneError,
        receive=lines.append,
    )
    assert lines == ["a\n", "1\n"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("import os; os.kill(os.getpid(), 9)", "signal 9"),  # as the kernel does when memory is short
        ("print('first', file=__import__('sys').stderr); raise SystemExit('no room')", "no room"),
        ("raise SystemExit(3)", "no message"),
    ],
)
def test_a_failure_is_one_sentence(program, text, value):
    with pytest.raises(ItuneError) as error:
        run_module(program(text), about="plan.onnx", error=ItuneError)
    assert str(error.value).startswith("plan.onnx: ")
    assert value in str(error.value)
    assert "first" not in str(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_part_dies_with_its_export(program, tmp_path):
    name = program("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    call = f"run_module({name!r}, about='it', error=ValueError, receive=print)"
    start = f"from itune.export.process import run_module; {call}"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, env=environment) as export:
        part = int(export.stdout.readline())
        export.send_signal(signal.SIGKILL)
    for _ in range(100):
        if not Path(f"/proc/{part}").exists() or "Z" in Path(f"/proc/{part}/stat").read_text().split()[2]:
            return
        time.sleep(0.05)
    os.kill(part, signal.SIGKILL)
    pytest.fail("it went on alone")
