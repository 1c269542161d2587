"""`itune NAME` and `python -m itune NAME`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from itune.cli.umbrella import PROGRAMS
from tests.conftest import REPOSITORY
from tests.itune.cli.conftest import RED, Paint


def itune(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "itune", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_every_program_is_a_command() -> None:
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts.pop("itune") == "itune.cli.umbrella:main"
    assert scripts == {f"itune-{name}": f"itune.cli.{module}:main" for name, module in PROGRAMS.items()}


def test_it_runs_the_program(bundle: Path, paint: Paint) -> None:
    done = itune("run", paint("red"), "--bundle", bundle)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{RED}\n", "")
    done = itune("run", "--json", "none.jpg", "--bundle", bundle)
    assert (done.returncode, json.loads(done.stdout)["image"]) == (1, "none.jpg")


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_imports_the_chosen_program_alone(name: str) -> None:
    code = f"""
import contextlib, io, json, sys
from itune.cli.umbrella import main
sys.argv[1:] = [{name!r}, "--help"]
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    main()
print(json.dumps([out.getvalue(), sorted(sys.modules)]))
"""
    line = [sys.executable, "-c", code]
    out, modules = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    assert f"Usage: itune-{name}" in out
    loaded = {f"itune.cli.{module}" for module in PROGRAMS.values()} & set(modules)
    assert loaded == {f"itune.cli.{PROGRAMS[name]}"}


def test_help_and_version() -> None:
    done = itune("--help")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.strip("│ ").partition(" ")[::2] for line in done.stdout.splitlines() if line.startswith("│")]
    described = {name: text.strip() for name, text in rows}
    assert described.keys() >= {*PROGRAMS, "completion", "--version"}
    assert all(described.keys())  # a line that goes on has no name
    assert itune("--version").stdout == itune("run", "--version").stdout


@pytest.mark.parametrize(
    ("arguments", "named"), [([], ["train", "run"]), (["rum"], ["rum", "run"]), (["--x"], ["--x"])]
)
def test_mistakes_are_one_sentence(arguments: list[str], named: list[str]) -> None:
    done = itune(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("itune: error: ")
    assert all(part in done.stderr for part in named)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["r"], {"run"}),
        (["run", "--sidec"], {"--sidecar"}),
        (["run", "--sidecar", ""], {"txt", "xmp"}),
        (["train", "--pres"], {"--preset"}),
        (["datastore", "bu"], {"build"}),
        (["run", "pho"], {"photo.jpg"}),
    ],
)
def test_bash_completes(words: list[str], expected: set[str], completions: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    script = f"""
source {completions["bash"]}
COMP_WORDS=(itune "$@") COMP_CWORD=$#
$(complete -p itune | sed 's/.*-F \\([^ ]*\\).*/\\1/') itune "${{@: -1}}" ""
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    line = ["bash", "-c", script, "bash", *words]
    done = subprocess.run(line, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert {word.strip() for word in done.stdout.splitlines()} == expected


@pytest.mark.parametrize(("shell", "check"), [("bash", "-n"), ("zsh", "-n"), ("fish", "--no-execute")])
def test_completion_scripts_parse(shell: str, check: str, completions: dict[str, Path]) -> None:
    if not shutil.which(shell):
        pytest.skip(f"needs {shell}")
    subprocess.run([shell, check, completions[shell]], check=True)


@pytest.fixture(scope="module")
def completions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The script for each shell."""
    folder = tmp_path_factory.mktemp("completions")
    for shell in ("bash", "zsh", "fish"):
        done = itune("completion", shell)
        assert (done.returncode, done.stderr) == (0, "")
        (folder / shell).write_text(done.stdout)
    return {path.name: path for path in folder.iterdir()}
