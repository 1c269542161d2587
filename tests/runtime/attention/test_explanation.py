"""The attention that a bundle shows is that of the eager model, whatever the bundle's precision and tower."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from itune.export.bundle import export_bundle
from itune.export.graph import builder as graph_module
from itune.export.graph.builder import Graph
from itune.export.options import ExportOptions
from itune.export.tensorrt.typed_graph import FLOAT, HALF, cast_outputs, type_graph
from itune.loading import LoadedCheckpoint, load_captioner
from itune.runtime import BundleError, Captioner, Explanation, ItuneError
from itune.runtime.attention.explanation import Explainer
from itune.runtime.bundle import MANIFEST, Bundle
from itune.runtime.image import decode, preprocess
from itune.runtime.manifest import FileHash
from tests.export.fixtures import save_checkpoint

CAPTION = "a dog runs through the green grass"


@torch.no_grad()
def eager_attention(checkpoint: Path, photo: Path, tokens: tuple[int, ...]) -> NDArray[np.float32]:
    """[adapted layers, tokens, N]: the mean over heads where each of `tokens` is predicted."""
    captioner, loaded = load_captioner(checkpoint), LoadedCheckpoint.load(checkpoint)
    model = loaded.model
    visual = loaded.tower.embed(preprocess(decode(photo), captioner.image)[None])
    keys_values = model.project(visual)
    seen = {}

    def record(layer):
        def hook(_module, inputs):
            seen[layer] = model.adapter(layer).attention(inputs[0], keys_values[f"{layer}.keys"])[0].mean(0)

        return hook

    for layer in model.adapter_layers:
        model.language_model.transformer.h[layer].mlp.register_forward_pre_hook(record(layer))
    prompt = [captioner.tokens.begin, *captioner.tokens.prompt]
    with model.looking_at(keys_values):
        model.language_model(torch.tensor([[*prompt, *tokens]]))
    rows = slice(len(prompt) - 1, len(prompt) - 1 + len(tokens))
    return np.stack([seen[layer][rows].numpy() for layer in model.adapter_layers])


def check_against_eager(bundle: Path, checkpoint: Path, photos: list[Path], atol: float) -> None:
    captioner = Captioner.load(bundle)
    layers = captioner.bundle.manifest.decoder.adapter_layers
    shown = []
    for photo in photos:
        own = captioner.caption(photo, num_beams=2, max_new_tokens=8)
        assert captioner.explain(photo, num_beams=2, max_new_tokens=8).token_ids == own.tokens
        for caption in (own, CAPTION):
            found = {each: captioner.explain(photo, caption, layer=each) for each in (*layers, "last", "mean")}
            for explanation in found.values():
                np.testing.assert_allclose(explanation.attention.sum(1), 1, atol=1e-5)
            expected = eager_attention(checkpoint, photo, found["last"].token_ids)
            for layer, rows in zip(layers, expected, strict=True):
                np.testing.assert_allclose(found[layer].attention, rows, atol=atol)
            np.testing.assert_allclose(found["last"].attention, expected[-1], atol=atol)
            np.testing.assert_allclose(found["mean"].attention, expected.mean(0), atol=atol)
        assert found["last"].caption == CAPTION
        shown.append(expected[-1])
    uniform = 1 / shown[0].shape[1]
    assert np.abs(shown[0] - uniform).max() > uniform / 2  # or anything would agree
    assert np.abs(shown[0] - shown[1]).max() > uniform / 4


@pytest.fixture(scope="module")
def clip_bundle(clip_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attention") / "clip"
    export_bundle(clip_checkpoint, folder, ExportOptions(verify=False))
    return folder


@pytest.fixture(scope="module")
def onnx_bundle(onnx_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attention") / "onnx"
    export_bundle(onnx_checkpoint, folder, ExportOptions(verify=False))
    return folder


def test_clip_attention_equals_eager(clip_bundle, clip_checkpoint, photos):
    check_against_eager(clip_bundle, clip_checkpoint, photos[:2], 1e-5)
    explanation = Captioner.load(clip_bundle).explain(photos[0], CAPTION)
    assert explanation.grid == (4, 4)
    assert explanation.patches.shape == (len(explanation.tokens), 4, 4)
    np.testing.assert_array_equal(explanation.cls_share, explanation.attention[:, 0])
    np.testing.assert_array_equal(explanation.patches.reshape(-1, 16), explanation.attention[:, 1:])
    assert "".join(explanation.tokens) == CAPTION.replace(" ", "")


def test_attention_after_a_prompt_equals_eager(onnx_bundle, onnx_checkpoint, photos):
    check_against_eager(onnx_bundle, onnx_checkpoint, photos[:2], 1e-5)
    explanation = Captioner.load(onnx_bundle).explain(photos[0], CAPTION)
    assert (explanation.grid, explanation.layer, explanation.layers) == ((4, 4), "last", (2,))
    assert explanation.cls_share.tolist() == [0] * len(explanation.tokens)
    with pytest.raises(ItuneError) as error:
        Captioner.load(onnx_bundle).explain(photos[0], "a \ud83d dog")
    assert r"\ud83d" in str(error.value)


def test_attention_of_one_head_and_of_external_weights(language_model, clip_tower, photos, tmp_path, monkeypatch):
    checkpoint = save_checkpoint(tmp_path, language_model, clip_tower, heads=1)
    monkeypatch.setattr(graph_module, "EXTERNAL_BYTES", 1)
    export_bundle(checkpoint, tmp_path / "b", ExportOptions(verify=False))
    assert (tmp_path / "b" / "decoder.onnx.data").stat().st_size > 10_000
    check_against_eager(tmp_path / "b", checkpoint, photos[:2], 1e-5)


@pytest.mark.parametrize(("precision", "atol"), [("fp16", 2e-3), ("int8", 0.03), ("int4", 0.3)])
def test_attention_of_every_precision(clip_checkpoint, photos, tmp_path, precision, atol):
    export_bundle(clip_checkpoint, tmp_path / "b", ExportOptions(precision=precision, verify=False))
    check_against_eager(tmp_path / "b", clip_checkpoint, photos[:2], atol)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_attention_of_graphs_made_for_tensorrt(clip_bundle, clip_checkpoint, photos, tmp_path, precision):
    graphs = {role: Graph.load(clip_bundle / f"{role}.onnx") for role in ("vision", "decoder")}
    for graph in graphs.values():
        type_graph(graph, precision)
    cast_outputs(graphs["vision"], HALF if precision == "fp16" else FLOAT)
    copy = replaced(clip_bundle, tmp_path / "b", graphs)
    captioner = Captioner.load(copy)
    for layer, rows in enumerate(eager_attention(clip_checkpoint, photos[0], (5, 6, 7)), 1):
        found = captioner.explainer.explain(decode(photos[0]), (5, 6, 7), layer, lambda _: [captioner.tokens.begin])
        np.testing.assert_allclose(found.attention, rows, atol=5e-3 if precision == "fp16" else 1e-5)


def replaced(bundle: Path, copy: Path, replacements: Mapping[str, Graph] | None = None, **fields: object) -> Path:
    """A copy of a bundle with other graphs, by their role, or other fields in its manifest."""
    copy.mkdir()
    for path in bundle.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((copy / MANIFEST).read_text())
    for role, graph in (replacements or {}).items():
        (path, *_) = graph.save(copy / f"{role}.onnx")
        manifest["files"][path.name] = FileHash.of(path).model_dump()
    (copy / MANIFEST).write_text(json.dumps(manifest | fields))
    return copy


def explain(bundle: Path, photo: Path | Image.Image, caption: str = CAPTION) -> Explanation:
    return Captioner.load(bundle).explain(photo, caption)


def test_bundles_without_patches_have_a_square_grid(clip_bundle, onnx_bundle, photos, tmp_path):
    for number, bundle in enumerate((clip_bundle, onnx_bundle)):
        assert explain(replaced(bundle, tmp_path / f"{number}", patches=None), photos[0]).grid == (4, 4)


def test_patches_that_are_no_square(onnx_checkpoint, photos, tmp_path):
    """A tower with registers: of 16 embeddings, the last 2 x 7 are patches."""
    export_bundle(onnx_checkpoint, tmp_path / "b", ExportOptions(patch_grid="2x7", verify=False))
    explanation = explain(tmp_path / "b", photos[0])
    assert explanation.grid == (2, 7)
    np.testing.assert_array_equal(explanation.patches[3].ravel(), explanation.attention[3, 2:])
    np.testing.assert_allclose(explanation.cls_share, explanation.attention[:, :2].sum(1), atol=1e-6)
    numbers = explanation.to_dict()
    assert numbers["grid"] == [2, 7]
    assert [token["text"] for token in numbers["tokens"]] == list(explanation.tokens)
    for token in numbers["tokens"]:
        assert token["cls"] + np.sum(token["attention"]) == pytest.approx(1, abs=1e-4)

    manifest = json.loads((tmp_path / "b" / MANIFEST).read_text())
    decoder = manifest["decoder"] | {"visual_tokens": 14}
    unknown = replaced(tmp_path / "b", tmp_path / "unknown", patches=None, decoder=decoder)
    too_many = replaced(tmp_path / "b", tmp_path / "many", patches=[3, 6])
    for bundle, values in ((unknown, ("None", "14", "--patch-grid")), (too_many, ("(3, 6)", "16", "--patch-grid"))):
        with pytest.raises(BundleError) as error:
            explain(bundle, photos[0])
        for value in (str(bundle), *values):
            assert value in str(error.value)


def test_bundles_without_attention(clip_bundle, onnx_bundle, clip_checkpoint, photos, tmp_path):
    manifest = json.loads((clip_bundle / MANIFEST).read_text())
    plain = replaced(clip_bundle, tmp_path / "plain", decoder=manifest["decoder"] | {"adapter_layers": []})
    with pytest.raises(BundleError) as error:
        explain(plain, photos[0])
    assert "i-tuning: []" in str(error.value)
    foreign = replaced(clip_bundle, tmp_path / "foreign", decoder=manifest["decoder"] | {"adapter_layers": [1, 40]})
    with pytest.raises(BundleError) as error:
        explain(foreign, photos[0])
    assert str(foreign / "decoder.onnx") in str(error.value)
    assert "h.40/mlp/adapter/Softmax" in str(error.value)
    roles = [graph for graph in manifest["graphs"] if graph["role"] != "decoder"]
    plans = Bundle.load(replaced(clip_bundle, tmp_path / "plans", graphs=roles))
    with pytest.raises(BundleError) as error:
        Explainer.load(plans, Captioner.load(clip_bundle).tokenizer)
    assert "'decoder'" in str(error.value)
    with pytest.raises(BundleError):
        load_captioner(clip_checkpoint).explain(photos[0])


@pytest.mark.parametrize("heads", [3, 8, 2**31 - 1])
def test_a_wrong_number_of_heads_is_refused(heads, clip_bundle, photos, tmp_path):
    manifest = json.loads((clip_bundle / MANIFEST).read_text())
    assert manifest["decoder"]["adapter_heads"] != heads
    wrong = replaced(clip_bundle, tmp_path / "wrong", decoder=manifest["decoder"] | {"adapter_heads": heads})
    with pytest.raises(BundleError) as error:
        explain(wrong, photos[0])
    assert "adapter_heads" in str(error.value)
    assert str(heads) in str(error.value)


def test_captions_that_cannot_be_written(clip_bundle, photos, tmp_path, clip_checkpoint):
    captioner = Captioner.load(clip_bundle)
    with pytest.raises(ItuneError) as error:
        captioner.explain(photos[0], "x " * 60)
    assert "48" in str(error.value)
    with pytest.raises(ItuneError) as error:
        captioner.explain(photos[0], CAPTION, layer=0)
    assert "layer 0" in str(error.value)
    assert captioner.explain(photos[0], " ").attention.shape == (0, 17)

    (tmp_path / "words.txt").write_text(CAPTION)
    export_bundle(
        clip_checkpoint,
        tmp_path / "b",
        ExportOptions(vocabulary=str(tmp_path / "words.txt"), verify=False),
    )
    assert explain(tmp_path / "b", photos[0]).caption == CAPTION
    with pytest.raises(ItuneError) as error:
        explain(tmp_path / "b", photos[0], "snowy hill")
    assert str(Bundle.load(tmp_path / "b").manifest.tokens.shortlist) in str(error.value)
