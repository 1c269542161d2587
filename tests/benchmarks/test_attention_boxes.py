"""Attention in boxes: shares that can be worked out by hand, the real photos and boxes, the pictures in the docs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from itune import Explanation, ItuneError
from tests.conftest import REPOSITORY

BENCHMARK = REPOSITORY / "benchmarks" / "attention_boxes.py"
ENTRIES = json.loads(BENCHMARK.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.fixture
def boxes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    import attention_boxes

    return attention_boxes


def explanation(maps: dict[str, np.ndarray], box: tuple[float, float, float, float] = (0, 0, 80, 40)) -> Explanation:
    """Words with 2 x 4 maps, half of whose attention CLS takes away, on a photo of 80 x 40."""
    rows = np.array([[0.5, *(0.5 * each / each.sum()).ravel()] for each in maps.values()])
    return Explanation(
        caption=" ".join(maps),
        token_ids=tuple(range(len(maps))),
        tokens=tuple(maps),
        attention=rows.astype(np.float32),
        grid=(2, 4),
        layer="last",
        layers=(0,),
        heads=1,
        photo=Image.new("RGB", (80, 40)),
        box=box,
    )


LEFT, RIGHT, ALL = (np.array([row, row], float) for row in ([1, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1]))


def test_patches_count_by_area(boxes: ModuleType) -> None:
    whole = explanation({"a": ALL})
    np.testing.assert_allclose(boxes.box_weights([0, 0, 0.25, 1], whole), LEFT)
    np.testing.assert_allclose(boxes.box_weights([0.125, 0.25, 0.5, 1], whole), [[0.25, 0.5, 0, 0], [0.5, 1, 0, 0]])
    middle = explanation({"a": ALL}, box=(20, 0, 60, 40))  # a tower that crops sees half of the photo
    np.testing.assert_allclose(boxes.box_weights([0, 0, 0.5, 0.5], middle), [[1, 1, 0, 0], [0, 0, 0, 0]])


def test_shares_and_controls(boxes: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two photos, whose nouns look left and right on their own, and everywhere and left on the other."""
    entries = [
        {"photo": "one.jpg", "caption": "big dog", "nouns": {"dog": [0, 0, 0.25, 1]}},
        {"photo": "two.jpg", "caption": "red cat", "nouns": {"cat": [0.75, 0, 1, 1]}},
    ]
    shown = {
        ("one", "big dog"): {"big": ALL, "dog": LEFT},
        ("one", "red cat"): {"red": ALL, "cat": ALL},
        ("two", "big dog"): {"big": ALL, "dog": LEFT},
        ("two", "red cat"): {"red": LEFT + ALL, "cat": RIGHT + ALL},
    }

    class Captioner:
        def explain(self, photo: Path, caption: str, *, layer: str) -> Explanation:
            assert layer == "3"
            return explanation(shown[photo.stem, caption])

    dog, cat = boxes.measure(Captioner(), "3", entries)
    assert (dog.photo, dog.noun, cat.noun) == ("one", "dog", "cat")
    found = [[each.area, each.inside, each.other_words, each.other_nouns, each.other_maps] for each in (dog, cat)]
    np.testing.assert_allclose(found, [[0.25, 1, 0.25, 0.25, 0.2], [0.25, 0.4, 0.2, 0, 0]], atol=1e-6)
    summary = boxes.summarise([dog, cat])
    assert (summary["nouns"], summary["photos"]) == (2, 2)
    assert summary["inside"] == pytest.approx(0.7)
    assert summary["area"]["above"] == pytest.approx(0.45)
    assert summary["area"]["interval"] == pytest.approx((0.15, 0.75))  # of either photo drawn twice
    with pytest.raises(ItuneError) as error:
        boxes.word_tokens(explanation(shown["one", "big dog"]), "bird")
    assert "'bird'" in str(error.value)
    assert "'big dog'" in str(error.value)


def test_nouns_of_several_tokens(boxes: ModuleType) -> None:
    spread = explanation({"a": ALL, "rock": LEFT, "et": RIGHT})
    assert boxes.word_tokens(spread, "rocket") == [1, 2]
    np.testing.assert_allclose(boxes.noun_map(spread, "rocket"), (LEFT + RIGHT) / 4, atol=1e-6)


def test_the_boxes_lie_in_free_photos_and_the_nouns_in_the_captions() -> None:
    assert len({entry["photo"] for entry in ENTRIES}) == len(ENTRIES) >= 10
    for entry in ENTRIES:
        photo = BENCHMARK.parent / entry["photo"]
        assert f"`{photo.name}`" in (photo.parent / "README.md").read_text(encoding="utf-8")
        assert photo.stat().st_size < 100_000
        for noun, (left, top, right, bottom) in entry["nouns"].items():
            assert noun in entry["caption"].split()
            assert 0 <= left < right <= 1
            assert 0 <= top < bottom <= 1


@pytest.mark.slow
def test_the_default_models_nouns_are_seen_where_they_are(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARK), "--json", str(tmp_path / "shares.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "20 nouns on 10 photos" in done.stdout
    result = json.loads((tmp_path / "shares.json").read_text())
    assert result["layer"] == "last"
    assert len(result["nouns"]) == 20
    for control in ("area", "other_words", "other_nouns", "other_maps"):
        assert result["summary"][control]["interval"][0] > 0
    done = subprocess.run([*command, "--layer", "12"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "12" in done.stderr
    assert "0, 1, 2, 3, 4, 5" in done.stderr


def test_the_pictures_in_the_docs(tmp_path: Path) -> None:
    for folder in ("benchmarks", "examples"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder)
    images = Path("docs/images")
    (tmp_path / images).mkdir(parents=True)
    shutil.copy(REPOSITORY / images / "heatmaps.py", tmp_path / images)
    subprocess.run([sys.executable, images / "heatmaps.py"], cwd=tmp_path, check=True)
    drawn = sorted((tmp_path / images).glob("*.png"))
    page = (REPOSITORY / "docs" / "heatmaps.md").read_text(encoding="utf-8")
    assert len(drawn) == 3
    for path in drawn:
        assert f"(images/{path.name})" in page
        assert path.stat().st_size < 250_000
        with Image.open(path) as new, Image.open(REPOSITORY / images / path.name) as old:
            difference = np.asarray(new.convert("RGB"), float) - np.asarray(old.convert("RGB"), float)
        assert np.abs(difference).mean() < 3  # of 255: the arithmetic of another machine
