"""The C++ decoder: every step against eager PyTorch and ONNX Runtime, and the search in one call against its steps."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from itune.backbones import ClipTower
from itune.eager import EagerEngine
from itune.export.methods.registry import build_decoder, build_vision
from itune.export.quantize.integer_matmul import Blocks, Rows
from itune.export.quantize.rewrite import halve_graph, quantize_graph
from itune.methods.ituning.model import ITuningModel
from itune.runtime.captioner import Captioner
from itune.runtime.engines.native import (
    CHOICE,
    KERNELS,
    ClipEncoder,
    DecoderShape,
    EncoderShape,
    GraphEncoder,
    NativeEngine,
)
from itune.runtime.engines.onnxruntime import OnnxRuntimeEngine, open_session
from itune.runtime.errors import EngineError, ItuneError, SearchError
from itune.runtime.onnx_files import find_weights
from itune.runtime.search import SearchConfig
from itune.runtime.search.loop import search
from itune.runtime.search.numpy_search import NumpySearch
from itune.runtime.settings import ACTIVATIONS
from tests.runtime.engines.test_onnxruntime import TWINS, VARIANTS, VOCABULARY, assert_same, random_model

native = pytest.importorskip("_itune_native")
PRECISIONS = ("fp32", "fp16", "int8", "int4")


@pytest.fixture(scope="module")
def tower(clip_folder: Path) -> ClipTower:
    return ClipTower(clip_folder)


@pytest.fixture(scope="module")
def pixels(tower: ClipTower) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (4, *tower.image.output_size, 3), np.uint8)


def export(model: ITuningModel, tower: ClipTower, folder: Path, precision: str, vocabulary=None) -> tuple[Path, Path]:
    """The graphs of a model, the decoder's in a precision."""
    build_vision(model, tower).save(folder / "vision.onnx")
    decoder = folder / "decoder.onnx"
    build_decoder(model, vocabulary).save(decoder)
    target = folder / f"{precision}.onnx"
    if precision == "fp16":
        halve_graph(decoder, target)
    elif precision != "fp32":
        quantize_graph(decoder, target, Blocks(int(precision[3:])))
    return folder / "vision.onnx", decoder if precision == "fp32" else target


def shape_of(model: ITuningModel) -> DecoderShape:
    config = model.language_model.config
    head = config.n_embd // config.n_head
    return DecoderShape(
        heads=config.n_head,
        width=config.n_embd,
        inner=config.n_inner or 4 * config.n_embd,
        vocabulary=config.vocab_size,
        positions=config.n_positions,
        prefix=0,
        visual_width=model.config.bottleneck,
        epsilon=config.layer_norm_epsilon,
        activation=ACTIVATIONS[config.activation_function],
        layers=config.n_layer,
        attention_scale=head**-0.5 if config.scale_attn_weights else 1.0,
        inverse_layer_scale=config.scale_attn_by_inverse_layer_idx,
        adapter_layers=tuple(model.adapter_layers),
        cross_attention=False,
    )


def weights_of(graph: Path) -> dict[str, Any]:
    return {name.removesuffix(".fp16"): stored.load for name, stored in find_weights(graph).items()}


def engine_of(model: ITuningModel, vision: Path, decoder: Path, kernels: str = "", threads: int = 2) -> NativeEngine:
    shape, weights = shape_of(model), weights_of(decoder)
    decoder = native.Decoder(shape, weights, threads, kernels)
    return NativeEngine(GraphEncoder.of(open_session(vision, 1), decoder, shape), decoder)


