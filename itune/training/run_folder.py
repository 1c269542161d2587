"""The folder of a training run: its lock, its recovery after an interruption, and its log of epochs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..data.records import Record
from ..files import atomic_path, only_writer
from ..runtime.errors import reading
from ..runtime.recovery import recover_folder

BEST, LAST, METRICS = "best", "last", "metrics.jsonl"


def holds_run(output: Path) -> bool:
    """Whether a run has saved something in the folder."""
    return any((output / name).exists() for name in (BEST, LAST, METRICS)) or any(output.glob(f".{LAST}.*.old"))


@contextmanager
def only_run(output: Path) -> Iterator[None]:
    """Make the folder and lock it for the block; restore or remove what a killed run left half-written.

    Raises:
        ItuneError: the folder cannot be made, or another run is writing to it.
    """
    with reading(f"--output {output}", mend="choose another folder"):
        output.mkdir(parents=True, exist_ok=True)
    busy = f"--output {output}: another training run is writing to it; choose another folder"
    try:
        with only_writer(output / ".lock", busy):
            for name in (BEST, LAST):
                recover_folder(output / name)
            yield
    finally:
        with suppress(OSError):  # unless the run saved nothing, the folder is not empty
            output.rmdir()


def log_epoch(output: Path, epoch: int, values: Mapping[str, Any]) -> None:
    """Add an epoch's line to `metrics.jsonl`; it replaces a line that a killed run wrote before it saved."""
    path = output / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if _epoch(line) not in (None, epoch)]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in [*kept, json.dumps({"epoch": epoch, **values})]))


def _epoch(line: str) -> object:
    try:
        return json.loads(line).get("epoch")
    except (ValueError, AttributeError, RecursionError):  # cut off
        return None


def fingerprint(*splits: Sequence[Record]) -> str:
    """Hash of the photos' ids, captions and weights, in the order of the splits and of their records."""
    digest = hashlib.sha256()
    for records in splits:
        for record in records:
            weight = [] if record.weight == 1 else [record.weight]  # earlier versions had no weights
            digest.update(f"{json.dumps([record.id, record.captions, *weight])}\n".encode())
        digest.update(b"\n")
    return digest.hexdigest()
