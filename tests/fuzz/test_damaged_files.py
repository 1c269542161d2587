"""Damaged files end in a result or in an ItuneError: never in another exception, a warning or output.

`ITUNE_FUZZ_SEEDS=START:END` replaces the seeds of each target, for hours by hand; a failure names its seed.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from itune.data.formats import read_entries
from itune.runtime.bundle import MANIFEST, TOKENIZER
from itune.runtime.captioner import Captioner
from itune.runtime.errors import ItuneError
from itune.runtime.image import decode
from itune.runtime.manifest import FileHash
from itune.runtime.retrieval.datastore import MANIFEST as STORE
from itune.runtime.retrieval.datastore import Datastore
from tests.fuzz.mutate import damage_bytes, damage_json
from tests.runtime.retrieval.test_datastore import DIM, make_store

Attempt = Callable[[Random, Path], object]
START, END = map(int, os.environ.get("ITUNE_FUZZ_SEEDS", "0:60").split(":"))
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8))
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA")
CAPTIONS = {
    "captions.token": b"a.jpg#0\tA dog .\na.jpg#1\tA cat .\nb.jpg#0\tTwo birds .\n",
    "captions.csv": b'image,caption\na.jpg,"A dog, running"\nb.jpg,Two birds\n',
    "metadata.jsonl": b'{"file_name": "a.jpg", "text": "A dog"}\n{"file_name": "b.jpg", "text": "Two birds"}\n',
    "list.json": b'[{"image": "a.jpg", "caption": "A dog"}, {"image": "b.jpg", "caption": "Two birds"}]',
    "karpathy.json": b'{"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "A dog"}]}]}',
    "coco.json": b'{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "A dog"}]}',
}


def survives(seed: int, attempt: Attempt, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Make one attempt; an ItuneError has to be one printable line."""
    folder.mkdir()
    message = "a result"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            attempt(Random(seed), folder)
        except ItuneError as error:
            message = str(error)
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}")
    shutil.rmtree(folder)
    assert message.isprintable(), seed
    assert message, seed
    assert (seed, [str(each.message) for each in warned], *capfd.readouterr()) == (seed, [], "", "")


@pytest.mark.parametrize("name", [MANIFEST, TOKENIZER, "vision.onnx", "decoder.onnx"])
def test_bundle(name: str, bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def attempt(random: Random, folder: Path) -> object:
        copy = shutil.copytree(bundle, folder / "bundle")
        damage = damage_json if name.endswith(".json") else damage_bytes
        (copy / name).write_bytes(damage((copy / name).read_bytes(), random))
        if name != MANIFEST:  # else the hash would catch everything
            manifest = json.loads((copy / MANIFEST).read_text())
            manifest["files"][name] = FileHash.of(copy / name).model_dump()
            (copy / MANIFEST).write_text(json.dumps(manifest))
        return Captioner.load(copy, threads=1).caption(PHOTO, max_new_tokens=4)

    for seed in range(START, END):
        survives(seed, attempt, tmp_path / "attempt", capfd)


@pytest.mark.parametrize("kind", FORMATS)
def test_photo(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    PHOTO.save(whole := BytesIO(), kind)
    for seed in range(START, END):
        survives(seed, lambda random, _: decode(damage_bytes(whole.getvalue(), random)), tmp_path / "attempt", capfd)


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def attempt(random: Random, folder: Path) -> object:
        damage = damage_json if name.endswith(".json") else damage_bytes
        (folder / name).write_bytes(damage(CAPTIONS[name], random))
        return read_entries(folder / name)

    for seed in range(START, END):
        survives(seed, attempt, tmp_path / "attempt", capfd)


@pytest.mark.parametrize("name", [STORE, "embeddings.npy", "entries.npy", "captions.txt", "captions.npy"])
def test_datastore(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def attempt(random: Random, folder: Path) -> object:
        store = make_store(
            folder / "store", "text", np.eye(DIM)[:3], [["a dog"], ["two men", "ein Loewe"], ["the sea"]]
        )
        damage = damage_json if name.endswith(".json") else damage_bytes
        (store / name).write_bytes(damage((store / name).read_bytes(), random))
        if name != STORE:
            manifest = json.loads((store / STORE).read_text())
            manifest["files"][name] = FileHash.of(store / name).model_dump()
            (store / STORE).write_text(json.dumps(manifest))
        return Datastore.load(store).search(np.eye(DIM, dtype=np.float32)[:2], 2)

    for seed in range(START, END):
        survives(seed, attempt, tmp_path / "attempt", capfd)
