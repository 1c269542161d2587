"""The compare side of a verification: replay the reference's scenarios on ONNX Runtime and measure the differences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...runtime.bundle import Bundle
from ...runtime.captioner import Captioner
from ...runtime.graph_names import VISUAL, values
from .captions import Written, caption_dev_split, compare_dev_split
from .limits import LIMITS, Limits
from .report import Check, VerificationError
from .scenarios import CAPTION_BEAMS, REFERENCE, Array, Reference, beside_loud_image, caption_images, replay

VALUE_SCALES = "value_scales"
"""In a manifest's provenance: each layer's factor on the visual values, which its W_o is divided by."""


def compare(bundle: Path, folder: Path) -> list[Check]:
    """Check every output of a bundle's graphs; raises VerificationError if one is misshapen or not finite."""
    captioner = Captioner.load(bundle, engine="onnxruntime", retrieve=0)
    captioner.retriever = None  # the same prompt on both sides; the embedding has its own check
    loaded = Bundle.load(bundle, verify=False)
    reference = Reference.model_validate_json((folder / REFERENCE).read_bytes())
    pixels, vocabulary = np.load(folder / "pixels.npy"), np.load(folder / "vocabulary.npy")
    value_scales = loaded.manifest.provenance.get(VALUE_SCALES, {})
    scales = {values(int(layer)): np.float32(scale) for layer, scale in value_scales.items()}
    differences = _Differences(loaded)
    for i, scenario in enumerate(reference.scenarios):
        found = replay(captioner.engine, pixels, scenario, vocabulary)
        with np.load(folder / f"{i}.npz") as expected:
            unscaled = {name: array / scales[name] if name in scales else array for name, array in found.items()}
            differences.add(scenario.name, dict(expected), unscaled)
        if i == 0:
            batch = replay(captioner.engine, pixels, beside_loud_image(scenario, vocabulary), vocabulary)
            differences.add_neighbours(found, batch)
    limits = differences.limits
    checks = [*differences.checks(), *_captions(reference.captions, caption_images(captioner, pixels), limits)]
    if written := caption_dev_split(captioner, folder):
        checks += compare_dev_split(reference.dev, written, folder, limits)
    return checks


class _Differences:
    """Collects the largest difference of every output."""

    def __init__(self, bundle: Bundle) -> None:
        graph = bundle.graph("vision", "onnxruntime")
        halved = graph.precision == "fp32" and graph.outputs[0].dtype == "float16"  # for a decoder in half precision
        vision, decoder = "fp16" if halved else graph.precision, bundle.graph("decoder", "onnxruntime").precision
        self.vision, self.limits = LIMITS[vision], LIMITS[max(vision, decoder, key=list(LIMITS).index)]
        self.largest: dict[str, Check] = {}
        self.same_best: list[bool] = []

    def add(self, case: str, expected: dict[str, Array], found: dict[str, Array]) -> None:
        for name, difference, scale in _compare(expected, found):
            output, _, step = name.partition("/")
            if output == "logits":
                self.same_best += (expected[name].argmax(axis=1) == found[name].argmax(axis=1)).tolist()
            when = "" if not step else " with past" if int(step) else " without past"
            limits = self.vision if output.startswith(VISUAL) else self.limits
            # Compared with the graph's own logits, the log-sum-exp is as exact in any precision.
            limit = LIMITS["fp32"].outputs if output == "logsumexp" else limits.outputs
            self._note(output + when, case, difference, scale, (limits.measure, limit))

    def add_neighbours(self, alone: dict[str, Array], batch: dict[str, Array]) -> None:
        """Compare an image by itself with the second row of a batch."""
        for name, difference, scale in _compare(alone, {name: array[1:] for name, array in batch.items()}):
            kind = name.partition("/")[0].split(".")[0]
            limits = self.vision if name.startswith(VISUAL) else self.limits
            self._note(f"neighbours: {kind}", name, difference, scale, (limits.measure, limits.neighbours))

    def checks(self) -> Iterator[Check]:
        yield from self.largest.values()
        same = float(np.mean(self.same_best))
        yield Check("best token", "", None, same, self.limits.top1, same >= self.limits.top1)

    def _note(self, output: str, case: str, difference: Array, scale: float, tolerance: tuple[str, float]) -> None:
        measure, limit = tolerance
        largest = float(np.abs(difference).max())
        value = (largest if measure == "max" else _rms(difference)) / (scale or 1.0)
        if output not in self.largest or value > self.largest[output].value:
            self.largest[output] = Check(output, case, largest, value, limit, value <= limit)


def _compare(expected: dict[str, Array], found: dict[str, Array]) -> Iterator[tuple[str, Array, float]]:
    """Name, difference, and root mean square of the expected values, for every output.

    Logits are compared without each row's mean, which changes no probability. The log-sum-exp depends on a few logits,
    which rounding may move far: it is compared with that of the graph's own logits.
    """
    for name, array in expected.items():
        other = found[name].astype(np.float64)
        if array.shape != other.shape or not np.isfinite(other).all():
            raise VerificationError(
                f"output {name} has shape {list(other.shape)}, expected {list(array.shape)}, or has values that are "
                "not finite"
            )
        output, _, step = name.partition("/")
        if output == "logsumexp":
            logits = found[f"logits/{step}"].astype(np.float64)
            yield name, other - np.logaddexp.reduce(logits, axis=1), _rms(_centred(logits))
        elif output == "logits":
            yield name, _centred(other) - _centred(array), _rms(_centred(array))
        else:
            yield name, other - array, _rms(array)


def _centred(logits: Array) -> Array:
    centred: Array = logits - logits.mean(axis=1, keepdims=True)
    return centred


def _rms(array: Array) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))  # fp16 squares overflow


def _captions(expected: list[list[Written]], found: list[list[Written]], limits: Limits) -> Iterator[Check]:
    for beams, theirs, ours in zip(CAPTION_BEAMS, expected, found, strict=True):
        value = float(np.mean([one.as_good_as(other) for one, other in zip(theirs, ours, strict=True)]))
        name = f"captions, {beams} beam{'s' if beams > 1 else ''}"
        case = f"{len({tuple(each.tokens) for each in theirs})} different of {len(theirs)}"
        yield Check(name, case, None, value, limits.captions, value >= limits.captions)
