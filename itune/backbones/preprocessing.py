"""A vision tower's preprocessing: from `preprocessor_config.json` to normalized pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.engines.base import Float32, UInt8
from ..runtime.errors import reading
from ..runtime.settings import ImageSettings
from .sources import BackboneError

PREPROCESSOR = "preprocessor_config.json"
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def read_image_settings(folder: Path) -> ImageSettings:
    """The settings of a Hugging Face `preprocessor_config.json`.

    Raises:
        BackboneError: the file is missing or damaged, or describes preprocessing that we do not reproduce.
    """
    path = folder / PREPROCESSOR
    with reading(path, BackboneError, "a vision tower needs an image preprocessor's configuration"):
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        size = config["size"] if isinstance(config["size"], dict) else {"shortest_edge": config["size"]}
        supported = {
            "do_resize": config.get("do_resize", True),
            "do_normalize": config.get("do_normalize", True),
            "do_rescale": config.get("do_rescale", True),
            "rescale_factor": abs(255 * config.get("rescale_factor", 1 / 255) - 1) < 1e-4,
            "size.longest_edge": "longest_edge" not in size,
        }
        if unsupported := [field for field, supports in supported.items() if not supports]:
            raise BackboneError(
                f"{path}: {unsupported[0]} is not supported: pixels are resized to a shorter edge or to height and "
                "width, rescaled by 1/255 and normalized"
            )
        edge = size.get("shortest_edge")
        crop = config.get("crop_size") if config.get("do_center_crop", True) else None
        if isinstance(crop, int):
            crop = {"height": crop, "width": crop}
        return ImageSettings(
            size=(edge, edge) if edge else (size["height"], size["width"]),
            resize="shortest_edge" if edge else "squash",
            crop=(crop["height"], crop["width"]) if crop else None,
            mean=config["image_mean"],
            std=config["image_std"],
            interpolation=_RESAMPLE[config.get("resample", 3)],  # type: ignore[arg-type]
        )


def normalize(pixels: UInt8, image: ImageSettings) -> Float32:
    """(pixels / 255 - mean) / std of uint8 [B, H, W, 3], as contiguous float32 [B, 3, H, W]."""
    scale = 1 / (255 * np.array(image.std))
    shift = -np.array(image.mean) / np.array(image.std)
    x = pixels * scale.astype(np.float32) + shift.astype(np.float32)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
