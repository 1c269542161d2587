"""itune-export --compare: a checkpoint in several precisions, side by side."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from .. import __version__
from ..export.options import CompareOptions
from ..runtime.errors import ItuneError
from . import common
from .program import BeamSearch, Flags, Options, Switch, chosen

if TYPE_CHECKING:
    from ..data.records import Record
    from ..export.compare.comparison import Row

RESULT, PICTURE = "comparison.json", "comparison.png"


class _Task(Options, title="What to write"):
    output: Annotated[Path, Parameter(name=["--output", "-o"])]
    """Folder for the bundles, the table as JSON and the picture; continues an earlier run."""
    compare: Switch = False
    """Set, since this is the help of `--compare`."""


def compare(
    checkpoint: Annotated[Path, Parameter(name="CHECKPOINT", help="Adapter checkpoint, or the output of itune-train.")],
    /,
    *,
    task: _Task,
    comparison: Annotated[Options, Flags(CompareOptions)],
    search: BeamSearch,
) -> None:
    """Export in several precisions; print size, scores, agreement with fp32 and latency of each, and draw them.

    Examples:
        itune-export runs/flickr8k --compare --data Flickr8k.token.txt -o comparison
    """
    options = CompareOptions(**chosen(comparison))
    common.require("export", "torch", "transformers", "safetensors", "onnx")
    common.require("plot", "matplotlib")
    from ..export.compare.comparison import Comparison
    from ..export.compare.picture import draw
    from ..files import atomic_path
    from ..runtime.cpus import available_cpus

    output, split = task.output, options.split
    measured = Comparison(
        checkpoint=checkpoint,
        folder=output,
        records=_records(options)[: options.limit],
        options=options,
        search={"num_beams": 5} | chosen(search),
        progress=_stage,
    )
    rows = measured.run()
    settings = {
        "checkpoint": str(checkpoint),
        "photos": len(measured.records),
        "split": split if options.data else None,
        "search": measured.search,
        "threads": options.threads or available_cpus(),
        "latency_photos": min(options.latency_photos, len(measured.records)),
        "versions": {"itune": __version__, "onnxruntime": version("onnxruntime")},
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with atomic_path(output / RESULT) as temporary:
        content = {"settings": settings, "rows": [asdict(row) for row in rows]}
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    photos = rows[0].photos
    title = f"{checkpoint.absolute().name}: {photos} photos, {measured.search['num_beams']} beams"
    draw(rows, title, output / PICTURE)
    if left_out := len(measured.records) - photos:
        common.warn(f"left out: {left_out} of {len(measured.records)} photos, which cannot be read")
    _print_table(rows, title)
    common.say(f"{output / RESULT}, {output / PICTURE}")


@contextmanager
def _stage(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, a line in a log."""
    if not sys.stderr.isatty():
        print(description, file=sys.stderr, flush=True)
    with common.progress(description) as update:
        yield update


def _records(options: CompareOptions) -> list[Record]:
    """The photos of a split with their captions, or those of a folder without any."""
    from ..data.records import Record, load_records, split_records
    from ..runtime.image import SUFFIXES

    data, images = options.data, options.images
    if data is not None and options.dev_fraction is not None:
        return split_records(load_records(data, images=images), options.dev_fraction, seed=0)[1]
    if data is not None:
        return load_records(data, images=images, split=None if options.split == "all" else options.split)
    found = sorted(path for path in images.glob("*") if path.suffix.lower() in SUFFIXES) if images else []
    if not found:
        where = f"--images {images} has none" if images else "give captions with --data, or a folder with --images"
        raise ItuneError(f"--compare needs photos: {where}")
    return [Record(path, (), path.name) for path in found]


def _print_table(rows: list[Row], title: str) -> None:
    scored, shortlisted = rows[0].cider is not None, any(row.fidelity.covered < 1 for row in rows)
    headings = ["", "MB", *(["CIDEr-D", "BLEU-4"] if scored else []), "captions as fp32", "KL", "top-1"]
    headings += ["covered"] if shortlisted else []
    headings += ["encode", "search", "total"]
    table = common.score_table(f"{title} (scores x 100, milliseconds at batch 1)", headings)
    for row in rows:
        scores = [f"{100 * (value or 0):.1f}" for value in (row.cider, row.bleu4)] if scored else []
        fidelity, latency = row.fidelity, row.latency
        table.add_row(
            row.name,
            f"{row.megabytes:.1f}",
            *scores,
            f"{row.same_captions:.1%}",
            f"{fidelity.kl:.1e}" if fidelity.kl else "0",
            f"{fidelity.top1:.1%}",
            *([f"{fidelity.covered:.1%}"] if shortlisted else []),
            *(f"{value:.0f}" for value in (latency.encode, latency.search, latency.total)),
        )
    common.print_result(table)
