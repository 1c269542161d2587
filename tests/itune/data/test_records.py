"""Caption files of every format: the records of good ones, and the file, line and field in the errors of bad ones."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itune.data.formats import DataError
from itune.data.records import Record, identical_photos, load_records, split_records


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write(path: Path, *lines: object) -> Path:
    """Strings as they are, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines), encoding="utf-8")
    return path


def mentions(error: pytest.ExceptionInfo[DataError], *values: object) -> bool:
    """Whether an error is one line that contains each of the values."""
    message = str(error.value)
    return "\n" not in message and all(str(value) in message for value in values)


def captions(records: list[Record]) -> dict[str, tuple[str, ...]]:
    return {record.id: record.captions for record in records}


@pytest.fixture
def flickr(tmp_path: Path) -> Path:
    """A folder as Flickr8k's, with the texts that lie beside its captions."""
    write(tmp_path / "Flickr8k.token.txt", *(f"{name}.jpg#{i}\t{name} {i} ." for name in "abcd" for i in range(2)))
    write(tmp_path / "Flickr8k.lemma.token.txt", "a.jpg#0\ta be ?")
    write(tmp_path / "Flickr_8k.trainImages.txt", "c.jpg", "a.jpg")
    write(tmp_path / "Flickr_8k.devImages.txt", "b.jpg")
    write(tmp_path / "Flickr_8k.testImages.txt", "d.jpg")
    write(tmp_path / "training-notes.txt", "Just a text.")
    write(tmp_path / "ExpertAnnotations.txt", "a.jpg\tb.jpg#2\t1")
    touch(tmp_path, *(f"images/{name}.jpg" for name in "abcd"))
    return tmp_path


KARPATHY: dict[str, Any] = {
    "images": [
        {"filepath": "train2014", "filename": "1.jpg", "cocoid": 11, "imgid": 0, "split": "train"},
        {"filepath": "val2014", "filename": "2.jpg", "cocoid": 22, "imgid": 1, "split": "restval"},
        {"filepath": "val2014", "filename": "3.jpg", "cocoid": 33, "imgid": 2, "split": "val"},
        {"filepath": "val2014", "filename": "4.jpg", "cocoid": 44, "imgid": 3, "split": "test"},
    ],
    "dataset": "coco",
}
for item in KARPATHY["images"]:
    item["sentences"] = [{"raw": f" photo {item['cocoid']}\n", "tokens": []}, {"raw": "Second."}]


def test_flickr8k(shared_data: Path) -> None:
    folder = shared_data / "flickr8k"
    if not folder.exists():
        pytest.skip(f"needs {folder}")
    train, dev = load_records(folder), load_records(folder, split="dev")
    assert (len(train), len(dev)) == (6000, 1000)
    assert Counter(len(record.captions) for record in train + dev) == {5: 7000}
    assert not {record.id for record in train} & {record.id for record in dev}
    assert dev[0].image.parent == folder / "images"
    assert dev[0].id == dev[0].image.stem


def test_token_file_with_split_lists(flickr: Path) -> None:
    assert load_records(flickr) == [
        Record(flickr / "images" / "a.jpg", ("a 0 .", "a 1 ."), "a"),
        Record(flickr / "images" / "c.jpg", ("c 0 .", "c 1 ."), "c"),
    ]
    assert captions(load_records(flickr / "Flickr8k.token.txt", split="dev")) == {"b": ("b 0 .", "b 1 .")}
    assert [record.id for record in load_records(flickr, split="test")] == ["d"]
    assert [record.id for record in load_records(flickr, split=None)] == ["a", "b", "c", "d"]


def test_lists_may_leave_the_suffix_out(flickr: Path) -> None:
    for name in ("train", "dev", "test"):
        (flickr / f"Flickr_8k.{name}Images.txt").unlink()
    write(flickr / "train.txt", "a", "b")
    write(flickr / "val.txt", "c")
    assert [record.id for record in load_records(flickr)] == ["a", "b"]
    assert [record.id for record in load_records(flickr, split="val")] == ["c"]


def test_token_file_without_lists_is_all_train(tmp_path: Path) -> None:
    file = write(tmp_path / "results_20130124.token", "1.jpg#0\tOne man .", "2.jpg#0\tTwo men .")
    touch(tmp_path, "flickr30k-images/1.jpg", "flickr30k-images/2.jpg")
    assert captions(load_records(tmp_path)) == {"1": ("One man .",), "2": ("Two men .",)}
    with pytest.raises(DataError) as error:
        load_records(file, split="dev")
    assert mentions(error, file, "dev", "2 photos")
    assert captions(load_records(file, split="dev", undivided=True)) == captions(load_records(file))


