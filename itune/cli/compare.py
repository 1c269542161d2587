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

import typer

from ..runtime.errors import ItuneError
from ..runtime.image import SUFFIXES
from . import common

if TYPE_CHECKING:
    from ..data.records import Record
    from ..export.compare.comparison import Row

RESULT, PICTURE = "comparison.json", "comparison.png"


def compare(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Adapter checkpoint, or the output of itune-train.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder for the bundles, the table as JSON and the picture; an earlier run's go on."
        ),
    ],
    _compare: Annotated[bool, typer.Option("--compare", help="Given, as this is what it says.")],
    precisions: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="DECODER[+VISION][@N|FILE], commas between: precisions, and a shortlist as of --vocabulary. "
            "fp32 is always there.",
        ),
    ] = "fp32,fp16,int8,int4",
    data: Annotated[
        Path | None,
        typer.Option(
            help="Captions to score against; their train split is what a shortlist @N counts. Without them, "
            "--images is captioned and nothing scored."
        ),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the photos, if not beside the captions.")] = None,
    split: Annotated[str, typer.Option(help="Split to caption: train, dev, test, or all.")] = "dev",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many photos.")] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams of the search.")] = 5,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest caption, in tokens.")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="> 0 favours long captions, < 0 short ones.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Photos at once, except where the time is taken.")] = 16,
    latency_photos: Annotated[int, typer.Option(min=1, help="Photos whose time is taken, one at a time.")] = 40,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all.")] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not compare the graphs with PyTorch.")] = False,
) -> None:
    """Export in several precisions; print size, scores, agreement with fp32 and latency of each, and draw them."""
    common.require("export", "torch", "transformers", "safetensors", "onnx")
    common.require("benchmark", "matplotlib")
    common.exit_when_asked()
    from ..export.compare.comparison import Comparison, Variant
    from ..export.compare.picture import draw
    from ..files import atomic_path
    from ..runtime.engines.onnxruntime import available_cpus

    search = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "length_penalty": length_penalty}
    comparison = Comparison(
        checkpoint=checkpoint,
        folder=output,
        records=_records(data, images, None if split == "all" else split)[:limit],
        data=data,
        search={name: value for name, value in search.items() if value is not None},
        batch_size=batch_size,
        latency_photos=latency_photos,
        threads=threads,
        verify=not no_verify,
        progress=_stage,
    )
    variants = [Variant.parse(text) for text in precisions.split(",")]
    rows = comparison.run(variants)
    settings = {
        "checkpoint": str(checkpoint),
        "photos": len(comparison.records),
        "split": split if data else None,
        "search": comparison.search,
        "threads": threads or available_cpus(),
        "latency_photos": min(latency_photos, len(comparison.records)),
        "versions": {name: version(name) for name in ("itune", "onnxruntime")},
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with atomic_path(output / RESULT) as temporary:
        content = {"settings": settings, "rows": [asdict(row) for row in rows]}
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    photos = rows[0].photos
    title = f"{checkpoint.absolute().name}: {photos} photos, {num_beams} beams"
    draw(rows, title, output / PICTURE)
    if left_out := len(comparison.records) - photos:
        common.console().print(
            f"left out: {left_out} of {len(comparison.records)} photos, which cannot be read", style="yellow"
        )
    _print_table(rows, title)
    common.console().print(f"{output / RESULT}, {output / PICTURE}", highlight=False)


@contextmanager
def _stage(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, a line in a log."""
    if not sys.stderr.isatty():
        print(description, file=sys.stderr, flush=True)
    with common.progress(description) as update:
        yield update


def _records(data: Path | None, images: Path | None, split: str | None) -> list[Record]:
    """The photos of a split with their captions, or those of a folder without any."""
    from ..data.records import Record, load_records

    if data is not None:
        return load_records(data, images=images, split=split)
    if images is None:
        raise ItuneError("--compare needs photos: give captions with --data, or a folder of photos with --images")
    photos = sorted(path for path in images.glob("*") if path.suffix.lower() in SUFFIXES)
    if not photos:
        raise ItuneError(f"--images {images}: there is no photo in it")
    return [Record(path, (), path.name) for path in photos]


def _print_table(rows: list[Row], title: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    scored, shortlisted = rows[0].cider is not None, any(row.fidelity.covered < 1 for row in rows)
    headings = ["", "MB", *(["CIDEr-D", "BLEU-4"] if scored else []), "captions as fp32", "KL", "top-1"]
    headings += ["covered"] if shortlisted else []
    table = Table(title=f"{title} (scores x 100, milliseconds at batch 1)", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in [*headings, "encode", "search", "total"]:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
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
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # of the 80 that rich takes for a file's, the columns need more
    console.print(table)
