from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from itune.export.graph.builder import Graph
from itune.export.methods.registry import build_decoder, build_vision
from itune.export.tensorrt.calibrate import PHOTOS, RANDOM, Histogram, calibration_images, choose_ranges
from itune.export.tensorrt.typed_graph import quantized_inputs
from itune.loading import LoadedCheckpoint
from itune.runtime.engines.onnxruntime import OnnxRuntimeEngine, open_session
from itune.runtime.errors import ItuneError


def histogram(*parts) -> Histogram:
    found = Histogram()
    for part in parts:
        found.add(np.asarray(part, np.float32))
    return found


def test_the_largest_counts_whenever_it_comes():
    rng = np.random.default_rng(0)
    small, large = rng.normal(size=10_000), 300 * rng.normal(size=10_000)
    early, late = histogram(large, small), histogram(small, large)
    assert early.largest == late.largest == pytest.approx(np.abs(large).max())
    assert early.counts.sum() == late.counts.sum() == 20_000
    np.testing.assert_array_equal(early.counts, late.counts)


def test_an_outlier_does_not_widen_the_range_of_least_error():
    values = np.random.default_rng(1).normal(size=100_000)
    found = histogram(values, [12.0])
    assert found.largest == 12
    assert 4 < found.range() < 9


def test_a_value_that_is_always_zero_has_a_range():
    assert histogram(np.zeros(5)).range() == 1.0


def test_the_range_of_least_error_is_the_best_of_all():
    values = np.random.default_rng(2).laplace(size=50_000).astype(np.float32)

    def error(size: float) -> float:
        step = size / 127
        return float(np.square(values - np.rint(values / step).clip(-127, 127) * step).mean())

    best = min(map(error, np.linspace(2, np.abs(values).max(), 200)))
    assert error(histogram(values).range()) < 1.05 * best


def test_balanced_adapters_compute_the_same(clip_checkpoint, pixels, tmp_path):
    loaded = LoadedCheckpoint.load(clip_checkpoint)
    build_vision(loaded.model, loaded.tower).save(tmp_path / "vision.onnx")
    build_decoder(loaded.model).save(tmp_path / "decoder.onnx")
    vision, decoder = (Graph.load(tmp_path / f"{role}.onnx") for role in ("vision", "decoder"))
    histograms = {}
    for graph in (vision, decoder):
        for node in graph.nodes:
            for name in node.output:
                histograms[name] = histogram([9.0 if name.endswith("Gelu") else 1.0])
    ranges, scales = choose_ranges(vision, decoder, histograms)
    assert set(quantized_inputs(vision) + quantized_inputs(decoder)) <= ranges.keys()
    assert scales.keys() == {"1", "2"}
    assert all(scale > 1.5 for scale in scales.values())  # S U was nine times smaller
    vision.save(tmp_path / "balanced-vision.onnx")
    decoder.save(tmp_path / "balanced-decoder.onnx")
    before, after = (
        OnnxRuntimeEngine(*(open_session(tmp_path / f"{kind}{r}.onnx", 1) for r in ("vision", "decoder")), 320)
        for kind in ("", "balanced-")
    )
    states = before.encode(pixels), after.encode(pixels)
    tokens = np.arange(len(pixels))[:, None]
    found = [e.step(tokens, np.arange(len(pixels)), s, 20) for e, s in zip((before, after), states, strict=True)]
    np.testing.assert_allclose(found[1].logits, found[0].logits, atol=1e-4)
    value = "visual.2.values"
    plain, scaled = (state.visual[value].numpy() for state in states)
    np.testing.assert_allclose(scaled, scales["2"] * plain, rtol=1e-4, atol=1e-5)


def test_photos_are_taken_evenly(tmp_path):
    for number in range(3 * PHOTOS):
        (tmp_path / f"{number:03}.jpg").touch()
    (tmp_path / "notes.txt").touch()
    found = calibration_images(tmp_path)
    assert len(found) == PHOTOS
    assert (found[0].name, found[-1].name) == ("000.jpg", f"{3 * PHOTOS - 1:03}.jpg")
    assert {image.shape for image in calibration_images(RANDOM)} == {(256, 256, 3)}


def test_a_folder_without_photos(tmp_path):
    with pytest.raises(ItuneError) as error:
        calibration_images(tmp_path)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(ItuneError) as error:
        calibration_images(Path("nowhere"))
    assert "--calibration-data nowhere" in str(error.value)
