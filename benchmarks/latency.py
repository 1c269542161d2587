"""What the export bought: eager PyTorch, its peers and the bundles of one checkpoint, alternating in one run.

    python benchmarks/latency.py --checkpoint CHECKPOINT
    python benchmarks/latency.py --random-init base --work-dir DIR    # the paper's sizes, without a download
    python benchmarks/latency.py --random-init base --contestants all --precisions fp32,int8,int4+int8
    python benchmarks/latency.py --random-init base --engine tensorrt --contestants eager-cuda-fp16  # on a GPU

Each contestant is a process of its own. All of them caption a photo before any of them gets the next, with the same
forced number of tokens, the same beams and the same threads. docs/benchmarks.md says what is measured.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from artifacts import BASE, Artifacts, choose_peers, console, label, peer_names
from contestants import PEERS, Task
from measuring import PARTS, batches, machine, measure, summarize
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from itune import ItuneError
from itune.checkpoint import find_checkpoint
from itune.cli.common import require
from itune.files import write_json
from itune.methods.schemas import load_config
from itune.runtime.bundle import TOKENIZER
from itune.runtime.bundle import Bundle as BundleFolder
from itune.runtime.cpus import available_cpus
from itune.runtime.engines.base import UInt8
from itune.runtime.engines.cuda import CudaDevice
from itune.runtime.image import SUFFIXES, decode, preprocess
from itune.runtime.retrieval.prompts import PromptWriter
from itune.runtime.settings import ImageSettings
from itune.runtime.text import load_tokenizer

PHOTOS = 8  # captions are compared on at least this many
PRECISIONS = {
    **dict.fromkeys(("native", "onnxruntime"), "fp32,int8"),
    "onnxruntime-cuda": "fp32,fp16",
    "tensorrt": "fp16,int8",
}
RETRIEVED = (
    "a brown dog runs through the tall grass",
    "two children are playing with a ball in a park",
    "a man in a blue shirt rides a bicycle down the street",
    "people sit at a table outside of a small cafe",
)
"""Stand-ins for retrieved captions, so that prompts have their usual length."""
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def photos(folder: Path | None) -> list[Path | Image.Image]:
    """The photos of a folder, or the repository's examples followed by smooth random ones."""
    named = sorted(p for p in (EXAMPLES if folder is None else folder).glob("*") if p.suffix.lower() in SUFFIXES)
    if folder is not None:
        if not named:
            raise ItuneError(f"--images {folder} contains no photo")
        return [*named]
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)) for _ in range(PHOTOS - len(named))]
    return [*named, *(image.resize((240, 240), Image.Resampling.BICUBIC) for image in coarse)]


def preprocessed(image: ImageSettings, folder: Path | None) -> UInt8:
    """The same photos as pixels for a tower, uint8 [photos, H, W, 3]."""
    return np.stack([preprocess(decode(source), image) for source in photos(folder)])


def make_task(bundle: Path, num_beams: int, new_tokens: int) -> Task:
    """The task of all contestants, with the tokens of a bundle's checkpoint."""
    loaded = BundleFolder.load(bundle, verify=False)
    tokens = loaded.manifest.tokens
    if new_tokens > tokens.room:
        raise ItuneError(f"--new-tokens must be at most {tokens.room}, the language model's positions after the prompt")
    return Task(num_beams, new_tokens, tuple(caption_head(loaded, new_tokens)), tokens.end)


def caption_head(bundle: BundleFolder, new_tokens: int) -> list[int]:
    """The prompt tokens; for a model that retrieves, with captions of usual length among them."""
    manifest = bundle.manifest
    retrieval = manifest.retrieval
    if retrieval is None or not retrieval.k:
        return manifest.tokens.prompt_tokens
    tokens = manifest.tokens.model_copy(update={"prompt": []})
    writer = PromptWriter(load_tokenizer(bundle.path(TOKENIZER)), manifest.text, retrieval)
    similar = [RETRIEVED[i % len(RETRIEVED)] for i in range(retrieval.k)]
    return [*tokens.prompt_tokens, *writer.write(similar, tokens.room - new_tokens)[0]]


def plan_options(arguments: argparse.Namespace) -> Callable[[str], list[Any]]:
    """The options of itune-export for TensorRT plans: this GPU, limits that fit the task, photos to calibrate with.

    Raises:
        EngineError: there is no GPU to measure on.
    """
    limits = {
        "--gpu": CudaDevice().capability,
        "--max-beams": max(arguments.num_beams, 5),
        "--max-batch": max(arguments.batch_size, 8),
        "--max-new-tokens": max(arguments.new_tokens, 32),
    }

    def options(precision: str) -> list[Any]:
        calibration = {"--calibration-data": arguments.images or EXAMPLES} if precision == "int8" else {}
        return [each for option in (limits | calibration).items() for each in option]

    return options


