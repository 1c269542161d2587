"""The files that a graph refers to, compared with what the onnx library says about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import _get_all_tensors, uses_external_data

from itune.runtime.onnx_files import external_files, find_weights
from tests.conftest import refused


def tensor(name: str, location: str | None = None) -> TensorProto:
    made = numpy_helper.from_array(np.arange(6, dtype=np.float32), name)
    if location is not None:
        made.ClearField("raw_data")
        made.data_location = TensorProto.EXTERNAL
        for key, value in (("offset", "0"), ("location", location), ("length", "24")):
            made.external_data.add(key=key, value=value)
    return made


def model() -> onnx.ModelProto:
    inner = helper.make_graph([], "inner", [], [], [tensor("a", "sub/inner.bin"), tensor("b")])
    values, indices = tensor("v", "sparse values"), numpy_helper.from_array(np.arange(6), "i")
    nodes = [
        helper.make_node("Constant", [], ["c"], value=tensor("", "constant.data")),
        helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=helper.make_graph([], "e", [], [])),
        helper.make_node("Own", [], ["e"], domain="own", several=[tensor("x", "ä.bin"), tensor("y", "ä.bin")]),
    ]
    graph = helper.make_graph(nodes, "graph", [], [], [tensor("w", "model.onnx_data"), tensor("z")])
    graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [9]))
    made = helper.make_model(graph, ir_version=8)
    constant = helper.make_node("Constant", [], ["c"], value=tensor("", "function.bin"))
    made.functions.append(helper.make_function("own", "F", [], ["c"], [constant], made.opset_import))
    return made


def test_all_places_of_a_tensor_are_searched(tmp_path: Path) -> None:
    made = model()
    file = tmp_path / "model.onnx"
    file.write_bytes(made.SerializeToString())
    found = external_files(file)
    by_onnx = {
        entry.value
        for each in _get_all_tensors(made)
        if uses_external_data(each)
        for entry in each.external_data
        if entry.key == "location"
    }
    assert by_onnx <= set(found)
    places = ["constant.data", "function.bin", "model.onnx_data", "sparse values", "sub/inner.bin", "ä.bin"]
    assert found == sorted(places)


@pytest.mark.parametrize("external", [False, True])
def test_weights_are_those_that_onnx_reads(external: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "large": rng.normal(size=(300, 129)).astype(np.float32),
        "small": rng.integers(0, 255, (3, 5, 7), np.uint8),
        "scalar": np.array(7, np.int64),
        "empty": np.zeros((0, 4), np.float32),
        "half": rng.normal(size=9).astype(np.float16),
        "text": np.array(["a", "b"], object),
    }
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    path = tmp_path / "model.onnx"
    model = helper.make_model(helper.make_graph([], "g", [], [], tensors))
    onnx.save_model(model, path, save_as_external_data=external, location="data", size_threshold=20)
    found = find_weights(path)
    assert found.keys() == arrays.keys() - {"text"}
    for name, stored in found.items():
        array = stored.load()
        assert array.dtype == (np.float32 if name == "half" else arrays[name].dtype)
        np.testing.assert_array_equal(array, arrays[name])
    if external:
        (tmp_path / "data").write_bytes((tmp_path / "data").read_bytes()[:-40])
        with pytest.raises(ValueError, match=r"large|small"):
            find_weights(path)


def test_a_cut_graph_never_gives_a_wrong_answer(tmp_path: Path) -> None:
    content = model().SerializeToString()
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    expected = set(external_files(file))
    for length in range(1, len(content)):
        file.write_bytes(content[:length])
        try:
            assert set(external_files(file)) <= expected
        except ValueError:
            continue
        onnx.load_model_from_string(content[:length])
    for wrong in (b"", b"<html>", b"\xff" * 20, b"\x3a\xff\xff\xff\xff\x0f"):
        file.write_bytes(wrong)
        with refused(ValueError):
            external_files(file)