def visual_pairs(engine: NativeEngine, pixels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys and values of each layer."""
    visual = engine.encode.session.run(None, {"pixels": pixels})
    return list(zip(visual[::2], visual[1::2], strict=True))


@pytest.fixture(scope="module")
def engines(tower, tmp_path_factory) -> dict[str, NativeEngine]:
    """One model in each precision."""
    folder, model = tmp_path_factory.mktemp("native"), random_model(tower, heads=2, first=1)
    return {precision: engine_of(model, *export(model, tower, folder, precision)) for precision in PRECISIONS}


def steps(engines, pixels, beams, mask, seed=0) -> Iterator[list]:
    """The results of several engines, step by step: a prompt, beams that change places, an image that finishes."""
    rng = np.random.default_rng(seed)
    states = [engine.encode(pixels) for engine in engines]
    tokens = rng.integers(0, VOCABULARY, (4, 4 if mask is not None else beams))
    parents, kept = np.arange(4), np.arange(4)
    for step, k in enumerate((1, 9, VOCABULARY, VOCABULARY + 5)):
        yield [e.step(tokens, parents, s, k, mask=mask) for e, s in zip(engines, states, strict=True)]
        mask, rows = None, len(tokens) // len(kept)
        parents = kept.repeat(beams) * rows + rng.integers(0, rows, len(kept) * beams)
        if step == 1:
            kept = np.array([0, 2, 3])
            for state in states:
                state.keep(kept)
                assert state.images == 3
            parents = parents.reshape(4, beams)[kept].reshape(-1)
            kept = np.arange(3)
        tokens = rng.integers(0, VOCABULARY, (len(parents), 1))


PROMPTS = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1]], np.bool_)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_step_equals_eager(variant, kernels, tower, pixels, tmp_path):
    model = random_model(tower, **VARIANTS[variant])
    engine, eager = engine_of(model, *export(model, tower, tmp_path, "fp32"), kernels), EagerEngine(model, tower)
    for beams in (1, 2, 7):
        for mask in (PROMPTS, None):
            for number, results in enumerate(steps([engine, eager], pixels, beams, mask)):
                assert_same(*results, f"{variant}, {beams} beams, prompts {mask is not None}, step {number}")


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_integers_equal_those_of_onnx_runtime(precision, kernels, tower, pixels, tmp_path):
    """Both round activations to the same integers, but where a value lies halfway between two."""
    model = random_model(tower, heads=2, first=1)
    paths = export(model, tower, tmp_path, precision)
    ours = engine_of(model, *paths, kernels)
    theirs = OnnxRuntimeEngine(*(open_session(path, 1) for path in paths), VOCABULARY)
    for found, expected in steps([ours, theirs], pixels, 3, PROMPTS):
        np.testing.assert_allclose(found.logsumexp, expected.logsumexp, atol=0.02)
        np.testing.assert_allclose(found.logits, expected.logits, atol=0.05)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_depends_on_no_neighbour_bit_for_bit(precision, engines, pixels):
    """The same image and prompt alone, and in a batch beside longer prompts."""
    engine = engines[precision]
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, (4, 4))
    together = engine.step(tokens, np.arange(4), engine.encode(pixels), 9, mask=PROMPTS)
    # ONNX Runtime encodes the images: alone, an image's embeddings may differ in their last bits.
    visual = visual_pairs(engine, pixels)
    for row, real in enumerate(PROMPTS):
        pairs = [(own_keys[row : row + 1], own_values[row : row + 1]) for own_keys, own_values in visual]
        state = engine.encode(pixels[:1])
        state.native = engine.decoder.state(1, pairs)
        alone = engine.step(tokens[row : row + 1, real], np.arange(1), state, 9)
        for own, other in zip(alone, together, strict=True):
            np.testing.assert_array_equal(own[0], other[row])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_threads_change_no_bit(precision, tower, pixels, tmp_path):
    model = random_model(tower, heads=2)
    paths = export(model, tower, tmp_path, precision)
    for results in steps([engine_of(model, *paths, threads=count) for count in (1, 2, 5)], pixels, 3, PROMPTS):
        for part in zip(*results, strict=True):
            np.testing.assert_array_equal(part[0], part[1])
            np.testing.assert_array_equal(part[0], part[2])


def clip_encoder_of(model: ITuningModel, tower: ClipTower, vision: Path, decoder, kernels: str = "", threads: int = 2):
    config = tower.model.config
    shape = EncoderShape(
        width=config.hidden_size,
        heads=config.num_attention_heads,
        inner=config.intermediate_size,
        layers=config.num_hidden_layers,
        image_size=config.image_size,
        patch_size=config.patch_size,
        epsilon=config.layer_norm_eps,
        activation=ACTIVATIONS[config.hidden_act],
        adapters=len(model.adapter_layers),
        visual_heads=model.config.heads,
        visual_width=model.config.bottleneck,
    )
    return ClipEncoder(native.Encoder(shape, weights_of(vision), threads, kernels), decoder)


def after_one_step(engine: NativeEngine, pixels: np.ndarray) -> np.ndarray:
    """The logits of all tokens in order of their ids, which depend on every key and value."""
    tokens = np.arange(len(pixels))[:, None]
    found = engine.step(tokens, np.arange(len(pixels)), engine.encode(pixels), VOCABULARY)
    return np.take_along_axis(found.logits, found.token_ids.argsort(axis=1), axis=1)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_encoder_equals_the_vision_graph(precision, heads, kernels, tower, pixels, tmp_path):
    model = random_model(tower, heads=heads, first=1)
    vision, decoder = export(model, tower, tmp_path, "fp32")
    if precision == "int8":
        (vision,) = quantize_graph(vision, tmp_path / "int8-vision.onnx", Rows())
    engine = engine_of(model, vision, decoder, kernels)
    expected = after_one_step(engine, pixels)
    engine.encode = clip_encoder_of(model, tower, vision, engine.decoder, kernels)
    found = after_one_step(engine, pixels)
    np.testing.assert_allclose(found, expected, atol=1e-4 if precision == "fp32" else 0.05)
    for threads in (1, 3):
        engine.encode = clip_encoder_of(model, tower, vision, engine.decoder, kernels, threads)
        np.testing.assert_array_equal(after_one_step(engine, pixels), found)
    beside_others = after_one_step(engine, pixels[[2, 1]])
    np.testing.assert_array_equal(beside_others[1], found[1])
    assert not np.array_equal(beside_others[0], found[0])


def test_equal_logits_stand_in_order_of_the_token_id(engines, pixels):
    engine = engines["fp32"]
    for k in (VOCABULARY, 7):
        found = engine.step(np.zeros((1, 1), np.int64), np.zeros(1, np.int64), engine.encode(pixels[:1]), k)
        order = found.token_ids[0].tolist()
        if k == VOCABULARY:
            place, whole = order.index(TWINS[0]), order
            assert order[place : place + 2] == list(TWINS)
        assert order == whole[:k]


CONFIGS = {
    "greedy": {"num_beams": 1},
    "beams": {"num_beams": 4, "num_return": 3},
    "longest": {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.5, "min_new_tokens": 3},
    "processors": {"num_beams": 2, "no_repeat_ngram_size": 2, "repetition_penalty": 1.4, "bad_words": ((5,), (7, 8))},
    "samples": {"num_beams": 1, "do_sample": True, "num_return": 4, "top_k": 0, "temperature": 1.5, "seed": 3},
    "nucleus": {"num_beams": 1, "do_sample": True, "top_p": 0.8, "seed": 4},
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_whole_search_equals_its_steps(name, precision, engines, pixels):
    """The same code in one call, and driven from Python by the search in NumPy."""
    engine, config = engines[precision], SearchConfig(max_new_tokens=12, **CONFIGS[name])
    prompts = [[1], [2, 3, 4], [5, 6], [7]]
    whole = search(engine, engine.encode(pixels), prompts, config, 0)
    by_steps = search(engine, engine.encode(pixels), prompts, config, 0, core=NumpySearch)
    for found, expected in zip(whole, by_steps, strict=True):
        assert [each.tokens for each in found] == [each.tokens for each in expected]
        assert [each.score for each in found] == pytest.approx([each.score for each in expected], abs=1e-9)


def test_a_shortlist_keeps_token_ids(tower, pixels, tmp_path):
    model, vocabulary = random_model(tower), np.array([0, 3, 8, 11, 40, 59])
    engine = engine_of(model, *export(model, tower, tmp_path, "int8", vocabulary))
    assert engine.most_candidates == 6
    found = engine.step(np.array([[3]]), np.zeros(1, np.int64), engine.encode(pixels[:1]), 99)
    assert sorted(found.token_ids[0]) == vocabulary.tolist()
    with pytest.raises(ValueError, match=r"vocabulary\.rows"):
        native.Decoder(replace(shape_of(model), vocabulary=2**29), weights_of(tmp_path / "int8.onnx"), 1, "")
    with pytest.raises(EngineError):
        engine.step(np.array([[4]]), np.zeros(1, np.int64), engine.encode(pixels[:1]), 1)


@pytest.mark.parametrize("token", [-1, VOCABULARY, 2**40])
def test_tokens_outside_the_vocabulary_are_refused(token, engines, pixels):
    engine = engines["int8"]
    with pytest.raises(EngineError):
        engine.step(np.array([[token]]), np.zeros(1, np.int64), engine.encode(pixels[:1]), 1)


def step_without_tokens(engine: NativeEngine, pixels: np.ndarray) -> None:
    nothing = np.zeros((1, 2), np.bool_)
    engine.step(np.zeros((1, 2), np.int64), np.zeros(1, np.int64), engine.encode(pixels[:1]), 1, mask=nothing)


def test_too_many_tokens_and_rows_without_any_are_refused(engines, pixels):
    engine = engines["int8"]
    with pytest.raises(EngineError):  # 32 positions
        engine.step(np.zeros((1, 33), np.int64), np.zeros(1, np.int64), engine.encode(pixels[:1]), 1)
    with pytest.raises(EngineError):
        step_without_tokens(engine, pixels)


@pytest.mark.parametrize(
    "wrong",
    [
        {"heads": 5},
        {"inner": 2**63},
        {"inner": 2**64 - 4},
        {"inner": 100, "visual_width": 44},
        {"layers": 2**29},
        {"positions": 31},
        {"positions": 2**40},
        {"width": 2**62},
        {"vocabulary": VOCABULARY + 1},
        {"visual_width": 15},
        {"adapter_layers": (0,)},
        {"activation": "abs"},
        {"cross_attention": True},
    ],
)
def test_a_shape_that_does_not_fit_the_weights_is_refused(wrong, tower, tmp_path):
    model = random_model(tower, heads=2, first=1)
    _, decoder = export(model, tower, tmp_path, "fp32")
    with pytest.raises(ValueError, match=r"weight|large|heads|activation"):
        native.Decoder(replace(shape_of(model), **wrong), weights_of(decoder), 1, "")


def test_wrong_arrays_are_refused(engines, pixels):
    engine = engines["int8"]
    one, pairs = np.zeros((2, 1), np.int64), visual_pairs(engine, pixels[:2])
    state = engine.encode(pixels[:2])
    for tokens, parents, mask in (
        (one[:1], np.arange(1), None),  # fewer rows than images
        (np.zeros((3, 1), np.int64), np.arange(3), None),
        (one, np.arange(3), None),
        (one, np.arange(2), np.ones((2, 2), np.bool_)),
    ):
        with pytest.raises(EngineError):
            engine.step(tokens, parents, state, 1, mask=mask)
    state = engine.encode(pixels[:2])
    engine.step(one, np.arange(2), state, 1)
    with pytest.raises(EngineError):
        engine.step(one, np.array([0, 2]), state, 1)
    swapped = [(own_values, own_keys) for own_keys, own_values in pairs]
    for wrong in (pairs[:1], swapped, [(own_keys[:1], own_values) for own_keys, own_values in pairs]):
        with pytest.raises(ValueError, match="visual"):
            engine.decoder.state(2, wrong)


def test_layers_that_see_the_image_differently_are_refused(engines, pixels):
    pairs = visual_pairs(engines["int8"], pixels[:1])
    shorter = [(pairs[0][0][..., :5].copy(), pairs[0][1][:, :, :5].copy()), *pairs[1:]]
    with pytest.raises(ValueError, match="visual"):
        engines["int8"].decoder.state(1, shorter)


def test_a_search_refuses_what_its_steps_refuse(engines, pixels):
    engine, config = engines["int8"], SearchConfig(num_beams=2)
    for prompts in ([[VOCABULARY]], [[1] * 40], [[1], [1]]):  # unknown token, too many positions, too many prompts
        with pytest.raises(EngineError):
            search(engine, engine.encode(pixels[:1]), prompts, config, 0)


def test_a_prefix_that_the_encoder_does_not_give_is_refused(tower, pixels, tmp_path):
    model = random_model(tower)
    vision, graph = export(model, tower, tmp_path, "fp32")
    shape = replace(shape_of(model), prefix=3)
    decoder = native.Decoder(shape, weights_of(graph), 1, "")
    with pytest.raises(ValueError, match="prefix"):
        GraphEncoder.of(open_session(vision, 1), decoder, shape)
    engine = NativeEngine(clip_encoder_of(model, tower, vision, decoder), decoder)
    with pytest.raises(EngineError):
        engine.step(np.array([[VOCABULARY]]), np.zeros(1, np.int64), engine.encode(pixels[:1]), 1)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_logits_that_are_no_numbers_end_the_search(precision, engines, pixels):
    engine = engines[precision]
    state = engine.encode(pixels[:1])
    visual = visual_pairs(engine, pixels[:1])
    state.native = engine.decoder.state(
        1, [(own_keys, own_values * np.float32(np.nan)) for own_keys, own_values in visual]
    )
    with pytest.raises(SearchError):
        search(engine, state, [[1]], SearchConfig(num_beams=2), 0)


def test_threads_of_python_share_an_engine(engines, pixels):
    engine, config, found = engines["int8"], SearchConfig(num_beams=3, max_new_tokens=8), {}

    def caption(number: int) -> None:
        found[number] = search(engine, engine.encode(pixels[number : number + 1]), [[1]], config, 0)

    threads = [Thread(target=caption, args=(number % 4,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        assert found[number] == search(engine, engine.encode(pixels[number : number + 1]), [[1]], config, 0)


def test_a_forked_process_starts_its_own_threads(engines, pixels):
    engine, config = engines["int8"], SearchConfig(num_beams=3, max_new_tokens=8)
    pairs = visual_pairs(engine, pixels[:1])
    prompts = np.array([[1]])

    def captions() -> list:
        return engine.decoder.captions(engine.decoder.state(1, pairs), prompts, config, 0, VOCABULARY)

    expected, context = captions(), multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(captions()))
    process.start()
    assert receiver.poll(30), "the child waits for threads that it does not have"
    assert receiver.recv() == expected
    process.join(30)
    assert process.exitcode == 0
    assert captions() == expected


def test_kernels_are_chosen_by_name(monkeypatch):
    for name in KERNELS:
        monkeypatch.setenv(CHOICE, name)
        assert Captioner.load(engine="native", threads=1).engine.kernels == name
    monkeypatch.setenv(CHOICE, "abacus")
    for engine in ("native", "auto"):
        with pytest.raises(ItuneError, match="abacus"):
            Captioner.load(engine=engine)
