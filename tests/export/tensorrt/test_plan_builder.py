"""The process that builds a plan: what it reports and how it fails; and the library that it takes."""

from __future__ import annotations

import importlib.util
import re
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


def test_progress_and_report(tmp_path):
    stages, reports = [], []
    plan = build_plan(one_operator(tmp_path, "Relu"), stages.append, reports.append)
    assert plan.bytes == (tmp_path / "one.plan").stat().st_size
    assert plan.peak_mb > 50
    assert reports == [plan.report]
    assert stages
    assert stages[0].startswith("building one.plan: ")


def test_an_operator_that_tensorrt_lacks(tmp_path):
    with pytest.raises(TensorRTError, match=r"^one.onnx: node QuickGelu: TensorRT cannot take operator QuickGelu: "):
        build_plan(one_operator(tmp_path, "QuickGelu", "com.microsoft"))
    assert not (tmp_path / "one.plan").exists()


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({}, "the profile is impossible: it has no range for input x"),
        (
            {"x": ([1, 7], [1, 7], [1, 7])},
            r"the profile is impossible: input x is \[-1, 8\] and not \[1, 7\] to \[1, 7\]",
        ),
        ({"x": ([1], [1], [1])}, "the profile is impossible: input x is"),
    ],
)
def test_an_impossible_profile(tmp_path, profile, message):
    request = one_operator(tmp_path, "Relu")
    ranges = {name: ProfileRange(min=low, opt=usual, max=high) for name, (low, usual, high) in profile.items()}
    with pytest.raises(TensorRTError, match=message):
        build_plan(request.model_copy(update={"profile": ranges}))


def test_a_builder_that_is_killed(tmp_path, monkeypatch):
    """As by a kernel that is out of memory."""
    script = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(tensorrt, "_command", lambda _request: ["python3", "-c", script])
    with pytest.raises(TensorRTError, match=r"one.onnx: .* killed by signal 9, perhaps for want of memory"):
        build_plan(one_operator(tmp_path, "Relu"))
    monkeypatch.setattr(tensorrt, "_command", lambda _request: ["python3", "-c", "raise SystemExit('no room')"])
    with pytest.raises(TensorRTError, match="ended without a plan: no room"):
        build_plan(one_operator(tmp_path, "Relu"))


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (
            "Unexpected exception std::bad_alloc",
            r"not enough memory \(.*bad_alloc\): give the machine more, or export smaller",
        ),
        ("", "not enough memory: give the machine more, or export smaller --max-batch and --max-beams"),
        ("Error Code 10: no implementation for h.0", "no plan could be built: Error Code 10: no implementation"),
    ],
)
def test_a_builder_that_gives_up(reason, message):
    """The first is what it said in a process of 700 MB of address space."""
    assert re.match(message, str(no_plan(reason)))


def test_unknown_gpus_are_answered_with_the_known_ones():
    with pytest.raises(TensorRTError, match=r"--gpu sm86,sm12: 'sm12' is no .* it knows sm80, sm86, sm89"):
        Library.find().choose_gpus("sm86,sm12")
    assert Library.find().choose_gpus("SM89, sm86,sm89") == ["sm89", "sm86"]
    assert "sm86" in Library.find().choose_gpus(None)


def test_without_tensorrt(monkeypatch):
    monkeypatch.setattr(tensorrt, "find_spec", lambda _name: None)
    with pytest.raises(TensorRTError, match=r"TensorRT is not installed; .* pip install 'itune\[tensorrt\]'"):
        Library.find()


def test_tensorrt_comes_first_and_must_be_new_enough(monkeypatch):
    """`tensorrt` builds for the machine's own GPU, and has no compute capabilities to choose."""
    module = SimpleNamespace(__version__="10.13.2", IBuilderConfig=object)
    monkeypatch.setattr(tensorrt, "find_spec", lambda _name: object())
    monkeypatch.setattr(tensorrt, "import_module", lambda _name: module)
    with pytest.raises(TensorRTError, match=r"tensorrt 10.13.2 is too old"):
        Library.find()
    module.__version__ = "11.0.0.114"
    library = Library.find()
    assert (library.flavour, library.version, library.known_gpus) == ("tensorrt", "11.0.0.114", [])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(TensorRTError, match="there is none here: use tensorrt-rtx"):
        library.choose_gpus(None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 6))
    assert library.choose_gpus(None) == ["sm86"]
    with pytest.raises(TensorRTError, match=r"--gpu sm89: .* own GPU only, sm86"):
        library.choose_gpus("sm89")
