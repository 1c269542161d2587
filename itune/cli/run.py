"""itune-run: images in, captions out. Imports the model's libraries only once there is something to caption."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from pydantic import Field

from ..runtime.errors import ImageError, ItuneError
from ..runtime.search.config import SearchConfig
from . import common
from .engine import EngineOptions
from .heatmap import HeatmapError, HeatmapOptions, Heatmaps
from .outputs.base import Captioned, SidecarError
from .outputs.options import OutputOptions, Outputs
from .photos import STDIN, PhotoOptions, watch
from .program import Flags, Options, Program, chosen


class _Run(EngineOptions, title="Model"):
    bundle: Path | None = None
    """Folder that itune-export wrote. Default: the model inside the package."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Images at once through the model."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Threads that read images ahead. Default: threads less one, at most 4."""


def run(
    images: Annotated[
        list[str | Path] | None,  # becomes str, as typed; because of Path, shells complete file names
        Parameter(
            name="IMAGE",
            help="Files, folders, quoted globs, or - for one image on stdin.",
            allow_leading_hyphen=False,
        ),
    ] = None,
    /,
    *,
    photos: PhotoOptions,
    output: OutputOptions,
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
    an image could not be read or a sidecar not written, after all others were captioned.

    Examples:
        itune-run photo.jpg
        itune-run photos/ --bundle my-bundle --json > captions.jsonl
        itune-run photos/ --recursive --csv --output captions.csv --resume
        itune-run inbox/ --watch --sidecar xmp
        itune-run photo.jpg --heatmap heatmap.png

    """
    named = [str(image) for image in images or ()]
    if not named and photos.from_file is None:
        raise ItuneError("IMAGE or --from-file is missing: name photos or folders; see itune-run --help")
    sources = photos.find(named)
    several = len(sources) > 1 and not photos.watch
    outputs = Outputs(output, named=several or sources != named, beside_progress=several)
    heatmaps = Heatmaps(heatmap, sources)
    if heatmaps and (photos.watch or output.resume):
        raise ItuneError("heatmaps are numbered by the photos of one run: leave out --watch and --resume, or --heatmap")
    inputs = [("the photo", Path(source)) for source in sources if source != STDIN]
    common.check_apart([*outputs.files, *heatmaps.files], inputs)
    for sidecar in () if photos.watch else outputs.sidecars:
        sidecar.check(sources)
    if not photos.watch and all(map(outputs.has, sources)):  # also if the list is empty
        with outputs:
            return 0

    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # ImageErrors carry what matters of its complaints
    captioner = model.loader(model.bundle)()
    if captioner.engine_notice:
        print(f"itune-run: {captioner.engine_notice}", file=sys.stderr)
    if heatmaps:
        captioner.explainer.choose(heatmaps.layer)  # refuses a wrong layer before anything is captioned
    options = chosen(search)
    failures = 0
    with outputs, heatmaps, common.progress("images", enabled=several) as update:
        for batch in watch(named, recursive=photos.recursive) if photos.watch else [sources]:
            left = [source for source in batch if not outputs.has(source)]
            results = captioner.stream(
                (sys.stdin.buffer.read() if source == STDIN else source for source in left),
                batch_size=model.batch_size,
                workers=0 if STDIN in left else model.workers,  # they would wait for stdin before the first caption
                **options,
            )
            for done, (name, (image, result)) in enumerate(zip(left, results, strict=True), 1):
                if isinstance(result, ImageError):
                    failures += 1
                    result = _explained(name, result)
                try:
                    outputs.write(Captioned(name, result, captioner.engine_name, captioner.kernels))
                    if heatmaps and not isinstance(result, ImageError):
                        heatmaps.add(captioner, done - 1, name, image, result, **options)
                except (SidecarError, HeatmapError) as error:
                    failures += 1
                    print(f"itune-run: {error}", file=sys.stderr)
                update(done, len(left))
    return 1 if failures else 0


def _explained(name: str, error: ImageError) -> ImageError:
    """The error of an image that is no file."""
    if name == STDIN:
        return ImageError(str(error).replace("the image:", "standard input:", 1))
    return ImageError(f"{name}: no photos in this folder (a list takes no folders)") if Path(name).is_dir() else error


PROGRAM = Program("itune-run", run)
main = PROGRAM.run

if __name__ == "__main__":
    main()
