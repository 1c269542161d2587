"""Hold a bundle against the checkpoint it came from: eager PyTorch on one side, ONNX Runtime on the other.

Each side runs in a process of its own, so that a large model is in memory once at a time:

    python -m itune.export.verify.checks reference CHECKPOINT FOLDER [IMAGES]   plays the scenarios, keeps all outputs
    python -m itune.export.verify.checks compare BUNDLE FOLDER                  replays them and measures differences
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from rich import box
from rich.table import Table

from ...data.records import Record
from ...runtime.bundle import Bundle
from ...runtime.captioner import Captioner
from ...runtime.engines.base import Int64
from ...runtime.errors import ItuneError
from ...runtime.settings import SearchDefaults
from .dev_split import DevScores, caption_dev_split, compare_dev_split, write_dev_split
from .scenarios import Array, Scenario, beside_loud_image, pick_images, record, replay

SHORTLIST = "shortlist.npy"
VALUE_SCALES = "value_scales"
"""In a manifest's provenance: by what the vision graph multiplies a layer's values, and its W_o is divided."""
CAPTION_BEAMS = (1, 3)
CAPTION_TOKENS = 16
_TIE = 1e-4
"""Captions whose scores differ by less are equally good: rounding decides which is found."""


class VerificationError(ItuneError):
    """The graphs do not compute what the checkpoint does."""


@dataclass(frozen=True)
class Limits:
    """How far a precision may be off. Differences are relative to the root mean square of what is compared."""

    measure: Literal["max", "rms"]
    outputs: float
    neighbours: float
    """For an image alone against the same image in a batch."""
    top1: float
    """Least fraction of rows with the same best token."""
    captions: float
    """Least fraction of identical captions."""
    dev_captions: float
    """The same on the many photos of a dev split, where now and then equally good beams change places."""
    cider: float
    """Least part of CIDEr-D that must be left on a dev split, when what chance does is forgiven."""


LIMITS = {  # from the tightest to the loosest
    "fp32": Limits("max", outputs=5e-4, neighbours=5e-4, top1=0.95, captions=1.0, dev_captions=0.98, cider=0.99),
    # fp32 products of weights that were rounded to 11 bits.
    "fp16": Limits("rms", outputs=0.03, neighbours=5e-4, top1=0.75, captions=0.0, dev_captions=0.0, cider=0.97),
    # Measured: a captioner trained on Flickr8k 0.015, random GPT-2 base and large 0.037, small random ones with
    # steep attention 0.12; single faults of 0.14 to 0.16 in small models pass below this limit. Flat random models
    # swap their best tokens at the least rounding, so that says little.
    "int8": Limits("rms", outputs=0.3, neighbours=0.05, top1=0.25, captions=0.0, dev_captions=0.0, cider=0.9),
    "int4": Limits("rms", outputs=0.5, neighbours=0.05, top1=0.1, captions=0.0, dev_captions=0.0, cider=0.8),
}


@dataclass(frozen=True)
class Check:
    """A line of the report."""

    output: str
    worst: str
    """The scenario with the largest difference."""
    max_abs: float | None
    value: float
    limit: float
    passed: bool


def verify_bundle(
    checkpoint: Path,
    bundle: Path,
    *,
    images: Path | None = None,
    dev: Sequence[Record] = (),
    vocabulary: Int64 | None = None,
    progress: Callable[[str], None] = lambda _stage: None,
) -> list[Check]:
    """Compare a bundle with its checkpoint: see `Check.passed` of what comes back.

    `images` is a folder of photos to use besides the synthetic images. The photos of `dev` are captioned on both
    sides, as the bundle does unless told otherwise, and both are scored. `vocabulary` is what the bundle's decoder was
    cut down to (see `build_decoder`): the checkpoint is held to the same tokens.

    Raises:
        VerificationError: one of the two sides cannot run at all.
    """
    with TemporaryDirectory(prefix="itune-verify-") as folder:
        if vocabulary is not None:
            np.save(Path(folder) / SHORTLIST, vocabulary)
        photos = f", {len(dev)} dev photos among them" if dev else ""
        if dev:
            write_dev_split(dev, Bundle.load(bundle, verify=False).manifest.search, Path(folder))
        progress(f"computing references in PyTorch{photos}")
        _run("reference", checkpoint, folder, *([] if images is None else [images]))
        progress(f"running the graphs{photos}")
        _run("compare", bundle, folder)
        report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
    return [Check(**check) for check in report]


def report_table(checks: Sequence[Check], title: str) -> Table:
    """The report as a table, a line for every output."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("output", no_wrap=True)
    table.add_column("worst in")  # gives way in a narrow terminal, so that the verdict is seen
    for header in ("max abs", "value", "limit", ""):
        table.add_column(header, justify="right", no_wrap=True, min_width=4)
    for check in checks:
        table.add_row(
            check.output,
            check.worst,
            "" if check.max_abs is None else f"{check.max_abs:.2g}",
            f"{check.value:.2g}",
            f"{check.limit:.2g}",
            "ok" if check.passed else "FAIL",
            style=None if check.passed else "bold red",
        )
    return table


