from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from itune.export.bundle import export_bundle
from itune.export.options import ExportOptions
from itune.export.quantize.rewrite import read_weights
from itune.export.restore import restore_bundle
from itune.loading import LoadedCheckpoint, eager_captioner
from itune.runtime.bundle import MANIFEST
from itune.runtime.errors import BundleError, ItuneError
from itune.runtime.manifest import FileHash
from tests.conftest import assert_same_weights
from tests.export.fixtures import int8_codes

KINDS = pytest.mark.parametrize("kind", ["clip", "onnx"])


@KINDS
def test_fp32_restores_the_checkpoint(kind, request, tmp_path, pixels):
    checkpoint = request.getfixturevalue(f"{kind}_checkpoint")
    export_bundle(checkpoint, tmp_path / "bundle", ExportOptions(verify=False))
    restore_bundle(tmp_path / "bundle", tmp_path / "restored")
    before, after = LoadedCheckpoint.load(checkpoint), LoadedCheckpoint.load(tmp_path / "restored" / "checkpoint")

    assert after.config.language_model.source == "../language-model"
    same = {"language_model", "vision"}
    assert after.config.model_dump(exclude=same) == before.config.model_dump(exclude=same)
    assert after.language.tokenizer.to_str() == before.language.tokenizer.to_str()
    assert after.tower.image == before.tower.image
    assert_same_weights(after, before)
    np.testing.assert_allclose(after.tower.embed(pixels), before.tower.embed(pixels), atol=1e-5)

    captions = [eager_captioner(each).caption(list(pixels), num_beams=3, max_new_tokens=12) for each in (before, after)]
    assert len({caption.tokens for caption in captions[0]}) > 1
    for old, new in zip(*captions, strict=True):
        assert old.tokens == new.tokens
        assert old.score == pytest.approx(new.score, abs=1e-4)


@KINDS
def test_int8_restores_to_the_same_integers(kind, request, tmp_path):
    export_bundle(
        request.getfixturevalue(f"{kind}_checkpoint"),
        tmp_path / "bundle",
        ExportOptions(precision="int8", verify=False),
    )
    restore_bundle(tmp_path / "bundle", tmp_path / "restored")
    export_bundle(
        tmp_path / "restored" / "checkpoint", tmp_path / "again", ExportOptions(precision="int8", verify=False)
    )
    before, after = int8_codes(tmp_path / "bundle"), int8_codes(tmp_path / "again")
    assert before.keys() == after.keys()
    assert len(before) > 15
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)
    for role in ("vision", "decoder"):
        old, new = (read_weights(tmp_path / folder / f"{role}.onnx") for folder in ("bundle", "again"))
        for name, weight in old.items():
            np.testing.assert_allclose(new[name], weight, rtol=1e-6, err_msg=name)


def test_force_replaces_what_was_restored_and_nothing_else(clip_checkpoint, tmp_path):
    export_bundle(clip_checkpoint, tmp_path / "bundle", ExportOptions(verify=False))
    mine = tmp_path / "project" / "checkpoint" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    with pytest.raises(ItuneError) as error:
        restore_bundle(tmp_path / "bundle", tmp_path / "project", force=True)
    assert "project" in str(error.value)
    assert mine.read_text() == "precious"
    for force in (False, True):
        restore_bundle(tmp_path / "bundle", tmp_path / "restored", force=force)
    (tmp_path / "restored" / "vision" / "run").write_text("precious")
    with pytest.raises(ItuneError) as error:
        restore_bundle(tmp_path / "bundle", tmp_path / "restored", force=True)
    assert "restored" in str(error.value)
    assert "vision/run" in str(error.value)


def test_the_search_defaults_are_restored(clip_checkpoint, tmp_path):
    search = {"num_beams": 4, "max_new_tokens": 12, "length_penalty": 0.5}
    first = export_bundle(clip_checkpoint, tmp_path / "bundle", ExportOptions(verify=False), search=search)
    restore_bundle(tmp_path / "bundle", tmp_path / "restored")
    loaded = LoadedCheckpoint.load(tmp_path / "restored" / "checkpoint")
    again = export_bundle(tmp_path / "restored" / "checkpoint", tmp_path / "again", ExportOptions(verify=False))
    assert again.search == first.search == loaded.config.search == eager_captioner(loaded).search
    assert first.search.model_dump() == first.search.model_dump() | search


