"""What the programs share: signals, checks of output paths, and a console with progress on stderr."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ..runtime.cpus import available_cpus
from ..runtime.errors import ItuneError, printable, reason

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells expect it."""
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""The signals that ask a program to end, or say that its terminal was closed."""


def on_ending(handler: Callable[[int, FrameType | None], object]) -> None:
    """Handle the signals `ENDING`, except those that are ignored, as under nohup."""
    for each in ENDING:
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, handler)


def exit_when_asked() -> None:
    """Exit with an exception at the signals `ENDING`, so that temporary files are removed."""
    on_ending(lambda number, _frame: sys.exit(128 + number))


def check_writable(option: str, path: Path, *, parents: bool = True) -> None:
    """Raise ItuneError, before hours of work, if the file that an option names cannot be written.

    `parents`: its folder may be missing, since it will be made.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if os.access(path, os.F_OK) and not path.is_file():
        reason = "is not a file"
    elif not folder.is_dir() or not (parents or folder == path.absolute().parent):
        reason = f"cannot be written: {path.parent} is not a folder"
    elif not os.access(folder, os.W_OK):
        reason = f"cannot be written: the folder {folder} is read-only"
    else:
        return
    raise ItuneError(f"{option} {path} {reason}; name another file")


def check_apart(outputs: Iterable[tuple[str, Path]], inputs: Iterable[tuple[str, Path]]) -> None:
    """Raise ItuneError if an output (option, file) is also an input (description, file) or another output.

    Files are replaced as a whole, so the input or the first output would be lost.
    """
    taken = {os.path.realpath(path): f"is also {what}" for what, path in inputs}
    for option, path in outputs:
        if clash := taken.get(place := os.path.realpath(path)):
            raise ItuneError(f"{option} {path} {clash}: name another file")
        taken[place] = f"is also the file of {option}"


def require(extra: str, *modules: str) -> None:
    """Raise ItuneError unless the modules of an optional part are installed; keep PyTorch within the CPU quota."""
    if (cpus := available_cpus()) < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(cpus))  # PyTorch does not know a container's quota
    if missing := [module for module in modules if find_spec(module) is None]:
        raise ItuneError(
            f"{', '.join(missing)} not installed; this command needs: pip install 'itune-captioner[{extra}]'"
        )


@cache
def console() -> Console:
    """Rich's console on stderr, for everything that is not a result."""
    from rich.console import Console

    return Console(stderr=True)


def score_table(title: str, headings: Sequence[str]) -> Table:
    """An empty table, with the row's name under the heading ""."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=bool(heading))
    return table


def print_result(result: Table | str) -> None:
    """Print a table or a text on stdout."""
    from rich.console import Console

    out = Console(highlight=False, markup=False)
    if not out.is_terminal:
        out.width = 120  # the columns need more than the 80 that rich takes for files
    out.print(result)


def warn(message: str) -> None:
    """Print a warning on stderr."""
    console().print(printable(message), style="yellow", markup=False, highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """Print a message on stderr."""
    console().print(message, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(description: str, *, enabled: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr while the block runs, on a terminal only; yields a function of (done, total)."""
    if not (enabled and sys.stderr.isatty()):
        yield lambda _done, _total: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f}/s" if task.speed else "", "progress.data.speed")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console(), transient=True, redirect_stdout=False) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def emit(line: str, *, beside_progress: bool = False) -> None:
    """Print a result at once; above the bar if it shares a terminal with a running `progress`."""
    if sys.stdout is None:  # closed by the parent process
        raise ItuneError("there is no standard output to print results to")
    if beside_progress and sys.stdout.isatty() and sys.stderr.isatty():
        console().print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)
    else:
        # One write: unbuffered, `print` would write the newline separately, and Ctrl-C could come in between.
        try:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise ItuneError(f"standard output: {reason(error)}") from error
