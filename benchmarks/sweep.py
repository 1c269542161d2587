"""How latency depends on beams, caption length, batch and model size, as JSON and plots.

    python benchmarks/sweep.py --work-dir DIR --json docs/sweep.json --plots docs/images
    python benchmarks/sweep.py --work-dir DIR --json docs/sweep.json --contestants all --sweeps sizes

Models have the paper's sizes and random weights. Contestants alternate at every point, as in `latency.py`. A sweep can
be interrupted and extended: points in the JSON file are measured again only for other contestants or changed bundles.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from artifacts import BASE, Artifacts, choose_peers, console
from contestants import PEERS, ContestantProcess
from latency import make_task, preprocessed
from measuring import batches, machine, measure, summarize
from sweep_plots import draw

from itune import ItuneError
from itune.cli.common import require
from itune.files import write_json
from itune.methods.schemas import load_config
from itune.runtime.bundle import Bundle as BundleFolder
from itune.runtime.cpus import available_cpus
from itune.runtime.engines.base import UInt8


@dataclass(frozen=True)
class Point:
    """One setting that all contestants run with."""

    size: str
    num_beams: int = 5
    new_tokens: int = 16
    batch_size: int = 1

    def __str__(self) -> str:
        batch = f"batch {self.batch_size}"
        return f"GPT-2 {self.size}, {self.num_beams} beams, {self.new_tokens} tokens, {batch}"


SWEEPS: dict[str, tuple[str, tuple[int, ...]]] = {
    "beams": ("num_beams", (1, 2, 3, 4, 5, 6, 8, 10)),
    "new-tokens": ("new_tokens", (8, 12, 16, 24, 32)),
    "batch": ("batch_size", (1, 2, 4, 8, 16, 32)),
}
"""The field that a sweep varies and its values, at the first of --sizes; the sweep `sizes` varies the size."""
SIZES = "sizes"


def points(sweeps: list[str], sizes: list[str]) -> list[Point]:
    """The points of some sweeps without repetitions, size by size; the point that all sweeps share comes first."""
    found = [Point(sizes[0])]  # the point that the sweeps share
    for sweep in sweeps:
        if sweep == SIZES:
            found += [Point(size) for size in sizes]
        else:
            field, values = SWEEPS[sweep]
            found += [replace(found[0], **{field: value}) for value in values]
    return sorted(dict.fromkeys(found), key=lambda point: sizes.index(point.size))


class Results:
    """The JSON file: the machine, and each point's bundles and summary."""

    def __init__(self, path: Path, threads: int) -> None:
        self.path = path
        self.content: dict[str, Any] = {"machine": machine(threads), "points": []}
        if not path.exists():
            return
        here = self.content["machine"]
        self.content = json.loads(path.read_text(encoding="utf-8"))
        for key in ("cpu", "threads", "versions"):
            before = self.content["machine"][key]
            if before != here[key]:
                raise ItuneError(f"{path} was measured with {key} {before}, not {here[key]}; choose another --json")

    def has(self, point: Point, bundles: dict[str, str], names: set[str]) -> bool:
        """Whether a point was measured with exactly these contestants and bundles."""
        entry = next((e for e in self.content["points"] if e["point"] == asdict(point)), None)
        return entry is not None and entry["bundles"] == bundles and entry["summary"].keys() == names

    def add(self, point: Point, bundles: dict[str, str], summary: dict[str, Any]) -> None:
        """Add or replace a point, and write the file."""
        kept = [entry for entry in self.content["points"] if entry["point"] != asdict(point)]
        self.content["points"] = [*kept, {"point": asdict(point), "bundles": bundles, "summary": summary}]
        write_json(self.path, self.content, indent=1)


