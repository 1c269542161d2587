"""The model inside the package: what it says, what it scores, and that its parts give the same captions in PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.parity import compare
from itune import Captioner
from itune.data import load_records
from itune.evaluate import caption_records, score_captions
from itune.export.bundle import export_bundle
from itune.export.restore import restore_bundle
from itune.runtime.bundle import default_bundle
from tests.conftest import REPOSITORY

GOLDEN = {
    "astronaut.jpg": "a black and white dog is standing in the snow",
    "camera.jpg": "a woman is holding a camera",
    "chelsea.jpg": "a snowboarder jumps off a ramp",
    "coffee.jpg": "a dog is standing in the snow with a stick in its mouth",
}


@pytest.fixture(scope="module")
def restored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("default") / "restored"
    restore_bundle(default_bundle(), folder)
    return folder


def test_golden_captions() -> None:
    photos = sorted((REPOSITORY / "examples").glob("*.jpg"))
    captions = Captioner.load().caption(photos, num_beams=5)
    assert {photo.name: caption.caption for photo, caption in zip(photos, captions, strict=True)} == GOLDEN


def test_a_caption_does_not_depend_on_its_batch() -> None:
    photos = sorted((REPOSITORY / "examples").glob("*.jpg"))
    captioner = Captioner.load()
    together = captioner.caption(photos * 2, batch_size=8)
    alone = [captioner.caption(photo) for photo in photos]
    assert [caption.tokens for caption in together] == [caption.tokens for caption in alone] * 2


def test_itune_run_describes_a_photo_in_json() -> None:
    command = [sys.executable, "-m", "itune.cli.run", str(REPOSITORY / "examples" / "astronaut.jpg"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result.keys() == {"image", "caption", "score", "tokens", "candidates", "ms"}
    assert result["caption"] == GOLDEN["astronaut.jpg"]
    assert len(result["candidates"]) == 5
    assert result["ms"].keys() == {"decode_image", "encode", "search"}


def test_restored_parts_export_to_the_same_int8_captions(restored: Path, tmp_path: Path) -> None:
    export_bundle(restored / "checkpoint", tmp_path / "again", precision="int8", verify=False)
    photos = sorted((REPOSITORY / "examples").glob("*.jpg"))
    # The search defaults of a bundle are not its weights': the length penalty is given.
    again, shipped = (
        Captioner.load(folder).caption(photos, num_beams=5, max_new_tokens=24, length_penalty=0.8)
        for folder in (tmp_path / "again", None)
    )
    assert [caption.tokens for caption in again] == [caption.tokens for caption in shipped]


@pytest.mark.slow
def test_fp32_bundle_writes_pytorchs_captions(restored: Path, tmp_path: Path, shared_data: Path) -> None:
    bundle = tmp_path / "fp32"
    export_bundle(restored / "checkpoint", bundle, precision="fp32", verify=False)
    photos = [record.image for record in load_records(shared_data / "flickr8k", split="dev")][:24]
    for row in compare(restored / "checkpoint", bundle, photos, beams=(1, 3, 5), new_tokens=24):
        assert row["identical"] == len(photos), row
        assert row["distinct"] >= 0.9 * len(photos), row
        assert row["exchanged"] == row["paired"], row


@pytest.mark.slow
def test_dev_score(shared_data: Path) -> None:
    records = load_records(shared_data / "flickr8k", split="dev")
    captions, failed = caption_records(Captioner.load(), records, num_beams=5)
    assert not failed
    assert score_captions(captions, records).cider >= 0.47
