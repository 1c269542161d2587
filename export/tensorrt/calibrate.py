"""How large activations get, on real photos and the model's own captions: the scales of static int8.

The fp32 graphs caption the photos once, with every value that int8 will round as one more output. Each value's sizes
are kept as a histogram, from which its range is chosen afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper
from tokenizers import Tokenizer

from ...runtime.bundle import TOKENIZER, Manifest
from ...runtime.captioner import Captioner
from ...runtime.engines.onnxruntime import OnnxRuntimeEngine, available_cpus, open_session
from ...runtime.errors import ImageError, ItuneError
from ...runtime.image import SUFFIXES
from ..graph.builder import Array, Graph
from ..quantize.weights import QMAX
from .typed_graph import quantized_inputs

RANDOM = Path("random")
"""In place of a folder of photos: noise."""
PHOTOS = 64
"""Taken evenly from the sorted folder."""
METHODS = ("mse", "percentile", "max")
Method = Literal["mse", "percentile", "max"]
METHOD: Method = "mse"
Ranges = dict[str, float]
_BINS = 2048
_BATCH = 4
_PERCENTILE = 0.9999


class Histogram:
    """The sizes of a value's elements; the bins grow wider as larger ones come."""

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

    def range(self, method: Method) -> float:
        """The size that becomes 127: the largest, one that few exceed, or that of the least squared error."""
        if method == "max" or not self.largest:
            return self.largest or 1.0
        edges = np.arange(1, _BINS + 1) * (self.limit / _BINS)
        if method == "percentile":
            place = np.searchsorted(self.counts.cumsum(), _PERCENTILE * self.counts.sum())
            return float(min(edges[place], self.largest))
        centres = edges - edges[0] / 2
        candidates = self.largest * np.linspace(0.05, 1, 96)
        return float(min(candidates, key=lambda size: _squared_error(self.counts, centres, size / QMAX)))


def _squared_error(counts: NDArray[np.int64], sizes: NDArray[np.float64], step: float) -> float:
    rounded = np.rint(sizes / step).clip(0, QMAX) * step
    # Within one step, what a bin holds is spread over the rounding error, too.
    return float(counts @ np.square(sizes - rounded))


class _Recording:
    """An ONNX Runtime session that shows some inner values to histograms."""

    def __init__(self, path: Path, values: Sequence[str]) -> None:
        model = onnx.load(path, load_external_data=False)
        model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in values)
        copy = path.with_name(f"calibration-{path.name}")  # beside its external weights
        onnx.save(model, copy)
        self.session = open_session(copy, available_cpus())
        self.histograms = {name: Histogram() for name in values}
        self.outputs = self.session.get_outputs()[: -len(values)]

    def get_inputs(self) -> Any:
        return self.session.get_inputs()

    def get_outputs(self) -> Any:
        return self.outputs

    def run_with_ort_values(self, names: Sequence[str], feeds: Mapping[str, ort.OrtValue]) -> Any:
        found = self.session.run_with_ort_values([*names, *self.histograms], feeds)
        for histogram, value in zip(self.histograms.values(), found[len(names) :], strict=True):
            histogram.add(value.numpy())
        return found[: len(names)]


