"""Run parts of an export in processes of their own, which frees their memory and turns a crash into one sentence."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable
from tempfile import TemporaryFile

from ..runtime.errors import ItuneError

_PR_SET_PDEATHSIG = 1  # of Linux


def _die_with_parent() -> None:
    """Have the system kill this process when the one that started it is killed: it would go on for hours alone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_DIE_WITH_PARENT = _die_with_parent if sys.platform == "linux" else None


def run_module(
    module: str,
    *arguments: object,
    about: str,
    error: type[ItuneError],
    receive: Callable[[str], None] = lambda _line: None,
) -> None:
    """Run `python -m module` and pass each line of its output to `receive`.

    If it fails, raises an `error` that begins with `about` and has the signal or the last line on stderr.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    with (
        TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, preexec_fn=_DIE_WITH_PARENT
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                receive(line)
            status = process.wait()
        finally:
            process.kill()
        stderr.seek(0)
        last = (stderr.read().strip().splitlines() or ["no message"])[-1]
    if status:
        reason = f"killed by signal {-status}, perhaps out of memory" if status < 0 else last
        raise error(f"{about}: {reason}")
