"""COCO's annotation and results formats, and NoCaps', with what goes wrong in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from itune.data.formats import read_results
from itune.data.records import DataError, load_records

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
    with pytest.raises(DataError, match=r"annotations\[0\]: has no 'caption' \(these are no captions: instances"):
        load_records(tmp_path / "instances_val2014.json", split="dev", check_images=False)


def test_references_need_no_file_names(tmp_path: Path) -> None:
    file = write(tmp_path / "coco_karpathy_test_gt.json", {"images": [{"id": 7}], "annotations": ANNOTATIONS[:1]})
    assert [r.id for r in load_records(file, split="test", check_images=False)] == ["7"]


def test_a_split_without_references(tmp_path: Path) -> None:
    file = write(tmp_path / "nocaps_test_image_info.json", {"images": IMAGES})
    with pytest.raises(DataError, match="no photo of the split 'test' has a caption"):
        load_records(file, split="test", check_images=False)
    records = load_records(file, split="test", check_images=False, captioned=False)
    assert [(r.id, r.captions) for r in records] == [("0", ()), ("7", ())]
    partly = write(tmp_path / "val.json", {"images": IMAGES, "annotations": ANNOTATIONS[:1]})
    assert [r.id for r in load_records(partly, split="dev", check_images=False, captioned=False)] == ["7"]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"images": [{"id": True, "file_name": "a"}]}, r"images\[0\].id: must be a whole number or a name, not True"),
        ({"images": [{"id": 1, "file_name": 5}]}, r"images\[0\].file_name: must be a string, not 5"),
        ({"images": [IMAGES[0], {"id": "0", "file_name": "c"}]}, r"images\[1\]: has the id 0 of images\[0\]"),
        ({"images": [IMAGES[0], {"id": 1, "file_name": "a.jpg"}]}, r"images\[1\]: has the photo of images\[0\], a.jpg"),
        ({"images": [], "annotations": []}, "images: is an empty list"),
        ({"images": {}, "annotations": []}, "images: must be a list, not {}"),
        ({"images": IMAGES, "annotations": {}}, "annotations: must be a list, not {}"),
        ({"images": IMAGES, "annotations": ["x"]}, r"annotations\[0\]: must be an object, not 'x'"),
        ({"images": IMAGES, "annotations": [{"image_id": 1, "caption": "x"}]}, r"image_id: '1' is not the id of any"),
        ({"images": IMAGES, "annotations": [{"image_id": 7, "caption": None}]}, r"caption\[0\]: must be a string"),
        ({"images": [{"id": 1, "file_name": "a", "domain": 3}]}, r"images\[0\].domain: must be a string, not 3"),
    ],
)
def test_bad_annotations(tmp_path: Path, document: object, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_records(write(tmp_path / "val.json", document), split="dev", check_images=False)
    assert "\n" not in str(caught.value)


def test_results(tmp_path: Path) -> None:
    file = write(
        tmp_path / "r.json", [{"image_id": 7, "caption": " a cat "}, {"image_id": "x", "caption": "", "id": 1}]
    )
    assert read_results(file) == {"7": "a cat", "x": ""}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"7": "a cat"}, r"must be a list of {\"image_id\": ..., \"caption\": \"...\"}.*, not {'7': 'a cat'}"),
        ([], r"must be a list of .*, not \[\]"),
        ("", r"is not JSON"),
        ("[{]", r"is not JSON"),
        (["a cat"], r"results\[0\]: must be an object, not 'a cat'"),
        ([{"image_id": 7}], r"results\[0\]: has no 'caption'"),
        ([{"caption": "x"}], r"results\[0\]: has no 'image_id'"),
        ('[{"image_id": NaN, "caption": "x"}]', r"results\[0\].image_id: must be a whole number or a name, not nan"),
        ('[{"image_id": 1.0, "caption": "x"}]', r"image_id: must be a whole number or a name, not 1.0"),
        ('[{"image_id": "", "caption": "x"}]', r"image_id: is empty"),
        ('[{"image_id": 1, "caption": NaN}]', r"results\[0\].caption: must be a string, not nan"),
        ('[{"image_id": 1, "caption": ["x"]}]', r"results\[0\].caption: must be a string, not \['x'\]"),
        ('[{"image_id": 1, "caption": "\\ud800"}]', r"results\[0\].caption: holds half of a surrogate pair"),
        (
            [{"image_id": 7, "caption": "x"}, {"image_id": "7", "caption": "y"}],
            r"results\[1\]: is a second caption of image '7', as results\[0\]; keep one",
        ),
    ],
)
def test_bad_results(tmp_path: Path, document: object, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_results(write(tmp_path / "results.json", document))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        read_results(tmp_path)
