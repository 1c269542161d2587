"""Preprocessing against transformers' own CLIP image processor."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from itune.runtime.image import decode, preprocess
from itune.runtime.settings import ImageSettings

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RESAMPLING = {name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "lanczos")}

sides = st.integers(1, 400)
seeds = st.integers(0, 2**32 - 1)


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Noise under a gradient: both fine and coarse structure that resizing could get wrong."""
    noise = np.random.default_rng(seed).integers(0, 128, (height, width, 3))
    ramp = np.linspace(0, 127, width)[None, :, None]
    return Image.fromarray((noise + ramp).astype(np.uint8))


@settings(max_examples=80, deadline=None)
@given(width=sides, height=sides, short=st.integers(1, 96), crop_height=sides, crop_width=sides, seed=seeds)
@example(width=640, height=480, short=224, crop_height=224, crop_width=224, seed=0)
@example(width=333, height=500, short=224, crop_height=224, crop_width=224, seed=1)
@example(width=7, height=5, short=3, crop_height=6, crop_width=9, seed=2)
@example(width=1, height=1, short=224, crop_height=224, crop_width=224, seed=3)
def test_shortest_edge_and_centre_crop(
    width: int, height: int, short: int, crop_height: int, crop_width: int, seed: int
) -> None:
    image = photo(width, height, seed)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": short},
        crop_size={"height": crop_height, "width": crop_width},
        do_rescale=False,
        do_normalize=False,
    )
    expected = processor(image)["pixel_values"][0].transpose(1, 2, 0)
    pixels = preprocess(image, ImageSettings(size=(short, short), crop=(crop_height, crop_width), mean=MEAN, std=STD))
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("interpolation", RESAMPLING)
@pytest.mark.parametrize(("width", "height"), [(50, 20), (20, 50), (30, 40), (300, 200)])
def test_squash(width: int, height: int, interpolation: str) -> None:
    image = photo(width, height, 0)
    processor = CLIPImageProcessorPil(
        size={"height": 30, "width": 40},
        resample=RESAMPLING[interpolation],
        do_center_crop=False,
        do_rescale=False,
        do_normalize=False,
    )
    expected = processor(image)["pixel_values"][0].transpose(1, 2, 0)
    config = ImageSettings(size=(30, 40), resize="squash", mean=MEAN, std=STD, interpolation=interpolation)
    np.testing.assert_array_equal(preprocess(image, config), expected)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "CMYK", "1"])
def test_what_the_tower_sees_is_what_clip_was_trained_on(mode: str) -> None:
    image = photo(61, 47, 5)
    if "A" in mode:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    image = image.convert(mode)
    expected = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})(image)
    pixels = preprocess(decode(image), ImageSettings(size=(32, 32), crop=(32, 32), mean=MEAN, std=STD))
    seen = (pixels / 255 - MEAN) / STD
    np.testing.assert_allclose(seen.transpose(2, 0, 1), expected["pixel_values"][0], atol=1e-5)


def test_shortest_edge_without_a_crop_still_fills_the_tower() -> None:
    pixels = preprocess(photo(80, 40, 0), ImageSettings(size=(16, 16), mean=MEAN, std=STD))
    assert pixels.shape == (16, 16, 3)


def test_a_thin_strip_is_resized_where_it_is_cropped() -> None:
    """Not to 1,024,000 x 2048 pixels first, which take 8 GB."""
    strip = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1, 500, 3), dtype=np.uint8))
    tower = ImageSettings(size=(2048, 2048), resize="shortest_edge", crop=(2048, 2048), mean=MEAN, std=STD)
    pixels = preprocess(strip, tower)
    centre = strip.resize((20 * 2048, 2048), Image.Resampling.BICUBIC, (240, 0, 260, 1))
    expected = np.asarray(centre.crop((19 * 1024, 0, 21 * 1024, 2048))).astype(int)
    assert np.abs(pixels - expected).max() <= 1
