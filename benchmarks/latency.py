"""What the export bought: eager PyTorch against the exported bundles of the same checkpoint, alternating in one run.

    python benchmarks/latency.py --checkpoint CHECKPOINT
    python benchmarks/latency.py --random-init base --work-dir DIR    # the papers' sizes, without a download

Batch 1; every contestant captions the same photo before anybody gets the next, in a process of its own. All write
the same forced number of tokens with the same beams on the same threads. docs/benchmarks.md says what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from contestants import Sample, Task, Worker
from PIL import Image
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from itune import ItuneError, __version__
from itune.checkpoint import CONFIG_FILE, WEIGHTS_FILE, atomic_path, find_checkpoint, hash_files, load_config
from itune.cli.common import require
from itune.runtime.bundle import MANIFEST
from itune.runtime.bundle import Bundle as BundleFolder
from itune.runtime.engines.base import UInt8
from itune.runtime.engines.onnxruntime import available_cpus
from itune.runtime.image import SUFFIXES, decode, preprocess

PRECISIONS = ("fp32", "int8")
PHOTOS = 8  # captions are compared on at least so many
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PARTS = ("encode", "decode", "total")
console = Console(stderr=True)


def bundles(checkpoint: Path, work: Path) -> dict[str, Path]:
    """Export the checkpoint in every precision into `work`, or reuse what an earlier run left there."""
    source = {name: hash_files([checkpoint / name]) for name in (WEIGHTS_FILE, CONFIG_FILE)}
    folders = {precision: work / f"bundle-{precision}" for precision in PRECISIONS}
    for precision, folder in folders.items():
        if not (folder / MANIFEST).is_file():
            with console.status(f"exporting {folder.name}"):
                export(checkpoint, precision, folder)
            continue
        provenance = BundleFolder.load(folder, verify=False).manifest.provenance
        if provenance.get("checkpoint") != source:
            raise ItuneError(f"{folder} was exported from another checkpoint: give another --work-dir")
        if provenance.get("itune") != __version__:
            raise ItuneError(
                f"{folder} was exported by another version of itune: delete it, or give another --work-dir"
            )
    return folders


def export(checkpoint: Path, precision: str, folder: Path) -> None:
    """Run itune-export, in a process whose memory goes with it."""
    # -P: started in a checkout, Python would take its folder `itune` for the package.
    command = [sys.executable, "-P", "-m", "itune.cli.export", checkpoint, "--precision", precision, "-o", folder]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as process:
        try:
            _, errors = process.communicate()
        except BaseException:
            process.terminate()  # it clears its half-written folder away, and is waited for
            raise
    if process.returncode:
        raise ItuneError(f"the export to {folder} failed: {(errors.strip().splitlines() or ['it was killed'])[-1]}")


def photos(folder: Path | None) -> list[Path | Image.Image]:
    """The photos of a folder, or the repository's examples and smooth random ones beside them."""
    named = sorted(p for p in (EXAMPLES if folder is None else folder).glob("*") if p.suffix.lower() in SUFFIXES)
    if folder is not None:
        if not named:
            raise ItuneError(f"--images {folder}: there is no photo in it")
        return [*named]
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)) for _ in range(PHOTOS - len(named))]
    return [*named, *(image.resize((240, 240), Image.Resampling.BICUBIC) for image in coarse)]


def measure(workers: dict[str, Worker], pixels: list[UInt8], warmup: int, repeats: int) -> dict[str, list[Sample]]:
    """Samples by contestant: `repeats` of them timed after a warm-up, and one of every photo at least."""
    samples: dict[str, list[Sample]] = {name: [] for name in workers}
    rounds = warmup + max(repeats, len(pixels))
    with Progress(console=console, transient=True) as progress:
        for number in progress.track(range(rounds), description="captioning"):
            for name, worker in workers.items():
                sample = worker.caption(pixels[(number - warmup) % len(pixels)])
                if number >= warmup:
                    samples[name].append(sample)
                time.sleep(0.05)  # let its threads go to sleep before the next one starts
    return samples


