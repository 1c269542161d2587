from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel

from itune.backbones import ClipTower
from itune.eager import EagerEngine
from itune.export.methods.registry import build_decoder, build_vision
from itune.export.quantize.integer_matmul import Blocks, Rows
from itune.export.quantize.rewrite import quantize_graph
from itune.methods.ituning.model import AdapterConfig, ITuningModel
from itune.runtime.bundle import MANIFEST, Bundle
from itune.runtime.captioner import Captioner
from itune.runtime.cpus import available_cpus
from itune.runtime.engines import onnxruntime as onnxruntime_engine
from itune.runtime.engines.onnxruntime import OnnxRuntimeEngine, open_session
from itune.runtime.errors import BundleError, EngineError
from itune.runtime.manifest import FileHash

VOCABULARY, WIDTH, TWINS = 60, 32, (11, 40)
PRECISIONS = ("fp32", "int8", "int4")
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "heads and dropping": {"heads": 4, "first": 2},
    "untied": {"heads": 2, "first": 1, "tie_word_embeddings": False, "n_inner": 70},
    "erf and layer scaling": {"activation_function": "gelu", "scale_attn_by_inverse_layer_idx": True},
    "relu and no scaling": {"activation_function": "relu", "scale_attn_weights": False},
}


def random_model(tower: ClipTower, heads: int = 1, first: int = 0, **config: object) -> ITuningModel:
    """Random adapters, biases and norms included, that look hard at the image; two tokens are the same."""
    torch.manual_seed(0)
    shape = {"n_layer": 3, "n_embd": WIDTH, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 32}
    language_model = GPT2LMHeadModel(GPT2Config(**(shape | config)))
    model = ITuningModel(language_model, AdapterConfig(WIDTH, tower.width, 16, heads, 2.5), first)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(float("ln_" in name and name.endswith("weight")), 0.25)
        language_model.lm_head.weight[TWINS[1]] = language_model.lm_head.weight[TWINS[0]]
    return model


@pytest.fixture(scope="module")
def tower(clip_folder: Path) -> ClipTower:
    return ClipTower(clip_folder)


@pytest.fixture(scope="module")
def pixels(tower: ClipTower) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (4, *tower.image.output_size, 3), np.uint8)


def export(model: ITuningModel, tower: ClipTower, folder: Path, *, fused: bool = False) -> tuple[Path, Path]:
    paths = folder / "vision.onnx", folder / "decoder.onnx"
    build_vision(model, tower).save(paths[0])
    build_decoder(model, fused=fused).save(paths[1])
    return paths


def engine_of(vision: Path, decoder: Path) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(open_session(vision, 1), open_session(decoder, 1), VOCABULARY)


@pytest.fixture(scope="module")
def engines(tower, tmp_path_factory) -> dict[str, OnnxRuntimeEngine]:
    """fp32, int8 and int4 of one model."""
    folder, model = tmp_path_factory.mktemp("engines"), random_model(tower, heads=2, first=1)
    paths = export(model, tower, folder)
    vision, decoder = export(model, tower, folder / "fused", fused=True)
    (int8_vision,) = quantize_graph(vision, folder / "int8-vision.onnx", Rows())
    small = {bits: quantize_graph(decoder, folder / f"int{bits}.onnx", Blocks(bits))[0] for bits in (8, 4)}
    return {"fp32": engine_of(*paths)} | {f"int{bits}": engine_of(int8_vision, small[bits]) for bits in small}


def assert_same(found, expected, case: str) -> None:
    assert found.logits.dtype == np.float32
    assert found.token_ids.dtype == np.int64
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-4, err_msg=case)
    np.testing.assert_allclose(found.logsumexp, expected.logsumexp, atol=1e-4, err_msg=case)
    different = found.token_ids != expected.token_ids
    close = np.abs(np.diff(expected.logits, axis=1)) < 1e-4
    near = np.pad(close, ((0, 0), (0, 1))) | np.pad(close, ((0, 0), (1, 0)))
    assert near[different].all(), case  # only what is nearly equal may change places


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_step_equals_eager(variant, fused, tower, pixels, tmp_path):
    model = random_model(tower, **VARIANTS[variant])
    engine, eager = engine_of(*export(model, tower, tmp_path, fused=fused)), EagerEngine(model, tower)
    rng = np.random.default_rng(0)
    prompts = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1]], np.bool_)
    for beams in (1, 2, 4):
        for mask in (prompts, None):
            states = engine.encode(pixels), eager.encode(pixels)
            tokens = rng.integers(0, VOCABULARY, (4, 4 if mask is not None else beams))
            parents, kept, first = np.arange(4), np.arange(4), mask
            for step, k in enumerate((1, 9, VOCABULARY, VOCABULARY + 5)):
                results = [
                    e.step(tokens, parents, s, k, mask=first) for e, s in zip((engine, eager), states, strict=True)
                ]
                assert_same(*results, f"{variant}, {beams} beams, prompts {mask is not None}, step {step}")
                first, rows = None, len(tokens) // len(kept)
                parents = kept.repeat(beams) * rows + rng.integers(0, rows, len(kept) * beams)
                if step == 1:  # the second of four images is finished
                    kept = np.array([0, 2, 3])
                    for state in states:
                        state.keep(kept)
                        assert state.images == 3
                    parents = parents.reshape(4, beams)[kept].reshape(-1)
                    kept = np.arange(3)
                tokens = rng.integers(0, VOCABULARY, (len(parents), 1))


