from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from itune.runtime import BundleError, Caption, Captioner, ImageError, ItuneError, SearchError
from itune.runtime.bundle import MANIFEST, TOKENIZER, Manifest
from itune.runtime.manifest import FileHash

RED, GREEN, BLUE = "a dog runs on grass", "two children play", "the sea is calm today"


@pytest.fixture(scope="module")
def captioner(bundle: Path) -> Captioner:
    return Captioner.load(bundle, threads=1)


def test_captions_every_kind_of_image(captioner: Captioner, paint: Callable[..., Path]) -> None:
    path = paint("red")
    image = Image.open(path)
    array = np.asarray(image)
    for source in (path, str(path), path.read_bytes(), image, array, array / 255):
        caption = captioner.caption(source)
        assert isinstance(caption, Caption)
        assert caption.caption == RED


def test_a_list_gives_a_list_whatever_the_batches(captioner: Captioner, paint: Callable[..., Path]) -> None:
    paths = [paint(colour) for colour in ("red", "blue", "green", "blue", "red")]
    alone = [captioner.caption(path) for path in paths]
    assert [each.caption for each in alone] == [RED, BLUE, GREEN, BLUE, RED]
    for batch_size in (1, 2, 3, 8):
        together = captioner.caption(paths, batch_size=batch_size)
        assert [each.tokens for each in together] == [each.tokens for each in alone]
        assert [each.candidates for each in together] == [each.candidates for each in alone]
    assert captioner.caption([]) == []
    assert [each.caption for each in captioner.caption((paths[2],))] == [GREEN]


def test_a_caption_has_tokens_candidates_and_timings(captioner: Captioner, paint: Callable[..., Path]) -> None:
    caption = captioner.caption(paint("green"), num_beams=3)
    assert caption.tokens == (6, 7, 8)  # neither begin nor end
    assert len(caption.candidates) == 3
    assert (caption.candidates[0].caption, caption.candidates[0].score) == (caption.caption, caption.score)
    scores = [candidate.score for candidate in caption.candidates]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] <= 0
    assert min(caption.ms.decode_image, caption.ms.encode, caption.ms.search) > 0
    assert len(captioner.caption(paint("green"), num_beams=1).candidates) == 1
    assert len(captioner.caption(paint("green")).candidates) == 5


def test_search_options_reach_the_search(captioner: Captioner, paint: Callable[..., Path]) -> None:
    path = paint("red")
    assert captioner.caption(path, max_new_tokens=2).caption == "a dog"
    assert len(captioner.caption(path, min_new_tokens=9).tokens) >= 9
    assert "dog" not in captioner.caption(path, bad_words=["dog"]).caption
    assert "dog runs" not in captioner.caption(path, bad_words=[" dog runs "]).caption
    longer = captioner.caption(path, length_penalty=3.0).score
    assert longer == pytest.approx(captioner.caption(path, length_penalty=1.0).score / 6**2)
    assert captioner.caption(path, num_beams=None, length_penalty=None).caption == RED


def test_wrong_options_are_refused_at_once(captioner: Captioner, paint: Callable[..., Path]) -> None:
    path = paint("red")
    assert captioner.caption(path, max_new_tokens=40).caption == RED
    options: list[tuple[dict[str, Any], str]] = [
        ({"max_new_tokens": 41}, "40, not 41"),
        ({"num_beams": 0}, "not 0"),
        ({"bad_words": "dog"}, "'dog'"),
        ({"bad_words": ["dog", " "]}, "bad_words.1"),
        ({"batch_size": 0}, "not 0"),
        ({"workers": -1}, "not -1"),
        ({"beams": 3}, "beams"),
    ]
    for option, value in options:
        with pytest.raises(SearchError) as error:
            captioner.stream([path], **option)  # at once, not at the first caption
        assert next(iter(option)) in str(error.value)
        assert value in str(error.value)


def test_a_bad_image_stops_a_list_but_not_a_stream(captioner: Captioner, paint: Callable[..., Path]) -> None:
    bad = paint("red").parent / "bad.png"
    bad.write_bytes(paint("red").read_bytes()[:60])
    images = [paint("red"), bad, Path("missing.jpg"), paint("blue"), bad]
    with pytest.raises(ImageError) as error:
        captioner.caption(images)
    assert str(bad) in str(error.value)
    for batch_size in (1, 2, 8):
        results = list(captioner.stream(images, batch_size=batch_size))
        assert [source for source, _ in results] == images
        kinds = [result.caption if isinstance(result, Caption) else type(result) for _, result in results]
        assert kinds == [RED, ImageError, ImageError, BLUE, ImageError]


