from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from itune.backbones import BackboneError
from itune.cli.datastore import main
from itune.data.features import Features
from itune.data.records import load_records
from itune.retrieval import build as building
from itune.retrieval.build import Added, add_to_datastore, build_datastore, photos_in
from itune.retrieval.encoder import TextEncoder, load_encoder, retrieve_for
from itune.retrieval.options import CaptionSource, DatastoreOptions
from itune.runtime.errors import DatastoreError, ItuneError
from itune.runtime.image import decode, preprocess
from itune.runtime.retrieval.datastore import Datastore
from tests.conftest import CAPTIONS, random_photo

PHOTOS = 12


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve photos of two captions each, most of which say what those of other photos do."""
    folder = tmp_path_factory.mktemp("photos")
    lines = []
    for i in range(PHOTOS):
        random_photo(i).save(folder / f"{i}.png")
        texts = [f"{CAPTIONS[i % 6]} and {i}", CAPTIONS[(i + 1) % 6]]
        lines.append(json.dumps({"image": f"{i}.png", "captions": texts, "id": i}))
    path = folder / "captions.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def text_store(tmp_path_factory: pytest.TempPathFactory, captions: Path, full_clip_folder: Path) -> Path:
    store = tmp_path_factory.mktemp("stores") / "text"
    build(captions, full_clip_folder, store)
    return store


@pytest.fixture(scope="module")
def image_store(tmp_path_factory: pytest.TempPathFactory, captions: Path, clip_folder: Path) -> Path:
    store = tmp_path_factory.mktemp("stores") / "image"
    build(captions, clip_folder, store)
    return store


def build(captions: Path, encoder: Path, store: Path, **options: Any) -> Added:
    return build_datastore(CaptionSource(captions=captions), str(encoder), store, DatastoreOptions(**options))


def add(store: Path, captions: Path, encoder: Path | None = None) -> Added:
    return add_to_datastore(store, CaptionSource(captions=captions), encoder=None if encoder is None else str(encoder))


def refuses(error: type[Exception], values: list[object], action: Callable[..., object], *arguments: Any) -> None:
    """The error's message names each of the values."""
    with pytest.raises(error) as caught:
        action(*arguments)
    assert [value for value in values if str(value) not in str(caught.value)] == []


def embed(encoder: Path, photo: int, folder: Path) -> Any:
    tower, head = load_encoder(str(encoder))
    pixels = preprocess(decode(folder / f"{photo}.png"), tower.image)
    return head.pool(tower.embed(pixels[None])).numpy()


