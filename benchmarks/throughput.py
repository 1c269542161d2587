"""Images per second through a bundle, and whether memory grows with the number of images.

    python benchmarks/throughput.py --images FOLDER --count 10000 --json throughput.json --plot throughput.png

One process captions them with `Captioner.stream`, including file decoding. The folder's photos (default: synthetic
JPEGs) repeat until there are `count`. Rate and resident memory are recorded every `--window` images.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from measuring import machine
from PIL import Image
from rich.console import Console

from itune.cli.common import progress, require
from itune.cli.photos import expand
from itune.files import atomic_path, write_json
from itune.runtime import Captioner, ImageError, ItuneError
from itune.runtime.cpus import available_cpus

SYNTHETIC = 200
SIZE = (500, 375)


class Window(NamedTuple):
    """A record of progress and memory after some images."""

    images: int
    seconds: float
    rss_mb: float


def photos(folder: Path | None) -> Sequence[str] | Sequence[bytes]:
    """The photos of a folder, or encoded smooth random ones."""
    if folder is not None:
        found = expand([str(folder)])
        if found == [str(folder)]:
            raise ItuneError(f"--images {folder} contains no photo")
        return found
    return [_synthetic_photo(np.random.default_rng(seed)) for seed in range(SYNTHETIC)]


def measure(
    captioner: Captioner, images: Sequence[str] | Sequence[bytes], arguments: argparse.Namespace
) -> list[Window]:
    """Caption `arguments.count` images; the first window is the start, before any image."""
    import psutil

    process = psutil.Process()

    def note(done: int) -> Window:
        return Window(done, perf_counter() - start, process.memory_info().rss / 1e6)

    def endless() -> Iterator[str | bytes]:
        while True:
            yield from images

    failed = 0
    start = perf_counter()
    windows = [note(0)]
    results = captioner.stream(
        islice(endless(), arguments.count),
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        num_beams=arguments.num_beams,
    )
    with progress("captioning") as update:
        for done, (_, result) in enumerate(results, 1):
            failed += isinstance(result, ImageError)
            if done % arguments.window == 0 or done == arguments.count:
                windows.append(note(done))
            update(done, arguments.count)
    if failed:
        raise ItuneError(f"{failed} of {arguments.count} images could not be decoded, so the rate means nothing")
    return windows


def summarize(windows: Sequence[Window]) -> dict[str, Any]:
    """Images per second with their spread over windows, and the peak memory of both halves, which shows if it grows."""
    images, seconds, rss = (np.array(column) for column in zip(*windows, strict=True))
    rates = np.diff(images) / np.diff(seconds)
    early = images <= images[-1] / 2
    return {
        "images_per_s": float(images[-1] / seconds[-1]),
        "images_per_s_p10_p50_p90": [float(rate) for rate in np.percentile(rates, (10, 50, 90))],
        "rss_mb": {
            "loaded": float(rss[0]),
            "most_in_first_half": float(rss[early].max()),
            "most_in_second_half": float(rss[~early].max()),
            "end": float(rss[-1]),
        },
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return the content of the JSON file."""
    images = photos(arguments.images)
    captioner = Captioner.load(arguments.bundle, threads=arguments.threads)
    windows = measure(captioner, images, arguments)
    return {
        "machine": machine(arguments.threads),
        "settings": {
            "bundle": str(arguments.bundle or "default model"),
            "images": f"{len(images)} {'synthetic' if arguments.images is None else 'photos'}",
            "count": arguments.count,
            "batch_size": arguments.batch_size,
            "workers": captioner.workers if arguments.workers is None else arguments.workers,
            "num_beams": arguments.num_beams or captioner.search.num_beams,
        },
        "summary": summarize(windows),
        "windows": [window._asdict() for window in windows],
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a PNG: memory and rate over the number of images."""
    # Imported here, so that matplotlib's memory does not count.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    images, seconds, rss = (np.array([window[name] for window in result["windows"]]) for name in Window._fields)
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    memory, rate = figure.subplots(2, sharex=True)
    memory.plot(images, rss)
    memory.set_ylim(0, 1.25 * rss.max())
    memory.set_ylabel("resident memory, MB")
    rate.stairs(np.diff(images) / np.diff(seconds), images, baseline=None)
    rate.set_ylim(0)
    rate.set_ylabel("images per second")
    rate.set_xlabel("images captioned")
    settings = result["settings"]
    memory.set_title(
        f"{settings['bundle']}, {settings['num_beams']} beams, batches of {settings['batch_size']}, "
        f"{result['machine']['threads']} threads"
    )
    for axes in (memory, rate):
        axes.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, format="png")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bundle", type=Path, help="default: the packaged model")
    parser.add_argument("--images", type=Path, help="folder of photos; default: synthetic JPEGs of 500 x 375")
    parser.add_argument("--count", type=int, default=1000, help="images to caption; the photos repeat")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, help="threads that decode ahead, as in itune-run")
    parser.add_argument("--num-beams", type=int, help="default: the bundle's")
    parser.add_argument("--threads", type=int, default=available_cpus(), help="CPU threads")
    parser.add_argument("--window", type=int, default=200, help="images between two records of rate and memory")
    parser.add_argument("--json", type=Path, help="write every window here")
    parser.add_argument("--plot", type=Path, help="write a PNG here")
    arguments = parser.parse_args(argv)
    for name in ("count", "window"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if arguments.count < 2 * arguments.window:
        parser.error("--count must be at least two windows")
    for name in ("json", "plot"):
        path = getattr(arguments, name)
        if path and not path.absolute().parent.is_dir():
            parser.error(f"--{name}: {path.parent} is not a folder")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write the files."""
    arguments = parse_arguments(argv)
    try:
        require("benchmark", "psutil", *(["matplotlib"] if arguments.plot else []))
        result = run(arguments)
        if arguments.json:
            write_json(arguments.json, result, indent=1)
        if arguments.plot:
            draw(result, arguments.plot)
    except (ItuneError, OSError) as error:
        print(f"throughput: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    summary = result["summary"]
    low, _, high = summary["images_per_s_p10_p50_p90"]
    rss = summary["rss_mb"]
    console = Console(highlight=False)
    console.print(f"{summary['images_per_s']:.1f} images/s (windows p10-p90: {low:.1f}-{high:.1f})")
    console.print(
        f"resident memory: {rss['loaded']:.0f} MB with the model loaded; at most {rss['most_in_first_half']:.0f} MB in "
        f"the first half of the images, {rss['most_in_second_half']:.0f} MB in the second",
        soft_wrap=True,
    )
    return 0


def _synthetic_photo(rng: np.random.Generator) -> bytes:
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
    file = io.BytesIO()
    coarse.resize(SIZE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
