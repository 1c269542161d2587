"""itune-run with the test bundle, within this process and as one of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from itune.cli import run as command

RED, GREEN, BLUE = "a dog runs on grass", "two children play", "the sea is calm today"
Paint = Callable[..., Path]


class Result:
    def __init__(self, status: object, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err
        assert "Traceback" not in err


@pytest.fixture
def run(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run itune-run with the test bundle."""

    def runner(*arguments: object, model: Path | None = bundle) -> Result:
        given = ["itune-run", *map(str, arguments), *(["--bundle", str(model)] if model else [])]
        monkeypatch.setattr(sys, "argv", given)
        with pytest.raises(SystemExit) as ended:
            command.main()
        return Result(ended.value.code or 0, *capsys.readouterr())

    return runner


def process(bundle: Path, *arguments: object, **options: object) -> subprocess.Popen[bytes]:
    given = [sys.executable, "-m", "itune.cli.run", "--bundle", bundle, *arguments]
    pipes: dict[str, object] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A suite that runs in the background inherits a shell's "ignore Ctrl-C", and would pass it on.
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([str(each) for each in given], **(pipes | options))  # type: ignore[call-overload, no-any-return]
