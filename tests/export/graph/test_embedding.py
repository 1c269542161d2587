from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from itune.backbones import load_language_model, load_vision_tower
from itune.cli.run import main
from itune.export.bundle import export_bundle
from itune.export.methods.registry import build_vision
from itune.export.options import ExportOptions
from itune.export.restore import restore_bundle
from itune.export.verify.report import Check
from itune.loading import LoadedCheckpoint, load_captioner
from itune.retrieval.build import build_datastore
from itune.retrieval.encoder import load_head
from itune.retrieval.options import CaptionSource, DatastoreOptions
from itune.runtime import Captioner, DatastoreError, ItuneError
from itune.runtime.bundle import MANIFEST, Manifest
from itune.runtime.errors import BundleError, SearchError
from itune.runtime.settings import RetrievalSettings
from tests.conftest import CAPTIONS, make_checkpoint, make_language_model, random_photo

EMBEDDING = "visual.embedding"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    lines = []
    for i in range(60):
        random_photo(i).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "captions": [CAPTIONS[i % 6], f"photo {'very ' * (i % 9)}{i}"]}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return [folder / f"{i}.png" for i in range(8)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, full_clip_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("retrieving")
    language = make_language_model(folder / "language-model", n_positions=400)
    return make_checkpoint(folder / "checkpoint", language, full_clip_folder, heads=2, lambda_=2.5)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    bundle = tmp_path_factory.mktemp("bundles") / "bundle"
    checks: list[Check] = []
    export_bundle(checkpoint, bundle, ExportOptions(retrieve=3), report=checks.extend)
    assert [check.passed for check in checks if check.output == EMBEDDING] == [True]
    return bundle


@pytest.fixture(scope="module", params=["text", "image"])
def store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, photos: list[Path], full_clip_folder: Path
) -> Path:
    store = tmp_path_factory.mktemp("stores") / "store"
    build_datastore(
        CaptionSource(captions=photos[0].with_name("captions.jsonl")),
        str(full_clip_folder),
        store,
        DatastoreOptions(kind=request.param),
    )
    return store


@pytest.mark.parametrize(("tower_name", "pooling"), [("clip", "projection"), ("clip", "mean"), ("onnx", "mean")])
def test_the_graph_computes_the_embedding_of_pytorch(
    request: pytest.FixtureRequest, tmp_path: Path, tower_name: str, pooling: Any, full_clip_folder: Path
) -> None:
    if tower_name == "clip":
        loaded = LoadedCheckpoint.load(request.getfixturevalue("checkpoint"))
    else:
        loaded = LoadedCheckpoint.load(request.getfixturevalue("onnx_checkpoint"))
    head = load_head(loaded.tower, "tower", pooling)
    (path,) = build_vision(loaded.model, loaded.tower, head).save(tmp_path / "vision.onnx")
    height, width = loaded.tower.image.output_size
    pixels = np.random.default_rng(0).integers(0, 256, (3, height, width, 3), np.uint8)
    (found,) = ort.InferenceSession(path).run([EMBEDDING], {"pixels": pixels})
    expected = head.pool(loaded.tower.embed(pixels)).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert np.abs(expected[0] - expected[1]).max() > 0.01
    assert found.shape[1] == {"projection": 20, "mean": loaded.tower.width}[pooling]


def test_captions_are_those_of_eager_pytorch_alone_and_in_batches(
    bundle: Path, checkpoint: Path, store: Path, photos: list[Path]
) -> None:
    captioner = Captioner.load(bundle, datastore=store, threads=1)
    options: Any = {"num_beams": 3, "max_new_tokens": 12}
    together = captioner.caption(photos, batch_size=8, **options)
    assert len({len(" ".join(each.retrieved or ())) for each in together}) > 2  # prompts of different lengths
    for size in (1, 3):
        for mine, theirs in zip(captioner.caption(photos, batch_size=size, **options), together, strict=True):
            assert (mine.tokens, mine.retrieved) == (theirs.tokens, theirs.retrieved)
            assert mine.score == pytest.approx(theirs.score, abs=1e-4)
    eager = load_captioner(checkpoint, datastore=store, retrieve=3)
    for mine, theirs in zip(eager.caption(photos, **options), together, strict=True):
        assert (mine.tokens, mine.retrieved) == (theirs.tokens, theirs.retrieved)
    assert all(len(each.retrieved or ()) == 3 for each in together)
    without = Captioner.load(bundle, retrieve=0).caption(photos, **options)
    assert [each.retrieved for each in without] == [()] * len(photos)
    assert [each.tokens for each in without] != [each.tokens for each in together]


