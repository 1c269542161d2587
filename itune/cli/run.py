"""itune-run: images in, captions out. Imports the model's libraries only once there is something to caption."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from pydantic import Field

from ..runtime.errors import ImageError, ItuneError, printable
from ..runtime.search.config import SearchConfig
from . import common, program
from .engine import EngineOptions
from .heatmap import HeatmapOptions
from .photos import STDIN, Found
from .program import Flags, Options, Switch, chosen


class _Run(EngineOptions, title="Model"):
    bundle: Path | None = None
    """Folder that itune-export wrote. Default: the model inside the package."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Images at once through the model."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Threads that read images ahead. Default: threads less one, at most 4."""
    json_: Switch = False
    """One JSON object per line instead of text."""
    recursive: Switch = False
    """Caption the photos in sub-folders, too."""


def run(
    images: Annotated[
        list[str],
        Parameter(
            name="IMAGE",
            help="Files, folders, quoted globs, or - for one image on stdin.",
            allow_leading_hyphen=False,
        ),
    ],
    /,
    *,
    model: _Run,
    search: Annotated[
        Options,
        Flags(SearchConfig, "Search (default: the bundle's)", omit=("bad_words",), names={"do_sample": "--sample"}),
    ],
    heatmap: HeatmapOptions,
) -> int:
    """Caption images.

    Prints the caption of a single image, and "path TAB caption" per line for several. With --json: image, caption,
    score (length-normalised log-probability), tokens, candidates, milliseconds, the engine (with its kernels, if it is
    the native one) and, with a datastore, the captions retrieved from it; or image and error. The exit status is 1 if
    an image could not be read, after all others were captioned.

    Examples:
        itune-run photo.jpg
        itune-run photos/ --bundle my-bundle --json > captions.jsonl
        itune-run photo.jpg --heatmap heatmap.png

    """
    found = [Found.at(argument, recursive=model.recursive) for argument in images]
    for each in found:
        if each.skipped:
            print(f"itune-run: {printable(each.place)}: skipped {each.summary}", file=sys.stderr)
    sources = [source for each in found for source in each.sources]
    if STDIN in sources and sys.stdin is None:
        raise ItuneError("-: standard input is closed")
    from .heatmap import Heatmaps

    heatmaps = Heatmaps(heatmap, sources)
    from ..caption_json import caption_json

    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # ImageErrors carry what matters of its complaints
    captioner = model.loader(model.bundle)()
    if captioner.engine_notice:
        print(f"itune-run: {captioner.engine_notice}", file=sys.stderr)
    if heatmaps:
        captioner.explainer.choose(heatmaps.layer)  # refuses a wrong layer before anything is captioned
    options = chosen(search)
    results = captioner.stream(
        (sys.stdin.buffer.read() if source == STDIN else source for source in sources),
        batch_size=model.batch_size,
        workers=0 if STDIN in sources else model.workers,  # workers would wait for stdin before the first caption
        **options,
    )
    several = len(sources) > 1
    named = several or sources != images  # print the name even of a folder's only file
    failures = 0
    with heatmaps, common.progress("images", enabled=several) as update:
        for done, (name, (image, result)) in enumerate(zip(sources, results, strict=True), 1):
            if isinstance(result, ImageError):
                failures += 1
                if name == STDIN:
                    result = ImageError(str(result).replace("the image:", "standard input:", 1))
                elif Path(name).is_dir():
                    result = ImageError(f"{name}: there are no photos in this folder")
            if model.json_:
                record = caption_json(name, result, captioner.engine_name, captioner.kernels)
                common.emit(json.dumps(record), beside_progress=several)
            elif isinstance(result, ImageError):
                print(f"itune-run: {result}", file=sys.stderr)
            else:
                caption = printable(result.caption)
                common.emit(f"{printable(name)}\t{caption}" if named else caption, beside_progress=several)
            if heatmaps and not isinstance(result, ImageError):
                try:
                    heatmaps.add(captioner, done - 1, name, image, result, **options)
                except ItuneError as error:  # the image has changed since, or the disk is full
                    failures += 1
                    print(f"itune-run: no heatmap: {error}", file=sys.stderr)
            update(done, len(sources))
    return 1 if failures else 0


def main() -> None:
    """Entry point."""
    program.run("itune-run", run)


if __name__ == "__main__":
    main()
