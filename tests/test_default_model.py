"""The packaged model: its captions, its score, and the same captions from its restored parts in PyTorch."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.parity import compare
from itune import Captioner
from itune.data.records import load_records
from itune.evaluate import caption_records, score_captions
from itune.export.bundle import export_bundle
from itune.export.graph.builder import Graph
from itune.export.options import ExportOptions
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
    """Neither on its size nor its order: int8 activations are scaled by row."""
    photos = []
    for path in sorted((REPOSITORY / "examples").glob("*.jpg")):
        photo = Image.open(path).convert("RGB")
        width, height = photo.size
        boxes = [(0, 0, 1, 1), (0, 0, 0.5, 0.6), (0.4, 0.1, 1, 0.9)]
        photos += [
            photo.crop((int(a * width), int(b * height), int(c * width), int(d * height))) for a, b, c, d in boxes
        ]
    captioner = Captioner.load()
    alone = [captioner.caption(photo) for photo in photos]
    assert len({caption.caption for caption in alone}) > len(photos) // 2
    for batch_size, seed in ((1, 0), (3, 1), (8, 2), (8, 3)):
        order = random.Random(seed).sample(range(len(photos)), len(photos))
        together = captioner.caption([photos[number] for number in order], batch_size=batch_size)
        for number, caption in zip(order, together, strict=True):
            assert caption.tokens == alone[number].tokens
            for own, other in zip(caption.candidates, alone[number].candidates, strict=True):
                assert own.caption == other.caption
                assert own.score == pytest.approx(other.score, abs=1e-5)  # sums in another order differ by at most 2e-7


def test_itune_run_describes_a_photo_in_json() -> None:
    command = [sys.executable, "-m", "itune.cli.run", str(REPOSITORY / "examples" / "astronaut.jpg"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result.keys() >= {"image", "caption", "score", "tokens", "candidates", "ms", "engine"}
    assert result["caption"] == GOLDEN["astronaut.jpg"]
    assert len(result["candidates"]) == 5
    assert result["ms"].keys() == {"decode_image", "encode", "search"}


def test_restored_parts_export_to_the_same_integers(restored: Path, tmp_path: Path) -> None:
    """Of all but the tower's one product: it was rounded by blocks when the model was shipped, now by channel."""
    export_bundle(restored / "checkpoint", tmp_path / "again", ExportOptions(precision="int8", verify=False))
    for graph in ("decoder.onnx", "vision.onnx"):
        again, shipped = (Graph.load(folder / graph).weights for folder in (tmp_path / "again", default_bundle()))
        integers = {name for name, array in shipped.items() if array.dtype in (np.uint8, np.int8) and array.ndim > 1}
        integers -= {"visual.weight.T.int8"}
        assert len(integers) > 20
        for name in integers:
            np.testing.assert_array_equal(again[name], shipped[name], err_msg=name)


@pytest.mark.slow
def test_fp32_bundle_writes_pytorchs_captions(restored: Path, tmp_path: Path, shared_data: Path) -> None:
    bundle = tmp_path / "fp32"
    export_bundle(restored / "checkpoint", bundle, ExportOptions(precision="fp32", verify=False))
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
    assert score_captions(captions, records)["cider"] >= 0.47
