"""A bundle made by hand, small enough to know what it says: a photo's main colour chooses its caption."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from itune.runtime.bundle import MANIFEST, TOKENIZER, DecoderSettings, GraphEntry, Manifest, TensorSpec, TokenSettings
from itune.runtime.manifest import FileHash
from itune.runtime.search.loop import CORE, NATIVE
from itune.runtime.search.loop import search as search_captions
from itune.runtime.search.numpy_search import NumpySearch
from itune.runtime.settings import ImageSettings, TextSettings
from tests.runtime.fake_engine import Search

SENTENCES = {"red": "a dog runs on grass", "green": "two children play", "blue": "the sea is calm today"}
END = "<|endoftext|>"
WORDS = [END, *" ".join(SENTENCES.values()).split(), *(f"word{number}" for number in range(51))]
SIZE = 16

Painter = Callable[..., Path]


def save_graph(
    path: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    inputs: list[TensorSpec],
    outputs: list[TensorSpec],
) -> None:
    def declare(spec: TensorSpec) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(
            spec.name, helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)), spec.shape
        )

    graph = helper.make_graph(
        nodes,
        path.stem,
        [declare(spec) for spec in inputs],
        [declare(spec) for spec in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def save_vision(path: Path) -> GraphEntry:
    """The mean colour of an image raises the first word of that colour's sentence."""
    first_words = np.zeros((3, len(WORDS)), np.float32)
    for channel, sentence in enumerate(SENTENCES.values()):
        first_words[channel, WORDS.index(sentence.split()[0])] = 10 / 255
    inputs = [TensorSpec(name="pixels", dtype="uint8", shape=["batch", SIZE, SIZE, 3])]
    outputs = [TensorSpec(name="visual", dtype="float32", shape=["batch", len(WORDS)])]
    nodes = [
        helper.make_node("Cast", ["pixels"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float", "height_width"], ["colour"], keepdims=0),
        helper.make_node("MatMul", ["colour", "first_words"], ["visual"]),
    ]
    save_graph(path, nodes, {"height_width": np.array([1, 2]), "first_words": first_words}, inputs, outputs)
    return GraphEntry(role="vision", engine="any", precision="fp32", file=path.name, inputs=inputs, outputs=outputs)


def save_decoder(path: Path) -> GraphEntry:
    """Each word is followed by the next one of its sentence; the rest is unlikely noise."""
    follows = np.random.default_rng(0).normal(size=(len(WORDS), len(WORDS))).astype(np.float32)
    for sentence in SENTENCES.values():
        chain = [WORDS.index(word) for word in sentence.split()]
        follows[0, chain[0]] = 30
        follows[chain, [*chain[1:], 0]] = 30
    inputs = [
        TensorSpec(name="tokens", dtype="int64", shape=["rows", "length"]),
        TensorSpec(name="positions", dtype="int64", shape=["rows", "length"]),
        TensorSpec(name="mask", dtype="bool", shape=["rows", "all"]),
        TensorSpec(name="parents", dtype="int64", shape=["rows"]),
        TensorSpec(name="k", dtype="int64", shape=[1]),
        TensorSpec(name="visual", dtype="float32", shape=["batch", len(WORDS)]),
    ]
    outputs = [
        TensorSpec(name="logits", dtype="float32", shape=["rows", "k"]),
        TensorSpec(name="token_ids", dtype="int64", shape=["rows", "k"]),
        TensorSpec(name="logsumexp", dtype="float32", shape=["rows"]),
    ]
    nodes = [
        helper.make_node("Gather", ["tokens", "last"], ["token"], axis=1),
        helper.make_node("Gather", ["follows", "token"], ["flat"]),
        helper.make_node("Shape", ["visual"], ["images"], end=1),
        helper.make_node("Concat", ["images", "beams_words"], ["grouped_shape"], axis=0),
        helper.make_node("Reshape", ["flat", "grouped_shape"], ["grouped"]),
        helper.make_node("Unsqueeze", ["visual", "last_axis_but_one"], ["visual_of_image"]),
        helper.make_node("Add", ["grouped", "visual_of_image"], ["sum"]),
        helper.make_node("Reshape", ["sum", "rows_words"], ["all_logits"]),
        helper.make_node("TopK", ["all_logits", "k"], ["logits", "token_ids"]),
        helper.make_node("ReduceLogSumExp", ["all_logits", "last_axis"], ["logsumexp"], keepdims=0),
    ]
    constants = {
        "follows": follows,
        "last": np.array(-1),
        "last_axis": np.array([-1]),
        "last_axis_but_one": np.array([1]),
        "beams_words": np.array([-1, len(WORDS)]),
        "rows_words": np.array([-1, len(WORDS)]),
    }
    save_graph(path, nodes, constants, inputs, outputs)
    return GraphEntry(role="decoder", engine="any", precision="fp32", file=path.name, inputs=inputs, outputs=outputs)


@pytest.fixture(scope="session", params=["native", "numpy"])
def search(request: pytest.FixtureRequest) -> Search:
    """The search, with its core in C++ and in NumPy."""
    if request.param == "numpy":
        return partial(search_captions, core=NumpySearch)
    if not NATIVE:
        pytest.skip("itune was built without a compiler")
    return partial(search_captions, core=CORE)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `Captioner.load` takes. Copy it before breaking it."""
    folder = tmp_path_factory.mktemp("bundle")
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / TOKENIZER))
    manifest = Manifest(
        name="colours",
        graphs=[save_vision(folder / "vision.onnx"), save_decoder(folder / "decoder.onnx")],
        image=ImageSettings(size=(SIZE, SIZE), resize="squash", mean=(0, 0, 0), std=(1, 1, 1)),
        text=TextSettings(),
        tokens=TokenSettings(begin=0, end=0, vocab_size=len(WORDS), max_positions=40),
        decoder=DecoderSettings(
            layers=1,
            heads=1,
            head_dim=1,
            hidden_size=1,
            adapter_layers=[0],
            bottleneck=1,
            adapter_heads=1,
            lambda_=1.0,
            score_scale=1.0,
            visual_tokens=1,
            visual_width=3,
        ),
        files={name: FileHash.of(folder / name) for name in ("vision.onnx", "decoder.onnx", TOKENIZER)},
        license="Apache-2.0",
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    return folder


@pytest.fixture
def paint(tmp_path: Path) -> Painter:
    """Write a photo of one colour into `tmp_path` and return its path."""

    def painter(colour: str, name: str | None = None) -> Path:
        path = tmp_path / (name or f"{colour}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 20), {"green": "lime"}.get(colour, colour)).save(path)
        return path

    return painter