@pytest.mark.parametrize("layout", ["{filepath}/{filename}", "images/{filepath}/{filename}", "all/{filename}"])
def test_karpathy(tmp_path: Path, layout: str) -> None:
    file = write(tmp_path / "dataset_coco.json", KARPATHY)
    touch(tmp_path, *(layout.format(**image) for image in KARPATHY["images"]))
    assert captions(load_records(tmp_path)) == {"11": ("photo 11", "Second."), "22": ("photo 22", "Second.")}
    for synonym in ("dev", "val", "validation"):
        (record,) = load_records(file, split=synonym)
        assert record.id == "33"
        assert record.image == tmp_path / layout.format(**KARPATHY["images"][2])
    assert len(load_records(file, split=None)) == 4


def test_karpathy_without_folders_and_coco_ids(tmp_path: Path) -> None:
    images = [{"filename": "x.jpg", "imgid": 7, "sentences": [{"raw": "x"}]}]
    images += [{"filename": "y.jpg", "sentences": [{"raw": "y"}]}]
    file = write(tmp_path / "dataset_flickr8k.json", {"images": images})
    touch(tmp_path, "x.jpg", "y.jpg")
    assert captions(load_records(file)) == {"7": ("x",), "y": ("y",)}


def test_jsonl(tmp_path: Path) -> None:
    file = write(
        tmp_path / "mine.jsonl",
        {"image": "a.jpg", "captions": ["A dog."], "split": "train"},
        "",
        {"image": "deep/b.png", "captions": [" Two ", "", " . "], "split": "Validation"},
        {"image": "c.jpg", "captions": "Just one.", "split": "training", "id": 3},
    )
    touch(tmp_path, "a.jpg", "deep/b.png", "c.jpg")
    assert captions(load_records(file)) == {"a": ("A dog.",), "3": ("Just one.",)}
    assert load_records(tmp_path, split="dev") == [
        Record(tmp_path / "deep" / "b.png", ("Two",), "deep/b", wordless=("", "."))
    ]
    with pytest.raises(DataError) as error:
        load_records(file, split="test")
    assert mentions(error, file, "test", "train (2 photos)", "dev (1 photos)")


def test_a_single_line_is_jsonl_too(tmp_path: Path) -> None:
    file = write(tmp_path / "one.json", {"image": "a.jpg", "captions": ["A dog."]})
    touch(tmp_path, "a.jpg")
    assert captions(load_records(file)) == {"a": ("A dog.",)}


