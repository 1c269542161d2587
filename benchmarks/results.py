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
from method_runs import BUDGET, RETRIEVE, RUNS, Run, Workplace
from results_tables import BASE, write_results
from rich.progress import Progress

from itune import Captioner, ItuneError
from itune.checkpoint import WEIGHTS_FILE, load_config
from itune.cli.common import progress, require
from itune.data.records import load_records
from itune.files import atomic_path
from itune.runtime.bundle import MANIFEST
from itune.runtime.engines.onnxruntime import available_cpus

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

    def flags(self, workplace: Workplace) -> list[Any]:
        """The retrieval options of itune-eval."""
        if self.retrieve is not None:
            return ["--retrieve", self.retrieve]
        return ["--datastore", workplace.datastore, "--retrieve", RETRIEVE] if self.run.retrieves else []


def conditions(runs: list[Run]) -> Iterator[Condition]:
    """All rows of the table."""
    for run in runs:
        yield Condition(run)
        if run.retrieves:
            yield Condition(run, retrieve=0)


def train(workplace: Workplace, runs: list[Run]) -> None:
    """Train the runs that are not complete, one after the other, all on the same cached embeddings."""
    _embed(workplace)
    if any(run.retrieves for run in runs) and not workplace.datastore.exists():
        cache = ["--cache-features", workplace.features]
        _itune(
            "datastore", "build", "--captions", workplace.folder / "train.jsonl", "--split", "all",
            "--encoder", workplace.folder / "vision", *cache, "-o", workplace.datastore,
        )  # fmt: skip
    for run in runs:
        workplace.train(run)


def _embed(workplace: Workplace) -> None:
    """Cache the photos' embeddings first, so that no run pays for them."""
    from itune.backbones import load_vision_tower
    from itune.data.features import FeatureCache

    cache = FeatureCache(workplace.features, load_vision_tower(str(workplace.folder / "vision")))
    for split in ("train", "dev"):
        photos = [record.image for record in load_records(workplace.folder / f"{split}.jsonl", split=None)]
        with progress(f"{split} photos") as update:
            cache.prepare(photos, flip=split == "train", progress=update)


def score(workplace: Workplace, runs: list[Run], java: bool = True) -> None:
    """Export every captioner and caption the dev split with it: WORK/methods/NAME.scores.json and .captions.json."""
    for condition in conditions(runs):
        stem = workplace.folder / "methods" / condition.name
        scores, captions = stem.with_name(f"{stem.name}.scores.json"), stem.with_name(f"{stem.name}.captions.json")
        if scores.exists():
            continue
        bundle = _bundle(workplace, condition.run)
        flags = ["--num-beams", NUM_BEAMS, "--output", captions, "--json", scores, *condition.flags(workplace)]
        flags += [] if java else ["--no-java"]
        _itune("evaluate", bundle, "--data", workplace.folder / "dev.jsonl", "--split", "all", *flags)
    if not (workplace.folder / "methods" / f"{BASE}.captions.json").exists():
        return  # nothing to compare with yet
    for condition in conditions(runs):
        if condition.name != BASE:
            _compare(workplace, condition, java)


def _compare(workplace: Workplace, condition: Condition, java: bool) -> None:
    """Test a captioner's captions against I-Tuning's, photo by photo: WORK/methods/NAME.against.json."""
    base, other = (workplace.folder / "methods" / f"{name}.captions.json" for name in (BASE, condition.name))
    files = ["--captions", base, "--captions", other, "--references", workplace.folder / "dev.jsonl"]
    written = other.with_name(f"{condition.name}.against.json")
    if not written.exists():
        _itune("evaluate", *files, "--json", written, *([] if java else ["--no-java"]))


def latency(workplace: Workplace, runs: list[Run], threads: int) -> None:
    """Time whole captions, photo by photo and captioner after captioner: WORK/methods/latency.json."""
    captioners: dict[str, Captioner] = {}
    for run in runs:
        store = {"datastore": workplace.datastore} if run.retrieves else {}
        captioners[run.name] = Captioner.load(_bundle(workplace, run), threads=threads, **store)
    photos = [record.image for record in load_records(workplace.folder / "dev.jsonl", split=None)[: _PHOTOS + _WARMUP]]
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
    _write_json(workplace.folder / "methods" / "latency.json", result)


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = np.percentile(values, (10, 50, 90))
    return {"p10": float(low), "median": float(middle), "p90": float(high)}


def write(workplace: Workplace, runs: list[Run], output: Path) -> None:
    """Write the tables to OUTPUT, and the figure and the data beside it as .png and .json."""
    rows = []
    for condition in conditions(runs):
        run, stem = condition.run, workplace.folder / "methods" / condition.name
        scores = _read_json(stem.with_name(f"{stem.name}.scores.json"))
        scores.pop("missing", None)  # it contains paths of this machine
        against = None
        if condition.name != BASE:
            against = _read_json(stem.with_name(f"{stem.name}.against.json"))["comparison"]["overall"]
        checkpoint = workplace.checkpoint(run) / "best"
        rows.append(
            {
                "name": condition.name,
                "title": condition.title,
                "trainable": _trainable(checkpoint / WEIGHTS_FILE),
                "epoch": load_config(checkpoint).training["epoch"],
                "resources": vars(workplace.resources(run)),
                "scores": scores,
                "against": against,
            }
        )
    timing = _read_json(workplace.folder / "methods" / "latency.json")
    content = {"budget": _budget(workplace), "rows": rows, "latency": timing}
    _write_json(output.with_suffix(".json"), content)
    write_results(content, output)


def _budget(workplace: Workplace) -> dict[str, Any]:
    photos = len(load_records(workplace.folder / "train.jsonl", split=None))
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


def _bundle(workplace: Workplace, run: Run) -> Path:
    bundle = workplace.folder / "methods" / f"{run.name}-{PRECISION}"
    if not (bundle / MANIFEST).exists():
        if not workplace.is_trained(run):
            raise ItuneError(f"{run.title} is not completely trained: run the stage train first")
        retrieval = ["--retrieve", RETRIEVE] if run.retrieves else []
        _itune("export", workplace.checkpoint(run) / "best", "--precision", PRECISION, *retrieval, "-o", bundle)
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


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


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
    workplace, known = Workplace(options.work_dir), {run.name: run for run in RUNS}
    available = [name for name, run in known.items() if (workplace.folder / run.language_model).exists()]
    wanted = options.methods.split(",") if options.methods else available
    if unknown := [name for name in wanted if name not in known]:
        raise ItuneError(f"--methods: unknown {unknown[0]!r}: choose from {', '.join(known)}")
    runs = [known[name] for name in wanted]
    if not (workplace.folder / "train.jsonl").exists():
        raise ItuneError(f"--work-dir {workplace.folder} has no train.jsonl: recipes/flickr8k writes it")
    stages: dict[str, Callable[[], None]] = {
        "train": lambda: train(workplace, runs),
        "score": lambda: score(workplace, runs, not options.no_java),
        "latency": lambda: latency(workplace, runs, options.threads),
        "write": lambda: write(workplace, runs, options.output),
    }
    stages[options.stage]()


if __name__ == "__main__":
    try:
        main()
    except ItuneError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
