"""The process that builds a plan: what it reports and how it fails; and the library that it takes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from itune.export.graph.builder import Graph
from itune.export.tensorrt import library as tensorrt
from itune.export.tensorrt.library import Library, PlanRequest, TensorRTError, build_plan
from itune.export.tensorrt.plan_builder import no_plan
from itune.runtime.bundle import ProfileRange

pytestmark = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, tensorrt.LIBRARIES)), reason="TensorRT is not installed: no plan can be built"
)


def one_operator(folder: Path, op: str, domain: str = "") -> PlanRequest:
    graph = Graph("one")
    x = graph.input("x", np.float32, ["rows", 8])
    graph.op(op, x, name="y", domain=domain)
    graph.output("y", np.float32, ["rows", 8])
    graph.save(folder / "one.onnx")
    sizes = ProfileRange(min=[1, 8], opt=[2, 8], max=[4, 8])
    return PlanRequest(
        source=folder / "one.onnx", target=folder / "one.plan", profile={"x": sizes}, compute_capabilities=["sm86"]
    )


def build(request):
    """Stages and layer reports of a build."""
    stages, reports = [], []
    build_plan(request, stages.append, reports.append)
    return stages, reports


def test_progress_and_report(tmp_path):
    stages, (report,) = build(one_operator(tmp_path, "Relu"))
    assert (tmp_path / "one.plan").stat().st_size > 1000
    assert (report.inputs, report.outputs) == ({"x": "float32"}, {"y": "float32"})
    assert stages[0].startswith("building one.plan: ")


def test_an_operator_that_tensorrt_lacks_is_named(tmp_path):
    with pytest.raises(TensorRTError) as error:
        build(one_operator(tmp_path, "QuickGelu", "com.microsoft"))
    assert "one.onnx" in str(error.value)
    assert "QuickGelu" in str(error.value)
    assert not (tmp_path / "one.plan").exists()


@pytest.mark.parametrize("sizes", [[1, 7], [1]])
def test_a_profile_of_another_shape_is_refused(tmp_path, sizes):
    profile = {"x": ProfileRange(min=sizes, opt=sizes, max=sizes)}
    with pytest.raises(TensorRTError) as error:
        build(one_operator(tmp_path, "Relu").model_copy(update={"profile": profile}))
    assert "one.onnx" in str(error.value)
    assert " x " in str(error.value)


@pytest.mark.parametrize(
    ("reason", "short"),
    [("Unexpected exception std::bad_alloc", True), ("Error Code 10: no implementation for h.0", False)],
)
def test_a_builder_that_fails(reason, short):
    """The first is what it said in a process of 700 MB of address space."""
    message = str(no_plan(reason))
    assert reason in message
    assert ("--max-batch" in message) == short


def test_unknown_gpus_are_answered_with_the_known_ones():
    with pytest.raises(TensorRTError) as error:
        Library.find().choose_gpus("sm86,sm12")
    assert all(value in str(error.value) for value in ("--gpu sm86,sm12", "sm80, sm86, sm89"))
    assert Library.find().choose_gpus("SM89, sm86,sm89") == ["sm89", "sm86"]
    assert "sm86" in Library.find().choose_gpus(None)


def test_without_tensorrt(monkeypatch):
    monkeypatch.setattr(tensorrt, "find_spec", lambda _name: None)
    with pytest.raises(TensorRTError) as error:
        Library.find()
    assert "pip install 'itune-captioner[tensorrt]'" in str(error.value)


def test_a_tensorrt_that_cannot_be_imported(monkeypatch):
    def fail(_name):
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(tensorrt, "import_module", fail)
    with pytest.raises(TensorRTError) as error:
        Library.find()
    assert "libnvinfer.so.10" in str(error.value)


def test_tensorrt_comes_first_and_must_be_new_enough(monkeypatch):
    """`tensorrt` builds for the machine's own GPU, and has no compute capabilities to choose."""
    module = SimpleNamespace(__version__="10.13.2", IBuilderConfig=object)
    monkeypatch.setattr(tensorrt, "find_spec", lambda _name: object())
    monkeypatch.setattr(tensorrt, "import_module", lambda _name: module)
    with pytest.raises(TensorRTError) as error:
        Library.find()
    assert "10.13.2" in str(error.value)
    module.__version__ = "11.0.0.114"
    library = Library.find()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert (library.flavour, library.version, library.known_gpus) == ("tensorrt", "11.0.0.114", [])
    with pytest.raises(TensorRTError) as error:
        library.choose_gpus(None)
    assert "tensorrt-rtx" in str(error.value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 6))
    assert library.choose_gpus(None) == ["sm86"]
    with pytest.raises(TensorRTError) as error:
        library.choose_gpus("sm89")
    assert "--gpu sm89" in str(error.value)
    assert "sm86" in str(error.value)