def sweep(arguments: argparse.Namespace, results: Results) -> None:
    """Measure the missing points size by size, with one size's contestants in memory at a time."""
    from random_init import GEOMETRIES, build_checkpoint

    peers, precisions = choose_peers(arguments.contestants), arguments.precisions.split(",")
    wanted = points(arguments.sweeps, arguments.sizes)
    results.content["usual"] = asdict(wanted[0])
    names = {*peers, *(f"itune {precision}" for precision in precisions)}
    for size in dict.fromkeys(point.size for point in wanted):
        with console.status(f"building GPT-2 {size} with random weights"):
            checkpoint = build_checkpoint(GEOMETRIES[size], arguments.work_dir / size)
        artifacts = Artifacts(checkpoint, arguments.work_dir / size)
        bundles = {precision: _weights(artifacts.bundle(precision)) for precision in precisions}
        missing = [point for point in wanted if point.size == size and not results.has(point, bundles, names)]
        if not missing:
            continue
        pixels = preprocessed(load_config(checkpoint).image, None)[: arguments.repeats]
        workers = artifacts.start(peers, precisions, arguments.threads)
        for number, point in enumerate(missing, 1):
            console.print(f"{number} of {len(missing)}: {point}", highlight=False)
            bundle = artifacts.bundle(precisions[0])
            results.add(point, bundles, measure_point(point, workers, pixels, bundle, arguments))
        for worker in workers.values():
            worker.close()


def measure_point(
    point: Point, workers: dict[str, ContestantProcess], pixels: UInt8, bundle: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The summary of one point."""
    task = make_task(bundle, point.num_beams, point.new_tokens)
    samples = measure(workers, batches(pixels, point.batch_size, arguments.repeats), task, arguments.warmup)
    return summarize(samples, len(pixels))


def _weights(bundle: Path) -> str:
    """The hashes of a bundle's graphs."""
    files = BundleFolder.load(bundle, verify=False).manifest.files
    graphs = sorted((name, file.sha256) for name, file in files.items() if ".onnx" in name)
    return " ".join(f"{name}:{sha256[:16]}" for name, sha256 in graphs)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    from random_init import GEOMETRIES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work-dir", type=Path, required=True, help="keep and reuse the models and bundles here")
    parser.add_argument("--json", type=Path, required=True, help="the results; an existing file is continued")
    parser.add_argument("--plots", type=Path, help="folder for the pictures, sweep-NAME.png")
    parser.add_argument("--plots-only", action="store_true", help="only draw the measured points")
    every = [*SWEEPS, SIZES]
    parser.add_argument("--sweeps", default=",".join(every), metavar="LIST", help=f"of {', '.join(every)}")
    parser.add_argument("--sizes", default=",".join(GEOMETRIES), metavar="LIST", help=f"of {', '.join(GEOMETRIES)}")
    parser.add_argument("--contestants", default=BASE, metavar="LIST", help=f"all, or of {', '.join(PEERS)}")
    parser.add_argument(
        "--precisions", default="fp32,int8", metavar="LIST", help="precisions of the bundles, as in latency.py"
    )
    parser.add_argument("--threads", type=int, default=available_cpus(), help="CPU threads of every contestant")
    parser.add_argument("--repeats", type=int, default=5, help="timed samples of a point")
    parser.add_argument("--warmup", type=int, default=1, help="samples of a point that do not count")
    arguments = parser.parse_args(argv)
    for name, known in (("sweeps", every), ("sizes", [*GEOMETRIES])):
        chosen = getattr(arguments, name).split(",")
        if unknown := [part for part in chosen if part not in known]:
            parser.error(f"--{name}: unknown {unknown[0]!r}: choose from {', '.join(known)}")
        setattr(arguments, name, chosen)
    if min(arguments.threads, arguments.repeats) < 1 or arguments.warmup < 0:
        parser.error("--threads and --repeats must be at least 1, --warmup at least 0")
    if not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json: {arguments.json.parent} is not a folder")
    if arguments.plots and not arguments.plots.is_dir():
        parser.error(f"--plots: {arguments.plots} is not a folder")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure the missing points and draw everything."""
    arguments = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that child processes end as well
    try:
        require("benchmark", "matplotlib")
        results = Results(arguments.json, arguments.threads)
        if not arguments.plots_only:
            sweep(arguments, results)
        if arguments.plots:
            for path in draw(results.content, arguments.plots):
                print(path)
    except (ItuneError, OSError) as error:
        print(f"sweep: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
