"""`itune NAME` runs the program itune-NAME; a new program is a row of `PROGRAMS` and an entry in pyproject.toml."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .program import Program

PROGRAMS = {
    "train": "train",
    "eval": "evaluate",
    "export": "export",
    "run": "run",
    "datastore": "datastore",
    "serve": "serve",
}
"""The module of each program in this folder: only that of the chosen one is imported."""


def umbrella() -> Program:
    """All programs as one."""
    from .program import Program

    programs = [import_module(f".{module}", __package__).PROGRAM for module in PROGRAMS.values()]
    return Program("itune", *programs, completion, help="Train, evaluate, export, run and serve image captioners.")


def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print a script that completes commands and options in a shell.

    Examples:
        itune run photo.jpg
        itune train --help
        itune completion bash > ~/.local/share/bash-completion/completions/itune
        itune completion zsh > ~/.zsh/completions/_cyclopts_itune
        itune completion fish > ~/.config/fish/completions/itune.fish

    """
    print(umbrella().app().generate_completion(shell=shell))


def main() -> None:
    """Entry point."""
    if sys.argv[1:] and (module := PROGRAMS.get(sys.argv[1])):
        del sys.argv[1]
        import_module(f".{module}", __package__).main()
    umbrella().run()