def test_images_folder_and_absolute_paths(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    touch(elsewhere, "a.jpg", "b.jpg")
    file = write(
        tmp_path / "texts" / "mine.jsonl",
        {"image": "a.jpg", "captions": ["a"]},
        {"image": str(elsewhere / "b.jpg"), "captions": ["b"]},
    )
    assert [r.image for r in load_records(file, images=elsewhere)] == [elsewhere / "a.jpg", elsewhere / "b.jpg"]
    assert len(load_records(file, images=tmp_path)) == 2, "a folder in the given one will do"
    with pytest.raises(DataError) as error:
        load_records(file)
    assert mentions(error, file, "1 of 2", "a.jpg", "--images")
    assert len(load_records(file, check_images=False)) == 2
    with pytest.raises(DataError) as error:
        load_records(file, images=tmp_path / "nowhere")
    assert mentions(error, tmp_path / "nowhere" / "a.jpg", "--images")


def test_byte_order_mark_and_windows_line_ends(flickr: Path) -> None:
    for path in flickr.glob("*.txt"):
        text = path.read_text(encoding="utf-8")
        path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n\r\n").encode())
    assert captions(load_records(flickr)) == {"a": ("a 0 .", "a 1 ."), "c": ("c 0 .", "c 1 .")}


def test_a_photo_on_several_lines_gets_all_its_captions(tmp_path: Path) -> None:
    lines = [{"image": name, "captions": [text]} for name, text in [("a.jpg", "1"), ("b.jpg", "2"), ("./a.jpg", "3")]]
    file = write(tmp_path / "mine.jsonl", *lines)
    touch(tmp_path, "a.jpg", "b.jpg")
    assert captions(load_records(file)) == {"a": ("1", "3"), "b": ("2",)}


def test_photos_without_captions_are_left_out(tmp_path: Path) -> None:
    file = write(tmp_path / "x.token", "a.jpg#0\t.", "a.jpg#1\t", "b.jpg#0\tb")
    touch(tmp_path, "a.jpg", "b.jpg")
    assert captions(load_records(file)) == {"b": ("b",)}
    with pytest.raises(DataError) as error:
        load_records(write(tmp_path / "x.token", "a.jpg#0\t."))
    assert mentions(error, file, "train")


PHOTO = {"image": "a.jpg", "captions": ["a"]}
BAD_FILES: list[tuple[list[object], tuple[str, ...]]] = [
    ([""], ("empty", "image,caption")),
    (["Hello"], ("'Hello",)),
    (["image,caption", "a.jpg"], ("line 2", "1 of 2")),
    (["image,caption", 'a.jpg,"A dog'], ("captions.txt",)),
    (["number,caption", "1,A dog"], ("'number,caption",)),
    (["a.jpg#0\tA dog", "b.jpg A cat"], ("line 2", "'b.jpg A cat'")),
    ([PHOTO, "", '{"image": "b.jpg"'], ("line 3", "JSON", "column 17")),
    ([PHOTO, ["b.jpg"]], ("line 2", "['b.jpg']")),
    ([{"image": "a.jpg", "title": "a"}], ("line 1", "captions")),
    ([[{"image": "a.jpg", "title": "a"}]], ("'[{",)),
    ([[{"image": "a.jpg", "caption": 3}]], ("0.caption", "3")),
    ([{"a.jpg": 3}], ("line 1", "image")),
    ([PHOTO, {"image": 3, "captions": []}], ("line 2", "image", "3")),
    ([PHOTO, {"image": "", "captions": []}], ("line 2", "image")),
    ([{"image": "a.jpg", "captions": {"en": "a"}}], ("line 1", "captions", "{'en': 'a'}")),
    ([{"image": "a.jpg", "captions": ["a", None]}], ("line 1", "captions.1", "None")),
    ([{"image": "a.jpg", "captions": ["\ud800"]}], ("line 1", "column 40")),
    ([PHOTO | {"split": 1}], ("line 1", "split", "1")),
    ([PHOTO | {"id": 1.5}], ("line 1", "id", "1.5")),
    ([PHOTO | {"id": True}], ("line 1", "id", "True")),
    ([PHOTO | {"id": " "}], ("line 1", "id", "' '")),
    ([PHOTO | {"split": "dev"}, {"image": "b.jpg", "captions": []}], ("line 2", "split")),
    ([PHOTO | {"split": "dev"}, PHOTO | {"split": "train"}], ("line 2", "a.jpg", "'train'", "line 1", "'dev'")),
    ([PHOTO, PHOTO | {"image": "a.png"}], ("line 2", "a.png", "id 'a'", "line 1", "a.jpg")),
    (["{", ' "images": [', "  {"], ("JSON", "line 4")),
    ([{"images": {}}], ("images", "{}")),
    ([{"images": [3]}], ("images.0", "3")),
    ([{"images": [{"file_name": "a.jpg"}], "annotations": []}], ("images.0.id",)),
    ([{"images": [{"filename": "a.jpg", "sentences": ["a"]}]}], ("images.0.sentences.0", "'a'")),
    ([{"images": [{"sentences": []}]}], ("images.0.filename",)),
    ([{"images": []}], ("images", "[]")),
    (["[" * 100_000], ("[[[",)),
    (['{"image": "a.jpg", "captions": ' + "[" * 100_000], ("line 1", "JSON")),
]


@pytest.mark.parametrize(("lines", "values"), BAD_FILES)
def test_bad_files_are_explained(tmp_path: Path, lines: list[object], values: tuple[str, ...]) -> None:
    file = write(tmp_path / "captions.txt", *lines)
    with pytest.raises(DataError) as error:
        load_records(file)
    assert mentions(error, file, *values)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    for name, value in (("photo.jpg", "0xff"), ("none.jsonl", "No such file"), ("x" * 300, "too long")):
        with pytest.raises(DataError) as error:
            load_records(tmp_path / name)
        assert mentions(error, tmp_path / name, value)


def test_folders_without_one_caption_file(tmp_path: Path) -> None:
    def refused(*values: object) -> bool:
        with pytest.raises(DataError) as error:
            load_records(tmp_path)
        return mentions(error, tmp_path, *values)

    assert refused("0")
    write(tmp_path / "readme.txt", "Hello")
    assert refused("0", "readme.txt")
    write(tmp_path / "train.jsonl", PHOTO)
    write(tmp_path / "dev.jsonl", PHOTO)
    assert refused("2", "dev.jsonl, train.jsonl")


def test_bad_split_lists(flickr: Path) -> None:
    def refused(*values: object) -> bool:
        with pytest.raises(DataError) as error:
            load_records(flickr)
        return mentions(error, flickr, *values)

    write(flickr / "more-train.txt", "b.jpg")
    assert refused("Flickr_8k.trainImages.txt", "more-train.txt", "'train'")
    (flickr / "more-train.txt").unlink()
    write(flickr / "Flickr_8k.testImages.txt", "d.jpg", "a.jpg")
    assert refused("trainImages.txt", "'a.jpg'", "testImages.txt")
    write(flickr / "Flickr_8k.testImages.txt", "d.jpg", "e.jpg", "f.jpg")
    assert refused("testImages.txt", "2 of 3", "'e.jpg'")


TABLES = {
    "captions.txt": [
        "image,caption",
        "a.jpg,A dog runs .",
        'b é.jpg,"Two cats, one mat"',
        "a.jpg,A brown dog",
    ],  # Kaggle's
    "a.csv": ["a.jpg,A dog runs .", "a.jpg,A brown dog", "b é.jpg,Two cats, one mat"],
    "b.csv": ["id;Caption;Image", "1;A dog runs .;a.jpg", "2;A brown dog;a.jpg", '3;"Two cats, one mat";b é.jpg'],
    "c.tsv": ["file_name\ttext", "a.jpg\tA dog runs .", "a.jpg\tA brown dog", "b é.jpg\tTwo cats, one mat"],
    "results.csv": [  # Flickr30k's
        "image_name| comment_number| comment",
        "a.jpg| 0| A dog runs .",
        "a.jpg| 1| A brown dog",
        "b é.jpg| 0| Two cats, one mat",
    ],
    "d.csv": ["filename,caption1,caption2", "a.jpg,A dog runs .,A brown dog", '"b é.jpg","Two cats, one mat",'],
    "e.csv": [
        "raw,filename",
        '"[""A dog runs ."", ""A brown dog""]",a.jpg',
        '"[""Two cats, one mat""]",b é.jpg',
    ],
    "f.csv": [  # padded, as spreadsheets write it, and short rows
        "image,caption1,caption2,caption3",
        "a.jpg,A dog runs .,A brown dog,",
        '"b é.jpg","Two cats, one mat"',
    ],
    "g.csv": [
        "image,caption,split",
        "a.jpg,A dog runs .,train",
        "a.jpg,A brown dog,train",
        "b é.jpg,Two cats, one mat,train",
    ],
    "h.csv": ["caption,image", "A dog runs .,a.jpg", "A brown dog,a.jpg", "Two cats, one mat,b é.jpg"],
    "i.csv": ["image,caption", "a.jpg,\"['A dog runs .', 'A brown dog']\"", "b é.jpg,\"['Two cats, one mat']\""],
    "j.csv": [
        "image_id,path,caption,comment",
        "1,a.jpg,A dog runs .,blurry",
        "1,a.jpg,A brown dog,?",
        '2,b é.jpg,"Two cats, one mat",',
    ],
    "metadata.jsonl": [
        {"file_name": "a.jpg", "text": "A dog runs ."},
        {"file_name": "a.jpg", "text": "A brown dog"},
        {"file_name": "b é.jpg", "text": "Two cats, one mat"},
    ],
    "one.jsonl": [
        {"image": "a.jpg", "caption": ["A dog runs .", "A brown dog"]},
        {"image": "b é.jpg", "caption": "Two cats, one mat"},
    ],
    "list.json": [
        [
            {"image": "a.jpg", "captions": ["A dog runs .", "A brown dog"]},
            {"image": "b é.jpg", "caption": "Two cats, one mat"},
        ]
    ],
    "object.json": [{"a.jpg": ["A dog runs .", "A brown dog"], "b é.jpg": "Two cats, one mat"}],
}
EXPECTED = {"a": ("A dog runs .", "A brown dog"), "b é": ("Two cats, one mat",)}


def test_quotation_marks_in_a_table_with_tabs_are_text(tmp_path: Path) -> None:
    file = write(tmp_path / "c.tsv", "image\tcaption", 'a.jpg\t"stop" says a sign', 'b.jpg\ta 12" pizza')
    assert [record.captions for record in load_records(file, check_images=False)] == [
        ('"stop" says a sign',),
        ('a 12" pizza',),
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "crlf"])
@pytest.mark.parametrize("name", TABLES)
def test_captions_as_people_have_them(tmp_path: Path, name: str, encoding: str) -> None:
    file = write(tmp_path / name, *TABLES[name])
    text = file.read_text(encoding="utf-8")
    if encoding == "crlf":
        file.write_bytes(text.replace("\n", "\r\n").encode())
    else:
        file.write_text(text, encoding=encoding)
    touch(tmp_path, "a.jpg", "b é.jpg")
    assert captions(load_records(file)) == EXPECTED
    if name != "object.json":
        assert captions(load_records(tmp_path)) == EXPECTED


