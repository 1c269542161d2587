"""The roofline: counts are exact on products that can be counted by hand; a report on a tiny bundle is plausible."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from itune.export.bundle import export_bundle
from itune.export.options import ExportOptions
from tests.conftest import REPOSITORY

ROOFLINE = REPOSITORY / "benchmarks" / "roofline.py"


@pytest.fixture
def roofline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOFLINE.parent))
    import roofline

    return roofline


def save(path: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], shape: list[int]) -> Path:
    graph = helper.make_graph(
        nodes,
        "counted",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_float_products_are_counted(roofline: ModuleType, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["patches"], strides=[4, 4]),  # [2, 5, 2, 2]
        helper.make_node("Reshape", ["patches", "shape"], ["rows"]),  # [2, 5, 4]
        helper.make_node("MatMul", ["rows", "w"], ["wide"]),  # [2, 5, 7]
        helper.make_node("Transpose", ["wide"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["wide", "turned"], ["y"]),  # [2, 5, 5]
    ]
    weights = {
        "kernel": np.ones((5, 3, 4, 4), np.float32),
        "w": np.ones((4, 7), np.float32),
        "shape": np.array([2, 5, 4]),
    }
    path = save(tmp_path / "float.onnx", nodes, weights, [2, 3, 8, 8])
    fp32, int8, megabytes = roofline.products(path, {"x": np.ones((2, 3, 8, 8), np.float32)})
    expected = 2 * (40 * 48 + 70 * 4 + 50 * 7)
    assert fp32 * 1e9 == pytest.approx(expected)
    assert int8 == 0
    assert megabytes * 1e6 == 2 * 5 * 5 * 4
    assert roofline.weight_bytes(path) == 240 * 4 + 28 * 4 + 3 * 8


def test_integer_products_are_counted_apart(roofline: ModuleType, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
        helper.make_node("MatMulInteger", ["q", "w", "zero"], ["sums"]),  # [5, 6]
        helper.make_node("Cast", ["sums"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["a"]),
        helper.make_node("DequantizeLinear", ["w", "one"], ["b"]),
        helper.make_node("MatMul", ["a", "b"], ["fake"]),  # int8 in fact, once ONNX Runtime has fused it
        helper.make_node("Add", ["floats", "fake"], ["y"]),
    ]
    weights = {"w": np.ones((4, 6), np.int8), "one": np.float32(1)}
    path = save(tmp_path / "integer.onnx", nodes, weights, [5, 4])
    fp32, int8, _ = roofline.products(path, {"x": np.ones((5, 4), np.float32)})
    assert fp32 == 0
    assert int8 * 1e9 == pytest.approx(2 * 2 * 30 * 4)


def test_tables_of_rows_are_not_read_whole(roofline: ModuleType, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "index"], ["row"]),
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["row", "product"], ["y"]),
    ]
    weights = {
        "table": np.ones((100, 6), np.float32),
        "index": np.array([3]),
        "w": np.ones((4, 6), np.float32),
    }
    assert roofline.weight_bytes(save(tmp_path / "lookup.onnx", nodes, weights, [1, 4])) == 4 * 6 * 4


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_report(precision: str, checkpoint_folder: Path, tmp_path: Path) -> None:
    bundle = tmp_path / precision
    export_bundle(checkpoint_folder, bundle, ExportOptions(precision=precision, verify=False))
    command = [sys.executable, ROOFLINE, bundle, "--threads", "1", "--repeats", "1", "--new-tokens", "4"]
    done = subprocess.run(
        [*map(str, command), "--json", str(tmp_path / "out.json")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert min(result["machine"][key] for key in ("gb_per_s", "fp32_gflops", "int8_gops")) > 0.1
    encode, step = result["stages"]
    assert encode["fp32_gflop"] > 0
    assert (encode["int8_gop"] > 0) == (precision == "int8")
    for stage in (encode, step):
        assert 0 < stage["floor_ms"] < stage["measured_ms"], "tiny products are all overhead"
        assert 0 < stage["megabytes"] < 1


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOFLINE), str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "is not a bundle" in done.stderr
    assert "Traceback" not in done.stderr
