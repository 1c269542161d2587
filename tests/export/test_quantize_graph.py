from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from itune.export.decoder import build_decoder
from itune.export.graph import MICROSOFT, Graph
from itune.export.quantize import snap_blockwise, snap_per_channel
from itune.export.quantize_graph import quantize_graph, read_weights
from itune.export.vision import build_vision
from itune.model import LoadedCheckpoint

SMALL = ("wpe", "position", "class", "normalize")  # what is looked up or added stays fp32


@pytest.fixture(scope="module")
def graphs(clip_checkpoint, onnx_checkpoint, tmp_path_factory) -> dict[str, Path]:
    """fp32 graphs: a decoder, a transformer tower and a convolutional tower."""
    folder = tmp_path_factory.mktemp("fp32")
    clip, conv = LoadedCheckpoint.load(clip_checkpoint), LoadedCheckpoint.load(onnx_checkpoint)
    built = {
        "decoder": build_decoder(clip.model),
        "clip": build_vision(clip.model, clip.tower),
        "conv": build_vision(conv.model, conv.tower),
    }
    return {name: graph.save(folder / f"{name}.onnx")[0] for name, graph in built.items()}


@pytest.mark.parametrize("name", ["decoder", "clip", "conv"])
def test_every_weight_is_int8_and_reads_back(graphs, name, tmp_path):
    (path,) = quantize_graph(graphs[name], tmp_path / "int8.onnx")
    before, after = read_weights(graphs[name]), read_weights(path)
    assert before.keys() == after.keys()
    rewritten = 0
    for weight_name, weight in before.items():
        found = after[weight_name]
        assert (found.shape, found.dtype) == (weight.shape, weight.dtype)
        if np.array_equal(found, weight):
            assert weight.ndim < 2 or any(part in weight_name for part in SMALL), weight_name
            continue
        rewritten += 1
        snapped = (
            [snap_per_channel(weight)] if weight.ndim == 4 else [snap_blockwise(weight), snap_blockwise(weight.T).T]
        )
        assert any(np.array_equal(found, grid) for grid in snapped), weight_name
    assert rewritten >= 3
    assert {n.op_type for n in Graph.load(path).nodes if n.domain == MICROSOFT} == {"MatMulNBits"}


@pytest.mark.parametrize("name", ["decoder", "clip", "conv"])
def test_quantising_what_was_read_back_loses_nothing_more(graphs, name, tmp_path):
    quantize_graph(graphs[name], tmp_path / "int8.onnx")
    restored = Graph.load(graphs[name])
    restored.weights |= read_weights(tmp_path / "int8.onnx")
    restored.save(tmp_path / "restored.onnx")
    quantize_graph(tmp_path / "restored.onnx", tmp_path / "again.onnx")
    once, twice = Graph.load(tmp_path / "int8.onnx").weights, Graph.load(tmp_path / "again.onnx").weights
    assert once.keys() == twice.keys()
    for weight, array in once.items():
        if array.dtype == np.float32:
            np.testing.assert_allclose(array, twice[weight], rtol=2e-7, err_msg=weight)
        else:
            np.testing.assert_array_equal(array, twice[weight], err_msg=weight)


def test_the_tied_embedding_is_stored_once(graphs, tmp_path):
    (path,) = quantize_graph(graphs["decoder"], tmp_path / "int8.onnx")
    graph = Graph.load(path)
    uses = Counter(name for node in graph.nodes for name in node.input)
    assert uses["transformer.wte.weight.int8"] == 2
    assert "transformer.wte.weight" not in graph.weights
    vocabulary = Graph.load(graphs["decoder"]).weights["transformer.wte.weight"].shape[0]
    stored = {n: w.nbytes for n, w in graph.weights.items() if vocabulary in w.shape}
    assert stored == {
        "transformer.wte.weight.int8": vocabulary * 64,
        "transformer.wte.weight.scales": vocabulary * 4,
    }


def test_widths_that_no_block_divides(tmp_path):
    """Embedding and head share padded codes: both must cut the padding off."""
    rng = np.random.default_rng(0)
    graph = Graph("odd")
    ids = graph.input("ids", np.int64, ["rows", "T"])
    table = graph.initializer("table", rng.standard_normal((9, 70), dtype=np.float32))
    bias = graph.initializer("bias", rng.standard_normal(9, dtype=np.float32))
    graph.op("Gather", table, ids, name="embedded")
    flat = graph.op("Reshape", "embedded", graph.constant([-1, 70]))
    graph.op("Gemm", flat, table, bias, transB=1, name="logits")
    graph.output("embedded", np.float32, ["rows", "T", 70])
    graph.output("logits", np.float32, ["rows * T", 9])
    graph.save(tmp_path / "fp32.onnx")
    (path,) = quantize_graph(tmp_path / "fp32.onnx", tmp_path / "int8.onnx")
    onnx.checker.check_model(onnx.load(path))

    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    rows = np.array([[0, 3], [8, 3]])
    embedded, logits = session.run(None, {"ids": rows})
    snapped = snap_blockwise(graph.weights["table"])
    np.testing.assert_allclose(embedded, snapped[rows], rtol=1e-6)
    expected = snapped[rows].reshape(-1, 70) @ snapped.T + graph.weights["bias"]
    np.testing.assert_allclose(logits, expected, atol=0.02 * expected.std())


def test_gemms_that_scale_stay_as_they_are(tmp_path):
    graph = Graph("scaled")
    x = graph.input("x", np.float32, ["rows", 64])
    weight = graph.initializer("weight", np.ones((64, 64), np.float32))
    graph.op("Gemm", x, weight, alpha=0.5, name="y")
    graph.output("y", np.float32, ["rows", 64])
    graph.save(tmp_path / "fp32.onnx")
    quantize_graph(tmp_path / "fp32.onnx", tmp_path / "int8.onnx")
    assert [node.op_type for node in Graph.load(tmp_path / "int8.onnx").nodes] == ["Gemm"]


def test_convolutions_run_in_fp32(graphs, tmp_path, pixels):
    """Only the storage is int8: the tower's output is that of the snapped weights."""
    (path,) = quantize_graph(graphs["conv"], tmp_path / "int8.onnx")
    int8, snapped = Graph.load(path), Graph.load(graphs["conv"])
    snapped.weights |= read_weights(path)
    assert sum(node.op_type == "DequantizeLinear" for node in int8.nodes) == 2
    (projection,) = (node for node in int8.nodes if node.op_type == "MatMulNBits")
    found = []
    for graph in (int8, snapped):
        graph.outputs = []
        graph.output(projection.input[0], np.float32, ["images", 16, 24])
        (file,) = graph.save(tmp_path / "tower.onnx")
        session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        found.append(session.run(None, {"pixels": pixels})[0])
    np.testing.assert_allclose(*found, atol=1e-5 * np.abs(found[1]).max())
