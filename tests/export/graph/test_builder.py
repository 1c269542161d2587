from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from itune.export.graph import builder as graph_module
from itune.export.graph.builder import Graph
from itune.runtime.errors import ItuneError


def small_graph() -> Graph:
    graph = Graph("small")
    x = graph.input("x", np.float32, ["rows", 40])
    weight = graph.initializer("weight", np.random.default_rng(0).standard_normal((40, 30), dtype=np.float32))
    with graph.scope("layer"):
        first = graph.op("MatMul", x, weight)
        scaled = graph.op("Mul", first, graph.constant(2, np.float32))
        graph.op("Mul", scaled, graph.constant(2, np.float32), name="y")
    graph.output("y", np.float32, ["rows", 30])
    return graph


def run(path) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.ones((2, 40), np.float32)})[0]


@pytest.fixture(params=["inside the graph", "in a file of their own"])
def weights(request, monkeypatch) -> str:
    if request.param == "in a file of their own":
        monkeypatch.setattr(graph_module, "EXTERNAL_BYTES", 1)
    return request.param


def test_saved_graphs_run_and_read_back(tmp_path, weights):
    files = small_graph().save(tmp_path / "small.onnx")
    assert [file.name for file in files] == ["small.onnx", "small.onnx.data"][: len(files)]
    assert len(files) == (1 if weights == "inside the graph" else 2)
    assert sorted(tmp_path.iterdir()) == sorted(files)
    onnx.checker.check_model(str(files[0]), full_check=True)
    np.testing.assert_allclose(run(files[0]), 4 * small_graph().weights["weight"].sum(0)[None].repeat(2, 0), rtol=1e-5)

    again = Graph.load(files[0])
    assert [node.name for node in again.nodes] == ["layer/MatMul", "layer/Mul", "layer/Mul_1"]
    np.testing.assert_array_equal(again.weights["weight"], small_graph().weights["weight"])
    (tmp_path / "copy").mkdir()
    for file, copy in zip(files, again.save(tmp_path / "copy" / "small.onnx"), strict=True):
        assert file.read_bytes() == copy.read_bytes()


def test_weights_that_no_node_reads_are_dropped_but_not_those_of_graphs_inside_nodes():
    graph, inner = Graph("outer"), Graph("inner")
    for name in ("inner.weight", "unused.weight"):
        graph.initializer(name, np.ones(3, np.float32))
    inner.op("Identity", "inner.weight", name="x")
    inner.output("x", np.float32, [3])
    branch = inner.to_model([]).graph
    graph.op("If", graph.constant(True, np.bool_), then_branch=branch, else_branch=branch, name="y")
    graph.drop_unused_weights()
    assert "inner.weight" in graph.weights
    assert "unused.weight" not in graph.weights


def test_equal_constants_are_one(tmp_path):
    assert len(small_graph().weights) == 2


def test_names_cannot_be_taken_twice():
    graph = small_graph()
    with pytest.raises(AssertionError):
        graph.initializer("weight", np.zeros(1))
    with pytest.raises(AssertionError):
        graph.op("Identity", "x", name="y")


def test_appending_to_a_graph_that_was_read(tmp_path):
    (file,) = small_graph().save(tmp_path / "small.onnx")
    graph = Graph.load(file)
    with graph.scope("layer"):
        graph.op("Mul", "y", "y", name="squared")
    graph.outputs = []
    graph.output("squared", np.float32, ["rows", 30])
    (squared,) = graph.save(tmp_path / "squared.onnx")
    np.testing.assert_allclose(run(squared), run(file) ** 2, rtol=1e-6)
    assert len({node.name for node in graph.nodes}) == len(graph.nodes)


def test_weights_outside_the_folder_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(graph_module, "EXTERNAL_BYTES", 1)
    path, data = small_graph().save(tmp_path / "inner" / "small.onnx")
    data.rename(tmp_path / "outside.data")
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../outside.data"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ItuneError) as error:
        Graph.load(path)
    assert "outside.data" in str(error.value)


def test_a_cut_file_of_weights_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(graph_module, "EXTERNAL_BYTES", 1)
    path, data = small_graph().save(tmp_path / "small.onnx")
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ItuneError) as error:
        Graph.load(path)
    assert data.name in str(error.value)
    assert "weight weight" in str(error.value)