def test_text_features_are_those_of_clip(full_clip_folder: Path, text_store: Path, captions: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    store = Datastore.load(text_store, verify=True)
    assert (store.manifest.kind, store.manifest.entries, store.manifest.images) == ("text", 2 * PHOTOS, PHOTOS)
    assert not store.manifest.centered
    model = CLIPModel.from_pretrained(full_clip_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(full_clip_folder)
    tower, head = load_encoder(str(full_clip_folder))
    pixels = preprocess(decode(captions.parent / "3.png"), tower.image)
    normalised = (pixels / 255 - np.array(tower.image.mean)) / np.array(tower.image.std)
    texts = [caption for record in load_records(captions) for caption in record.captions]
    with torch.no_grad():
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=40, return_tensors="pt")
        image = torch.from_numpy(normalised.transpose(2, 0, 1)[None]).float()
        output = model(**inputs, pixel_values=image)
    expected = (output.logits_per_image / model.logit_scale.exp())[0].detach().numpy()
    found = store.search(head.pool(tower.embed(pixels[None])).numpy(), 2 * PHOTOS)[0]
    best = np.argsort(-expected)[0]
    assert found[0].caption == texts[best]
    assert found[0].score == pytest.approx(expected[best], abs=1e-5)
    assert len(found) == PHOTOS + 6  # each of the six that several photos have once
    np.testing.assert_allclose(TextEncoder(str(full_clip_folder)).embed(texts), output.text_embeds, atol=1e-6)


def test_a_photo_finds_itself_among_others(image_store: Path, clip_folder: Path, captions: Path) -> None:
    store = Datastore.load(image_store)
    assert (store.manifest.kind, store.manifest.entries, store.manifest.captions) == ("image", PHOTOS, 2 * PHOTOS)
    np.testing.assert_allclose(np.linalg.norm(store.embeddings, axis=1), 1, atol=1e-6)
    for photo in (0, 7):
        (found,) = store.search(embed(clip_folder, photo, captions.parent), 100)
        scores = {each.image: each.score for each in found}
        assert scores[str(photo)] == pytest.approx(1, abs=1e-5)
        assert max(score for image, score in scores.items() if image != str(photo)) < 0.99


def test_centering_is_what_the_manifest_says(tmp_path: Path, captions: Path, clip_folder: Path) -> None:
    rows = {}
    for center in (True, False):
        build(captions, clip_folder, tmp_path / str(center), center=center)
        rows[center] = np.array(Datastore.load(tmp_path / str(center)).embeddings)
    mean = rows[False].mean(axis=0)
    expected = rows[False] - mean
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(rows[True], expected, atol=1e-5)
    assert not (tmp_path / "False" / "mean.npy").exists()


def test_training_never_sees_a_photos_own_captions(
    tmp_path: Path, image_store: Path, clip_folder: Path, captions: Path
) -> None:
    tower, head = load_encoder(str(clip_folder))
    records = load_records(captions)
    store, features = Datastore.load(image_store), Features(tower)
    found = retrieve_for(records, features, store, 3, head, cache=tmp_path)
    assert list(found) == [record.id for record in records]
    for record in records:
        assert len(found[record.id]) == 3
        assert not set(found[record.id]) & set(record.captions)  # photo 1's second is photo 2's first, too
    assert retrieve_for(records, None, store, 3, head, cache=tmp_path) == found  # type: ignore[arg-type]
    (kept,) = tmp_path.glob("retrieved-*.json")
    for damage in ("", '{"cut', "[]", "{}"):
        kept.write_text(damage)
        assert retrieve_for(records, features, store, 3, head, cache=tmp_path) == found
    renamed = [type(record)(record.image, record.captions, f"other{record.id}") for record in records]
    assert list(retrieve_for(renamed, features, store, 3, head).values()) == list(found.values())
    shown = retrieve_for(renamed, features, store, 3, head, leave_out="photo", cache=tmp_path)
    assert any(set(shown[record.id]) & set(record.captions) for record in renamed)
    dev = retrieve_for(records, features, store, 3, head, leave_out="photo", cache=tmp_path)
    for record in records:
        assert record.captions[0] not in dev[record.id]  # which no other photo has


def test_adding_in_two_steps_is_building_at_once(
    tmp_path: Path, captions: Path, full_clip_folder: Path, text_store: Path
) -> None:
    lines = captions.read_text(encoding="utf-8").splitlines()
    first = captions.with_name("first.jsonl")
    first.write_text("\n".join(lines[:5]), encoding="utf-8")
    store = tmp_path / "store"
    build(first, full_clip_folder, store)
    reader = Datastore.load(store)
    added = add(store, captions)
    assert added.known == 5
    whole = Datastore.load(text_store)
    grown = Datastore.load(store, verify=True)
    np.testing.assert_allclose(grown.embeddings, whole.embeddings, atol=1e-6)
    np.testing.assert_array_equal(grown.entries, whole.entries)
    assert [grown.captions[i] for i in range(2 * PHOTOS)] == [whole.captions[i] for i in range(2 * PHOTOS)]
    assert [source["photos"] for source in added.manifest.provenance["sources"]] == [5, 7]
    assert len(reader.search(np.ones((1, 20)), 4)[0]) == 4  # who had the old one open, still has it
    refuses(DatastoreError, [captions, 12, "already"], add, store, captions)
    assert Datastore.load(store, verify=True).manifest == added.manifest
    assert list(tmp_path.iterdir()) == [store]


def test_an_interrupted_build_leaves_nothing(
    tmp_path: Path, captions: Path, clip_folder: Path, image_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = shutil.copytree(image_store, tmp_path / "store")
    before = Datastore.load(store, verify=True).manifest
    more = captions.with_name("more.jsonl")
    more.write_text('{"image": "0.png", "captions": ["new"], "id": "new"}', encoding="utf-8")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "_write_embeddings", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(captions, clip_folder, tmp_path / "new")
    with pytest.raises(KeyboardInterrupt):
        add(store, more, clip_folder)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert Datastore.load(store, verify=True).manifest == before


def test_many_entries_are_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_clip_folder: Path) -> None:
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghij "))
    texts = ["x" + "".join(rng.choice(letters, 20)) for _ in range(1500)]
    lines = [json.dumps({"image": f"{i}.png", "captions": [text]}) for i, text in enumerate(texts)]
    files = [tmp_path / "first.jsonl", tmp_path / "all.jsonl"]
    for file, count in zip(files, (1200, 1500), strict=True):
        file.write_text("\n".join(lines[:count]), encoding="utf-8")
    exact = tmp_path / "exact"
    build(files[1], full_clip_folder, exact)
    monkeypatch.setattr(building, "FLAT_ENTRIES", 1000)
    store = tmp_path / "store"
    build(files[0], full_clip_folder, store)
    manifest = add(store, files[1]).manifest
    assert (manifest.index, manifest.entries) == ("ivf", 1500)
    queries = rng.normal(size=(20, 20)).astype(np.float32)
    flat, ivf = Datastore.load(exact), Datastore.load(store, verify=True)
    assert ivf.embeddings.dtype == np.float16
    expected, found = flat.search(queries, 4), ivf.search(queries, 4)
    words = [[{each.caption for each in captions} for captions in results] for results in (expected, found)]
    assert np.mean([len(theirs & ours) for theirs, ours in zip(*words, strict=True)]) > 3.8
    assert found[0][0].score == pytest.approx(expected[0][0].score, abs=1e-3)
    assert [ivf.search(query[None], 4)[0] for query in queries] == found


def test_two_additions_do_not_lose_one(
    tmp_path: Path, captions: Path, clip_folder: Path, image_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = shutil.copytree(image_store, tmp_path / "store")
    more = captions.with_name("two.jsonl")
    more.write_text('{"image": "0.png", "captions": ["new"], "id": "new"}', encoding="utf-8")
    write = building._write_embeddings

    def meanwhile(*arguments: Any) -> None:
        refuses(DatastoreError, [store], add, store, more, clip_folder)
        write(*arguments)

    monkeypatch.setattr(building, "_write_embeddings", meanwhile)
    add(store, more, clip_folder)
    assert Datastore.load(store, verify=True).manifest.images == PHOTOS + 1
    assert list(tmp_path.iterdir()) == [store]


def test_photos_of_the_datastore_are_told_apart_from_new_ones(image_store: Path, captions: Path) -> None:
    store, records = Datastore.load(image_store), load_records(captions)
    assert photos_in(store, records) == PHOTOS
    others = [replace(record, captions=("nothing of the kind",)) for record in records[:3]]
    renamed = [replace(record, id=f"x{record.id}") for record in records[:3]]
    assert photos_in(store, [*others, *renamed, *records[3:5]]) == 2


def test_files_that_number_their_photos_alike(tmp_path: Path, clip_folder: Path, captions: Path) -> None:
    """Karpathy's files all count from 0; ids with spaces stay what they are."""
    files = []
    for name, texts in (("here", ["a dog", "a  cat"]), ("there", ["a bus", "A dog."])):
        images = [
            {"image": str(captions.parent / f"{i}.png"), "captions": [text], "id": f"no  {i}"}
            for i, text in enumerate(texts)
        ]
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("\n".join(map(json.dumps, images)), encoding="utf-8")
    store = tmp_path / "store"
    build(files[0], clip_folder, store)
    assert add(store, files[1]).known == 0
    whole = Datastore.load(store, verify=True)
    assert [whole.images[i] for i in range(4)] == ["no  0", "no  1", "there:no  0", "there:no  1"]
    assert [whole.captions[i] for i in range(4)] == ["a dog", "a cat", "a bus", "A dog."]
    for file in files:
        refuses(DatastoreError, [file, 2, "already"], add, store, file)


def test_faiss_is_missed_before_anything_is_embedded(
    tmp_path: Path, captions: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "FLAT_ENTRIES", 10)
    monkeypatch.setitem(sys.modules, "faiss", None)
    stages: list[str] = []
    source = CaptionSource(captions=captions)
    with pytest.raises(DatastoreError) as error:
        build_datastore(source, str(clip_folder), tmp_path / "s", progress=lambda what, *_: stages.append(what))
    assert "itune-captioner[retrieval]" in str(error.value)
    assert stages == []


def test_a_link_to_a_datastore_stays_one(tmp_path: Path, captions: Path, clip_folder: Path, image_store: Path) -> None:
    shutil.copytree(image_store, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    more = captions.with_name("three.jsonl")
    more.write_text('{"image": "0.png", "captions": ["new"], "id": "new"}', encoding="utf-8")
    add(tmp_path / "link", more, clip_folder)
    assert (tmp_path / "link").is_symlink()
    assert Datastore.load(tmp_path / "real").manifest.images == PHOTOS + 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_refusals(tmp_path: Path, captions: Path, clip_folder: Path, full_clip_folder: Path, image_store: Path) -> None:
    new = tmp_path / "s"
    with pytest.raises(BackboneError) as error:
        build(captions, clip_folder, new, kind="text")
    assert "visual_projection" in str(error.value)
    with pytest.raises(ValidationError) as contradiction:
        build(captions, full_clip_folder, new, kind="text", pooling="mean")
    assert "--pooling mean" in str(contradiction.value)
    refuses(ItuneError, [image_store, "--force"], build, captions, clip_folder, image_store)
    other = tmp_path / "other"
    other.mkdir()
    for force in (True, False):
        with pytest.raises(ItuneError) as refused:
            build(captions, clip_folder, other, force=force)
        assert str(other) in str(refused.value)
        assert "--force" not in str(refused.value)
    refuses(ItuneError, [captions], build, captions, clip_folder, captions / "s")
    source = CaptionSource(captions=captions, cache_features=captions)
    refuses(ItuneError, [f"--cache-features {captions}"], build_datastore, source, str(clip_folder), new)
    store = shutil.copytree(image_store, tmp_path / "deep" / "store")
    (store / "mine.txt").write_text("precious")
    with pytest.raises(ItuneError) as lost:
        build(captions, clip_folder, store, force=True)
    assert "mine.txt" in str(lost.value)
    refuses(ItuneError, [store, "mine.txt"], add, store, captions, clip_folder)
    (store / "mine.txt").unlink()
    refuses(DatastoreError, [store, "--encoder"], add, store, captions)
    refuses(DatastoreError, [store, "mean, 24 wide", full_clip_folder], add, store, captions, full_clip_folder)
    broken = captions.with_name("broken.jsonl")
    broken.with_name("bad.png").write_bytes(b"no image")
    broken.write_text('{"image": "bad.png", "captions": ["nothing"]}', encoding="utf-8")
    for cache in (None, tmp_path / "f"):
        source = CaptionSource(captions=broken, cache_features=cache)
        refuses(DatastoreError, [broken, "bad.png"], build_datastore, source, str(clip_folder), new)
    shutil.rmtree(tmp_path / "f")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "other"]


def test_command_line(
    tmp_path: Path,
    captions: Path,
    clip_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["itune-datastore", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            main()
        return int(done.value.code or 0), *capsys.readouterr()

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    store, photo = tmp_path / "store", captions.parent / "5.png"
    bad = captions.parent / "unreadable.png"
    bad.write_bytes(b"no image")
    arguments = ["--captions", captions, "--encoder", clip_folder, "-o", store, "--cache-features", tmp_path / "cache"]
    status, _, message = run("build", *arguments)
    assert status == 0, message
    assert "24 captions of 12 photos, 12 entries" in message
    assert json.loads(run("info", store, "--json")[1])["encoder"]["pooling"] == "mean"
    assert "photos (image to image)" in run("info", store)[1]
    content = json.loads((store / "datastore.json").read_text())
    for sources in (5, [3], [{"file": "[/x]"}]):
        (store / "datastore.json").write_text(json.dumps(content | {"provenance": {"sources": sources}}))
        assert run("info", store)[0] == 0
    (store / "datastore.json").write_text(json.dumps(content))
    status, printed, _ = run("search", store, photo, bad, "-k", 2, "--json")
    first, second = map(json.loads, printed.splitlines())
    assert (status, len(first["retrieved"]), set(second)) == (1, 2, {"image", "error"})
    assert set(first["retrieved"][0]) == {"caption", "score", "image"}
    assert run("search", store, photo, "-k", 3)[1].count("\t") == 6
    (store / "captions.txt").write_text("damaged")
    for command, value in ((["info", store], "captions.txt"), (["serach"], "serach")):
        status, _, message = run(*command)
        assert (status, len(message.splitlines())) == (2, 1)
        assert value in message
    status, _, message = run("build", *arguments, "--kind", "text", "--pooling", "mean", "--force")
    assert status == 2
    assert "--pooling mean" in message