def write_reference(checkpoint: Path, folder: Path, images: Path | None, shortlist: Int64 | None = None) -> None:
    """Play the scenarios and caption the images in eager PyTorch; keep everything in `folder`."""
    from ...loading import (
        LoadedCheckpoint,
        eager_captioner,  # torch, which `compare` does without
    )

    loaded = LoadedCheckpoint.load(checkpoint)
    captioner = eager_captioner(loaded, shortlist)
    vocabulary = np.arange(captioner.tokens.vocab_size) if shortlist is None else shortlist
    pixels = pick_images(loaded.config.image, images)
    scenarios = record(captioner.engine, pixels, captioner.tokens, vocabulary)
    np.save(folder / "pixels.npy", pixels)
    np.save(folder / "vocabulary.npy", vocabulary)
    for i, scenario in enumerate(scenarios):
        outputs = replay(captioner.engine, pixels, scenario, vocabulary)
        np.savez(folder / f"{i}.npz", **outputs)  # type: ignore[arg-type]  # no output is named allow_pickle
    content = {
        "scenarios": [asdict(s) for s in scenarios],
        "captions": _captions(captioner, pixels),
        "dev": caption_dev_split(captioner, folder),
    }
    (folder / "reference.json").write_text(json.dumps(content), encoding="utf-8")


def compare(bundle: Path, folder: Path) -> list[Check]:
    """Replay the scenarios on a bundle's graphs and measure the differences."""
    captioner = Captioner.load(bundle, engine="onnxruntime", retrieve=0)
    captioner.retriever = None  # the same prompt on both sides; the embedding is held to PyTorch's elsewhere
    loaded = Bundle.load(bundle, verify=False)
    graphs = [loaded.graph(role, "onnxruntime") for role in ("vision", "decoder")]
    vision, decoder = (graph.precision for graph in graphs)
    if vision == "fp32" and graphs[0].outputs[0].dtype == "float16":
        vision = "fp16"  # all that a decoder in half precision reads of it
    reference = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    scenarios = [Scenario.from_json(content) for content in reference["scenarios"]]
    pixels, vocabulary = np.load(folder / "pixels.npy"), np.load(folder / "vocabulary.npy")

    scales = loaded.manifest.provenance.get(VALUE_SCALES, {})
    differences = _Differences(vision, decoder)
    for i, scenario in enumerate(scenarios):
        found = replay(captioner.engine, pixels, scenario, vocabulary)
        values = {f"visual.{layer}.values": scale for layer, scale in scales.items()}
        unscaled = {name: array / np.float32(values.get(name, 1)) for name, array in found.items()}
        with np.load(folder / f"{i}.npz") as expected:
            differences.add(scenario.name, dict(expected), unscaled)
        if i == 0:
            company = replay(captioner.engine, pixels, beside_loud_image(scenario, vocabulary), vocabulary)
            differences.add_neighbours(found, company)
    captions = _caption_checks(reference["captions"], _captions(captioner, pixels), differences.limits)
    checks = [*differences.checks(), *captions]
    if written := caption_dev_split(captioner, folder):
        checks += _dev_checks(compare_dev_split(reference["dev"], written, folder, _TIE), differences.limits)
    return checks


class _Differences:
    """Collects the worst difference of every output."""

    def __init__(self, vision: str, decoder: str) -> None:
        loosest = max(vision, decoder, key=list(LIMITS).index)
        self.vision, self.limits = LIMITS[vision], LIMITS[loosest]
        self.worst: dict[str, Check] = {}
        self.same_best: list[bool] = []

    def add(self, case: str, expected: dict[str, Array], found: dict[str, Array]) -> None:
        self.same_best += _best(expected, found)
        for name, difference, scale in _compare(expected, found):
            output, _, step = name.partition("/")
            when = "" if not step else " with past" if int(step) else " without past"
            limits = self.vision if output.startswith("visual.") else self.limits
            # Held to the graph's own logits, it is as exact in any precision.
            limit = LIMITS["fp32"].outputs if output == "logsumexp" else limits.outputs
            self._note(output + when, case, difference, scale, limit, limits.measure)

    def add_neighbours(self, alone: dict[str, Array], company: dict[str, Array]) -> None:
        second = {name: array[1:] for name, array in company.items()}
        for name, difference, scale in _compare(alone, second):
            kind = name.partition("/")[0].split(".")[0]
            limits = self.vision if kind == "visual" else self.limits
            self._note(f"neighbours: {kind}", name, difference, scale, limits.neighbours, limits.measure)

    def checks(self) -> Iterator[Check]:
        yield from self.worst.values()
        same = float(np.mean(self.same_best))
        yield Check("best token", "", None, same, self.limits.top1, same >= self.limits.top1)

    def _note(self, output: str, case: str, difference: Array, scale: float, limit: float, measure: str) -> None:
        largest = float(np.abs(difference).max())
        typical = largest if measure == "max" else _rms(difference)
        value = typical / (scale or 1.0)
        if output not in self.worst or value > self.worst[output].value:
            self.worst[output] = Check(output, case, largest, value, limit, value <= limit)