def test_the_image_decides(engines, pixels):
    """A parity test on a model that ignores its image would prove nothing."""
    logits = []
    for images in ([0, 1], [1, 0]):
        state = engines["fp32"].encode(pixels[images])
        logits.append(step_of(engines["fp32"], state, np.zeros((2, 1), np.int64)))
    np.testing.assert_allclose(logits[0], logits[1][::-1], atol=1e-5)
    assert np.abs(logits[0][0] - logits[0][1]).max() > 0.5


def step_of(engine, state, tokens) -> np.ndarray:
    """The logits of all tokens, in order of their ids."""
    candidates = engine.step(tokens, np.arange(len(tokens)), state, VOCABULARY)
    return np.take_along_axis(candidates.logits, candidates.token_ids.argsort(axis=1), axis=1)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_equal_logits_stand_in_order_of_the_token_id(engines, pixels, precision):
    state = engines[precision].encode(pixels[:1])
    candidates = engines[precision].step(np.zeros((1, 1), np.int64), np.zeros(1, np.int64), state, VOCABULARY)
    order = candidates.token_ids[0].tolist()
    place = order.index(TWINS[0])
    assert order[place : place + 2] == list(TWINS)
    # and where only one of the two fits into k
    state = engines[precision].encode(pixels[:1])
    fewer = engines[precision].step(np.zeros((1, 1), np.int64), np.zeros(1, np.int64), state, place + 1)
    assert fewer.token_ids[0].tolist() == order[: place + 1]


@pytest.mark.parametrize(("precision", "limit"), [("int8", 0.05), ("int4", 0.5)])
def test_integers_stay_close_to_fp32(engines, pixels, precision, limit):
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (4, 5))
    logits = {p: step_of(engine, engine.encode(pixels), tokens) for p, engine in engines.items()}
    error = np.sqrt(np.mean((logits[precision] - logits["fp32"]) ** 2))
    assert 0 < error < limit * logits["fp32"].std()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_loud_neighbour_changes_no_bit(engines, pixels, precision):
    """The same image in the same place of a batch of the same shape: exactly the same candidates."""
    engine, results = engines[precision], []
    for loudness, token in ((1, 3), (1000, 7)):
        state = engine.encode(pixels[:2])
        state.visual = {name: second_image_times(loudness, value) for name, value in state.visual.items()}
        first = engine.step(np.array([[5], [token]]), np.arange(2), state, 9)
        second = engine.step(np.array([[5], [6], [token], [token]]), np.array([0, 0, 1, 1]), state, 9)
        results.append([first, second])
    for quiet, loud in zip(*results, strict=True):
        rows = len(quiet.logits) // 2
        for a, b in zip(quiet, loud, strict=True):
            np.testing.assert_array_equal(a[:rows], b[:rows])
        assert not np.array_equal(quiet.logits[rows:], loud.logits[rows:])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_loud_neighbour_changes_no_bit_in_the_encoder(engines, pixels, precision):
    engine = engines[precision]
    states = [engine.encode(np.stack([pixels[0], other])) for other in (pixels[1], np.full_like(pixels[1], 255))]
    for name, value in states[0].visual.items():
        np.testing.assert_array_equal(value.numpy()[0], states[1].visual[name].numpy()[0])
        assert not np.array_equal(value.numpy()[1], states[1].visual[name].numpy()[1])


def second_image_times(factor, value):
    array = value.numpy().copy()
    array[1] *= factor
    return type(value).ortvalue_from_numpy(array)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_alone_or_in_company(engines, pixels, precision):
    """Other shapes may sum in another order: the same tokens, logits within 1e-5 of their spread."""
    engine = engines[precision]
    tokens = np.array([[5], [6], [7], [8]])
    together = step_of(engine, engine.encode(pixels), tokens)
    for i in range(4):
        alone = step_of(engine, engine.encode(pixels[[i]]), tokens[[i]])
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5 * together.std())
        assert alone[0].argmax() == together[i].argmax()


def test_a_bundle_loads_with_the_threads_asked_for(bundle):
    engine = OnnxRuntimeEngine.load(Bundle.load(bundle), threads=1)
    for session in (engine.vision, engine.decoder):
        assert session.get_session_options().intra_op_num_threads == 1
    engine = OnnxRuntimeEngine.load(Bundle.load(bundle))
    assert engine.decoder.get_session_options().intra_op_num_threads == available_cpus()