def test_a_prompt_is_fed_but_not_returned(captioner: Captioner, paint: Callable[..., Path]) -> None:
    prompted = Captioner(
        captioner.engine,
        captioner.tokenizer,
        captioner.image,
        captioner.tokens.model_copy(update={"prompt": [1, 2]}),
        captioner.search,
    )
    assert prompted.caption(paint("blue")).caption == "runs on grass"
    with pytest.raises(SearchError) as error:
        prompted.caption(paint("blue"), max_new_tokens=39)
    assert "38, not 39" in str(error.value)


def test_wrong_options_and_bundles_are_not_loaded(bundle: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"engine": "cuda", "threads": 0, "retrieve": -1}
    for name, value in options.items():
        with pytest.raises(ItuneError) as refused:
            Captioner.load(bundle, **{name: value})
        assert f"{name} {value!r}" in str(refused.value)
    with pytest.raises(BundleError) as error:
        Captioner.load(tmp_path / "absent")
    assert str(tmp_path / "absent") in str(error.value)
    with pytest.raises(BundleError) as error:
        Captioner.load(bundle, retrieve=3)
    assert str(bundle) in str(error.value)
    broken = shutil.copytree(bundle, tmp_path / "broken")
    (broken / TOKENIZER).write_text("{}")
    manifest = Manifest.model_validate_json((broken / MANIFEST).read_bytes())
    files = manifest.files | {TOKENIZER: FileHash.of(broken / TOKENIZER)}
    (broken / MANIFEST).write_text(manifest.model_copy(update={"files": files}).to_json())
    with pytest.raises(BundleError) as error:
        Captioner.load(broken)
    assert str(broken / TOKENIZER) in str(error.value)


def test_files_and_generators(captioner: Captioner, paint: Callable[..., Path]) -> None:
    path = paint("red")
    expected = captioner.caption(path).caption
    buffer = io.BytesIO()
    buffer.write(path.read_bytes())  # the position is the end, as after saving an image
    assert captioner.caption(buffer).caption == expected
    with path.open("rb") as file:
        assert captioner.caption(file).caption == expected
        assert not file.closed
    assert [each.caption for each in captioner.caption(path for _ in range(3))] == [expected] * 3
    assert [each.caption for each in captioner.caption({path: 1})] == [expected]


def test_a_folder_is_not_an_image(captioner: Captioner, tmp_path: Path) -> None:
    with pytest.raises(ImageError) as error:
        captioner.caption(tmp_path)
    assert f"{tmp_path}: is a folder" in str(error.value)


def test_a_misspelt_option_names_the_nearest(captioner: Captioner, paint: Callable[..., Path]) -> None:
    with pytest.raises(SearchError) as error:
        captioner.caption(paint("red"), num_beam=3)
    assert "num_beam;" in str(error.value)
    assert "num_beams" in str(error.value)


def test_a_pickled_captioner_loads_its_bundle_again(
    bundle: Path, paint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle.parent)
    captioner = Captioner.load(bundle.name, threads=1)
    content = pickle.dumps(captioner)
    monkeypatch.chdir("/")
    copy = pickle.loads(content)
    assert copy.threads == 1
    assert copy.caption(paint("blue")).tokens == captioner.caption(paint("blue")).tokens


def test_the_errors_of_bad_images_do_not_keep_them_in_memory(captioner: Captioner, paint: Callable[..., Path]) -> None:
    path = paint("red")
    path.write_bytes(path.read_bytes()[:50])
    ((_, error),) = captioner.stream([path])
    assert isinstance(error, ImageError)
    assert error.__traceback__ is None
    assert error.__cause__ is None
    assert error.__context__ is None


def test_a_stream_takes_several_images(captioner: Captioner, paint: Callable[..., Path]) -> None:
    for one in (str(paint("red")), paint("red"), paint("red").read_bytes(), np.zeros((8, 8, 3), np.uint8)):
        with pytest.raises(SearchError):
            list(captioner.stream(one))  # type: ignore[type-var]
