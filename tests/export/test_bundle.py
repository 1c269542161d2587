from __future__ import annotations

import json

import numpy as np
import pytest

from itune.export.bundle import export_bundle
from itune.export.options import ExportOptions
from itune.export.verify.report import VerificationError
from itune.loading import LoadedCheckpoint, eager_captioner
from itune.runtime import Captioner
from itune.runtime.bundle import MANIFEST, Bundle
from itune.runtime.errors import ItuneError


@pytest.fixture(scope="module")
def bundle(clip_checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("bundles") / "tiny"
    export_bundle(clip_checkpoint, output, ExportOptions(verify=False, license="Nobody's."), search={"num_beams": 3})
    return Bundle.load(output)


def test_manifest_describes_the_model(bundle):
    manifest = bundle.manifest
    assert manifest.name == "tiny"
    assert {path.name for path in bundle.folder.iterdir()} == {*manifest.files, MANIFEST}
    assert [(g.role, g.engine, g.precision) for g in manifest.graphs] == [
        ("vision", "any", "fp32"),
        ("decoder", "any", "fp32"),
    ]
    vision, decoder = manifest.graphs
    assert [(spec.name, spec.dtype, spec.shape) for spec in vision.inputs] == [
        ("pixels", "uint8", ["images", 32, 32, 3])
    ]
    assert [(spec.name, spec.shape) for spec in vision.outputs[:2]] == [
        ("visual.1.keys", ["images", 2, 16, 17]),
        ("visual.1.values", ["images", 2, 17, 16]),
    ]
    assert {"tokens", "positions", "mask", "parents", "k"} < {spec.name for spec in decoder.inputs}
    assert manifest.decoder.adapter_layers == [1, 2]
    assert (manifest.decoder.lambda_, manifest.decoder.score_scale) == (2.5, 0.4)
    assert (manifest.search.num_beams, manifest.search.max_new_tokens) == (3, 32)
    assert manifest.provenance["training"] == {"epochs": 3}
    assert len(manifest.provenance["checkpoint"]["adapters.safetensors"]) == 64


def test_card_names_the_licence_and_the_sources(bundle):
    card = bundle.path("README.md").read_text()
    assert "Nobody's." in card
    source = bundle.manifest.provenance["language_model"]["source"]
    assert source.startswith("../")
    assert source not in card  # a folder's name means something elsewhere, the way to it does not
    assert f"{source.removeprefix('../')}: 3 layers of 64" in card
    assert "not recorded" in card  # the checkpoint knows no CIDEr


def test_own_card_and_default_licence(clip_checkpoint, tmp_path):
    (tmp_path / "card.md").write_text("Mine.")
    manifest = export_bundle(
        clip_checkpoint, tmp_path / "b", ExportOptions(verify=False, model_card=tmp_path / "card.md", name="n")
    )
    assert (tmp_path / "b" / "README.md").read_text() == "Mine."
    assert manifest.name == "n"
    assert "whose licences apply" in manifest.license


@pytest.mark.parametrize("kind", ["clip", "onnx"])
def test_captions_are_those_of_pytorch(kind, request, tmp_path, pixels):
    checkpoint = request.getfixturevalue(f"{kind}_checkpoint")
    export_bundle(checkpoint, tmp_path / "b", ExportOptions(verify=False))
    exported, eager = Captioner.load(tmp_path / "b"), eager_captioner(LoadedCheckpoint.load(checkpoint))
    images = list(pixels)
    for num_beams in (1, 3, 5):
        expected, found = (c.caption(images, num_beams=num_beams, max_new_tokens=12) for c in (eager, exported))
        assert [caption.tokens for caption in found] == [caption.tokens for caption in expected]
        assert [c.score for c in found] == pytest.approx([c.score for c in expected], abs=1e-4)
        assert len({caption.tokens for caption in expected}) >= 9


def test_swapped_visual_states_swap_the_captions(bundle, pixels):
    captioner = Captioner.load(bundle.folder)
    first, second = captioner.caption([pixels[0], pixels[2]])
    assert first.tokens != second.tokens
    encode = captioner.engine.encode

    def swapped(images):
        state = encode(images)
        state.keep(np.array([1, 0]))
        return state

    captioner.engine.encode = swapped
    assert [c.tokens for c in captioner.caption([pixels[0], pixels[2]])] == [second.tokens, first.tokens]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_caption_does_not_depend_on_neighbours(precision, clip_checkpoint, tmp_path, pixels):
    export_bundle(clip_checkpoint, tmp_path / "b", ExportOptions(precision=precision, verify=False))
    captioner = Captioner.load(tmp_path / "b")
    for num_beams in (1, 5):
        together = captioner.caption(list(pixels[:6]), num_beams=num_beams, max_new_tokens=12)
        for image, caption in zip(pixels[:6], together, strict=True):
            alone = captioner.caption(image, num_beams=num_beams, max_new_tokens=12)
            assert alone.tokens == caption.tokens
            assert alone.score == pytest.approx(caption.score, abs=1e-5)


@pytest.mark.parametrize(
    ("precision", "vision", "expected"),
    [
        ("fp16", None, [("any", "fp16"), ("any", "fp16")]),
        ("int8", None, [("onnxruntime", "int8"), ("onnxruntime", "int8")]),
        ("int4", None, [("onnxruntime", "int8"), ("onnxruntime", "int4")]),
        ("int4", "fp32", [("any", "fp32"), ("onnxruntime", "int4")]),
        ("fp32", "int8", [("onnxruntime", "int8"), ("any", "fp32")]),
    ],
)
def test_each_graph_has_its_precision(precision, vision, expected, clip_checkpoint, tmp_path):
    manifest = export_bundle(
        clip_checkpoint, tmp_path / "b", ExportOptions(precision=precision, vision_precision=vision, verify=False)
    )
    assert [(graph.engine, graph.precision) for graph in manifest.graphs] == expected
    card = (tmp_path / "b" / "README.md").read_text()
    assert f"(vision {expected[0][1]}, decoder {expected[1][1]})" in card


@pytest.mark.parametrize("grid", ["3x4", "5x5", "4", "0x4"])
def test_patch_grids_that_the_tower_does_not_have(grid, clip_checkpoint, tmp_path):
    """Of 4 x 4 patches."""
    with pytest.raises(ItuneError) as error:
        export_bundle(clip_checkpoint, tmp_path / "b", ExportOptions(verify=False, patch_grid=grid))
    assert f"--patch-grid {grid}" in str(error.value)
    assert "4x4" in str(error.value)


def test_existing_output_is_kept_unless_forced(clip_checkpoint, tmp_path):
    output = tmp_path / "b"
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    with pytest.raises(ItuneError) as error:
        export_bundle(clip_checkpoint, output, ExportOptions(verify=False))
    assert str(output) in str(error.value)
    for manifest in (None, "{}", '{"files": 3}'):
        if manifest:
            (output / MANIFEST).write_text(manifest)
        with pytest.raises(ItuneError) as error:
            export_bundle(clip_checkpoint, output, ExportOptions(verify=False, force=True))
        assert str(output) in str(error.value)
    (output / MANIFEST).write_text('{"files": {"decoder.onnx": {}}}')
    with pytest.raises(ItuneError) as error:
        export_bundle(clip_checkpoint, output, ExportOptions(verify=False, force=True))
    assert "mine.txt" in str(error.value)
    assert (output / "mine.txt").read_text() == "precious"
    (output / "mine.txt").unlink()
    for _ in range(2):
        export_bundle(clip_checkpoint, output, ExportOptions(verify=False, force=True))
    Bundle.load(output)
    (output / "datastore").mkdir()
    (output / "datastore" / "datastore.json").touch()
    with pytest.raises(ItuneError) as error:
        export_bundle(clip_checkpoint, output, ExportOptions(verify=False, force=True))
    assert "datastore" in str(error.value)
    assert list(tmp_path.iterdir()) == [output]


def test_what_appears_meanwhile_is_kept(clip_checkpoint, tmp_path):
    output = tmp_path / "b"

    def appear(_what: str) -> None:
        output.mkdir(exist_ok=True)
        (output / "mine.txt").write_text("precious")

    with pytest.raises(ItuneError) as error:
        export_bundle(clip_checkpoint, output, ExportOptions(verify=False), progress=appear)
    assert str(output) in str(error.value)
    assert [path.name for path in output.iterdir()] == ["mine.txt"]
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_export_leaves_nothing(error, clip_checkpoint, tmp_path):
    def interrupt(stage):
        if "decoder" in stage:
            raise error

    with pytest.raises(error):
        export_bundle(clip_checkpoint, tmp_path / "b", ExportOptions(), progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", ["search", "training"])
def test_search_defaults_come_from_the_checkpoint(field, clip_checkpoint, tmp_path):
    content = json.loads((clip_checkpoint / "itune.json").read_text())
    del content["search"]  # where there is none, what the training says of its dev evaluation counts
    content["training"] = {"dev_cider": 0.5}
    content[field] = content.get(field, {}) | {"num_beams": 4, "max_new_tokens": 90}
    for part in ("language_model", "vision"):
        content[part]["source"] = str((clip_checkpoint / content[part]["source"]).resolve())
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "itune.json").write_text(json.dumps(content))
    (tmp_path / "c" / "adapters.safetensors").symlink_to(clip_checkpoint / "adapters.safetensors")
    manifest = export_bundle(tmp_path / "c", tmp_path / "b", ExportOptions(verify=False))
    assert manifest.search.num_beams == 4
    assert manifest.search.max_new_tokens == 48  # as many as there are positions
    assert "50.0 (x 100)" in (tmp_path / "b" / "README.md").read_text()
    with pytest.raises(ItuneError) as error:
        export_bundle(tmp_path / "c", tmp_path / "b2", ExportOptions(verify=False), search={"max_new_tokens": 49})
    assert "--max-new-tokens 49" in str(error.value)
    assert "48" in str(error.value)


def test_wrong_graph_leaves_no_bundle(clip_checkpoint, tmp_path, monkeypatch):
    """One wrong weight, as a bug in the merge would make it."""
    build = export_bundle.__globals__["build_decoder"]

    def wrong(model, vocabulary, **options):
        graph = build(model, vocabulary, **options)
        weight = graph.weights["transformer.h.1.mlp.c_fc.weight"].copy()
        weight[:, -32:] *= 1.2  # the queries' columns
        graph.weights["transformer.h.1.mlp.c_fc.weight"] = weight
        return graph

    monkeypatch.setitem(export_bundle.__globals__, "build_decoder", wrong)
    reports = []
    with pytest.raises(VerificationError) as error:
        export_bundle(clip_checkpoint, tmp_path / "b", ExportOptions(), report=reports.append)
    assert "logits" in str(error.value)
    assert "0.0005" in str(error.value)
    assert list(tmp_path.iterdir()) == []
    failed = {check.output for check in reports[0] if not check.passed}
    assert {"logits with past", "logits without past", "present.2.key"} <= failed
    assert not failed & {"visual.1.keys", "present.1.key"}
