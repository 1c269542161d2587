from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from itune.runtime.errors import DatastoreError
from itune.runtime.manifest import FileHash
from itune.runtime.retrieval.consensus import NGramWeights, consensus
from itune.runtime.retrieval.datastore import MANIFEST, Datastore, DatastoreManifest, caption_key
from itune.runtime.retrieval.nearest import Ranking
from itune.runtime.settings import EncoderIdentity

DIM = 8
ENCODER = EncoderIdentity(source="tower", sha256="a" * 64, pooling="mean", dim=DIM)


def write_texts(folder: Path, name: str, texts: Sequence[str]) -> None:
    lines = [f"{text}\n".encode() for text in texts]
    (folder / f"{name}.txt").write_bytes(b"".join(lines))
    np.save(folder / f"{name}.npy", np.cumsum([0, *map(len, lines)]))


def make_store(
    folder: Path, kind: Any, rows: Any, captions: Sequence[Sequence[str]], mean: Any = None, **fields: Any
) -> Path:
    """A datastore as `itune-datastore` would write it; entry i is of photo `p{i}`."""
    folder.mkdir(parents=True)
    rows = np.asarray(rows, np.float32)
    np.save(folder / "embeddings.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    ends = np.cumsum([0, *map(len, captions)])
    np.save(folder / "entries.npy", np.stack([np.arange(len(rows)), ends[:-1], ends[1:]], axis=1))
    write_texts(folder, "captions", [text for texts in captions for text in texts])
    write_texts(folder, "images", [f"p{i}" for i in range(len(rows))])
    if mean is not None:
        np.save(folder / "mean.npy", np.asarray(mean, np.float32))
    manifest = DatastoreManifest(
        kind=kind,
        encoder=ENCODER,
        entries=len(rows),
        captions=int(ends[-1]),
        images=len(rows),
        index="flat",
        centered=mean is not None,
        files={path.name: FileHash.of(path) for path in folder.iterdir()},
    )
    (folder / MANIFEST).write_text(manifest.model_copy(update=fields).to_json())
    return folder


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """Captions of four photos along the axes, one of them twice."""
    texts = [["a dog"], ["A  dog ."], ["two men"], ["ein Löwe gähnt"], ["the sea"]]
    rows = np.eye(DIM)[[0, 0, 1, 2, 3]]
    return make_store(tmp_path / "words", "text", rows, texts)


def query(*values: float) -> Any:
    return np.array([[*values, *([0.0] * (DIM - len(values)))]], np.float32)


def test_text_to_text_best_first_without_repeats(words: Path) -> None:
    store = Datastore.load(words, encoder=ENCODER.model_copy(update={"source": "elsewhere"}))
    (found,) = store.search(query(3, 2, 1), 9)
    assert [(each.caption, each.image) for each in found] == [
        ("a dog", "p0"),
        ("two men", "p2"),
        ("ein Löwe gähnt", "p3"),
        ("the sea", "p4"),
    ]
    assert found[0].score == pytest.approx(3 / 14**0.5)
    assert [each.caption for each in store.search(query(3, 2, 1), 2)[0]] == ["a dog", "two men"]
    assert store.search(query(1), 0) == [[]]
    assert store.search(np.empty((0, DIM), np.float32), 4) == []


def test_ties_keep_the_order_of_the_entries(words: Path) -> None:
    (found,) = Datastore.load(words).search(query(1, 1, 1, 1), 4)
    assert [each.image for each in found] == ["p0", "p2", "p3", "p4"]


def test_excluded_images_and_captions(words: Path) -> None:
    store = Datastore.load(words)
    both = np.concatenate([query(1, 0.5), query(1, 0.5)])
    found = store.search(both, 2, exclude_images=[{"p0"}, ()])
    assert [[each.image for each in captions] for captions in found] == [["p1", "p2"], ["p0", "p2"]]
    found = store.search(both, 2, exclude_captions=[["a DOG."], ()])
    assert found[0][0].caption == "two men"
    assert found[1][0].caption == "a dog"


def test_looks_further_if_the_nearest_captions_are_equal(tmp_path: Path) -> None:
    rows = np.zeros((300, DIM))
    rows[:, 0], rows[:, 1] = 1, np.arange(300) / 1000
    store = Datastore.load(make_store(tmp_path / "s", "text", rows, [*[["same"]] * 298, ["other"], ["third"]]))
    assert [each.caption for each in store.search(query(1), 3)[0]] == ["same", "other", "third"]


def test_an_image_store_returns_captions_that_its_neighbours_agree_on(tmp_path: Path) -> None:
    near = [["a red car", "a dog runs on grass"], ["a dog runs on the grass"], ["the dog runs on grass"], ["a kite"]]
    rows = np.array([[1, 0.1 * i, *[0] * (DIM - 2)] for i in range(4)])
    store = Datastore.load(make_store(tmp_path / "s", "image", rows, near))
    (found,) = store.search(query(1), 4)
    assert found[0].caption == "a dog runs on grass"
    assert [each.caption for each in found].index("a kite") == 3
    assert {each.image: each.score for each in found}["p0"] == pytest.approx(1)
    (others,) = store.search(query(1), 4, exclude_images=[{"p1"}], exclude_captions=[["A red car."]])
    assert {each.caption for each in others} == {"a dog runs on grass", "the dog runs on grass", "a kite"}


def test_only_the_nearest_photos_vote(tmp_path: Path) -> None:
    rows = np.array([[1, 0.01 * i, *[0] * (DIM - 2)] for i in range(60)])
    texts = [[f"one of {i}"] if i < 20 else ["many say this"] for i in range(60)]
    store = Datastore.load(make_store(tmp_path / "s", "image", rows, texts))
    assert "many say this" not in {each.caption for each in store.search(query(1), 20)[0]}
    assert "many say this" in {each.caption for each in store.search(query(1), 21)[0]}


def test_queries_are_centred_as_entries_were(tmp_path: Path) -> None:
    mean = np.full(DIM, 0.5)
    store = Datastore.load(make_store(tmp_path / "s", "text", np.eye(DIM), [[f"axis {i}"] for i in range(DIM)], mean))
    (found,) = store.search(query(0.5, 0.5, 0.5, 0.9, 0.5, 0.5, 0.5, 0.5), 1)
    assert (found[0].caption, found[0].score) == ("axis 3", pytest.approx(1))


def test_agrees_with_sorting_everything_and_with_other_batches(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40_000, DIM))
    rows[100:200] = rows[:100]  # equal ones far apart
    store = Datastore.load(make_store(tmp_path / "s", "text", rows, [[f"text {i}"] for i in range(len(rows))]))
    queries = rng.normal(size=(16, DIM)).astype(np.float32)
    queries[:4] = rows[100:104]
    found = store.search(queries, 7)
    exact = store.embeddings.astype(np.float64)
    for each, captions in zip(queries.astype(np.float64), found, strict=True):
        scores = (exact @ (each / np.linalg.norm(each))).astype(np.float32)
        expected = np.lexsort((np.arange(len(scores)), -scores))[:7]
        assert [int(caption.image[1:]) for caption in captions] == expected.tolist()
    assert [store.search(each[None], 7)[0] for each in queries] == found
    assert [found[i][0].image for i in range(4)] == ["p0", "p1", "p2", "p3"]
    few = Ranking(store.embeddings, queries).best(0, 10**6)
    assert len(few[0]) == len(rows)