def print_table(result: dict[str, Any]) -> None:
    """Print the summary."""
    settings, about = result["settings"], result["machine"]
    out = Console(highlight=False)
    out.print(
        f"{settings['model']}: batch {settings['batch_size']}, {settings['num_beams']} beams, "
        f"{settings['new_tokens']} tokens, {about['threads']} threads of {about['cpu']}, "
        f"{' on '.join(filter(None, [', '.join(settings['engine']), about['gpu']]))}, "
        f"{settings['samples']} samples, milliseconds"
    )
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("", "", "median", "p95", "min-max", "speed-up", "p10-p90"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, row in result["summary"].items():
        parts = [part for part in PARTS if part in row]
        for part in parts:
            found = row[part]
            low, high = found["speedup_p10_p90"]
            table.add_row(
                label(name) if part == parts[0] else "",
                part,
                f"{found['median_ms']:.0f}",
                f"{found['p95_ms']:.0f}",
                f"{found['min_ms']:.0f}-{found['max_ms']:.0f}",
                f"{found['speedup']:.2f}x",
                f"{low:.1f}-{high:.1f}",
                end_section=part == parts[-1],
            )
    out.print(table)
    for name, row in result["summary"].items():
        facts = [f"peak memory {row['peak_mb']:.0f} MB"]
        if name in PEERS and PEERS[name].note:
            facts.append(PEERS[name].note)
        if settings["batch_size"] > 1 and "images_per_s" in row:
            facts.append(f"{row['images_per_s']:.1f} images/s")
        if name != BASE and "identical_captions" in row:
            facts.append(f"{row['identical_captions']} of {settings['photos']} captions identical to eager's")
        out.print(f"{label(name)}: {', '.join(facts)}", soft_wrap=True)
    distinct = result["summary"][BASE]["distinct_captions"]
    doubt = "" if distinct >= 0.9 * settings["photos"] else ", too few for agreement to mean much"
    out.print(f"{distinct} of the {settings['photos']} photos' captions are distinct{doubt}.")


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Build or reuse the models, measure, and return the content of the JSON file."""
    photos(arguments.images)  # report mistakes before anything is built
    peer_names(arguments.contestants)
    plans = plan_options(arguments) if "tensorrt" in arguments.engine else None
    vision = "clip" if arguments.random_init else load_config(find_checkpoint(arguments.checkpoint)).vision.kind
    peers, precisions = choose_peers(arguments.contestants, vision), arguments.precisions.split(",")
    if arguments.random_init:
        # Not at the top: the contestants' processes import this file too, and most do not need torch.
        from random_init import GEOMETRIES, build_checkpoint

        with console.status(f"building GPT-2 {arguments.random_init} with random weights"):
            checkpoint = build_checkpoint(GEOMETRIES[arguments.random_init], work)
        model = f"GPT-2 {arguments.random_init}, CLIP ViT-B/16, random weights"
    else:
        checkpoint = find_checkpoint(arguments.checkpoint)
        model = str(arguments.checkpoint)
    pixels = preprocessed(load_config(checkpoint).image, arguments.images)
    artifacts = Artifacts(checkpoint, work, arguments.engine, plans)
    task = make_task(artifacts.own(precisions[0]), arguments.num_beams, arguments.new_tokens)
    workers = artifacts.start(peers, precisions, arguments.threads)
    samples = measure(workers, batches(pixels, arguments.batch_size, arguments.repeats), task, arguments.warmup)
    summary = summarize(samples, len(pixels))
    for name, worker in workers.items():
        summary[name]["peak_mb"] = worker.close()
    return {
        "machine": machine(arguments.threads),
        "settings": {
            "model": model,
            "engine": arguments.engine,
            "batch_size": arguments.batch_size,
            "num_beams": arguments.num_beams,
            "new_tokens": arguments.new_tokens,
            "warmup": arguments.warmup,
            "samples": len(samples[BASE]),
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
    model.add_argument(
        "--random-init", choices=("base", "medium", "large"), help="one of the paper's sizes, with random weights"
    )
    parser.add_argument("--work-dir", type=Path, help="keep and reuse the models and bundles here")
    parser.add_argument(
        "--contestants",
        default=BASE,
        metavar="LIST",
        help=f"in addition to the bundles, separated by commas: {', '.join(PEERS)}; all: every one that is installed",
    )
    parser.add_argument(
        "--engine",
        type=lambda text: text.split(","),
        default=["native"],
        metavar="LIST",
        help=f"engines that run the bundles, separated by commas: {', '.join(PRECISIONS)} (default: native)",
    )
    parser.add_argument(
        "--precisions",
        metavar="LIST",
        help="precisions of the bundles, as in itune-export; DECODER+VISION for two of them; default: "
        + "; ".join(f"{precisions} on {engine}" for engine, precisions in PRECISIONS.items()),
    )
    parser.add_argument("--batch-size", type=int, default=1, help="photos per batch")
    parser.add_argument("--num-beams", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=16, help="forced length of every caption")
    parser.add_argument("--threads", type=int, default=available_cpus(), help="CPU threads of every contestant")
    parser.add_argument("--repeats", type=int, default=16, help="timed samples (at least one of every photo)")
    parser.add_argument("--warmup", type=int, default=2, help="samples that do not count")
    parser.add_argument("--images", type=Path, help="folder of photos; default: examples and random ones")
    parser.add_argument("--json", type=Path, help="write every sample here")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.engine) - set(PRECISIONS):
        parser.error(f"--engine: unknown {min(unknown)!r}: choose from {', '.join(PRECISIONS)}")
    arguments.precisions = arguments.precisions or PRECISIONS[arguments.engine[0]]
    for name in ("batch_size", "num_beams", "new_tokens", "threads", "repeats"):
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that child processes end as well
    try:
        require("export", "torch", "transformers", "safetensors", "onnx")
        with tempfile.TemporaryDirectory(prefix="itune-latency-") as temporary:
            result = run(arguments, arguments.work_dir or Path(temporary))
        if arguments.json:
            write_json(arguments.json, result, indent=1)
    except (ItuneError, OSError) as error:
        print(f"latency: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print_table(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
