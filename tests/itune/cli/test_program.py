"""Flags from option models, and what all programs do alike."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest

from itune.cli import program
from itune.cli.program import Flags, Options, chosen
from itune.export.options import CompareOptions, ExportOptions, ImportOptions
from itune.flags import flag
from itune.runtime.search import SearchConfig
from itune.runtime.settings import Settings, describe
from itune.training.config import TrainConfig

Call = Callable[..., tuple[int, str, str]]


class _Files(Options, title="Files"):
    folder: Path | None = None
    """A folder."""
    several: tuple[Path, ...] = ()
    """Files."""


def show(
    names: Annotated[list[str], program.Parameter(name="NAME", allow_leading_hyphen=False)],
    /,
    *,
    files: _Files,
    settings: Annotated[Options, Flags(TrainConfig, omit=("preset", "begin"))],
) -> int:
    """Show the options.

    Examples:
        show this
    """
    print(json.dumps([names, len(files.several), chosen(settings)]))
    return 3


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["show", *arguments])
        monkeypatch.setattr(show, "__annotations__", show.__annotations__)  # undo what `run` does to them
        with pytest.raises(SystemExit) as ended:
            program.Program("show", show).run()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("arguments", "names", "several", "settings"),
    [
        (["a"], ["a"], 0, {}),
        (["a", "-", "b"], ["a", "-", "b"], 0, {}),
        (["--", "--seed"], ["--seed"], 0, {}),
        (["a", "--lambda", "2", "--lambda=4"], ["a"], 0, {"lambda_": 4.0}),
        (["a", "--flip", "--no-lower"], ["a"], 0, {"flip": True, "lower": False}),
        (["a", "--prompt", "", "--end=-"], ["a"], 0, {"prompt": "", "end": "-"}),
        (["a", "--several", "x", "--several", "y"], ["a"], 2, {}),
        (["a", "--prompt", "--seed"], ["a"], 0, {"prompt": "--seed"}),
        (["[1]", "--prompt", "{}"], ["[1]"], 0, {"prompt": "{}"}),
    ],
)
def test_flags(call: Call, arguments: list[str], names: list[str], several: int, settings: dict[str, object]) -> None:
    status, out, err = call(*arguments)
    assert (status, err) == (3, "")
    assert json.loads(out) == [names, several, settings]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], ["NAME", "show --help"]),
        (["a", "--batch-sizes", "3"], ["--batch-sizes", "--batch-size?"]),
        (["a", "--begin", "x"], ["--begin"]),
        (["a", "--epochs", "0"], ["--epochs", "'0'"]),
        (["a", "--lambda", "x"], ["--lambda", "'x'"]),
        (["a", "--warmup", "nan"], ["--warmup", "'nan'"]),
        (["a", "--method", "rnn"], ["--method", "'rnn'", "'clipcap'"]),
        (["a", "--folder", ""], ["--folder", "empty"]),
        (["a", "--several", "b", "--several="], ["--several", "empty"]),
        (["a", "--folder"], ["--folder"]),
    ],
)
def test_mistakes_are_one_sentence(call: Call, arguments: list[str], named: list[str]) -> None:
    status, out, err = call(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("show: error: ")
    assert all(part in err for part in named)


def test_help_has_groups_and_examples(call: Call) -> None:
    status, out, _ = call("--help")
    assert status == 0
    titles = ["Files", "Model", "Method I-Tuning", "Method SmallCap", "Method ClipCap", "Optimisation", "Examples:"]
    places = [out.index(title) for title in titles]
    assert places == sorted(places)
    assert "show this" in out[places[-1] :]
    assert "A folder." in out
    assert "GPT-2" in out


@pytest.mark.parametrize("model", [TrainConfig, SearchConfig, ExportOptions, ImportOptions, CompareOptions])
def test_every_option_is_described(model: type[Settings]) -> None:
    describe(model)
    assert [flag(name) for name, field in model.model_fields.items() if not field.description] == []