def test_texts_beside_photos(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "deep/b.PNG", "c.jpg")
    write(tmp_path / "a.txt", "A dog runs .", "", "A brown dog")
    write(tmp_path / "deep" / "b.txt", "Two cats")
    write(tmp_path / "notes.txt", "of no photo")
    touch(tmp_path, ".hidden/d.jpg", "._a.jpg")
    write(tmp_path / ".hidden" / "d.txt", "no caption")
    (tmp_path / "._a.txt").write_bytes(b"\xff")
    assert captions(load_records(tmp_path)) == {"a": ("A dog runs .", "A brown dog"), "deep/b": ("Two cats",)}


def test_a_caption_file_comes_before_texts_beside_photos(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "captions.jpg")
    write(tmp_path / "captions.txt", "image,caption", "a.jpg,A dog")
    write(tmp_path / "a.txt", "notes")
    assert captions(load_records(tmp_path)) == {"a": ("A dog",)}


def test_split_lists_in_another_unicode_form(tmp_path: Path) -> None:
    name = "café.jpg"
    touch(tmp_path, name)
    write(tmp_path / "x.token", f"{unicodedata.normalize('NFD', name)}#0\ta", "b.jpg#0\tb")
    write(tmp_path / "dev.txt", unicodedata.normalize("NFC", name))
    assert len(load_records(tmp_path / "x.token", split="dev")) == 1


