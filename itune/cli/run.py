"""itune-run: images in, captions out. Imports the model's libraries only once there is something to caption."""

from __future__ import annotations

import glob
import json
import logging
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from . import common

STDIN = "-"


def run(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE", help="Files, folders, quoted globs, or - for one image on stdin."),
    ],
    bundle: Annotated[
        Path | None, typer.Option(help="Folder that itune-export wrote; default: the model inside the package.")
    ] = None,
    num_beams: Annotated[int | None, typer.Option(help="Beams; 1 is greedy. Default: the bundle's, 5.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest caption, in tokens.")] = None,
    min_new_tokens: Annotated[int | None, typer.Option(help="Shortest caption, in tokens.")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="Above 0 favours longer captions.")] = None,
    no_repeat_ngram_size: Annotated[
        int | None, typer.Option(help="No n-gram of this size occurs twice; 0 is off.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1, tokens of the caption so far become less likely.")
    ] = None,
    num_return: Annotated[
        int | None, typer.Option(help="Candidates per image in --json; default: all beams, or one sample.")
    ] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Draw captions at random instead of the best.")] = False,
    temperature: Annotated[
        float | None, typer.Option(help="With --sample: below 1 keeps to likely words; default 1.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="With --sample: draw from so many best tokens; default 50, 0 is all.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="With --sample: draw from the best tokens of this total probability.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="With --sample: another seed draws other captions.")] = None,
    engine: Annotated[str, typer.Option(help="auto, tensorrt, onnxruntime-cuda or onnxruntime (the CPU).")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: the engine's choice.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images at once through the model.")] = 8,
    workers: Annotated[
        int | None, typer.Option(help="Threads that read images ahead; default: threads less one, at most 4.")
    ] = None,
    heatmap: Annotated[
        Path | None,
        typer.Option(
            metavar="PNG|FOLDER", help="Draw what the adapters look at for each token; several images take a folder."
        ),
    ] = None,
    heatmap_layer: Annotated[
        str | None,
        typer.Option(metavar="last|mean|N", help="Decoder layer of the heatmap, or the mean of all. [default: last]"),
    ] = None,
    heatmap_json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the heatmap's numbers, one JSON object a line and image.")
    ] = None,
    datastore: Annotated[
        Path | None,
        typer.Option(help="Folder of itune-datastore, for a bundle that retrieves. Default: datastore/ in the bundle."),
    ] = None,
    retrieve: Annotated[
        int | None, typer.Option(help="Captions of similar images in the prompt; 0 is none. Default: the bundle's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    _version: common.Version = False,
) -> int:
    """Caption images.

    Prints the caption of a single image, and "path TAB caption" a line for several. With --json: image, caption,
    score (length-normalised log-probability), tokens, candidates, milliseconds and, with a datastore, the captions
    retrieved from it; or image and error. The exit status is 1 if an image could not be read, after all others were
    captioned.
    """
    sources = expand(images)
    from .heatmap import FigureError, Heatmaps

    heatmaps = Heatmaps(heatmap, heatmap_json, heatmap_layer, sources)
    from ..runtime.captioner import Captioner
    from ..runtime.errors import ImageError

    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what matters of its complaints is in the ImageErrors
    captioner = Captioner.load(bundle, engine=engine, threads=threads, datastore=datastore, retrieve=retrieve)
    if captioner.engine_notice:
        print(f"itune-run: {captioner.engine_notice}", file=sys.stderr)
    if heatmaps:
        captioner.explainer.reader.choose(heatmaps.layer)  # what cannot be shown is told before anything is captioned
    if STDIN in sources:
        workers = 0  # reading ahead would wait for stdin before it captions what comes first
    options: dict[str, Any] = {
        "num_beams": num_beams,
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "length_penalty": length_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "repetition_penalty": repetition_penalty,
        "num_return": num_return,
        "do_sample": sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    results = captioner.stream(
        (sys.stdin.buffer.read() if source == STDIN else source for source in sources),
        batch_size=batch_size,
        workers=workers,
        **options,
    )
    several = len(sources) > 1
    named = several or sources != images  # even the only file of a folder has its name printed
    failures = 0
    with heatmaps, common.progress("images", enabled=several) as update:
        for done, (name, (image, result)) in enumerate(zip(sources, results, strict=True), 1):
            failures += isinstance(result, ImageError)
            if as_json:
                record = {"error": str(result)} if isinstance(result, ImageError) else asdict(result)
                if record.get("retrieved") is None:
                    record.pop("retrieved", None)
                common.emit(json.dumps({"image": name, **record}), beside_progress=several)
            elif isinstance(result, ImageError):
                print(f"itune-run: {result}", file=sys.stderr)
            else:
                common.emit(f"{name}\t{result.caption}" if named else result.caption, beside_progress=several)
            if heatmaps and not isinstance(result, ImageError):
                try:
                    heatmaps.add(captioner, done - 1, name, image, result, **options)
                except (ImageError, FigureError) as error:  # it has changed since it was captioned, or the disk is full
                    failures += 1
                    print(f"itune-run: no heatmap: {error}", file=sys.stderr)
            update(done, len(sources))
    return 1 if failures else 0


def expand(arguments: Iterable[str]) -> list[str]:
    """Replace folders by the images directly inside, sorted by name, and globs by the files that match.

    What is neither, or has none, stays as it is, so that its error names it.
    """
    return [source for argument in arguments for source in _inside(argument) or [argument]]


def _inside(argument: str) -> list[str]:
    from ..runtime.image import SUFFIXES

    path = Path(argument)
    try:
        if argument == STDIN or path.is_file():
            return []
        if path.is_dir():
            visible = (child for child in path.iterdir() if not child.name.startswith("."))
            return sorted(str(child) for child in visible if child.suffix.lower() in SUFFIXES and not _blocks(child))
        matches = glob.glob(argument, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
        return sorted(match for match in matches if Path(match).is_file())
    except OSError:
        return []  # to be told when it is opened


def _blocks(path: Path) -> bool:
    """Whether reading it may wait for ever, as a named pipe."""
    return path.is_fifo() or path.is_socket() or path.is_char_device() or path.is_block_device()


def main() -> None:
    """Entry point."""
    common.run(run)


if __name__ == "__main__":
    main()
