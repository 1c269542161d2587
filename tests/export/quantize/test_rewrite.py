from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from itune.export.graph.builder import MICROSOFT, Graph
from itune.export.methods.registry import build_decoder, build_vision
from itune.export.quantize.integer_matmul import Blocks, Rows
from itune.export.quantize.rewrite import float_graph, halve_graph, quantize_graph, read_weights
from itune.export.quantize.weights import snap_blockwise, snap_per_channel
from itune.loading import LoadedCheckpoint
from itune.runtime.engines.onnxruntime import open_session
from itune.runtime.errors import ItuneError

SCHEMES = [Blocks(8), Blocks(4), Rows()]
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


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("name", ["decoder", "clip", "conv"])
def test_every_weight_is_rounded_and_reads_back(graphs, name, scheme, tmp_path):
    (path,) = quantize_graph(graphs[name], tmp_path / "small.onnx", scheme)
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
        assert any(np.array_equal(found, grid) for grid in grids(weight, scheme, weight_name)), weight_name
    assert rewritten >= 3
    expected = {"MatMulIntegerToFloat"} if isinstance(scheme, Rows) else {"MatMulNBits"}
    expected |= {"MatMulNBits"} if name == "decoder" else set()  # its head
    assert {n.op_type for n in Graph.load(path).nodes if n.domain == MICROSOFT} == expected


def grids(weight: np.ndarray, scheme: Blocks | Rows, name: str) -> list[np.ndarray]:
    """What a weight may have become, in either orientation."""
    if weight.ndim == 4:
        return [snap_per_channel(weight)]
    if "wte" in name or "lm_head" in name:
        return [snap_blockwise(weight)]
    if isinstance(scheme, Rows):
        return [snap_per_channel(weight), snap_per_channel(weight.T).T]
    return [snap_blockwise(weight, scheme.bits), snap_blockwise(weight.T, scheme.bits).T]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("name", ["decoder", "clip", "conv"])
def test_quantising_what_was_read_back_loses_nothing_more(graphs, name, scheme, tmp_path):
    quantize_graph(graphs[name], tmp_path / "small.onnx", scheme)
    float_graph(tmp_path / "small.onnx").save(tmp_path / "restored.onnx")
    quantize_graph(tmp_path / "restored.onnx", tmp_path / "again.onnx", scheme)
    once, twice = Graph.load(tmp_path / "small.onnx").weights, Graph.load(tmp_path / "again.onnx").weights
    assert once.keys() == twice.keys() | {n for n in once if "constant." in n}
    for weight, array in twice.items():
        if array.dtype == np.float32:
            np.testing.assert_allclose(array, once[weight], rtol=2e-7, err_msg=weight)
        else:
            np.testing.assert_array_equal(array, once[weight], err_msg=weight)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("name", ["clip", "conv"])
def test_integer_products_are_near_those_of_the_rounded_weights(graphs, name, scheme, tmp_path, pixels):
    (path,) = quantize_graph(graphs[name], tmp_path / "small.onnx", scheme)
    (floats,) = float_graph(path).save(tmp_path / "floats.onnx")
    assert {node.op_type for node in Graph.load(floats).nodes} <= {
        n.op_type for n in Graph.load(graphs[name]).nodes
    } | {"Gemm"}
    found, expected = (open_session(file, 1).run(None, {"pixels": pixels}) for file in (path, floats))
    for one, other in zip(found, expected, strict=True):
        assert np.sqrt(np.mean((one - other) ** 2)) < 0.06 * np.sqrt(np.mean(other**2))


@pytest.mark.parametrize("name", ["decoder", "clip", "conv"])
def test_half_precision_is_storage_only(graphs, name, tmp_path):
    (path,) = halve_graph(graphs[name], tmp_path / "half.onnx")
    onnx.checker.check_model(onnx.load(path))
    stored, before, after = Graph.load(path), read_weights(graphs[name]), read_weights(path)
    assert before.keys() == after.keys()
    assert set(stored.opsets) == {""}
    for weight, array in before.items():
        half = array.dtype == np.float32 and array.ndim > 1
        assert (f"{weight}.fp16" in stored.weights) == half
        expected = array.astype(np.float16).astype(np.float32) if half else array
        np.testing.assert_array_equal(after[weight], expected, err_msg=weight)
    assert [n.op_type for n in float_graph(path).nodes] == [n.op_type for n in Graph.load(graphs[name]).nodes]


def test_weights_too_large_for_half_precision_are_refused(tmp_path):
    graph = Graph("large")
    weight = graph.initializer("weight", np.full((2, 2), 1e5, np.float32))
    graph.op("MatMul", graph.input("x", np.float32, ["rows", 2]), weight, name="y")
    graph.output("y", np.float32, ["rows", 2])
    graph.save(tmp_path / "fp32.onnx")
    with pytest.raises(ItuneError) as error:
        halve_graph(tmp_path / "fp32.onnx", tmp_path / "half.onnx")
    assert "weight weight" in str(error.value)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_row_never_depends_on_the_others(scheme, tmp_path):
    """Not even a row of zeros beside one that is a million times louder than the third."""
    rng = np.random.default_rng(0)
    graph = Graph("product")
    weight = graph.initializer("weight", rng.standard_normal((96, 40), dtype=np.float32))
    graph.op("MatMul", graph.input("x", np.float32, ["images", "N", 96]), weight, name="y")
    graph.output("y", np.float32, ["images", "N", 40])
    graph.save(tmp_path / "fp32.onnx")
    (path,) = quantize_graph(tmp_path / "fp32.onnx", tmp_path / "small.onnx", scheme)
    session = open_session(path, 1)
    x = rng.standard_normal((3, 5, 96), dtype=np.float32) * np.float32([[[0]], [[1e6]], [[1]]])
    (together,) = session.run(None, {"x": x})
    for i in range(3):
        np.testing.assert_array_equal(session.run(None, {"x": x[i : i + 1]})[0][0], together[i])
    assert not together[0].any()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_tied_embedding_is_stored_once_in_8_bits(graphs, scheme, tmp_path):
    (path,) = quantize_graph(graphs["decoder"], tmp_path / "int8.onnx", scheme)
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
    graph = Graph("padded")
    ids = graph.input("ids", np.int64, ["rows", "T"])
    table = graph.initializer("table", rng.standard_normal((9, 70), dtype=np.float32))
    bias = graph.initializer("bias", rng.standard_normal(9, dtype=np.float32))
    graph.op("Gather", table, ids, name="embedded")
    flat = graph.op("Reshape", "embedded", graph.constant([-1, 70]))
    graph.op("Gemm", flat, table, bias, transB=1, name="logits")
    graph.output("embedded", np.float32, ["rows", "T", 70])
    graph.output("logits", np.float32, ["rows * T", 9])
    graph.save(tmp_path / "fp32.onnx")
    (path,) = quantize_graph(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", Blocks())
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
    quantize_graph(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", Blocks())
    assert [node.op_type for node in Graph.load(tmp_path / "int8.onnx").nodes] == ["Gemm"]


def test_convolutions_run_in_fp32(graphs, tmp_path, pixels):
    """Only the storage is int8: the tower's output is that of the snapped weights."""
    (path,) = quantize_graph(graphs["conv"], tmp_path / "int8.onnx", Blocks())
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