def test_names_in_another_unicode_form(tmp_path: Path) -> None:
    for form, other in (("NFC", "NFD"), ("NFD", "NFC")):
        folder, name = tmp_path / form, unicodedata.normalize(form, "höfe/café 犬が.jpg")
        touch(folder, name)
        file = write(folder / "a.jsonl", {"image": unicodedata.normalize(other, name), "captions": ["a"]})
        assert load_records(file)[0].image.is_file()


def test_missing_photos(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(
        tmp_path / "a.jsonl", PHOTO, {"image": "B.jpg", "captions": ["b"]}, {"image": "c.jpg", "captions": ["c"]}
    )
    touch(tmp_path, "a.jpg", "b.jpg")
    with pytest.raises(DataError) as error:
        load_records(file)
    assert mentions(error, "2 of 3", tmp_path / "B.jpg", "there is b.jpg", "--skip-missing")
    assert [record.id for record in load_records(file, skip_missing=True)] == ["a"]
    assert "2 of 3" in caplog.text
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(DataError):
        load_records(file, skip_missing=True)


def test_photos_in_two_folders_are_ambiguous(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", PHOTO)
    touch(tmp_path, "old/a.jpg", "new/a.jpg")
    with pytest.raises(DataError) as error:
        load_records(file)
    assert mentions(error, "old", "new", "--images")
    assert load_records(file, images=tmp_path / "old")[0].image == tmp_path / "old" / "a.jpg"


def test_the_wrong_photo_of_flickr8k(tmp_path: Path) -> None:
    file = write(tmp_path / "x.token", "a.jpg#0\ta", "2258277193_586949ec62.jpg.1#0\tPeople on a bench")
    touch(tmp_path, "a.jpg")
    assert captions(load_records(file, split=None)) == {"a": ("a",)}


text = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\t"), min_size=1).map(str.strip)
sayable = text.filter(lambda caption: any(character.isalnum() for character in caption))
photo_names = st.from_regex(r"[a-z0-9_#. -]{0,6}[a-z0-9]", fullmatch=True).map(lambda name: f"{name}.jpg")
corpora = st.dictionaries(photo_names, st.lists(sayable, min_size=1, max_size=3), min_size=1, max_size=5).filter(
    lambda corpus: len({name.strip() for name in corpus}) == len(corpus)  # spaces around a name do not count
)


@settings(deadline=None)
@given(corpora)
def test_every_format_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, list[str]]
) -> None:
    folder = tmp_path_factory.mktemp("formats")
    expected = [tuple(texts) for texts in corpus.values()]
    token = write(
        folder / "a.token", *(f"{name}#{i}\t{text}" for name, ts in corpus.items() for i, text in enumerate(ts))
    )
    jsonl = write(folder / "a.jsonl", *({"image": name, "captions": texts} for name, texts in corpus.items()))
    images = [{"filename": n, "sentences": [{"raw": text} for text in texts]} for n, texts in corpus.items()]
    karpathy = write(folder / "a.json", {"images": images})
    for file in (token, jsonl, karpathy):
        records = load_records(file, check_images=False)
        assert [record.captions for record in records] == expected
        assert [record.image.name for record in records] == [name.strip() for name in corpus]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([".", "/", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from(["image", "captions", "split", "id", "filename", "filepath", "sentences", "cocoid"])
records_of_junk = st.lists(st.dictionaries(fields, json_values, max_size=6), max_size=3)
junk = st.one_of(
    st.binary(),
    st.text(st.sampled_from('{}[]",:#019\t\n ab.\\')).map(str.encode),
    records_of_junk.map(lambda items: "\n".join(map(json.dumps, items)).encode()),
    records_of_junk.map(lambda items: json.dumps({"images": items}).encode()),
    json_values.map(lambda value: json.dumps({"images": value}).encode()),
    st.lists(json_values).map(
        lambda values: json.dumps({"images": [{"filename": "a", "sentences": [{"raw": v}]} for v in values]}).encode()
    ),
)


@settings(deadline=None, max_examples=200)
@given(junk, st.sampled_from([None, "train", "dev", "other"]))
def test_junk_is_refused_in_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, split: str | None
) -> None:
    folder = tmp_path_factory.mktemp("junk")
    (folder / "captions.json").write_bytes(content)
    for source in (folder, folder / "captions.json"):
        with suppress(DataError):  # nothing else may come out
            assert all(record.captions for record in load_records(source, split=split, check_images=False))


def test_identical_photos_are_on_one_side(tmp_path: Path) -> None:
    records = []
    for i in range(60):
        path = tmp_path / f"{i}.jpg"
        path.write_bytes(b"x" * 10 + bytes([i % 20]))
        records.append(Record(path, ("a",), str(i)))
    train, dev = split_records(records, 0.3, seed=0)
    assert not {r.image.read_bytes() for r in train} & {r.image.read_bytes() for r in dev}
    assert len(dev) % 3 == 0
    (tmp_path / "0.jpg").unlink()
    assert len(identical_photos([record.image for record in records])) == 60


def numbered(count: int) -> list[Record]:
    return [Record(Path(f"{i}.jpg"), (f"photo {i}",), str(i)) for i in range(count)]


def test_hold_out_is_about_the_fraction() -> None:
    train, dev = split_records(numbered(5000), 0.1, seed=0)
    assert 420 <= len(dev) <= 580
    assert sorted(train + dev, key=lambda r: int(r.id)) == numbered(5000)
    assert dev == sorted(dev, key=lambda r: int(r.id))
    assert split_records(numbered(5000), 0.1, seed=1)[1] != dev


@settings(deadline=None)
@given(st.integers(2, 300), st.integers(0, 50), st.floats(0.01, 0.99), st.integers())
def test_added_photos_move_no_other(count: int, added: int, fraction: float, seed: int) -> None:
    train, dev = split_records(numbered(count), fraction, seed)
    assert train
    assert dev
    more_train, more_dev = split_records(numbered(count + added)[::-1], fraction, seed)
    # Only the single photo of a side that would be empty may come back to the other.
    assert len(set(train) - set(more_train)) <= (len(train) == 1)
    assert len(set(dev) - set(more_dev)) <= (len(dev) == 1)


def test_what_cannot_be_held_out() -> None:
    for fraction, count in ((0.0, 3), (1.0, 3), (-1.0, 3), (float("nan"), 3), (0.5, 1)):
        with pytest.raises(DataError) as error:
            split_records(numbered(count), fraction, 0)
        assert mentions(error, fraction, f"{count} photos")
