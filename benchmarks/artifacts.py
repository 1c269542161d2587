"""The bundles and conversions of one checkpoint that the contestants load: built once and reused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from contestants import BUNDLE, PEERS, ContestantProcess, Entry
from rich.console import Console

from itune import ItuneError, __version__
from itune.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from itune.files import atomic_folder, hash_files, write_json
from itune.runtime.bundle import MANIFEST
from itune.runtime.bundle import Bundle as BundleFolder

BASE = "eager"
"""The contestant that all others are compared with."""
_SOURCE = "source.json"
_BENCHMARKS = Path(__file__).resolve().parent
console = Console(stderr=True)


class Artifacts:
    """The folders of a checkpoint's bundles and conversions below `work`, built on demand."""

    def __init__(
        self,
        checkpoint: Path,
        work: Path,
        engines: Sequence[str] = ("native",),
        plans: Callable[[str], list[Any]] | None = None,
    ) -> None:
        """`engines` run the bundles; `plans`: the options of itune-export for TensorRT plans of a precision."""
        self.checkpoint, self.work, self.engines, self.plans = checkpoint, work, engines, plans
        self.source = {name: hash_files([checkpoint / name]) for name in (WEIGHTS_FILE, CONFIG_FILE)}

    def bundle(self, precision: str) -> Path:
        """The bundle of a precision: itune-export's, or DECODER+VISION for two of them."""
        return self._bundle(precision)

    def own(self, precision: str) -> Path:
        """The bundle of a precision for the engine under test, with TensorRT plans where it needs them."""
        return self._bundle(precision, self.plans)

    def _bundle(self, precision: str, plans: Callable[[str], list[Any]] | None = None) -> Path:
        folder = self.work / f"bundle-{'tensorrt-' if plans else ''}{precision}"
        if (folder / MANIFEST).is_file():
            provenance = BundleFolder.load(folder, verify=False).manifest.provenance
            self._check(folder, provenance.get("checkpoint"), provenance.get("itune"))
            return folder
        decoder, _, vision = precision.partition("+")
        command = ["-m", "itune.cli.export", self.checkpoint, "--precision", decoder, "-o", folder]
        options = ["--vision-precision", vision] if vision else []
        if plans:
            options += ["--target", "tensorrt", *plans(decoder)]
        with console.status(f"exporting {folder.name}"):
            _run([*command, *options], f"the export to {folder}")
        return folder

    def conversion(self, name: str) -> Path:
        """The folder that a peer's own `convert` writes."""
        entry = PEERS[name]
        module = entry.implementation.partition(":")[0]
        folder = self.work / module.rpartition(".")[2]
        if (folder / _SOURCE).is_file():
            found: dict[str, Any] = json.loads((folder / _SOURCE).read_text(encoding="utf-8"))
            self._check(folder, found["checkpoint"], found["itune"])
            return folder
        source = self.checkpoint if entry.source == "checkpoint" else self.bundle("fp32")
        with console.status(f"converting for {entry.label}"), atomic_folder(folder) as staging:
            _run(["-m", module, source, staging], f"the conversion for {name}")
            write_json(staging / _SOURCE, {"checkpoint": self.source, "itune": __version__})
        return folder

    def _check(self, folder: Path, checkpoint: Any, version: Any) -> None:
        if checkpoint != self.source:
            raise ItuneError(f"{folder} was exported from another checkpoint: choose another --work-dir")
        if version != __version__:
            raise ItuneError(
                f"{folder} was exported by another version of itune: delete it, or choose another --work-dir"
            )

    def start(self, peers: Iterable[str], precisions: Iterable[str], threads: int) -> dict[str, ContestantProcess]:
        """Start a process for every peer and every bundle, by name.

        A bundle is called `itune PRECISION`, or `itune ENGINE PRECISION` if not on the native engine.
        """
        parts: dict[str, tuple[Entry, Path]] = {}
        for name in peers:
            reads = PEERS[name].reads
            folder = self.checkpoint if reads == "checkpoint" else None
            parts[name] = (PEERS[name], folder or (self.bundle("fp32") if reads == "bundle" else self.conversion(name)))
        for engine, precision in product(self.engines, precisions):
            entry = replace(BUNDLE, options={"engine": engine})
            parts[f"itune {'' if engine == 'native' else f'{engine} '}{precision}"] = (entry, self.own(precision))
        workers = {}
        with console.status("loading") as status:
            for name, (entry, folder) in parts.items():
                status.update(f"loading {name}")
                workers[name] = ContestantProcess(entry, folder, threads)
        return workers


def label(name: str) -> str:
    """The name of a contestant in tables."""
    return PEERS[name].label if name in PEERS else name


def peer_names(text: str) -> list[str]:
    """Parse a comma-separated list of peers, eager PyTorch always first; raises ItuneError for an unknown name."""
    names = list(PEERS) if text == "all" else [BASE, *(n for n in text.split(",") if n not in ("", BASE))]
    for name in names:
        if name not in PEERS:
            raise ItuneError(f"--contestants: unknown {name!r}: choose from all, {', '.join(PEERS)}")
    return list(dict.fromkeys(names))


def choose_peers(text: str, vision: str = "clip") -> list[str]:
    """The peers of a comma-separated list (as in `peer_names`); `all` means every peer that can run here.

    `vision`: the kind of the checkpoint's tower, "clip" or "onnx".

    Raises:
        ItuneError: an unknown name, or one that cannot run here.
    """
    chosen = []
    for name in peer_names(text):
        reason = PEERS[name].lacks(vision)
        if reason and text != "all":
            raise ItuneError(f"--contestants: {name} {reason}")
        if reason:
            console.print(f"skipped: {name} {reason}", highlight=False)
        else:
            chosen.append(name)
    return chosen


def _run(arguments: list[Any], what: str) -> None:
    """Run a Python module in a process of its own, so that its memory is freed at the end."""
    command = [sys.executable, *map(str, arguments)]
    path = os.pathsep.join([str(_BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    ) as process:
        try:
            _, errors = process.communicate()
        except BaseException:
            process.terminate()  # it removes its half-written folder before it ends
            raise
    if process.returncode:
        raise ItuneError(f"{what} failed: {(errors.strip().splitlines() or ['it was killed'])[-1]}")