def test_restored_tower_does_not_grow(onnx_checkpoint, tmp_path):
    export_bundle(onnx_checkpoint, tmp_path / "bundle", ExportOptions(precision="int8", verify=False))
    restore_bundle(tmp_path / "bundle", tmp_path / "restored")
    tower = onnx.load(tmp_path / "restored" / "vision" / "model.onnx")
    onnx.checker.check_model(tower, full_check=True)
    export_bundle(tmp_path / "restored" / "checkpoint", tmp_path / "again", ExportOptions(verify=False))
    restore_bundle(tmp_path / "again", tmp_path / "restored-again")
    again = onnx.load(tmp_path / "restored-again" / "vision" / "model.onnx")
    assert [node.op_type for node in again.graph.node] == [node.op_type for node in tower.graph.node]


def test_taken_outputs_and_bundles_without_restore_settings_are_named(clip_checkpoint, tmp_path):
    export_bundle(clip_checkpoint, tmp_path / "bundle", ExportOptions(verify=False))
    (tmp_path / "taken").mkdir()
    with pytest.raises(ItuneError) as error:
        restore_bundle(tmp_path / "bundle", tmp_path / "taken")
    assert "taken" in str(error.value)
    manifest = json.loads((tmp_path / "bundle" / MANIFEST).read_text())
    del manifest["restore"]
    (tmp_path / "bundle" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError) as error:
        restore_bundle(tmp_path / "bundle", tmp_path / "restored")
    assert str(tmp_path / "bundle" / MANIFEST) in str(error.value)
    assert "restore" in str(error.value)
    assert not (tmp_path / "restored").exists()


def damaged(bundle, change):
    """Change a bundle's manifest and graphs, and bring the hashes up to date."""
    content = json.loads((bundle / MANIFEST).read_text())
    change(bundle, content)
    for name, entry in content["files"].items():
        entry |= FileHash.of(bundle / name).model_dump()
    (bundle / MANIFEST).write_text(json.dumps(content))


def drop_weights(bundle, _content):
    graph = onnx.load(bundle / "decoder.onnx")
    del graph.graph.initializer[:]
    onnx.save(graph, bundle / "decoder.onnx")


@pytest.mark.parametrize(
    "change",
    [
        drop_weights,
        lambda _bundle, content: content["restore"]["checkpoint"].update(method=3),
        lambda _bundle, content: content["restore"]["checkpoint"].pop("vision"),
        lambda _bundle, content: content["restore"]["vision"].update(patch_size="x"),
        lambda _bundle, content: content["restore"]["vision"].update(hidden_size=7),
    ],
)
def test_damaged_bundles_are_refused_in_a_sentence(clip_checkpoint, tmp_path, change):
    export_bundle(clip_checkpoint, tmp_path / "bundle", ExportOptions(verify=False))
    damaged(tmp_path / "bundle", change)
    with pytest.raises(ItuneError) as error:
        restore_bundle(tmp_path / "bundle", tmp_path / "restored")
    assert str(tmp_path / "bundle") in str(error.value)
    assert not (tmp_path / "restored").exists()


def test_terms_are_carried_on(clip_checkpoint, tmp_path):
    export_bundle(clip_checkpoint, tmp_path / "bundle", ExportOptions(verify=False, license="For research."))
    restore_bundle(tmp_path / "bundle", tmp_path / "free")
    assert LoadedCheckpoint.load(tmp_path / "free" / "checkpoint").config.license is None
    (tmp_path / "bundle" / "LICENSE.md").write_text("The terms at length.")
    restore_bundle(tmp_path / "bundle", tmp_path / "restored")
    checkpoint = tmp_path / "restored" / "checkpoint"
    assert LoadedCheckpoint.load(checkpoint).config.license == "For research."
    assert "For research." in (tmp_path / "restored" / "README.md").read_text()
    again = export_bundle(checkpoint, tmp_path / "again", ExportOptions(verify=False))
    assert again.license == "For research."
    for part in (checkpoint, tmp_path / "restored" / "language-model", tmp_path / "again"):
        assert (part / "LICENSE.md").read_text() == "The terms at length."
    with pytest.raises(ItuneError) as error:
        export_bundle(checkpoint, tmp_path / "other", ExportOptions(verify=False, license="MIT"))
    assert "--license" in str(error.value)
    restore_bundle(tmp_path / "bundle", tmp_path / "restored", force=True)
