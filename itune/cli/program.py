"""Turns a function into a program: flags from option models, grouped help, one-sentence errors, exit statuses."""

from __future__ import annotations

import errno
import inspect
import io
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_type_hints

from cyclopts import App, CycloptsError, Group, Parameter, UnknownOptionError
from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, create_model, field_validator

from .. import __version__
from ..flags import flag, refusal
from ..runtime.errors import ItuneError, printable
from ..runtime.search.config import SearchConfig
from ..runtime.settings import Settings, describe
from . import common

Switch = Annotated[bool, Parameter(show_default=False)]
"""A flag without a value, off by default."""
COMPLETION = "completion"
"""The command whose output describes all flags, as `--help` does."""
_OTHER_NAMES = {"model": "bundle", "o": "output", "out": "output"}
group = cache(Group.create_ordered)
"""The group of this name in `--help`; groups appear in the order in which they are first named."""


class Options(Settings):
    """Base of the models whose fields are flags."""

    model_config = ConfigDict(defer_build=True)  # most runs set few flags: building all models would cost 10 ms

    @field_validator("*", mode="before")
    @classmethod
    def _path_is_not_empty(cls, value: Any, info: ValidationInfo) -> Any:
        # As from a shell variable without a value; Path("") would be the current folder.
        values = value if isinstance(value, list) else [value]
        is_empty = any(isinstance(each, str) and not each.strip() for each in values)
        if is_empty and _takes_path(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("the path is empty")
        return value


def _takes_path(hint: Any) -> bool:
    return hint is Path or any(map(_takes_path, get_args(hint)))


@dataclass(frozen=True)
class Flags:
    """Metadata of an `Options` annotation: flags for the fields of `model`, none of them required.

    The command gets an object with these fields, None where the user left the flag out. Constraints of single fields
    apply, defaults and rules across fields do not: those wait for the rest of the configuration. A field's group in
    `--help` is the title of the class that declares it, or `group`.
    """

    model: type[Settings]
    group: str = ""
    only: Collection[str] = ()
    omit: Collection[str] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    def build(self) -> Any:
        """The annotation for cyclopts."""
        fields: dict[str, Any] = {}
        titles = self._titles()
        groups = {title: group(title) for title in titles.values()}
        for name, info in self.model.model_fields.items():
            if name not in titles:
                continue
            parameter = Parameter(
                name=self.names.get(name, flag(name)), group=groups[titles[name]], negative_bool="no-"
            )
            hint: Any = info.rebuild_annotation() | None
            fields[name] = (Annotated[hint, parameter], Field(None, description=info.description))
        return create_model(self.model.__name__, __base__=Options, **fields)

    def _titles(self) -> dict[str, str]:
        """The fields that become flags, each with its group."""
        titles: dict[str, str] = {}
        for owner in self.model.__mro__:
            if issubclass(owner, Settings):
                own = [name for name in vars(owner).get("__annotations__", ()) if name in self.model.model_fields]
                titles |= {name: owner.model_config.get("title") or self.group for name in own if name not in titles}
        return {
            name: title for name, title in titles.items() if name in (self.only or titles) and name not in self.omit
        }


BeamSearch = Annotated[Options, Flags(SearchConfig, "Search", only=("num_beams", "max_new_tokens", "length_penalty"))]


def chosen(options: Options) -> dict[str, Any]:
    """The options that the user set, by name."""
    return {name: value for name, value in options if value is not None}


def _with_flags(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """The command with annotations that cyclopts flattens: the fields of every option model become flags."""
    hints = get_type_hints(command, include_extras=True)
    command.__kwdefaults__ = dict(command.__kwdefaults__ or {})
    for name, hint in hints.items():
        flags = next((each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Flags)), None)
        model = flags.model if flags else hint
        if isinstance(model, type) and issubclass(model, Settings):
            if {"--help", "-h", COMPLETION} & set(sys.argv):
                describe(model)
            model = flags.build() if flags else model
            title = None if flags else group(str(model.model_config.get("title", "Options")))
            hints[name] = Annotated[model, Parameter(name="*", group=title, show_default=False if flags else None)]
            if not any(field.is_required() for field in model.model_fields.values()):
                command.__kwdefaults__[name] = model.model_construct()
    command.__annotations__ = hints
    return command


class _Dash(str):
    """The argument "-", which cyclopts would take for an option."""

    __slots__ = ()

    def startswith(self, *_: Any) -> bool:
        return False


def _version() -> str:
    from ..runtime.search.loop import NATIVE

    parts = [f"itune {__version__}", "NumPy search"]
    if NATIVE:
        from _itune_native import kernels

        parts[1:] = ["native search", f"native engine ({kernels()[0]})"]
    with suppress(PackageNotFoundError):  # onnxruntime comes in wheels of several names
        parts.append(f"onnxruntime {version('onnxruntime')}")
    return ", ".join(parts)


class Program:
    """A program with one command, or with several that its first argument chooses from.

    A command's docstring is its help; what follows "Examples:" comes last. A command may be a whole program.
    """

    def __init__(self, name: str, *commands: Callable[..., int | None] | Program, help: str | None = None) -> None:
        self.name, self.commands, self.help = name, commands, help

    @property
    def command(self) -> str:
        """Its name as a command of another program: "run" for itune-run."""
        return self.name.rpartition("-")[2]

    def app(self) -> App:
        """The program for cyclopts."""
        app = App(
            name=self.name,
            version=_version,
            help=self.help,
            help_format="markdown",
            default_parameter=Parameter(
                allow_leading_hyphen=True,
                allow_repeating=True,
                json_dict=False,
                json_list=False,
                negative_bool=(),
                negative_iterable=(),
            ),
            result_action="return_value",
            suppress_keyboard_interrupt=False,
        )
        group.cache_clear()
        shown = []
        for command in self.commands:
            if isinstance(command, Program):
                app.command(command.app(), name=command.command)
                continue
            text, _, examples = inspect.cleandoc(command.__doc__ or "").partition("\n\nExamples:\n")
            shown.append(examples)
            if len(self.commands) == 1:
                app.help = text
                app.default(_with_flags(command))
            else:
                app.command(_with_flags(command), help=text, help_epilogue=f"Examples:\n\n{examples}")
        app.help_epilogue = "Examples:\n\n" + "\n".join(shown)
        return app

    def run(self) -> NoReturn:
        """Run the program and exit: with what the command returns, 2 after a user's error, or 130 after Ctrl-C."""
        _open_standard_streams()
        common.exit_when_asked()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # the locale may lack characters of a file name or a caption
                stream.reconfigure(errors="backslashreplace")
        arguments = [_Dash(each) if each == "-" else each for each in sys.argv[1:]]
        error: Exception
        try:
            if (empty := _empty_argument(sys.argv[1:])) is not None:
                raise ItuneError(f"argument {empty} is empty, as from an unset shell variable: name a file or folder")
            if not arguments and len(self.commands) > 1:
                names = (each.command if isinstance(each, Program) else each.__name__ for each in self.commands)
                raise ItuneError(f"COMMAND is missing: choose one of {', '.join(names)}")
            status = self.app()(arguments, exit_on_error=False, print_error=False, verbose=False)
            sys.stdout.flush()  # here, where a full disk is an error
            sys.exit(status)
        except KeyboardInterrupt:
            sys.exit(common.INTERRUPTED)
        except BrokenPipeError:  # the reader of stdout left
            _discard_output()
            sys.exit(1)
        except (CycloptsError, ValidationError, ItuneError, OSError) as caught:
            error = caught
            _discard_output()
        print(f"{self.name}: error: {_sentence(error, self.name)}", file=sys.stderr)
        sys.exit(2)


def _open_standard_streams() -> None:
    """Open what the shell has closed: else the first file that is opened would get the terminal's output."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # takes the lowest free descriptor; what is written there is an error
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115


def _discard_output() -> None:
    """Drop what is left in the buffer of stdout, which would fail again at exit."""
    with suppress(OSError):
        sys.stdout.flush()
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _empty_argument(arguments: Sequence[str]) -> int | None:
    """The number, from 1, of an argument that is empty, unless it is the value of an option."""
    for number, (before, argument) in enumerate(zip(("", *arguments), arguments, strict=False), 1):
        if not argument.strip() and not before.startswith("-"):
            return number
    return None


def _suggestion(error: CycloptsError) -> str:
    """A flag for an unknown one that abbreviates it, is a part of it, or is another tool's name for it."""
    if not isinstance(error, UnknownOptionError):
        return ""
    typed = (error.token.keyword or error.token.value).partition("=")[0].strip("-")
    for name in (name for argument in error.argument_collection for name in argument.names):
        words = name.strip("-").split("-")
        if typed == "".join(word[0] for word in words) or {typed, _OTHER_NAMES.get(typed)} & set(words):
            return f" Did you mean {name}?"
    return ""


def _sentence(error: Exception, name: str) -> str:
    cause = error.__cause__ if isinstance(error, CycloptsError) else error
    if isinstance(cause, ValidationError):
        return refusal(cause)
    text = printable(str(error))
    if isinstance(error, OSError) and error.filename is None and error.errno in (errno.ENOSPC, errno.EBADF, errno.EIO):
        return f"standard output: {error.strerror}"
    if isinstance(error, CycloptsError):
        own = _suggestion(error)
        text = text.partition(" Did you mean")[0] + own if own else text
    return f"{text.rstrip('.')}; see {name} --help" if isinstance(error, CycloptsError) else text
