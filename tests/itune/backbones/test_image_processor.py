"""Preprocessing is that of the image processor that transformers builds from the same files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor, CLIPConfig

from itune.backbones import load_vision_tower, normalize
from itune.backbones.image_processor import read_image_settings
from itune.backbones.pretrained import BackboneError
from itune.export.restore import _preprocessor
from itune.runtime.image import preprocess
from itune.runtime.settings import ImageSettings
from tests.conftest import make_clip, refused


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return make_clip(tmp_path / "clip")


PROCESSORS: list[dict[str, object]] = [
    {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 40},
        "crop_size": {"height": 32, "width": 28},
    },
    {"feature_extractor_type": "CLIPFeatureExtractor", "size": 30, "crop_size": 32, "image_mean": [0.1, 0.2, 0.3]},
    {"image_processor_type": "CLIPImageProcessorFast", "size": 32, "crop_size": 32, "resample": 0, "image_std": 0.4},
    {"size": {"height": 30, "width": 40}, "do_center_crop": False, "resample": 2, "do_convert_rgb": False},
    {"size": [30, 40], "crop_size": {"height": 20, "width": 28}, "resample": 1},
    {"image_processor_type": "ViTImageProcessor", "size": 32},
    {"feature_extractor_type": "ViTFeatureExtractor"},
    {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}},
    {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 40}, "crop_size": 32},
]
"""Some leave out fields, for which every processor has its own defaults."""


@pytest.mark.parametrize("settings", PROCESSORS, ids=str)
def test_preprocessing_is_that_of_transformers(settings: dict[str, object], tmp_path: Path) -> None:
    other = {"size": 7, "crop_size": 7}
    for name, files in {
        "4": {"preprocessor_config.json": settings},
        "5": {"processor_config.json": {"image_processor": settings}},
        "both": {"processor_config.json": {"image_processor": settings}, "preprocessor_config.json": other},
        "flat": {"processor_config.json": {"size": 9}, "preprocessor_config.json": settings},
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_text(json.dumps(content))
        theirs = AutoImageProcessor.from_pretrained(folder, config=CLIPConfig(), backend="pil")
        ours = read_image_settings(folder)
        random = np.random.default_rng(0)
        for height, width in (50, 70), (90, 41), (20, 20):
            photo = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
            expected = theirs(photo, return_tensors="np")["pixel_values"]
            np.testing.assert_allclose(normalize(preprocess(photo, ours)[None], ours), expected, atol=1e-6)


def test_a_clip_saved_by_transformers_5(clip: Path) -> None:
    old = clip / "preprocessor_config.json"
    settings = json.loads(old.read_text()) | {"image_mean": [0.1, 0.2, 0.3], "size": {"shortest_edge": 40}}
    old.unlink()
    (clip / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    image = load_vision_tower(str(clip)).image
    assert (image.mean, image.size) == ((0.1, 0.2, 0.3), (40, 40))


@pytest.mark.parametrize(
    "settings",
    [
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}},
        {"image_processor_type": "LevitImageProcessor"},
        {"image_processor_type": "OwnImageProcessor"},
        {"feature_extractor_type": "OwnFeatureExtractor"},
        {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.Own"}},
    ],
    ids=str,
)
def test_other_image_processors_are_refused_by_name(settings: dict[str, object], clip: Path) -> None:
    file = clip / "processor_config.json"
    file.write_text(json.dumps({"image_processor": settings}))
    with refused(BackboneError, file, next(iter(settings.values()))):
        load_vision_tower(str(clip))


@pytest.mark.parametrize(
    "fields",
    [
        {"size": (30, 40), "resize": "squash"},
        {"size": (40, 40), "crop": (32, 28), "interpolation": "bilinear"},
        {"size": (40, 40)},
    ],
    ids=str,
)
def test_a_restored_tower_has_the_same_preprocessing(fields: dict[str, object], tmp_path: Path) -> None:
    settings = ImageSettings.model_validate({"mean": (0.1, 0.2, 0.3), "std": (1, 2, 3)} | fields)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(_preprocessor(settings)))
    found = read_image_settings(tmp_path)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    np.testing.assert_array_equal(preprocess(photo, found), preprocess(photo, settings))
    assert (found.mean, found.std) == (settings.mean, settings.std)
