"""The feature cache: what an interruption, another process, changed photos and changed towers do to it."""

from __future__ import annotations

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from itune.backbones import load_vision_tower
from itune.data.features import FeatureCache, Features
from itune.runtime.errors import ItuneError
from tests.conftest import refused


@pytest.fixture
def clip(clip_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(clip_folder, tmp_path / "clip")


@pytest.fixture
def live(clip_folder: Path) -> Features:
    return Features(load_vision_tower(str(clip_folder)))


def test_a_photo_is_read_as_it_was_prepared(clip: Path, photos: list[Path], tmp_path: Path) -> None:
    mine = [Path(shutil.copy(photo, tmp_path / photo.name)) for photo in photos[:3]]
    tower = load_vision_tower(str(clip))
    expected = Features(tower).read(mine)
    cache = FeatureCache(tmp_path / "cache", tower)
    assert cache.prepare(mine) == {}
    os.utime(mine[0], (1, 1))
    shutil.copy(photos[5], mine[1])
    mine[2].unlink()
    torch.testing.assert_close(cache.read(mine), expected, rtol=2e-3, atol=2e-3)
    assert list(cache.prepare(mine)) == [mine[2]]


def test_two_paths_to_one_photo(clip: Path, photos: list[Path], tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(photos[0])
    paths = [photos[0], tmp_path / "link.png", photos[1], photos[2]]
    tower = load_vision_tower(str(clip))
    for _ in range(2):
        cache = FeatureCache(tmp_path / "cache", tower)
        assert cache.prepare(paths) == {}
        torch.testing.assert_close(cache.read(paths), Features(tower).read(paths), rtol=2e-3, atol=2e-3)
    (index,) = (tmp_path / "cache").glob("*/index.jsonl")
    assert len(index.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "damage", [None, b"\xff\xfe\n", b"{}\n", b"3\n", b'"x\n', b'["x", 0.0, 1]\n', b'["x", 0, Infinity]\n']
)
def test_a_damaged_index_is_computed_anew(damage: bytes | None, clip: Path, photos: list[Path], tmp_path: Path) -> None:
    tower = load_vision_tower(str(clip))
    FeatureCache(tmp_path / "cache", tower).prepare(photos)
    (index,) = (tmp_path / "cache").glob("*/index.jsonl")
    lines = index.read_bytes().splitlines(keepends=True)
    if damage is None:
        index.unlink()
    else:
        index.write_bytes(b"".join([*lines[:2], damage, *lines[3:]]))
    cache = FeatureCache(tmp_path / "cache", tower)
    assert cache.prepare(photos) == {}
    torch.testing.assert_close(cache.read(photos), Features(tower).read(photos), rtol=2e-3, atol=2e-3)
    assert sorted(index.read_bytes().splitlines(keepends=True)) == sorted(lines)


def test_another_activation_is_another_tower(clip: Path, photos: list[Path], tmp_path: Path) -> None:
    """A correction of a CLIP's config.json leaves its weights as they are."""
    found = []
    for activation in ("quick_gelu", "gelu"):
        config = json.loads((clip / "config.json").read_text())
        (clip / "config.json").write_text(json.dumps(config | {"hidden_act": activation}))
        cache = FeatureCache(tmp_path / "cache", load_vision_tower(str(clip)))
        cache.prepare(photos)
        found.append(cache.read(photos))
    assert not torch.allclose(*found, rtol=1e-2)


def test_cache_survives_interruption_and_skips_bad_photos(live: Features, photos: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8 no photo")
    cache = FeatureCache(tmp_path / "cache", live.tower)
    assert list(cache.prepare([photos[0], bad, photos[1]])) == [bad]
    data = next((tmp_path / "cache").glob("*/features.f16"))
    index = data.with_name("index.jsonl")
    with data.open("ab") as file:
        file.write(b"half a row")
    with index.open("a") as file:
        file.write('"half a li')
    again = FeatureCache(tmp_path / "cache", live.tower)
    assert again.prepare(photos) == {}
    assert len(index.read_text().splitlines()) == len(photos)
    torch.testing.assert_close(again.read(photos), live.read(photos), rtol=2e-3, atol=2e-3)


def test_two_trainings_may_fill_one_cache_at_a_time(
    live: Features, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = Features.embed

    def slow(self: Features, *arguments: Any) -> Any:
        time.sleep(0.2)  # time enough for the other one to begin
        return embed(self, *arguments)

    monkeypatch.setattr(Features, "embed", slow)
    with ThreadPoolExecutor(2) as pool:
        caches = [FeatureCache(tmp_path / "cache", live.tower) for _ in range(2)]
        orders = (photos, photos[::-1])
        running = [pool.submit(cache.prepare, order) for cache, order in zip(caches, orders, strict=True)]
        assert [each.result() for each in running] == [{}, {}]
    monkeypatch.undo()
    index = next((tmp_path / "cache").glob("*/index.jsonl"))
    assert len(index.read_text().splitlines()) == len(photos)
    for cache in (*caches, FeatureCache(tmp_path / "cache", live.tower)):
        assert cache.prepare(photos) == {}
        torch.testing.assert_close(cache.read(photos), live.read(photos), rtol=2e-3, atol=2e-3)


def test_mirrored_embeddings_are_those_of_the_mirrored_photo(live: Features, photos: list[Path]) -> None:
    pixels = live.pixels(photos[0])
    assert not isinstance(pixels, str)
    expected = live.tower.embed(np.ascontiguousarray(pixels[None, :, ::-1]))
    torch.testing.assert_close(live.read([photos[0]], [True]), expected)


def test_an_index_that_lost_or_repeats_a_line_gives_no_wrong_embeddings(
    clip: Path, live: Features, photos: list[Path], tmp_path: Path
) -> None:
    tower = load_vision_tower(str(clip))
    cache = FeatureCache(tmp_path / "cache", tower)
    cache.prepare(photos)
    expected = cache.read(photos)
    (index,) = (tmp_path / "cache").glob("*/index.jsonl")
    lines = index.read_bytes().splitlines(keepends=True)
    for damaged in (lines[1:], [lines[0], *lines], [*lines[:1], *lines[2:]], lines[::-1]):
        index.write_bytes(b"".join(damaged))
        cache = FeatureCache(tmp_path / "cache", tower)
        cache.prepare(photos)
        assert torch.equal(cache.read(photos), expected)


def test_damaged_rows_are_noticed(clip: Path, photos: list[Path], tmp_path: Path) -> None:
    tower = load_vision_tower(str(clip))
    FeatureCache(tmp_path / "cache", tower).prepare(photos)
    (rows,) = (tmp_path / "cache").glob("*/features.f16")
    content = bytearray(rows.read_bytes())
    content[-1] ^= 1
    rows.write_bytes(content)
    cache = FeatureCache(tmp_path / "cache", tower)
    cache.prepare(photos)
    with refused(ItuneError, tmp_path / "cache"):
        cache.read(photos)


def test_swapped_names_are_noticed(clip: Path, photos: list[Path], tmp_path: Path) -> None:
    tower = load_vision_tower(str(clip))
    FeatureCache(tmp_path / "cache", tower).prepare(photos)
    (index,) = (tmp_path / "cache").glob("*/index.jsonl")
    first, second, *others = (json.loads(line) for line in index.read_text().splitlines())
    first[0], second[0] = second[0], first[0]
    index.write_text("".join(f"{json.dumps(line)}\n" for line in (first, second, *others)))
    cache = FeatureCache(tmp_path / "cache", tower)
    cache.prepare(photos)
    with refused(ItuneError, tmp_path / "cache"):
        cache.read(photos)


def test_a_cache_of_an_earlier_version_counts(clip: Path, photos: list[Path], tmp_path: Path) -> None:
    tower = load_vision_tower(str(clip))
    cache = FeatureCache(tmp_path / "cache", tower)
    cache.prepare(photos)
    (index,) = (tmp_path / "cache").glob("*/index.jsonl")
    index.write_text("".join(f"{json.dumps(json.loads(line)[0])}\n" for line in index.read_text().splitlines()))
    before = index.read_bytes()
    again = FeatureCache(tmp_path / "cache", tower)
    again.prepare(photos)
    assert index.read_bytes() == before
    assert torch.equal(again.read(photos), cache.read(photos))


def test_embeddings_beyond_half_precision(clip: Path, photos: list[Path], tmp_path: Path) -> None:
    tower = load_vision_tower(str(clip))
    last = [weight for name, weight in tower.model.named_parameters() if name.endswith("mlp.fc2.bias")][-1]
    with torch.no_grad():
        last.fill_(1e5)
    with refused(ItuneError, photos[0], "65504"):
        FeatureCache(tmp_path / "cache", tower).prepare(photos)
    assert torch.isfinite(Features(tower).read(photos)).all()


def test_links_in_a_shared_cache_are_not_followed(clip: Path, photos: list[Path], tmp_path: Path) -> None:
    tower = load_vision_tower(str(clip))
    FeatureCache(tmp_path / "cache", tower).prepare(photos)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("features.f16", "index.jsonl", "lock"):
        (place,) = (tmp_path / "cache").glob(f"*/{name}")
        kept = place.rename(tmp_path / "kept")
        place.symlink_to(victim)
        with refused(ItuneError, tmp_path / "cache"):
            FeatureCache(tmp_path / "cache", tower).prepare(photos)
        assert victim.read_text() == "precious"
        place.unlink()
        kept.rename(place)