def calibration_images(source: Path) -> list[Any]:
    """The photos of a folder, evenly chosen, or noise for `random`.

    Raises:
        ItuneError: there is no photo.
    """
    if source == RANDOM:
        rng = np.random.default_rng(0)
        return [
            np.kron(rng.integers(0, 256, (side, side, 3), np.uint8), np.ones((256 // side,) * 2 + (1,), np.uint8))
            for side in (4, 16, 64, 256) * 4
        ]
    if not source.is_dir():
        raise ItuneError(f"--calibration-data {source}: is not a folder; name one with photos, or random")
    photos = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not photos:
        raise ItuneError(f"--calibration-data {source}: there is no photo in it")
    return [photos[place] for place in np.linspace(0, len(photos) - 1, min(PHOTOS, len(photos))).astype(int)]


def calibrate(
    vision: Path,
    decoder: Path,
    folder: Path,
    manifest: Manifest,
    images: Iterable[Any],
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> dict[str, Histogram]:
    """Caption the images with the fp32 graphs; histograms of what int8 rounds, by the value's name.

    `folder` has the tokenizer. Of two values that are joined to one, there is a
    histogram each.

    Raises:
        ItuneError: no image can be read.
    """
    images = list(images)
    sessions: list[Any] = [_Recording(path, _recorded(Graph.load(path))) for path in (vision, decoder)]
    engine = OnnxRuntimeEngine(sessions[0], sessions[1], manifest.tokens.candidates)  # sessions in all that it calls
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    captioner = Captioner(engine, tokenizer, manifest.image, manifest.tokens, manifest.search)
    read = 0
    for done, (_, result) in enumerate(captioner.stream(images, batch_size=_BATCH), 1):
        read += not isinstance(result, ImageError)
        progress(done, len(images))
    if not read:
        raise ItuneError(f"--calibration-data: {images[0]} cannot be read, nor can any other of {len(images)} photos")
    histograms: dict[str, Histogram] = sessions[0].histograms | sessions[1].histograms
    return histograms


def choose_ranges(
    vision: Graph, decoder: Graph, histograms: Mapping[str, Histogram], method: Method = METHOD
) -> tuple[Ranges, dict[str, float]]:
    """The range of everything that int8 rounds in the two fp32 graphs; their adapters are balanced for it.

    Returns the ranges, and by what U of each layer was multiplied.

    The second product of an adapted layer reads [GELU(...) | S U] under one range, and its rows share their scales
    with W_o's. So U grows by a factor in the vision graph and W_o shrinks by it in the decoder, which changes nothing
    else: the factor splits the mismatch of the activations and that of the weights evenly.
    """
    ranges = {name: histogram.range(method) for name, histogram in histograms.items()}
    joins = joined_parts(decoder)
    products = {node.input[0]: node.input[1] for node in decoder.nodes if node.input and node.input[0] in joins}
    values: dict[str, float] = {}
    for joined, (activation, retrieved) in joins.items():
        name = products[joined]
        weight = np.array(decoder.weights[name])
        layer = name.split(".")[2]
        own = len(weight) - _bottleneck(vision, layer)
        mismatch = ranges[activation] / ranges[retrieved] * np.abs(weight[own:]).max() / np.abs(weight[:own]).max()
        factor = float(np.sqrt(mismatch)) or 1.0
        weight[own:] /= factor
        decoder.weights[name] = weight
        values[layer] = factor
        ranges[joined] = max(ranges[activation], factor * ranges[retrieved])
    if values:
        _scale_values(vision, values)
    return ranges, values


def joined_parts(graph: Graph) -> dict[str, tuple[str, str]]:
    """By the value that joins them: the outputs of an adapted layer's activation function and of its adapter."""
    joins = {node.output[0]: node for node in graph.nodes if node.name.endswith("/mlp/Concat")}
    return {name: (node.input[0], node.input[1]) for name, node in joins.items()}


def _bottleneck(vision: Graph, layer: str) -> int:
    shape = next(v.type.tensor_type.shape for v in vision.outputs if v.name == f"visual.{layer}.values")
    heads, _, width = (dim.dim_value for dim in shape.dim[1:])
    return int(heads * width)


def _scale_values(vision: Graph, factors: Mapping[str, float]) -> None:
    """Multiply U of each layer; the columns of the vision graph's last product are K and U of one after the other."""
    layers = [value.name.split(".")[1] for value in vision.outputs if value.name.endswith(".values")]
    ones = [(1.0, factors[layer]) for layer in layers]
    scale = np.repeat(np.array(ones, np.float32).ravel(), [_bottleneck(vision, n) for n in layers for _ in range(2)])
    for name in ("visual.weight", "visual.bias"):
        vision.weights[name] = vision.weights[name] * scale


def _recorded(graph: Graph) -> list[str]:
    parts = joined_parts(graph)
    return [part for name in quantized_inputs(graph) for part in parts.get(name, (name,))]
