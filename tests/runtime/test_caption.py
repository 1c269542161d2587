"""How a notebook shows captions: with their picture, and without keeping photos in memory."""

from __future__ import annotations

import base64
import io
import json
import pickle
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from itune.runtime.caption import Candidate, Caption, Timings
from itune.runtime.captioner import Captioner

Paint = Callable[..., Path]
HOSTILE = "<script>alert(1)</script>\"' onerror=x &amp;"


@pytest.fixture(scope="module")
def captioner(bundle: Path) -> Captioner:
    return Captioner.load(bundle)


class Shown(HTMLParser):
    """The tags, the text and the picture of a caption's HTML."""

    def __init__(self, caption: Caption) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.picture: Image.Image | None = None
        self.feed(caption._repr_html_())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            assert [name for name, _ in attrs] == ["src", "alt"]
            kind, _, content = str(dict(attrs)["src"]).partition(",")
            assert kind == "data:image/jpeg;base64"
            self.picture = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_photo_is_read_again_when_it_is_shown(captioner: Captioner, tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    Image.new("RGB", (2000, 1000), "red").save(path)
    caption = captioner.caption(path)
    assert caption.picture == str(path)
    shown = Shown(caption)
    assert shown.picture is not None
    assert shown.picture.size == (320, 160)
    assert caption.caption in shown.text
    assert all(candidate.caption in shown.text for candidate in caption.candidates)
    path.unlink()
    assert Shown(caption).picture is None
    assert caption.caption in Shown(caption).text


def test_what_has_no_path_keeps_what_the_tower_saw(captioner: Captioner, paint: Paint) -> None:
    content = paint("red").read_bytes()
    photo = Image.new("RGB", (4000, 3000), "red")
    for source in (content, io.BytesIO(content), photo, np.asarray(photo)):
        caption = captioner.caption(source)
        assert caption.picture is not None
        assert len(caption.picture) < 20_000
        shown = Shown(caption).picture
        assert shown is not None
        assert shown.convert("RGB").getpixel((8, 8)) == pytest.approx((254, 0, 0), abs=3)
    frames = [photo] * 3
    assert [result.picture for _, result in captioner.stream(frames)] == [None] * 3  # type: ignore[union-attr]
    assert Shown(next(iter(captioner.stream(frames)))[1]).picture is None  # type: ignore[arg-type]


def test_the_picture_is_no_part_of_the_result(captioner: Captioner, paint: Paint) -> None:
    path = paint("red")
    from_path, from_bytes = captioner.caption(path), captioner.caption(path.read_bytes())
    same = replace(from_bytes, ms=from_path.ms)
    assert same == from_path
    assert "base64" not in repr(from_bytes)
    assert json.loads(json.dumps(asdict(from_bytes)))["caption"] == from_path.caption
    assert pickle.loads(pickle.dumps(from_bytes)).picture == from_bytes.picture


@pytest.mark.parametrize(
    "picture", [None, HOSTILE, f"data:image/jpeg;base64,{HOSTILE}", "http://localhost:9/a.jpg", "\0", "/"]
)
def test_html_is_escaped(picture: str | None) -> None:
    caption = Caption(HOSTILE, 0.0, (), (Candidate(HOSTILE, 0.0),) * 2, Timings(0, 0, 0), None, picture)
    html = caption._repr_html_()
    assert "<script" not in html
    assert html.count("<img") == html.count('" alt="">') == ("base64" in str(picture))
    assert "\"' onerror" not in html
