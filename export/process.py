"""Parts of an export that run in processes of their own: that bounds their memory, and a crash is one sentence."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from tempfile import TemporaryFile

from ..runtime.errors import ItuneError


def run_module(
    module: str,
    *arguments: object,
    error: Callable[[str], ItuneError],
    receive: Callable[[str], None] = lambda _line: None,
) -> None:
    """Run `python -m module` and pass each line of its output to `receive`.

    If it fails, raises what `error` makes of the signal or of the last line on stderr.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    with (
        TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
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
        raise error(f"killed by signal {-status}, perhaps out of memory" if status < 0 else last)
