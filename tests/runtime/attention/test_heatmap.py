"""Heatmaps: the bytes that give a graph more outputs, what of a photo is drawn, and itune-run --heatmap."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from itune.cli import run as command
from itune.runtime.attention.explanation import Explanation, more_outputs
from itune.runtime.attention.heatmap import GAP, MARGIN, _labels, draw_heatmap
from itune.runtime.bundle import default_bundle, square_grid
from itune.runtime.image import preprocess, seen_box
from itune.runtime.settings import ImageSettings
from tests.conftest import REPOSITORY, random_photo

EXAMPLES = REPOSITORY / "examples"
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def test_more_outputs_is_what_protobuf_merges() -> None:
    path = default_bundle() / "decoder.onnx"
    names = ["h.0/mlp/adapter/Softmax", "x" * 200]  # a length of two bytes
    before, after = onnx.load(path), onnx.ModelProto.FromString(path.read_bytes() + more_outputs(names))
    assert [output.name for output in after.graph.output] == [*(o.name for o in before.graph.output), *names]
    del after.graph.output[-2:]
    assert after == before


def test_square_grids() -> None:
    grids = {1: (1, 1), 2: (1, 1), 9: (3, 3), 10: (3, 3), 81: (9, 9), 197: (14, 14), 257: (16, 16), 3: None, 201: None}
    assert {tokens: square_grid(tokens) for tokens in grids} == grids


@settings(max_examples=60, deadline=None)
@given(width=st.integers(40, 200), height=st.integers(40, 200), short=st.integers(20, 60), squash=st.booleans())
def test_the_seen_box_is_what_the_tower_sees(width: int, height: int, short: int, squash: bool) -> None:
    """A photo whose colours are its coordinates tells where a pixel of the tower's lay in it."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    photo = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    crop = None if squash else (short - 4, short)
    size = (short, short + 7) if squash else (short, short)
    resize = "squash" if squash else "shortest_edge"
    image = ImageSettings(size=size, resize=resize, crop=crop, mean=MEAN, std=STD, interpolation="bilinear")
    left, top, right, bottom = seen_box((width, height), image)
    pixels = preprocess(photo, image).astype(float)
    rows, columns = pixels.shape[:2]
    middle = (pixels[rows // 2, columns // 2, 0], pixels[rows // 2, columns // 2, 1])
    assert left + (columns // 2 + 0.5) / columns * (right - left) - 0.5 == pytest.approx(middle[0], abs=1.5)
    assert top + (rows // 2 + 0.5) / rows * (bottom - top) - 0.5 == pytest.approx(middle[1], abs=1.5)
    first = (pixels[1, 1, 0], pixels[1, 1, 1])
    assert left + 1.5 / columns * (right - left) - 0.5 == pytest.approx(first[0], abs=3)
    assert top + 1.5 / rows * (bottom - top) - 0.5 == pytest.approx(first[1], abs=3)


def explanation(attention: np.ndarray, words: tuple[str, ...], size: tuple[int, int], **fields: object) -> Explanation:
    values = {"grid": (4, 4), "box": (0.0, 0.0, *map(float, size)), "layer": "last", "layers": (2,), "heads": 1}
    return Explanation(
        caption=" ".join(words),
        token_ids=tuple(range(len(words))),
        tokens=words,
        attention=attention.astype(np.float32),
        photo=Image.new("RGB", size, (120, 120, 120)),
        **(values | fields),  # type: ignore[arg-type]
    )


def test_the_figure_is_warm_where_a_token_looks() -> None:
    """CLS gets nothing on the first tile, and half on the second, which looks elsewhere."""
    attention = np.zeros((2, 17))
    attention[0, 1 + 4 * 1 + 3] = 1  # second row, last column
    attention[1, [0, 1 + 4 * 3 + 0]] = 0.5  # last row, first column
    figure = np.asarray(draw_heatmap(explanation(attention, ("one", "two"), (80, 60)), 1280), int)
    column = (1280 - 2 * MARGIN - 2 * GAP) // 3
    warmth = figure[:, :, 0] - figure[:, :, 2]
    top = np.flatnonzero((figure[:, MARGIN + 5] == 120).all(-1))[0]  # of the photo itself
    height = round(column * 60 / 80)
    for token, (row, place) in enumerate(((1, 3), (3, 0)), 1):
        x = MARGIN + token * (column + GAP)
        tile = warmth[top : top + height, x : x + column]
        y_most, x_most = np.unravel_index(tile.argmax(), tile.shape)
        assert (y_most * 4 // height, x_most * 4 // column) == (row, place)
        assert tile[int((row + 0.5) / 4 * height), int((place + 0.5) / 4 * column)] > 40
        assert tile[int(0.4 * height), int(0.4 * column)] < 20  # nobody looks at the middle
    assert abs(warmth[top : top + height, MARGIN : MARGIN + column]).max() == 0


def test_a_notebook_shows_the_figure() -> None:
    shown = explanation(np.full((1, 17), 1 / 17), ("<one>",), (80, 60))
    picture = Image.open(io.BytesIO(shown._repr_jpeg_()))
    expected = np.asarray(draw_heatmap(shown), float)
    assert picture.format == "JPEG"
    assert abs(np.asarray(picture, float) - expected).mean() < 2


def test_labels_tell_the_pieces_of_a_word() -> None:
    shown = replace(explanation(np.ones((5, 16)), ("a", "tow", "er", ",", "red"), (9, 9)), caption="a tower, red")
    assert _labels(shown) == ["a", "tow", "-er", ",", "red"]
    letters = replace(shown, caption="a \N{SNOWMAN}er, red", tokens=("a", "\ufffd", "\ufffd", "er", "red"))
    assert _labels(letters) == ["a", "\ufffd", "\ufffd", "er", "red"]


@pytest.mark.parametrize("width", [320, 1280])
@pytest.mark.parametrize("size", [(50, 50), (300, 20), (20, 300), (1, 1)])
@pytest.mark.parametrize("tokens", [0, 1, 6, 30])
def test_figures_of_any_shape(width: int, size: tuple[int, int], tokens: int) -> None:
    attention = np.random.default_rng(0).dirichlet(np.ones(16), tokens).reshape(tokens, 16)
    words = tuple("extraordinarily-long-word" * (1 + i % 3) for i in range(tokens))
    figure = draw_heatmap(explanation(attention, words, size), width)
    assert figure.width == width
    assert figure.height < 40 * width


def test_what_was_padded_or_cropped_is_drawn_so() -> None:
    attention = np.full((1, 16), 1 / 16)
    figure = np.asarray(draw_heatmap(explanation(attention, ("a",), (40, 40), box=(-40.0, 0.0, 80.0, 40.0))), int)
    column = (1280 - 2 * MARGIN - 2 * GAP) // 3
    row = figure[np.flatnonzero((figure[:, MARGIN + column // 2] == 120).all(-1))[5], MARGIN : MARGIN + column, 0]
    assert [row[int(part * column)] for part in (0.1, 0.5, 0.9)] == [0, 120, 0]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[object, str, str]]:
    """Run itune-run with the model inside the package: its status, what it said on stdout and on stderr."""

    def runner(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["itune-run", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            command.main()
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return ended.value.code or 0, said.out, said.err

    return runner


Run = Callable[..., tuple[object, str, str]]


def test_one_figure_and_its_numbers(run: Run, tmp_path: Path) -> None:
    photo, figure, numbers = EXAMPLES / "camera.jpg", tmp_path / "camera.png", tmp_path / "camera.json"
    status, out, err = run(photo, "--heatmap", figure, "--heatmap-json", numbers, "--heatmap-layer", 3, "--json")
    assert (status, err) == (0, "")
    caption, shown = json.loads(out), json.loads(numbers.read_text())
    assert list(shown) == ["image", "caption", "layer", "grid", "box", "tokens"]
    assert (shown["image"], shown["caption"], shown["layer"]) == (str(photo), caption["caption"], "3")
    assert (shown["grid"], shown["box"]) == ([9, 9], [0, 0, 512, 512])
    assert [token["id"] for token in shown["tokens"]] == caption["tokens"]
    assert " ".join(token["text"] for token in shown["tokens"]) == caption["caption"]
    for token in shown["tokens"]:
        assert np.shape(token["attention"]) == (9, 9)
        assert np.sum(token["attention"]) + token["cls"] == pytest.approx(1, abs=1e-4)
    with Image.open(figure) as drawn:
        assert (drawn.format, drawn.width) == ("PNG", 1280)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["camera.json", "camera.png"]


def test_a_folder_of_figures(run: Run, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for name in ("a.png", "b.png", "deeper/a.png"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        random_photo(len(name)).save(photos / name)
    (photos / "bad.png").write_bytes(b"no image")
    folder, numbers = tmp_path / "new" / "figures", tmp_path / "numbers.jsonl"
    arguments = [photos / "a.png", photos / "bad.png", photos / "b.png", photos / "deeper" / "a.png"]
    status, out, err = run(*arguments, "--heatmap", folder, "--heatmap-json", numbers, "--num-beams", 1)
    assert status == 1
    assert len(out.splitlines()) == 3
    assert str(photos / "bad.png") in err
    assert sorted(path.name for path in folder.iterdir()) == ["a-2.png", "a.png", "b.png"]
    shown = [json.loads(line) for line in numbers.read_text().splitlines()]
    assert [each["image"] for each in shown] == [str(arguments[i]) for i in (0, 2, 3)]
    assert (folder / "a.png").read_bytes() != (folder / "a-2.png").read_bytes()


def test_layers_differ_and_stdin_has_a_name(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = set()
    for layer in ("last", "5", "mean"):
        with (EXAMPLES / "coffee.jpg").open("rb") as photo:
            monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": photo}))
            assert run("-", "--heatmap", tmp_path / layer, "--heatmap-layer", layer)[0] == 0
        figures.add((tmp_path / layer / "stdin.png").read_bytes())
    assert len(figures) == 2


def test_what_cannot_be_written_or_shown(run: Run, tmp_path: Path) -> None:
    photo, file = EXAMPLES / "coffee.jpg", tmp_path / "file.txt"
    file.write_text("mine")
    random_photo(0).save(tmp_path / "mine.png")
    photo_bytes = (tmp_path / "mine.png").read_bytes()
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "taken" / "coffee.png").mkdir(parents=True)
    figure, mine = tmp_path / "x.png", tmp_path / "mine.png"
    for arguments, named in (
        (["--heatmap-layer", "mean"], ["--heatmap-layer", "--heatmap-json"]),
        (["--heatmap", file], ["--heatmap", file, ".webp"]),
        ([EXAMPLES, "--heatmap", figure], ["--heatmap", figure, "5"]),
        (["--heatmap", tmp_path / "no" / "x.png"], ["--heatmap", tmp_path / "no" / "x.png"]),
        (["--heatmap", file / "x"], ["--heatmap", file / "x"]),
        (["--heatmap-json", tmp_path], ["--heatmap-json", tmp_path]),
        (["--heatmap-json", tmp_path / "fifo.json"], ["--heatmap-json", tmp_path / "fifo.json"]),
        (["--heatmap", figure, "--heatmap-layer", "6"], ["layer 6", "0, 1, 2, 3, 4, 5"]),
        ([mine, "--heatmap", tmp_path], ["--heatmap", mine, "the photo"]),
        ([mine, "--heatmap-json", mine], ["--heatmap-json", mine, "the photo"]),
        (["--heatmap", figure, "--heatmap-json", tmp_path / "." / "x.png"], ["--heatmap-json", figure, "of --heatmap"]),
        (["--heatmap", tmp_path / "taken"], ["--heatmap", tmp_path / "taken" / "coffee.png"]),
    ):
        status, out, err = run(photo, *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert all(str(part) in err for part in named), err
    assert file.read_text() == "mine"
    assert (tmp_path / "mine.png").read_bytes() == photo_bytes
    assert not (tmp_path / "x.png").exists()


def test_a_figure_that_cannot_be_written_stops_nothing(run: Run, tmp_path: Path) -> None:
    photos, numbers = tmp_path / "photos", tmp_path / "numbers.jsonl"
    photos.mkdir()
    # As long as a name may be; the figure's, which has a number, is too long.
    names = [f"{'a' * 251}.png", f"{'a' * 251}.jpg", "b.png"]
    for i, name in enumerate(names):
        random_photo(i).save(photos / name)
    status, out, err = run(photos, "--heatmap", tmp_path / "figures", "--heatmap-json", numbers, "--num-beams", 1)
    assert status == 1
    assert len(out.splitlines()) == 3
    assert f"no heatmap: {tmp_path / 'figures' / ('a' * 251)}-2.png: File name too long" in err
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [f"{'a' * 251}.png", "b.png"]
    assert len(numbers.read_text().splitlines()) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to(run: Run, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    for arguments in (["--heatmap", tmp_path], ["--heatmap-json", tmp_path / "x.json"]):
        status, out, err = run(EXAMPLES / "coffee.jpg", *arguments)
        assert (status, out) == (2, "")
        assert arguments[0] in err