def test_a_graph_that_is_none_is_one_sentence(bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    (copy / "decoder.onnx").write_bytes(b"this is not a graph")
    content = json.loads((copy / MANIFEST).read_text())
    content["files"]["decoder.onnx"] = FileHash.of(copy / "decoder.onnx").model_dump()
    (copy / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BundleError) as error:
        OnnxRuntimeEngine.load(Bundle.load(copy))
    assert str(copy / "decoder.onnx") in str(error.value)
    assert "\n" not in str(error.value)


def test_graphs_that_do_not_fit_are_one_sentence(bundle, tmp_path):
    def refused(change, *values):
        folder = shutil.copytree(bundle, tmp_path / str(len(list(tmp_path.iterdir()))))
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest, {graph["role"]: graph for graph in manifest["graphs"]})
        (folder / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(BundleError) as error:
            OnnxRuntimeEngine.load(Bundle.load(folder))
        assert all(value in str(error.value) for value in (str(folder), *values))

    def swap(_manifest, graphs):
        graphs["vision"]["role"], graphs["decoder"]["role"] = "decoder", "vision"

    def twice(role):
        return lambda _manifest, graphs: graphs[role].update(
            file=graphs["decoder" if role == "vision" else "vision"]["file"]
        )

    refused(swap, "vision", "16 x 16")
    refused(twice("vision"), "vision", "16 x 16")
    refused(twice("decoder"), "decoder", "['pixels']")
    refused(lambda manifest, _graphs: manifest["image"].update(crop=[17, 17]), "vision", "17 x 17")


@pytest.mark.parametrize(
    ("flags", "expected"), [("fpu avx2", False), ("avx2 avx512_vnni", True), ("avx2 avx_vnni", True), (None, False)]
)
def test_vnni_is_read_from_the_processors_flags(flags, expected, monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(onnxruntime_engine, "CPUINFO", cpuinfo)
    monkeypatch.setattr(onnxruntime_engine.platform, "machine", lambda: "x86_64")
    assert onnxruntime_engine.has_vnni() == expected
    monkeypatch.setattr(onnxruntime_engine.platform, "machine", lambda: "aarch64")
    assert onnxruntime_engine.has_vnni()


HOSTILE: dict[str, tuple[str, Callable[[onnx.GraphProto], object]]] = {
    "pixels of another type": ("vision", lambda graph: _declare(graph.input[0], TensorProto.FLOAT)),
    "tokens of another type": ("decoder", lambda graph: _declare(_named(graph.input, "tokens"), TensorProto.INT32)),
    "k without a dimension": ("decoder", lambda graph: _declare(_named(graph.input, "k"), shape=[])),
    "ids beyond the vocabulary": ("decoder", lambda graph: _shift(graph, "token_ids", np.array(10**6))),
    "negative ids": ("decoder", lambda graph: _shift(graph, "token_ids", np.array(-(10**6)))),
    "ids beyond 64 bits": ("decoder", lambda graph: _shift(graph, "token_ids", np.array(2**63 - 1))),
    "a row too few": ("decoder", lambda graph: _cut(graph, "logsumexp")),
    "a dimension that is not UTF-8": (
        "vision",
        lambda graph: setattr(graph.input[0].type.tensor_type.shape.dim[0], "dim_param", "not UTF-8"),
    ),
    "visual state of no image": ("vision", lambda graph: _cut(graph, "visual")),
}


def _named(values, name):
    return next(value for value in values if value.name == name)


def _declare(value, kind=None, shape=None):
    tensor = value.type.tensor_type
    tensor.elem_type = kind or tensor.elem_type
    if shape is not None:
        del tensor.shape.dim[:]


def _after(graph, name, node, constants):
    for each in graph.node:
        each.output[:] = ["before" if output == name else output for output in each.output]
    graph.node.append(node)
    graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in constants.items())


def _shift(graph, name, by):
    _after(graph, name, helper.make_node("Add", ["before", "by"], [name]), {"by": by})


def _cut(graph, name):
    bounds = {"from": np.array([0]), "to": np.array([0]), "axis": np.array([0])}
    _after(graph, name, helper.make_node("Slice", ["before", *bounds], [name]), bounds)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_graph_is_one_error(case, bundle, tmp_path):
    role, change = HOSTILE[case]
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    model = onnx.load(folder / f"{role}.onnx")
    change(model.graph)
    content = model.SerializeToString().replace(b"not UTF-8", b"\xff" * 9)
    (folder / f"{role}.onnx").write_bytes(content)
    content = json.loads((folder / MANIFEST).read_text())
    content["files"][f"{role}.onnx"] = FileHash.of(folder / f"{role}.onnx").model_dump()
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises((BundleError, EngineError)):
        Captioner.load(folder, threads=1).caption(Image.new("RGB", (16, 16), "red"))