def test_consensus_counts_votes_and_rare_words() -> None:
    same, other = ["a", "dog", "runs", "on", "grass"], ["two", "men", "sit", "idle"]
    rarity = NGramWeights([same, other])
    np.testing.assert_allclose(consensus([same, same, other], np.array([1.0, 3, 5]), rarity), [3, 1, 0], atol=1e-12)
    assert consensus([[], ["a"]], np.ones(2), rarity).tolist() == [0, 0]
    common = NGramWeights([["a", "dog"], ["a", "cat"], ["a", "bird"], ["a", "bee"]])
    agreement = consensus([["a", "dog"], ["a", "cat"], ["the", "dog"]], np.ones(3), common)
    assert agreement[2] > agreement[1] == 0  # "a" has no weight, as all captions contain it
    assert caption_key(" A  Dog .") == "a dog"


def edit(folder: Path, **fields: Any) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(content | fields))


NO_SHAPE = "{'descr': '<i8', 'fortran_order': False, 'shape': (9223372036854775808, 3)}"
BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, MANIFEST),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), MANIFEST),
    "no JSON": (lambda folder: (folder / MANIFEST).write_text("{"), f"{MANIFEST}: Invalid JSON"),
    "no object": (lambda folder: (folder / MANIFEST).write_text("[]"), f"{MANIFEST}: Input should be an object"),
    "format": (lambda folder: edit(folder, format=2, kind="video"), f"{MANIFEST}: format: Input should be 1, not 2"),
    "kind": (lambda folder: edit(folder, kind="video"), f"{MANIFEST}: kind: "),
    "nprobe": (lambda folder: edit(folder, nprobe=1 << 70), f"{MANIFEST}: nprobe: "),
    "unlisted": (lambda folder: edit(folder, files={}), "captions.npy: "),
    "no index": (lambda folder: edit(folder, index="ivf"), "index.faiss: "),
    "outside": (lambda folder: edit(folder, files={"../x": {"sha256": "a" * 64, "bytes": 1}}), "'../x'"),
    "entries": (lambda folder: edit(folder, entries=4), "embeddings.npy: contains float32 (5, 8) instead of (4, 8)"),
    "missing": (lambda folder: (folder / "captions.txt").unlink(), "captions.txt: "),
    "size": (lambda folder: (folder / "captions.txt").write_text("short"), "captions.txt: damaged (5 bytes"),
    "hash": (lambda folder: flip(folder / "embeddings.npy"), "embeddings.npy: damaged"),
    "offsets' type": (
        lambda folder: resave(folder, "captions", np.zeros((2, 2))),
        "captions.npy: contains float64 (2, 2)",
    ),
    "offsets down": (lambda folder: resave(folder, "captions", np.array([0, 15, 6, 23, 40, 48])), "captions.txt: "),
    "offsets short": (lambda folder: resave(folder, "captions", np.array([0, 6, 15, 23, 40, 47])), "captions.txt: "),
    "image beyond": (lambda folder: change_entry(folder, 0, 5), "entries.npy: "),
    "caption beyond": (lambda folder: change_entry(folder, 2, 6), "entries.npy: "),
    "negative": (lambda folder: change_entry(folder, 1, -1), "entries.npy: "),
    "no captions": (lambda folder: change_entry(folder, 2, 4), "entries.npy: "),
    "archive": (lambda folder: rewrite(folder, "entries.npy", b"PK\x03\x04 no archive"), "entries.npy: "),
    "header": (lambda folder: rewrite(folder, "entries.npy", header("{'descr': '<f4', (((")), "entries.npy: "),
    "shape": (lambda folder: rewrite(folder, "entries.npy", header(NO_SHAPE)), "entries.npy: "),
    "no text": (lambda folder: rewrite(folder, "captions.txt", b""), "captions.txt: "),
}


