"""Which engine runs a bundle and what it reports; ONNX Runtime on CUDA as far as a CPU can test it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnxruntime import InferenceSession

from itune import Captioner
from itune.cli import run as command
from itune.loading import load_captioner
from itune.runtime.captioner import ENGINES
from itune.runtime.engines import choice
from itune.runtime.engines import onnxruntime as onnxruntime_engine
from itune.runtime.engines.cuda import CudaDevice
from itune.runtime.engines.onnxruntime import CUDA, OnnxRuntimeCudaEngine, OnnxRuntimeEngine, open_session
from itune.runtime.errors import BundleError, EngineError, ItuneError
from tests.runtime.plans import make_plan_bundle


@pytest.fixture(scope="module")
def plans(checkpoint_folder, tmp_path_factory) -> Path:
    return make_plan_bundle(checkpoint_folder, tmp_path_factory.mktemp("plans") / "bundle", half=True)


@pytest.fixture
def no_gpu(monkeypatch) -> None:
    """A machine without one, whatever this is."""

    def refuse(_self: CudaDevice) -> None:
        raise EngineError("there is no NVIDIA GPU here")

    monkeypatch.setattr(CudaDevice, "__init__", refuse)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])


@pytest.fixture
def onnxruntime_gpu(monkeypatch):
    """What is installed looks like onnxruntime-gpu, which falls back to the CPU silently."""
    real = ort.InferenceSession

    def session(path, options, providers, **options_of_python):
        assert providers[0] == CUDA or providers == ["CPUExecutionProvider"]
        return real(path, options, providers=["CPUExecutionProvider"], **options_of_python)

    monkeypatch.setattr(ort, "InferenceSession", session)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("no libraries"), raising=False)


class Bound(OnnxRuntimeCudaEngine):
    """The engine for CUDA, its bindings on the CPU."""

    device = "cpu"


@pytest.mark.usefixtures("no_gpu")
def test_plans_without_a_gpu_say_what_runs_here(plans):
    for engine in ("auto", "tensorrt"):
        with pytest.raises(EngineError) as error:
            Captioner.load(plans, engine=engine)
        assert str(plans) in str(error.value)
        assert "no NVIDIA GPU" in str(error.value)
        assert "--engine onnxruntime" in str(error.value)


@pytest.mark.usefixtures("no_gpu")
def test_an_evaluation_takes_the_engine_asked_for(plans):
    with pytest.raises(EngineError):
        load_captioner(plans)
    assert load_captioner(plans, engine="onnxruntime").engine_name == "onnxruntime"


@pytest.mark.usefixtures("no_gpu")
def test_without_plans_the_cpu_is_taken_silently(bundle):
    captioner = Captioner.load(bundle, threads=1)
    assert (captioner.engine_name, captioner.engine_notice) == ("onnxruntime", None)


def test_an_unknown_engine(bundle):
    with pytest.raises(ItuneError) as error:
        Captioner.load(bundle, engine="torch")
    assert all(engine in str(error.value) for engine in (*ENGINES, "torch"))


def test_tensorrt_without_plans(bundle):
    with pytest.raises(BundleError) as error:
        Captioner.load(bundle, engine="tensorrt")
    assert "--target tensorrt" in str(error.value)


def test_onnxruntime_without_cuda(bundle, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineError) as error:
        Captioner.load(bundle, engine="onnxruntime-cuda")
    assert "onnxruntime-gpu" in str(error.value)


@pytest.mark.usefixtures("onnxruntime_gpu")
def test_a_silent_fallback_is_noticed(bundle, plans, capsys, monkeypatch):
    with pytest.raises(EngineError) as error:
        Captioner.load(bundle, engine="onnxruntime-cuda")
    fell_back = str(error.value)
    assert "(no libraries)" in fell_back
    assert "pip install" in fell_back
    captioner = Captioner.load(bundle, threads=1)
    assert captioner.engine_name == "onnxruntime"
    assert captioner.engine_notice == f"captioning on the CPU: {fell_back}"
    monkeypatch.setattr(CudaDevice, "__init__", lambda _self: (_ for _ in ()).throw(EngineError("no driver")))
    with pytest.raises(EngineError) as error:
        Captioner.load(plans)
    assert "no driver" in str(error.value)
    assert fell_back in str(error.value)
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("onnxruntime_gpu")
def test_plans_fall_to_onnx_runtime_on_cuda(plans, monkeypatch):
    monkeypatch.setattr(CudaDevice, "__init__", lambda _self: (_ for _ in ()).throw(EngineError("no driver")))
    monkeypatch.setattr(choice, "OnnxRuntimeCudaEngine", Bound)
    monkeypatch.setattr(onnxruntime_engine, "CUDA", "CPUExecutionProvider")
    captioner = Captioner.load(plans, threads=1)
    assert captioner.engine_name == "onnxruntime-cuda"
    assert captioner.engine_notice == "captioning with ONNX Runtime on CUDA, as TensorRT cannot run here: no driver"


@pytest.mark.usefixtures("onnxruntime_gpu")
def test_graphs_that_cannot_run_on_cuda_run_on_the_cpu(bundle, monkeypatch):
    def fail(*_arguments):
        raise RuntimeError("CUDA kernel of GroupQueryAttention\nwithout an attention bias")

    monkeypatch.setattr(choice, "OnnxRuntimeCudaEngine", Bound)
    monkeypatch.setattr(onnxruntime_engine, "CUDA", "CPUExecutionProvider")
    monkeypatch.setattr(InferenceSession, "run_with_iobinding", fail)
    captioner = Captioner.load(bundle, threads=1)
    assert captioner.engine_name == "onnxruntime"
    assert "CUDA kernel of GroupQueryAttention" in captioner.engine_notice
    assert "without an attention bias" not in captioner.engine_notice
    assert "fp16" in captioner.engine_notice


def test_bound_to_a_device_the_candidates_are_the_same(plans):
    """The bindings that keep visual state and cache on the device, tried where the device is the CPU."""
    paths = [plans / "vision.onnx", plans / "decoder.onnx"]
    bound, plain = (engine(*(open_session(path, 1) for path in paths), 300) for engine in (Bound, OnnxRuntimeEngine))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 32, 32, 3), np.uint8)
    states = bound.encode(pixels), plain.encode(pixels)
    tokens, parents = np.full((3, 1), 1), np.arange(3)
    for _ in range(4):
        found, expected = (
            one.step(tokens, parents, state, 7) for one, state in zip((bound, plain), states, strict=True)
        )
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)
        for state in states:
            state.keep(np.array([0, 2]) if state.images == 3 else np.arange(2))
        rows = len(tokens) // 3 if len(tokens) == 3 else 2
        parents = np.array([0, 0, 2, 2]) if rows == 1 else np.array([0, 1, 3, 2])
        tokens = rng.integers(0, 200, (4, 1))


@pytest.mark.usefixtures("no_gpu")
def test_itune_run_without_a_gpu(plans, photos, monkeypatch, capsys):
    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["itune-run", str(photos[0]), "--bundle", str(plans), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            command.main()
        return int(ended.value.code or 0)

    assert run("--json") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("itune-run: error: ")
    assert err.count("\n") == 1
    assert "--engine onnxruntime" in err
    assert run("--json", "--engine", "onnxruntime") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["caption"]
    assert err == ""


@pytest.mark.usefixtures("onnxruntime_gpu")
def test_itune_run_says_what_auto_took(bundle, photos, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["itune-run", str(photos[0]), "--bundle", str(bundle), "--json"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert not ended.value.code
    out, err = capsys.readouterr()
    assert json.loads(out)["caption"]
    assert "itune-run: captioning on the CPU" in err
