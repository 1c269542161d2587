"""The TensorRT engine on a fake GPU: whole captions through its buffers, its limits, its errors."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from itune import Captioner
from itune.runtime.bundle import MANIFEST, Bundle, PlanSettings, ProfileRange
from itune.runtime.engines import tensorrt as tensorrt_engine
from itune.runtime.engines.onnxruntime import OnnxRuntimeEngine
from itune.runtime.engines.tensorrt import ALIGNMENT, Layout, TensorRTEngine
from itune.runtime.engines.tensorrt_plan import choose_profile
from itune.runtime.errors import BundleError, EngineError, SearchError
from tests.runtime.fake_gpu import FakeDevice, FakeTensorRT
from tests.runtime.plans import BATCH, BEAMS, POSITIONS, K, make_plan_bundle

CASES: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1, "max_new_tokens": 8},
    "beams": {"num_beams": 5, "max_new_tokens": 12},
    "constraints": {"num_beams": 3, "max_new_tokens": 10, "min_new_tokens": 4, "no_repeat_ngram_size": 2},
    "all positions": {"num_beams": 2, "max_new_tokens": POSITIONS, "min_new_tokens": POSITIONS},
    "samples": {"do_sample": True, "top_k": 20, "seed": 3, "num_return": 3, "max_new_tokens": 6},
}


@pytest.fixture(scope="module", params=["fp32", "fp16 state"])
def plans(request, checkpoint_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plans") / "bundle"
    return make_plan_bundle(checkpoint_folder, folder, half=request.param == "fp16 state")


@pytest.fixture(scope="module")
def fp32_plans(checkpoint_folder, tmp_path_factory) -> Path:
    return make_plan_bundle(checkpoint_folder, tmp_path_factory.mktemp("plans") / "bundle")


@pytest.fixture
def device(monkeypatch) -> FakeDevice:
    device = FakeDevice()
    monkeypatch.setattr(tensorrt_engine, "CudaDevice", lambda: device)
    return device


@pytest.fixture
def trt(device, monkeypatch) -> FakeTensorRT:
    trt = FakeTensorRT(device)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)
    return trt


def assert_says(error: pytest.ExceptionInfo[Any], *values: str) -> None:
    """The message is one line and contains all values."""
    assert "\n" not in str(error.value)
    for value in values:
        assert value in str(error.value)


def edited(folder: Path, target: Path, edit: Callable[[dict], None]) -> Bundle:
    """A copy of a bundle with another manifest."""
    shutil.copytree(folder, target)
    content = json.loads((target / MANIFEST).read_text())
    edit(content)
    (target / MANIFEST).write_text(json.dumps(content))
    return Bundle.load(target)


@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize("case", CASES)
def test_captions_are_those_of_onnx_runtime(case, plans, photos):
    reference = Captioner.load(plans, engine="onnxruntime", threads=1)
    captioner = Captioner.load(plans, engine="auto", threads=1)
    assert (captioner.engine_name, captioner.engine_notice) == ("tensorrt", "captioning with TensorRT")
    for batch_size in (1, BATCH):  # the very same products, so the very same scores
        found = captioner.caption(photos, batch_size=batch_size, **CASES[case])
        expected = reference.caption(photos, batch_size=batch_size, **CASES[case])
        assert [(c.tokens, c.candidates) for c in found] == [(c.tokens, c.candidates) for c in expected]
    assert len({caption.tokens for caption in expected}) > 1
    # more than the plans take at once, in two runs
    found = captioner.caption(photos[:5], batch_size=5, **CASES[case])
    assert [caption.tokens for caption in found] == [caption.tokens for caption in expected[:5]]


@pytest.mark.usefixtures("trt")
def test_steps_with_prompts_and_finished_images(plans):
    """Every candidate of every step, with images that leave both parts of the state, and one part that goes empty."""
    engine = TensorRTEngine.load(Bundle.load(plans))
    reference = OnnxRuntimeEngine.load(Bundle.load(plans), threads=1)
    rng = np.random.default_rng(0)
    images, beams = BATCH + 2, 3
    pixels = rng.integers(0, 256, (images, 32, 32, 3), np.uint8)
    mask = np.array([[0, 1, 1], [1, 1, 1], [0, 0, 1], [1, 1, 1], [0, 1, 1]], np.bool_)
    states = engine.encode(pixels), reference.encode(pixels)
    tokens, parents, first = rng.integers(0, 200, mask.shape), np.arange(images), mask
    present, rows = images, 1  # rows of each image in the previous step
    for kept in ([0, 1, 2, 3, 4], [1, 2, 3, 4], [1, 3], [0], [0]):
        results = []
        for one, state in zip((engine, reference), states, strict=True):
            results.append(one.step(tokens, parents, state, 9, mask=first))
            state.keep(np.array(kept))
            assert state.images == len(kept)
        for found, expected in zip(*results, strict=True):
            assert found.dtype == expected.dtype
            np.testing.assert_allclose(found, expected, atol=2e-3)
        rows = 1 if first is not None else beams
        assert len(tokens) == present * rows
        first = None
        parents = np.repeat(kept, beams) * rows + rng.integers(0, rows, len(kept) * beams)
        tokens, present = rng.integers(0, 200, (len(parents), 1)), len(kept)


def test_only_the_candidates_come_back(device, trt, fp32_plans, photos):
    captioner = Captioner.load(fp32_plans, threads=1)
    captioner.caption(photos[0], num_beams=2, max_new_tokens=5, min_new_tokens=5)
    assert device.copied < 5 * 5 * ALIGNMENT
    assert max(context.runs for context in trt.contexts) == 4
    assert {context.profile for context in trt.contexts} == {0, 1}
    assert not device.queue


def test_memory_is_reused_and_freed(device, trt, fp32_plans, photos):
    engine = TensorRTEngine.load(Bundle.load(fp32_plans))
    pixels = np.zeros((1, 32, 32, 3), np.uint8)
    fixed = len(device.memories)
    states = [engine.encode(pixels) for _ in range(2)]  # two searches at once have buffers of their own
    assert len(device.memories) == fixed + 6
    del states
    gc.collect()
    engine.encode(pixels)
    assert len(device.memories) == fixed + 6
    del engine
    trt.contexts.clear()
    gc.collect()
    assert not device.memories


@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({"num_beams": BEAMS + 1}, ["15 rows", "18", "--max-beams"]),
        ({"num_beams": 5, "no_repeat_ngram_size": 1, "min_new_tokens": 9, "bad_words": ["a", "dog"] * 9}, None),
        ({"do_sample": True, "top_k": K + 1}, [f"{K} candidates", f"{K + 1}"]),
        ({"max_new_tokens": POSITIONS + 1}, [f"at most {POSITIONS}", "--max-new-tokens"]),
    ],
)
def test_beyond_the_profiles(options, values, fp32_plans, photos):
    captioner = Captioner.load(fp32_plans, engine="tensorrt", threads=1)
    options = {"max_new_tokens": 9} | options
    if values is None:
        assert captioner.caption(photos[:3], **options)
        return
    with pytest.raises(SearchError) as error:
        captioner.caption(photos[:3], **options)
    assert_says(error, *values)


@pytest.mark.usefixtures("trt")
def test_a_shape_that_no_profile_allows(fp32_plans):
    engine = TensorRTEngine.load(Bundle.load(fp32_plans))
    state = engine.encode(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(SearchError) as error:
        engine.step(np.zeros((1, 6), np.int64), np.array([0]), state, 4)
    assert_says(error, "decoder.plan", "tokens [1, 6]")
    with pytest.raises(SearchError) as error:
        engine.encode(np.zeros((1, 40, 40, 3), np.uint8))
    assert_says(error, "vision.plan", "[1, 40, 40, 3]", "[1, 32, 32, 3]")


def set_plan(**values: object) -> Callable[[dict], None]:
    def edit(content: dict) -> None:
        for graph in content["graphs"]:
            if graph["plan"]:
                graph["plan"] |= values

    return edit


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        ({"version": "9.9"}, ["tensorrt-rtx 9.9", "1.7.1.116", "tensorrt-rtx-cu12==9.9"]),
        ({"compute_capabilities": ["sm120"]}, ["sm120", "--gpu sm86"]),
        ({"flavour": "tensorrt", "version": "11.1"}, ["tensorrt 11.1", "tensorrt-cu12==11.1"]),
    ],
)
def test_plans_for_something_else(settings, values, trt, fp32_plans, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    bundle = edited(fp32_plans, tmp_path / "bundle", set_plan(**settings))
    with pytest.raises(EngineError) as error:
        TensorRTEngine.load(bundle)
    assert_says(error, "vision.plan", *values)
    with pytest.raises(EngineError) as error:
        Captioner.load(bundle.folder)
    assert_says(error, "--engine onnxruntime", *values)
    assert Captioner.load(bundle.folder, engine="onnxruntime").engine_name == "onnxruntime"


def test_the_vendors_own_tensorrt(device, fp32_plans, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT(device, "tensorrt", "11.1"))
    bundle = edited(fp32_plans, tmp_path / "bundle", set_plan(flavour="tensorrt", version="11.1"))
    assert TensorRTEngine.load(bundle).encode(np.zeros((1, 32, 32, 3), np.uint8)).images == 1


def test_a_plan_that_tensorrt_refuses(trt, fp32_plans):
    trt.refuses = "Error Code 1:\nSerialization"
    with pytest.raises(EngineError) as error:
        TensorRTEngine.load(Bundle.load(fp32_plans))
    assert_says(error, "vision.plan", "tensorrt_rtx", "Error Code 1: Serialization")


def spoil_type(content: dict) -> None:
    content["graphs"][-1]["inputs"][0]["dtype"] = "int32"


def spoil_name(content: dict) -> None:
    content["graphs"][-1]["outputs"][0]["name"] = "scores"


def drop_profile(content: dict) -> None:
    del content["graphs"][-1]["plan"]["profiles"][1]


def drop_range(content: dict) -> None:
    del content["graphs"][-1]["plan"]["profiles"][1]["k"]


def drop_plan(content: dict) -> None:
    del content["graphs"][-1]


@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize(
    ("edit", "values"),
    [
        (spoil_type, ["decoder.plan", "('tokens', 'int64')", "('tokens', 'int32')"]),
        (spoil_name, ["decoder.plan", "('present.0.key', 'float", "('scores', 'float"]),
        (drop_profile, ["decoder.plan", "2 profiles", "1 profiles"]),
        (drop_range, ["decoder.plan", "profiles"]),
        (drop_plan, ["decoder", "--target tensorrt"]),
    ],
)
def test_a_manifest_that_describes_something_else(edit, values, fp32_plans, tmp_path):
    with pytest.raises(BundleError) as error:
        TensorRTEngine.load(edited(fp32_plans, tmp_path / "bundle", edit))
    assert_says(error, *values)


def test_cuda_graphs_only_where_the_library_has_them(trt, fp32_plans, photos, monkeypatch):
    for wanted in (False, True):
        engine = TensorRTEngine.load(Bundle.load(fp32_plans), cuda_graphs=wanted)
        engine.encode(np.zeros((1, 32, 32, 3), np.uint8))
        config = trt.contexts[-1].config
        assert (config is not None) == wanted
        assert not wanted or config.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE"
    monkeypatch.delattr(FakeTensorRT, "CudaGraphStrategy")
    TensorRTEngine.load(Bundle.load(fp32_plans), cuda_graphs=True).encode(np.zeros((1, 32, 32, 3), np.uint8))
    assert trt.contexts[-1].config is None


def test_layout():
    dtypes = {name: np.dtype(np.int16) for name in "abc"}
    layout = Layout(dtypes, {"a": (1,), "b": (0, 3), "c": (2, ALIGNMENT // 4 + 1)})
    assert layout.addresses(1000) == {"a": 1000, "b": 1256, "c": 1256}
    assert layout.size == 768
    memory = np.zeros(layout.size, np.uint8)
    layout.view(memory, "c")[1, -1] = 7
    assert memory.nonzero()[0].tolist() == [256 + ALIGNMENT + 2]


def test_the_first_profile_that_allows_the_sizes():
    def allow(low: list[int], high: list[int]) -> dict[str, ProfileRange]:
        return {"x": ProfileRange(min=low, opt=low, max=high)}

    profiles = [allow([1, 0], [2, 0]), allow([1, 1], [8, 5]), allow([1, 1], [16, 5])]
    assert [choose_profile(profiles, {"x": size}, "a.plan") for size in ([2, 0], [2, 1], [9, 5])] == [0, 1, 2]
    for size in ([3, 0], [2]):
        with pytest.raises(SearchError) as error:
            choose_profile(profiles, {"x": size}, "a.plan")
        assert_says(error, "a.plan", f"x {size}")


def test_the_fake_has_nothing_that_the_real_library_lacks():
    trt = pytest.importorskip("tensorrt_rtx")
    assert {"ERROR", "INTERNAL_ERROR"} <= set(dir(trt.ILogger.Severity))
    assert hasattr(trt.TensorLocation, "HOST")
    assert hasattr(trt.CudaGraphStrategy, "WHOLE_GRAPH_CAPTURE")
    assert hasattr(trt.IRuntimeConfig, "cuda_graph_strategy")
    for name in ("FakeRuntime", "FakeEngine", "FakeContext"):
        real = {"FakeRuntime": trt.Runtime, "FakeEngine": trt.ICudaEngine, "FakeContext": trt.IExecutionContext}[name]
        methods = [name for name in vars(getattr(sys.modules[FakeDevice.__module__], name)) if not name.startswith("_")]
        assert [method for method in methods if not hasattr(real, method)] == []


def test_the_real_library_refuses_a_plan_in_one_sentence(device, fp32_plans, tmp_path):
    trt = pytest.importorskip("tensorrt_rtx")
    bundle = edited(fp32_plans, tmp_path / "bundle", set_plan(version=trt.__version__))
    with pytest.raises(EngineError) as error:
        TensorRTEngine.load(bundle)
    assert_says(error, "vision.plan", "erializ")
    assert PlanSettings.model_validate(bundle.manifest.graphs[-1].plan)