def _compare(expected: dict[str, Array], found: dict[str, Array]) -> Iterator[tuple[str, Array, float]]:
    """Name, difference, and the root mean square of what is expected, of every output.

    A constant on all logits of a row changes no probability, so they are compared without their mean. The
    log-sum-exp hangs on a few logits, which rounding may move far: it is held to the graph's own logits.
    """
    for name, array in expected.items():
        other = found[name].astype(np.float64)
        if array.shape != other.shape:
            raise VerificationError(f"output {name} has shape {list(other.shape)} instead of {list(array.shape)}")
        if not np.isfinite(other).all():
            raise VerificationError(f"output {name} holds numbers that are not finite")
        output, _, step = name.partition("/")
        if output == "logsumexp":
            logits = found[f"logits/{step}"].astype(np.float64)
            yield name, other - np.logaddexp.reduce(logits, axis=1), _rms(_centred(logits))
        elif output == "logits":
            array = _centred(array)
            yield name, _centred(other) - array, _rms(array)
        else:
            yield name, other - array, _rms(array)


def _centred(logits: Array) -> Array:
    centred: Array = logits - logits.mean(axis=1, keepdims=True)
    return centred


def _rms(array: Array) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))  # fp16 squares overflow


def _best(expected: dict[str, Array], found: dict[str, Array]) -> list[bool]:
    names = [name for name in expected if name.startswith("logits/")]
    return [same for n in names for same in (expected[n].argmax(axis=1) == found[n].argmax(axis=1)).tolist()]


def _captions(captioner: Captioner, pixels: Array) -> list[list[tuple[list[int], float]]]:
    """Tokens and score of every image's caption, for each of CAPTION_BEAMS."""
    room = captioner.tokens.room
    # In full: the bundle may have search defaults of its own.
    options: Any = SearchDefaults(max_new_tokens=min(CAPTION_TOKENS, room)).model_dump()
    found = (captioner.caption(list(pixels), **{**options, "num_beams": beams}) for beams in CAPTION_BEAMS)
    return [[(list(caption.tokens), caption.score) for caption in captions] for captions in found]


def _caption_checks(expected: Any, found: Any, limits: Limits) -> Iterator[Check]:
    for beams, theirs, ours in zip(CAPTION_BEAMS, expected, found, strict=True):
        same = [
            tokens == our_tokens or abs(score - our_score) < _TIE
            for (tokens, score), (our_tokens, our_score) in zip(theirs, ours, strict=True)
        ]
        different = len({tuple(tokens) for tokens, _ in theirs})
        value, name = sum(same) / len(same), f"captions, {beams} beam{'s' if beams > 1 else ''}"
        case = f"{different} different of {len(same)}"
        yield Check(name, case, None, value, limits.captions, value >= limits.captions)


def _dev_checks(scores: DevScores, limits: Limits) -> list[Check]:
    case = f"{scores.different} different, {scores.photos} photos"
    same, cider = scores.same >= limits.dev_captions, scores.found + scores.margin >= limits.cider * scores.reference
    points = f"{100 * scores.found:.1f}, PyTorch {100 * scores.reference:.1f}"
    return [
        Check("captions, dev", case, None, scores.same, limits.dev_captions, same),
        Check("CIDEr-D, dev", points, None, scores.kept, limits.cider, cider),
    ]


def _run(*arguments: object) -> None:
    command = [sys.executable, "-m", "itune.export.verify.checks", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        raise VerificationError(f"verification was killed by signal {-done.returncode}, perhaps for want of memory")
    if done.returncode:
        raise VerificationError(f"verification: {done.stderr.strip().splitlines()[-1]}")


def _main(side: str, source: str, folder: str, images: str | None = None) -> None:
    if side == "reference":
        shortlist = Path(folder) / SHORTLIST
        vocabulary = np.load(shortlist) if shortlist.exists() else None
        write_reference(Path(source), Path(folder), Path(images) if images else None, vocabulary)
    else:
        checks = compare(Path(source), Path(folder))
        text = json.dumps([asdict(check) for check in checks])
        (Path(folder) / "report.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        _main(*sys.argv[1:])
    except ItuneError as error:
        sys.exit(str(error))