def header(text: str) -> bytes:
    """The start of a .npy file."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def resave(folder: Path, name: str, array: Any) -> None:
    """Write an array, and correct its hash."""
    np.save(folder / f"{name}.npy", array)
    list_file(folder, f"{name}.npy")


def change_entry(folder: Path, column: int, value: int) -> None:
    """Change the last of the five entries, which is [4, 4, 5]."""
    entries = np.load(folder / "entries.npy")
    entries[-1, column] = value
    resave(folder, "entries", entries)


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Write any content, and correct its hash."""
    (folder / name).write_bytes(content)
    list_file(folder, name)


def list_file(folder: Path, name: str, **fields: Any) -> None:
    """Put a file's hash into the manifest."""
    files = json.loads((folder / MANIFEST).read_text())["files"]
    edit(folder, files=files | {name: FileHash.of(folder / name).model_dump()}, **fields)


@pytest.mark.parametrize(("breakage", "where"), BREAKAGES.values(), ids=BREAKAGES)
def test_damage_is_reported_in_one_sentence(words: Path, breakage: Callable[[Path], object], where: str) -> None:
    breakage(words)
    with pytest.raises(DatastoreError) as error:
        Datastore.load(words)
    assert where in str(error.value)
    assert str(words) in str(error.value)
    assert "\n" not in str(error.value)


