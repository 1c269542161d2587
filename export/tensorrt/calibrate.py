"""Calibration of static int8: how large activations get on real photos and the model's own captions.

The fp32 graphs caption the photos once, with every value that int8 quantises as one more output. A histogram keeps
each value's magnitudes, from which its range is chosen afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from ...runtime.bundle import TOKENIZER, Manifest
from ...runtime.captioner import Captioner
from ...runtime.cpus import available_cpus
from ...runtime.engines.onnxruntime import OnnxRuntimeEngine, open_session
from ...runtime.errors import ImageError, ItuneError
from ...runtime.image import SUFFIXES
from ...runtime.text import load_tokenizer
from ..graph.builder import Array, Graph
from ..methods.ituning import merged_input
from ..methods.visual_attention import BIAS, WEIGHT
from ..quantize.weights import QMAX
from .typed_graph import quantized_inputs

RANDOM = Path("random")
"""Noise in place of a folder of photos."""
PHOTOS = 64
"""How many photos of the sorted folder are used, evenly spaced."""
Ranges = dict[str, float]
_BINS = 2048
_BATCH = 4


class Histogram:
    """The magnitudes of a value's elements; the bins grow wider as larger ones come."""

    def __init__(self) -> None:
        self.counts = np.zeros(_BINS, np.int64)
        self.limit = 2.0**-20
        self.largest = 0.0

    def add(self, values: Array) -> None:
        """Count the elements of an array."""
        sizes = np.abs(values, dtype=np.float32).ravel()
        self.largest = max(self.largest, float(sizes.max(initial=0)))
        while self.limit <= self.largest:
            self.counts = np.append(self.counts.reshape(-1, 2).sum(axis=1), np.zeros(_BINS // 2, np.int64))
            self.limit *= 2
        places = (sizes * np.float32(_BINS / self.limit)).astype(np.int32)
        self.counts += np.bincount(np.minimum(places, _BINS - 1), minlength=_BINS)

    def range(self) -> float:
        """The magnitude that becomes 127 with the least squared rounding error."""
        if not self.largest:
            return 1.0
        centres = (np.arange(_BINS) + 0.5) * (self.limit / _BINS)

        def squared_error(size: float) -> float:
            step = size / QMAX
            return float(self.counts @ np.square(centres - np.rint(centres / step).clip(0, QMAX) * step))

        return float(min(self.largest * np.linspace(0.05, 1, 96), key=squared_error))


class _RecordingEngine(OnnxRuntimeEngine):
    """Runs two graphs whose inner values `histograms` are outputs, too, and adds these to their histograms."""

    histograms: dict[str, Histogram]

    def _run(
        self, session: ort.InferenceSession, outputs: Sequence[str], inputs: Mapping[str, ort.OrtValue]
    ) -> dict[str, ort.OrtValue]:
        named = super()._run(session, outputs, inputs)
        for name in self.histograms.keys() & named.keys():
            self.histograms[name].add(named.pop(name).numpy())
        return named


def calibration_images(source: Path) -> list[Any]:
    """Evenly spaced photos of a folder, or noise for `random`.

    Raises:
        ItuneError: the folder has no photo.
    """
    if source == RANDOM:
        rng = np.random.default_rng(0)
        return [
            np.kron(rng.integers(0, 256, (side, side, 3), np.uint8), np.ones((256 // side,) * 2 + (1,), np.uint8))
            for side in (4, 16, 64, 256) * 4
        ]
    photos = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not photos:
        raise ItuneError(f"--calibration-data {source}: is not a folder of photos; name one, or random")
    return [photos[place] for place in np.linspace(0, len(photos) - 1, min(PHOTOS, len(photos))).astype(int)]


def calibrate(
    vision: Path,
    decoder: Path,
    folder: Path,
    manifest: Manifest,
    images: Sequence[Any],
    progress: Callable[[int, int], None],
) -> dict[str, Histogram]:
    """Caption the images with the fp32 graphs; histograms of the values that int8 quantises, by name.

    `folder` has the tokenizer. A value that joins two others has a histogram for each of them.

    Raises:
        ItuneError: no image can be read.
    """
    histograms: dict[str, Histogram] = {}
    sessions = []
    for path in (vision, decoder):
        graph = Graph.load(path)
        joined = {name: parts for _, name, *parts in _joined(graph)}
        own = [part for name in quantized_inputs(graph) for part in joined.get(name, [name])]
        histograms |= {name: Histogram() for name in own}
        model = onnx.load(path, load_external_data=False)
        model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in own)
        copy = path.with_name(f"calibration-{path.name}")  # beside its external weights
        onnx.save(model, copy)
        sessions.append(open_session(copy, available_cpus()))
    engine = _RecordingEngine(sessions[0], sessions[1], manifest.tokens.candidates)
    engine.histograms = histograms
    tokenizer = load_tokenizer(folder / TOKENIZER)
    captioner = Captioner(engine, tokenizer, manifest.image, manifest.tokens, manifest.search)
    read = 0
    for done, (_, result) in enumerate(captioner.stream(images, batch_size=_BATCH), 1):
        read += not isinstance(result, ImageError)
        progress(done, len(images))
    if not read:
        raise ItuneError(f"--calibration-data: none of {len(images)} photos can be read, such as {images[0]}")
    if read < len(images):
        logging.getLogger(__name__).warning(
            "--calibration-data: %d of %d photos cannot be read", len(images) - read, len(images)
        )
    return histograms


def choose_ranges(
    vision: Graph, decoder: Graph, histograms: Mapping[str, Histogram]
) -> tuple[Ranges, dict[str, float]]:
    """The ranges of all values that int8 quantises in the two fp32 graphs, whose adapters are balanced for it.

    Returns the ranges, and the factor on the visual values U of each layer.

    The second product of an adapted layer reads [GELU(...) | S U] with one range, and its rows share their scales
    with W_o's. So U grows by a factor in the vision graph and W_o shrinks by it in the decoder, which changes nothing
    else: the factor splits the mismatch of the activations and that of the weights evenly.
    """
    ranges = {name: histogram.range() for name, histogram in histograms.items()}
    weights = {node.input[0]: node.input[1] for node in decoder.nodes if node.op_type == "MatMul"}
    layers = _joined(decoder)
    if not layers:
        return ranges, {}
    width = vision.weights[BIAS].size // (2 * len(layers))
    factors: dict[str, float] = {}
    for layer, joined, activation, retrieved in layers:
        name = weights[joined]
        weight = np.array(decoder.weights[name])
        inner, output = weight[:-width], weight[-width:]
        mismatch = ranges[activation] / ranges[retrieved] * np.abs(output).max() / np.abs(inner).max()
        factors[layer] = factor = float(np.sqrt(mismatch)) or 1.0
        output /= factor
        decoder.weights[name] = weight
        ranges[joined] = max(ranges[activation], factor * ranges[retrieved])
    # The columns of the visual weights are K and U, layer by layer.
    scale = np.array([(1.0, factor) for factor in factors.values()], np.float32).repeat(width)
    for name in (WEIGHT, BIAS):
        vision.weights[name] = vision.weights[name] * scale
    return ranges, factors


def _joined(graph: Graph) -> list[tuple[str, str, str, str]]:
    """(layer, [GELU(...) | S U], GELU(...), S U) of each layer with a merged adapter."""
    layers = {merged_input(layer): str(layer) for layer in range(len(graph.inputs))}
    return [(layers[node.name], node.output[0], *node.input) for node in graph.nodes if node.name in layers]
