"""Which method captions best on the same data? Trains, exports, scores and times all methods, and writes the tables.

    python benchmarks/results.py train --work-dir WORK [--methods i-tuning,clipcap]
    python benchmarks/results.py score --work-dir WORK
    python benchmarks/results.py latency --work-dir WORK
    python benchmarks/results.py write --work-dir WORK --output docs/results.md

WORK contains `train.jsonl`, `dev.jsonl`, `language-model/` and `vision/`, written by `recipes/flickr8k` (or by its
`prepare.py` and `itune-export --restore default`), and `prompted/language-model/` for the rows on a language model
trained with prompts. Every stage can be interrupted and started again; completed parts are skipped. All methods share
the settings in `method_runs.BUDGET`; those in `method_runs.RUNS` are their own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from artifacts import console
from measuring import machine
from method_runs import BUDGET, RETRIEVE, RUNS, Run, WorkFolder
from results_tables import BASE, write_results
from rich.progress import Progress

from itune import Captioner, ItuneError
from itune.checkpoint import WEIGHTS_FILE
from itune.cli.common import progress, require
from itune.data.records import load_records
from itune.files import write_json
from itune.methods.schemas import load_config
from itune.runtime.bundle import MANIFEST
from itune.runtime.cpus import available_cpus

NUM_BEAMS = 5
PRECISION = "int8"
_PHOTOS = 40
_WARMUP = 3


@dataclass(frozen=True)
class Condition:
    """A trained captioner and how it is scored: with its datastore, or with fewer retrieved captions."""

    run: Run
    retrieve: int | None = None

    @property
    def name(self) -> str:
        """The stem of its result files."""
        return self.run.name if self.retrieve is None else f"{self.run.name}-retrieve-{self.retrieve}"

    @property
    def title(self) -> str:
        """The name of its row in the table."""
        return self.run.title if self.retrieve is None else f"{self.run.title}, empty datastore"

    def flags(self, work: WorkFolder) -> list[Any]:
        """The retrieval options of itune-eval."""
        if self.retrieve is not None:
            return ["--retrieve", self.retrieve]
        return ["--datastore", work.datastore, "--retrieve", RETRIEVE] if self.run.retrieves else []


def conditions(runs: list[Run]) -> Iterator[Condition]:
    """All rows of the table."""
    for run in runs:
        yield Condition(run)
        if run.retrieves:
            yield Condition(run, retrieve=0)


def train(work: WorkFolder, runs: list[Run]) -> None:
    """Train the runs that are not complete, one after the other, all on the same cached embeddings."""
    _embed(work)
    if any(run.retrieves for run in runs) and not work.datastore.exists():
        cache = ["--cache-features", work.features]
        _itune(
            "datastore", "build", "--captions", work.path / "train.jsonl", "--split", "all",
            "--encoder", work.path / "vision", *cache, "-o", work.datastore,
        )  # fmt: skip
    for run in runs:
        work.train(run)


def _embed(work: WorkFolder) -> None:
    """Cache the photos' embeddings first, so that no run pays for them."""
    from itune.backbones import load_vision_tower
    from itune.data.features import FeatureCache

    cache = FeatureCache(work.features, load_vision_tower(str(work.path / "vision")))
    for split in ("train", "dev"):
        photos = [record.image for record in load_records(work.path / f"{split}.jsonl", split=None)]
        with progress(f"{split} photos") as update:
            cache.prepare(photos, flip=split == "train", progress=update)


def score(work: WorkFolder, runs: list[Run], java: bool = True) -> None:
    """Export every captioner and caption the dev split with it: WORK/methods/NAME.scores.json and .captions.json."""
    for condition in conditions(runs):
        stem = work.path / "methods" / condition.name
        scores, captions = stem.with_name(f"{stem.name}.scores.json"), stem.with_name(f"{stem.name}.captions.json")
        if scores.exists():
            continue
        bundle = _bundle(work, condition.run)
        flags = ["--num-beams", NUM_BEAMS, "--output", captions, "--json", scores, *condition.flags(work)]
        flags += [] if java else ["--no-java"]
        _itune("evaluate", bundle, "--data", work.path / "dev.jsonl", "--split", "all", *flags)
    if not (work.path / "methods" / f"{BASE}.captions.json").exists():
        return  # nothing to compare with yet
    for condition in conditions(runs):
        if condition.name != BASE:
            _compare(work, condition, java)


def _compare(work: WorkFolder, condition: Condition, java: bool) -> None:
    """Test a captioner's captions against I-Tuning's, photo by photo: WORK/methods/NAME.against.json."""
    base, other = (work.path / "methods" / f"{name}.captions.json" for name in (BASE, condition.name))
    files = ["--captions", base, "--captions", other, "--references", work.path / "dev.jsonl"]
    written = other.with_name(f"{condition.name}.against.json")
    if not written.exists():
        _itune("evaluate", *files, "--json", written, *([] if java else ["--no-java"]))