def test_int8_retrieves_the_same_and_a_plain_store_travels_along(
    tmp_path: Path, checkpoint: Path, store: Path, photos: list[Path], bundle: Path
) -> None:
    small = tmp_path / "small"
    export_bundle(checkpoint, small, ExportOptions(precision="int8", retrieve=3, verify=False))
    shutil.copytree(store, small / "datastore")
    captioner = Captioner.load(small, threads=1)
    found = captioner.caption(photos, batch_size=8, max_new_tokens=6)
    alone = captioner.caption(photos, batch_size=1, max_new_tokens=6)
    assert [each.tokens for each in found] == [each.tokens for each in alone]
    exact = Captioner.load(bundle, datastore=store).caption(photos, max_new_tokens=6)
    same = [set(a.retrieved or ()) == set(b.retrieved or ()) for a, b in zip(found, exact, strict=True)]
    assert sum(same) >= 6


def test_swapping_the_datastore_changes_what_is_retrieved(
    tmp_path: Path, bundle: Path, photos: list[Path], full_clip_folder: Path
) -> None:
    captions = photos[0].with_name("others.jsonl")
    captions.write_text('{"image": "0.png", "captions": ["only this", "and that"]}')
    build_datastore(CaptionSource(captions=captions), str(full_clip_folder), tmp_path / "other")
    found = Captioner.load(bundle, datastore=tmp_path / "other", retrieve=1).caption(photos[3])
    assert found.retrieved in (("only this",), ("and that",))


def test_room_for_the_prompt(tmp_path: Path, bundle: Path, store: Path, photos: list[Path]) -> None:
    few = shutil.copytree(bundle, tmp_path / "few")
    manifest = Manifest.model_validate_json((few / MANIFEST).read_bytes())
    shortest = len(Captioner.load(bundle, retrieve=0).prompts(_State(), _Config())[0][0]) - 1
    tokens = manifest.tokens.model_copy(update={"max_positions": shortest + 60})
    (few / MANIFEST).write_text(manifest.model_copy(update={"tokens": tokens}).to_json())
    captioner = Captioner.load(few, datastore=store)
    assert len(captioner.caption(photos[0], max_new_tokens=8).retrieved or ()) in (0, 1, 2)
    assert captioner.caption(photos[0], max_new_tokens=60).retrieved == ()
    with pytest.raises(SearchError) as error:
        captioner.caption(photos[0], max_new_tokens=61)
    assert "60" in str(error.value)


class _State:
    images, embedding = 1, None


class _Config:
    max_new_tokens = 8


def test_bundles_refuse_missing_and_foreign_datastores(
    tmp_path: Path, bundle: Path, store: Path, checkpoint: Path, clip_folder: Path, photos: list[Path]
) -> None:
    with pytest.raises(DatastoreError) as error:
        Captioner.load(bundle)
    assert "--datastore" in str(error.value)
    with pytest.raises(ItuneError) as error:
        Captioner.load(bundle, datastore=store, retrieve=-1)
    assert "retrieve" in str(error.value)
    other = tmp_path / "other"
    build_datastore(CaptionSource(captions=photos[0].with_name("captions.jsonl")), str(clip_folder), other)
    with pytest.raises(DatastoreError) as error:
        Captioner.load(bundle, datastore=other)
    assert "clip" in str(error.value)
    with pytest.raises(BundleError) as error:
        Captioner.load(None, datastore=store)
    assert "--retrieve" in str(error.value)


def test_a_bundle_that_was_not_trained_with_it(
    tmp_path: Path, checkpoint: Path, store: Path, photos: list[Path]
) -> None:
    plain = tmp_path / "plain"
    export_bundle(checkpoint, plain, ExportOptions(retrieve=0, verify=False))
    assert Captioner.load(plain).caption(photos[0]).retrieved is None
    assert len(Captioner.load(plain, datastore=store).caption(photos[0]).retrieved or ()) == 4
    assert Captioner.load(plain, datastore=store, retrieve=0).caption(photos[0]).retrieved is None
    restore_bundle(plain, tmp_path / "restored")  # the added output is no part of the tower
    assert load_vision_tower(str(tmp_path / "restored" / "vision")).width == 24
    assert load_language_model(str(tmp_path / "restored" / "language-model")).model.config.n_positions == 400