def test_another_encoders_datastore_is_refused_with_both_names(words: Path) -> None:
    for update in ({"sha256": "b" * 64}, {"pooling": "projection"}, {"dim": 9}):
        other = ENCODER.model_copy(update=update | {"source": "other"})
        with pytest.raises(DatastoreError) as error:
            Datastore.load(words, encoder=other)
        assert str(ENCODER) in str(error.value)
        assert str(other) in str(error.value)
    store = Datastore.load(words)
    for embeddings, value in ((np.ones((1, 9), np.float32), "[1, 9]"), (query(np.nan), "1 not finite"), (None, "[]")):
        with pytest.raises(DatastoreError) as error:
            store.search(embeddings, 1)
        assert value in str(error.value)


def test_a_large_datastore_without_faiss_says_what_to_install(words: Path) -> None:
    (words / "index.faiss").write_bytes(b"no index")
    list_file(words, "index.faiss", index="ivf", nprobe=1)
    code = (
        "import sys; sys.modules['faiss'] = None\n"
        "from itune.runtime import Datastore, DatastoreError\n"
        f"try: Datastore.load({str(words)!r})\nexcept DatastoreError as error: print(error)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'itune-captioner[retrieval]'" in done.stdout
    pytest.importorskip("faiss")
    with pytest.raises(DatastoreError) as error:
        Datastore.load(words)
    assert str(words / "index.faiss") in str(error.value)


def test_faiss_indices_that_do_not_fit(words: Path) -> None:
    faiss = pytest.importorskip("faiss")
    rows = np.load(words / "embeddings.npy")

    def ivf(dim: int) -> Any:
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, 1, faiss.METRIC_INNER_PRODUCT)
        index.train(rows[:, :dim])
        return index

    few, narrow = ivf(DIM), ivf(DIM - 1)
    few.add(rows[:4])
    narrow.add(np.ascontiguousarray(rows[:, :-1]))
    for wrong in (faiss.IndexFlatIP(DIM), narrow, few):
        faiss.write_index(wrong, str(words / "index.faiss"))
        list_file(words, "index.faiss", index="ivf", nprobe=1)
        with pytest.raises(DatastoreError) as error:
            Datastore.load(words)
        assert str(words / "index.faiss") in str(error.value)
    index = ivf(DIM)
    index.add_with_ids(rows, np.array([0, 1, 2, 3, 1 << 40]))
    faiss.write_index(index, str(words / "index.faiss"))
    list_file(words, "index.faiss", nprobe=0)
    with pytest.raises(DatastoreError) as error:
        Datastore.load(words)
    assert str(words / "index.faiss") in str(error.value)
    edit(words, nprobe=1)
    assert len(Datastore.load(words).search(query(1), 4)[0]) <= 4  # the last id, which has no entry, is left out


def test_photos_with_equal_captions_do_not_hide_the_others(tmp_path: Path) -> None:
    rows = [[1, 0.01 * i, 0, 0, 0, 0, 0, 0] for i in range(40)]
    captions = [["Normal chest."]] * 25 + [[f"Chest {i}."] for i in range(15)]
    store = Datastore.load(make_store(tmp_path / "photos", "image", rows, captions))
    (found,) = store.search(query(1), 4)
    assert found[0].caption == "Normal chest."
    assert len({caption_key(each.caption) for each in found}) == 4
    (found,) = store.search(query(1), 100)
    assert len(found) == 16


def test_consensus_of_many_captions_takes_little_memory() -> None:
    words = [[f"w{(7 * i + j) % 5000}" for j in range(10)] for i in range(4000)]
    rarity = NGramWeights(words[::10])
    tracemalloc.start()
    agreement = consensus(words, np.ones(len(words)), rarity)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()
    assert np.isfinite(agreement).all()
