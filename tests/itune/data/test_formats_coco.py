"""COCO's annotation and results formats, and NoCaps': good files and bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from itune.data.formats import DataError, read_results
from itune.data.records import load_records

IMAGES: list[dict[str, Any]] = [
    {"id": 0, "file_name": "a.jpg", "domain": "in-domain", "width": 9},
    {"id": 7, "file_name": "b.jpg", "domain": "near-domain"},
]
ANNOTATIONS: list[dict[str, Any]] = [
    {"id": 1, "image_id": 7, "caption": "A cat. "},
    {"id": 2, "image_id": 0, "caption": "A dog."},
    {"id": 3, "image_id": 7, "caption": "."},
    {"id": 4, "image_id": 7, "caption": "A grey cat."},
]


def write(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("captions_val2014", "dev"),
        ("nocaps_val_4500_captions", "dev"),
        ("captions_train2014", "train"),
        ("myTestSet", "test"),
        ("x", "train"),
        ("latest", "train"),
        ("retrieval_captions", "train"),
        ("festival", "train"),
        ("retrieval_test", "test"),
    ],
)
def test_annotations(tmp_path: Path, name: str, split: str) -> None:
    file = write(tmp_path / f"{name}.json", {"info": {}, "images": IMAGES, "annotations": ANNOTATIONS})
    records = load_records(file, split=split, check_images=False)
    assert [(r.image.name, r.captions, r.id, r.domain) for r in records] == [
        ("a.jpg", ("A dog.",), "0", "in-domain"),
        ("b.jpg", ("A cat.", "A grey cat."), "7", "near-domain"),
    ]
    assert load_records(file, split=None, check_images=False) == records


def test_they_are_found_in_a_folder_beside_other_annotations(tmp_path: Path) -> None:
    write(tmp_path / "captions_val2014.json", {"images": IMAGES, "annotations": ANNOTATIONS})
    write(tmp_path / "instances_val2014.json", {"images": IMAGES, "annotations": [{"id": 1, "image_id": 7}]})
    assert len(load_records(tmp_path, split="dev", check_images=False)) == 2
    with pytest.raises(DataError) as error:
        load_records(tmp_path / "instances_val2014.json", split="dev", check_images=False)
    assert "instances_val2014.json" in str(error.value)
    assert "annotations.0.caption" in str(error.value)


def test_references_need_no_file_names(tmp_path: Path) -> None:
    file = write(tmp_path / "coco_karpathy_test_gt.json", {"images": [{"id": 7}], "annotations": ANNOTATIONS[:1]})
    assert [r.id for r in load_records(file, split="test", check_images=False)] == ["7"]


def test_a_split_without_references(tmp_path: Path) -> None:
    file = write(tmp_path / "nocaps_test_image_info.json", {"images": IMAGES})
    with pytest.raises(DataError) as error:
        load_records(file, split="test", check_images=False)
    assert str(file) in str(error.value)
    records = load_records(file, split="test", check_images=False, captioned=False)
    assert [(r.id, r.captions) for r in records] == [("0", ()), ("7", ())]
    partly = write(tmp_path / "val.json", {"images": IMAGES, "annotations": ANNOTATIONS[:1]})
    assert [r.id for r in load_records(partly, split="dev", check_images=False, captioned=False)] == ["7"]


@pytest.mark.parametrize(
    ("document", "values"),
    [
        ({"images": [{"id": True, "file_name": "a"}]}, ["images.0.id", "True"]),
        ({"images": [{"id": 1, "file_name": 5}]}, ["images.0.file_name", "5"]),
        ({"images": [IMAGES[0], {"id": "0", "file_name": "c"}]}, ["images.1", "id '0'", "images.0"]),
        ({"images": [IMAGES[0], IMAGES[0]]}, ["images.1", "id '0'", "images.0"]),
        ({"images": [IMAGES[0], {"id": 1, "file_name": "a.jpg"}]}, ["images.1", "file_name 'a.jpg'", "images.0"]),
        ({"images": [], "annotations": []}, ["images", "[]"]),
        ({"images": {}, "annotations": []}, ["images", "{}"]),
        ({"images": IMAGES, "annotations": {}}, ["annotations", "{}"]),
        ({"images": IMAGES, "annotations": ["x"]}, ["annotations.0", "'x'"]),
        ({"images": IMAGES, "annotations": [{"image_id": 1, "caption": "x"}]}, ["annotations.0", "id '1'"]),
        ({"images": IMAGES, "annotations": [{"image_id": 7, "caption": None}]}, ["annotations.0.caption", "None"]),
        ({"images": [{"id": 1, "file_name": "a", "domain": 3}]}, ["images.0.domain", "3"]),
    ],
)
def test_bad_annotations(tmp_path: Path, document: object, values: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        load_records(write(tmp_path / "val.json", document), split="dev", check_images=False)
    assert "\n" not in str(caught.value)
    assert all(value in str(caught.value) for value in ["val.json", *values])


@pytest.mark.parametrize("first", ["images", "annotations"])
def test_annotations_are_recognised_in_any_order(tmp_path: Path, first: str) -> None:
    fields: dict[str, object] = {"images": IMAGES, "annotations": ANNOTATIONS * 2000}
    file = write(tmp_path / "captions_val.json", {first: fields[first], **fields})
    assert len(load_records(tmp_path, split="dev", check_images=False)) == 2
    assert len(load_records(file, split="dev", check_images=False)[1].captions) == 4000


def test_results(tmp_path: Path) -> None:
    file = write(
        tmp_path / "r.json", [{"image_id": 7, "caption": " a cat "}, {"image_id": "x", "caption": "", "id": 1}]
    )
    assert read_results(file) == {"7": "a cat", "x": ""}


@pytest.mark.parametrize(
    ("document", "values"),
    [
        ({"7": "a cat"}, ["{'7': 'a cat'}"]),
        ([], ["[]"]),
        ("", ["JSON"]),
        ("[{]", ["JSON", "column 3"]),
        (["a cat"], ["0: ", "'a cat'"]),
        ([{"image_id": 7}], ["0.caption"]),
        ([{"caption": "x"}], ["0.image_id"]),
        ('[{"image_id": NaN, "caption": "x"}]', ["0.image_id", "nan"]),
        ('[{"image_id": 1.0, "caption": "x"}]', ["0.image_id", "1.0"]),
        ('[{"image_id": "", "caption": "x"}]', ["0.image_id", "''"]),
        ('[{"image_id": 1, "caption": NaN}]', ["0.caption", "nan"]),
        ('[{"image_id": 1, "caption": ["x"]}]', ["0.caption", "['x']"]),
        ('[{"image_id": 1, "caption": "\\ud800"}]', ["line 1 column"]),
        ([{"image_id": 7, "caption": "x"}, {"image_id": "7", "caption": "y"}], ["1: ", "image_id '7'", "0; "]),
    ],
)
def test_bad_results(tmp_path: Path, document: object, values: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        read_results(write(tmp_path / "results.json", document))
    assert "\n" not in str(caught.value)
    assert all(value in str(caught.value) for value in ["results.json", *values])


def test_results_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_results(tmp_path)
    assert str(tmp_path) in str(caught.value)