def latency(work: WorkFolder, runs: list[Run], threads: int) -> None:
    """Time whole captions, photo by photo and captioner after captioner: WORK/methods/latency.json."""
    captioners: dict[str, Captioner] = {}
    for run in runs:
        store = {"datastore": work.datastore} if run.retrieves else {}
        captioners[run.name] = Captioner.load(_bundle(work, run), threads=threads, **store)
    photos = [record.image for record in load_records(work.path / "dev.jsonl", split=None)[: _PHOTOS + _WARMUP]]
    taken: dict[str, list[float]] = {name: [] for name in captioners}
    shown: dict[str, list[int]] = {}
    with Progress(console=console, transient=True) as bar:
        for number, photo in enumerate(bar.track(photos, description="captioning")):
            for name, captioner in captioners.items():
                start = time.perf_counter()
                caption = captioner.caption(photo, num_beams=NUM_BEAMS)
                if number >= _WARMUP:
                    taken[name].append(1e3 * (time.perf_counter() - start))
                    if caption.retrieved is not None:
                        shown.setdefault(name, []).append(len(caption.retrieved))
                time.sleep(0.02)  # its threads go to sleep before the next one starts
    result = {
        "machine": machine(threads),
        "photos": len(photos) - _WARMUP,
        "num_beams": NUM_BEAMS,
        "precision": PRECISION,
        "ms": {name: _spread(values) for name, values in taken.items()},
        "retrieved": {name: float(np.mean(counts)) for name, counts in shown.items()},
    }
    write_json(work.path / "methods" / "latency.json", result, indent=1)


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = np.percentile(values, (10, 50, 90))
    return {"p10": float(low), "median": float(middle), "p90": float(high)}


def write(work: WorkFolder, runs: list[Run], output: Path) -> None:
    """Write the tables to OUTPUT, and the figure and the data beside it as .png and .json."""
    rows = []
    for condition in conditions(runs):
        run, stem = condition.run, work.path / "methods" / condition.name
        scores = _read_json(stem.with_name(f"{stem.name}.scores.json"))
        scores.pop("missing", None)  # it contains paths of this machine
        against = None
        if condition.name != BASE:
            against = _read_json(stem.with_name(f"{stem.name}.against.json"))["comparison"]["overall"]
        checkpoint = work.checkpoint(run) / "best"
        rows.append(
            {
                "name": condition.name,
                "title": condition.title,
                "trainable": _trainable(checkpoint / WEIGHTS_FILE),
                "epoch": load_config(checkpoint).training["epoch"],
                "resources": vars(work.resources(run)),
                "scores": scores,
                "against": against,
            }
        )
    timing = _read_json(work.path / "methods" / "latency.json")
    content = {"budget": _budget(work), "rows": rows, "latency": timing}
    write_json(output.with_suffix(".json"), content, indent=1)
    write_results(content, output)


def _budget(work: WorkFolder) -> dict[str, Any]:
    photos = len(load_records(work.path / "train.jsonl", split=None))
    return {
        "photos": photos,
        "epochs": int(BUDGET["--epochs"]),
        "flags": BUDGET,
        "num_beams": NUM_BEAMS,
        "retrieve": RETRIEVE,
    }


def _trainable(path: Path) -> int:
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        # SmallCap's layer norms and CLIP's projection are in the file, but frozen.
        names = [name for name in file.keys() if ".norm." not in name and not name.startswith("projection.")]  # noqa: SIM118
        return sum(int(np.prod(file.get_slice(name).get_shape())) for name in names)


def _bundle(work: WorkFolder, run: Run) -> Path:
    bundle = work.path / "methods" / f"{run.name}-{PRECISION}"
    if not (bundle / MANIFEST).exists():
        if not work.is_trained(run):
            raise ItuneError(f"{run.title} is not completely trained: run the stage train first")
        retrieval = ["--retrieve", RETRIEVE] if run.retrieves else []
        _itune("export", work.checkpoint(run) / "best", "--precision", PRECISION, *retrieval, "-o", bundle)
    return bundle


def _itune(command: str, *arguments: Any) -> None:
    """Run one of itune's programs."""
    process = subprocess.run([sys.executable, "-m", f"itune.cli.{command}", *map(str, arguments)], check=False)
    if process.returncode:
        raise ItuneError(f"itune {command} stopped; start again to resume")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ItuneError(f"{path} is missing: run the stages train, score and latency first, of the same methods")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("train", "score", "latency", "write"))
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--methods", help="rows, separated by commas; default: all whose language model exists")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--no-java", action="store_true", help="score without METEOR and SPICE")
    parser.add_argument("--output", type=Path, default=Path("docs/results.md"), help="output of the stage write")
    options = parser.parse_args(arguments)
    require("benchmark", "torch", "transformers", "onnx", "matplotlib")
    work, known = WorkFolder(options.work_dir), {run.name: run for run in RUNS}
    available = [name for name, run in known.items() if (work.path / run.language_model).exists()]
    wanted = options.methods.split(",") if options.methods else available
    if unknown := [name for name in wanted if name not in known]:
        raise ItuneError(f"--methods: unknown {unknown[0]!r}: choose from {', '.join(known)}")
    runs = [known[name] for name in wanted]
    if not (work.path / "train.jsonl").exists():
        raise ItuneError(f"--work-dir {work.path} has no train.jsonl: recipes/flickr8k writes it")
    stages: dict[str, Callable[[], None]] = {
        "train": lambda: train(work, runs),
        "score": lambda: score(work, runs, not options.no_java),
        "latency": lambda: latency(work, runs, options.threads),
        "write": lambda: write(work, runs, options.output),
    }
    stages[options.stage]()


if __name__ == "__main__":
    try:
        main()
    except ItuneError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