def milliseconds(samples: list[Sample], part: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """One part of every sample's time."""
    return np.array([s.encode + s.decode if part == "total" else getattr(s, part) for s in samples])


def summarize(samples: dict[str, list[Sample]], count: int, base: str) -> dict[str, dict[str, Any]]:
    """Median, p95 and spread by contestant and part, ratios against `base`, and whether captions are the same."""
    summary: dict[str, dict[str, Any]] = {}
    expected = [sample.tokens for sample in samples[base][:count]]
    for name, own in samples.items():
        row: dict[str, Any] = {}
        for part in PARTS:
            ms, others = milliseconds(own, part), milliseconds(samples[base], part)
            pairs = others / ms  # the same photo, one right after the other
            row[part] = {
                "median_ms": float(np.median(ms)),
                "p95_ms": float(np.percentile(ms, 95)),
                "min_ms": float(ms.min()),
                "max_ms": float(ms.max()),
                "speedup": float(np.median(others) / np.median(ms)),
                "speedup_p10_p90": [float(p) for p in np.percentile(pairs, (10, 90))],
            }
        captions = [sample.tokens for sample in own[:count]]
        row["identical_captions"] = sum(a == b for a, b in zip(captions, expected, strict=True))
        row["distinct_captions"] = len(set(captions))
        summary[name] = row
    return summary


def machine(threads: int) -> dict[str, Any]:
    """What ran it."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    packages = ("torch", "transformers", "onnxruntime", "numpy", "itune")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def print_table(result: dict[str, Any]) -> None:
    """Show the summary on the terminal."""
    settings, about = result["settings"], result["machine"]
    out = Console(highlight=False)
    out.print(
        f"{settings['model']}: batch 1, {settings['num_beams']} beams, {settings['new_tokens']} tokens, "
        f"{about['threads']} threads of {about['cpu']}, {settings['samples']} samples, milliseconds"
    )
    table = Table(box=box.SIMPLE)
    for heading in ("", "", "median", "p95", "min-max", "speed-up", "p10-p90"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, row in result["summary"].items():
        for part in PARTS:
            found = row[part]
            low, high = found["speedup_p10_p90"]
            table.add_row(
                name if part == PARTS[0] else "",
                part,
                f"{found['median_ms']:.0f}",
                f"{found['p95_ms']:.0f}",
                f"{found['min_ms']:.0f}-{found['max_ms']:.0f}",
                f"{found['speedup']:.2f}x",
                f"{low:.1f}-{high:.1f}",
                end_section=part == PARTS[-1],
            )
    out.print(table)
    for name, row in result["summary"].items():
        same = f", {row['identical_captions']} of {settings['photos']} captions identical to eager's"
        out.print(f"{name}: peak memory {row['peak_mb']:.0f} MB{'' if name == 'eager' else same}")
    distinct = result["summary"]["eager"]["distinct_captions"]
    doubt = "" if distinct >= 0.9 * settings["photos"] else ", too few for agreement to mean much"
    out.print(f"{distinct} of the {settings['photos']} photos' captions are distinct{doubt}.")


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Build or reuse what is needed, measure, and return everything that the JSON file holds."""
    sources = photos(arguments.images)
    if arguments.random_init:
        # Not at the top: the contestants' processes import this file too, and only eager PyTorch needs torch.
        from random_init import GEOMETRIES, build_checkpoint

        with console.status(f"building GPT-2 {arguments.random_init} with random weights"):
            checkpoint = build_checkpoint(GEOMETRIES[arguments.random_init], work)
        model = f"GPT-2 {arguments.random_init}, CLIP ViT-B/16, random weights"
    else:
        checkpoint = find_checkpoint(arguments.checkpoint)
        model = str(arguments.checkpoint)
    image = load_config(checkpoint).image
    pixels = [preprocess(decode(source), image)[None] for source in sources]
    folders = bundles(checkpoint, work)
    tokens = BundleFolder.load(folders["fp32"], verify=False).manifest.tokens
    room = tokens.max_positions - len(tokens.prompt)
    if arguments.new_tokens > room:
        raise ItuneError(f"--new-tokens must be at most {room}, the language model's positions after the prompt")
    task = Task(arguments.num_beams, arguments.new_tokens, arguments.threads)
    with console.status("loading"):
        workers = {"eager": Worker("eager", checkpoint, task)}
        workers |= {f"ONNX {precision}": Worker("bundle", folder, task) for precision, folder in folders.items()}
    samples = measure(workers, pixels, arguments.warmup, arguments.repeats)
    summary = summarize(samples, len(pixels), "eager")
    for name, worker in workers.items():
        summary[name]["peak_mb"] = worker.close()
    return {
        "machine": machine(arguments.threads),
        "settings": {
            "model": model,
            "num_beams": arguments.num_beams,
            "new_tokens": arguments.new_tokens,
            "warmup": arguments.warmup,
            "samples": len(samples["eager"]),
            "photos": len(pixels),
        },
        "summary": summary,
        "samples": {name: [sample._asdict() for sample in own] for name, own in samples.items()},
    }


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=Path, help="adapter checkpoint to export and compare")
    model.add_argument("--random-init", choices=("base", "medium", "large"), help="a paper's size with random weights")
    parser.add_argument("--work-dir", type=Path, help="keep and reuse the models and bundles here")
    parser.add_argument("--num-beams", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=16, help="forced length of every caption")
    parser.add_argument("--threads", type=int, default=available_cpus(), help="CPU threads of every contestant")
    parser.add_argument("--repeats", type=int, default=16, help="timed samples (at least one of every photo)")
    parser.add_argument("--warmup", type=int, default=2, help="samples that are not counted")
    parser.add_argument("--images", type=Path, help="folder of photos; default: examples and random ones")
    parser.add_argument("--json", type=Path, help="write every sample here")
    arguments = parser.parse_args(argv)
    for name in ("num_beams", "new_tokens", "threads", "repeats"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.warmup < 0:
        parser.error("--warmup must not be negative")
    if arguments.images and not arguments.images.is_dir():
        parser.error(f"--images: {arguments.images} is not a folder")
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json: {arguments.json.parent} is not a folder")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write the JSON file."""
    arguments = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started here ends, too
    try:
        require("export", "torch", "transformers", "safetensors", "onnx")
        with tempfile.TemporaryDirectory(prefix="itune-latency-") as temporary:
            result = run(arguments, arguments.work_dir or Path(temporary))
        if arguments.json:
            with atomic_path(arguments.json) as path:
                path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except (ItuneError, OSError) as error:
        print(f"latency: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print_table(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