def test_a_restored_bundle_is_exported_and_retrieves_again(
    tmp_path: Path, checkpoint: Path, photos: list[Path], full_clip_folder: Path
) -> None:
    config = json.loads((checkpoint / "itune.json").read_text())
    encoder = load_head(load_vision_tower(str(full_clip_folder)), str(full_clip_folder)).encoder
    trained = shutil.copytree(checkpoint, checkpoint.with_name(f"trained-{tmp_path.name}"))
    settings = RetrievalSettings(k=3, encoder=encoder.model_copy(update={"source": config["vision"]["source"]}))
    (trained / "itune.json").write_text(json.dumps(config | {"retrieval": settings.model_dump(mode="json")}))
    export_bundle(trained, tmp_path / "bundle", ExportOptions(verify=False))
    restore_bundle(tmp_path / "bundle", tmp_path / "restored")
    vision = str(tmp_path / "restored" / "vision")
    found, expected = (load_head(load_vision_tower(each), each) for each in (vision, str(full_clip_folder)))
    assert found.projection is not None
    assert expected.projection is not None
    torch.testing.assert_close(found.projection.weight, expected.projection.weight, atol=1e-6, rtol=0)
    captions = photos[0].with_name("captions.jsonl")
    build_datastore(CaptionSource(captions=captions), vision, tmp_path / "store", DatastoreOptions(kind="image"))
    again = export_and_load(tmp_path / "restored" / "checkpoint", tmp_path / "again", tmp_path / "store")
    eager = load_captioner(tmp_path / "restored" / "checkpoint", datastore=tmp_path / "store")
    options: Any = {"num_beams": 2, "max_new_tokens": 8}
    assert [each.tokens for each in again.caption(photos, **options)] == [
        each.tokens for each in eager.caption(photos, **options)
    ]


def export_and_load(checkpoint: Path, bundle: Path, store: Path) -> Captioner:
    export_bundle(checkpoint, bundle, ExportOptions(verify=False))
    return Captioner.load(bundle, datastore=store)


def test_heatmaps_are_of_the_prompt_that_the_caption_has(
    tmp_path: Path,
    checkpoint: Path,
    store: Path,
    photos: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Long captions leave room for fewer retrieved ones; a photo that goes away meanwhile stops nothing."""
    bundle = tmp_path / "bundle"
    export_bundle(checkpoint, bundle, ExportOptions(retrieve=4, verify=False))
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["search"]["max_new_tokens"] = 8
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    captioner = Captioner.load(bundle, datastore=store)
    options: Any = {"num_beams": 1, "min_new_tokens": 340, "max_new_tokens": 345}
    caption = captioner.caption(photos[0], **options)
    usual = captioner.caption(photos[0], num_beams=1)
    assert len(caption.retrieved or ()) < len(usual.retrieved or ())
    assert len(captioner.explain(photos[0], caption, **options).tokens) == len(caption.tokens)

    gone = tmp_path / "gone.png"
    shutil.copy(photos[1], gone)
    explain = Captioner.explain

    def explain_late(self: Captioner, image: Any, *arguments: Any, **options: Any) -> Any:
        gone.unlink(missing_ok=True)
        return explain(self, image, *arguments, **options)

    monkeypatch.setattr(Captioner, "explain", explain_late)
    arguments = [photos[0], gone, photos[2], "--bundle", bundle, "--datastore", store, "--num-beams", 1]
    arguments += ["--min-new-tokens", 340, "--max-new-tokens", 345, "--heatmap-json", tmp_path / "h.json"]
    monkeypatch.setattr(sys, "argv", ["itune-run", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        main()
    written = capsys.readouterr()
    assert done.value.code == 1
    assert len(written.out.splitlines()) == 3
    assert "gone.png" in written.err
    assert len((tmp_path / "h.json").read_text().splitlines()) == 2


def test_json_lists_the_retrieved_captions(
    bundle: Path, store: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> dict[str, Any]:
        command = ["itune-run", photos[0], "--bundle", bundle, "--json", "--max-new-tokens", 5, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        with pytest.raises(SystemExit) as done:
            main()
        assert not done.value.code
        return dict(json.loads(capsys.readouterr().out))

    assert len(run("--datastore", store, "--retrieve", 2)["retrieved"]) == 2
    assert run("--retrieve", 0)["retrieved"] == []
