"""What the four command lines share: errors as one sentence, exit statuses, a console and progress on stderr."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_args, get_type_hints

import typer

from .. import __version__
from ..runtime.errors import ItuneError

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells expect it."""
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""The signals that a program is asked to end with, or whose terminal was closed."""


def _print_version(wanted: bool) -> None:
    if wanted:
        from ..runtime.search import NATIVE

        parts = [f"itune {__version__}", "native search" if NATIVE else "NumPy search"]
        with suppress(PackageNotFoundError):  # it comes in wheels of several names
            parts.append(f"onnxruntime {version('onnxruntime')}")
        print(", ".join(parts))
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
]


def run(command: Callable[..., int | None], name: str | None = None) -> NoReturn:
    """Run `command` as the program `name` (default: "itune-" and the function's name), and exit.

    The exit status is what the command returns, 2 after an error of the user's and 130 after Ctrl-C.
    """
    name = name or f"itune-{command.__name__}"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name or a caption may be more than the locale can spell
            stream.reconfigure(errors="backslashreplace")
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(command)
    try:
        _refuse_empty_paths(command, app)
        sys.exit(app(prog_name=name, standalone_mode=False))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(INTERRUPTED)
    except (ItuneError, OSError) as error:
        _fail(name, str(error))
    except Exception as error:
        # Usage errors: click's ClickException, which Typer keeps under another name in every few releases.
        if not hasattr(error, "format_message"):
            raise
        _fail(name, f"{error.format_message().rstrip('.')}; see {name} --help")


def _refuse_empty_paths(command: Callable[..., int | None], app: typer.Typer) -> None:
    """Raise ItuneError for an option "", as of a shell variable without a value, that means the current folder to Path.

    To be called before the options are parsed, after which it is "." as that is.
    """
    arguments = sys.argv[1:]
    empty = {argument for argument, after in pairwise(arguments) if after == ""}
    empty |= {argument.removesuffix("=") for argument in arguments if argument.endswith("=")}
    if not empty:
        return
    hints = get_type_hints(command)
    for parameter in typer.main.get_command(app).params:
        if _takes_path(hints.get(parameter.name or "")) and (flags := empty.intersection(parameter.opts)):
            raise ItuneError(f"{min(flags)} is empty: give a path")


def _takes_path(hint: Any) -> bool:
    """Whether an annotation is Path, or has it inside."""
    return hint is Path or any(map(_takes_path, get_args(hint)))


def _fail(name: str, message: str) -> NoReturn:
    print(f"{name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def on_ending(handler: Callable[[int, FrameType | None], object]) -> None:
    """Handle the signals `ENDING`, but for those that are ignored, as under nohup."""
    for each in ENDING:
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, handler)


def exit_when_asked() -> None:
    """Exit by an exception at the signals `ENDING`, so that what is half-written is cleared away."""
    on_ending(lambda number, _frame: sys.exit(128 + number))


def check_writable(option: str, path: Path) -> None:
    """Raise ItuneError, before hours of work, where the file that an option names cannot be written."""
    if path.exists() and not path.is_file():
        raise ItuneError(f"{option} {path} is no file: name one")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ItuneError(f"{option} {path}: {folder} is no folder: name another")
    if not os.access(folder, os.W_OK):
        raise ItuneError(f"{option} {path}: the folder {folder} cannot be written to: name another")


def check_apart(outputs: Iterable[tuple[str, Path]], inputs: Iterable[tuple[str, Path]]) -> None:
    """Raise ItuneError where one of the `outputs` (option, file) is one of the `inputs` (what it is, file), or another.

    Files are replaced as a whole: what is read would be lost, and of two outputs the first.
    """
    read = {os.path.realpath(path): what for what, path in inputs}
    written: dict[str, str] = {}
    for option, path in outputs:
        place = os.path.realpath(path)
        if place in read:
            raise ItuneError(f"{option} would replace {read[place]} {path}: name another place")
        if place in written:
            raise ItuneError(f"{written[place]} and {option} would both be written to {path}: name another place")
        written[place] = option


def require(extra: str, *modules: str) -> None:
    """Raise ItuneError unless the modules of an optional part of itune are installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ItuneError(f"{', '.join(missing)} not installed; this command needs: pip install 'itune[{extra}]'")


@cache
def console() -> Console:
    """Rich's console on stderr, where everything goes that is not a result."""
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def progress(description: str, *, enabled: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr while the block runs, on a terminal only: call what it yields with (done, total)."""
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


def emit(line: str, *, beside_progress: bool) -> None:
    """Print a result at once; where it shares a terminal with a running `progress`, above the bar."""
    if sys.stdout is None:  # closed by who started the program
        raise ItuneError("there is no standard output to print results to")
    if beside_progress and sys.stdout.isatty() and sys.stderr.isatty():
        console().print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)
    else:
        # In one piece: unbuffered, `print` would write the line's end apart, and Ctrl-C come between the two.
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
