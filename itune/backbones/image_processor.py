"""Read how a vision tower's photos are preprocessed, as transformers reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import read_json
from ..runtime.errors import reading
from ..runtime.settings import ImageSettings
from .pretrained import BackboneError

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
_STEPS = ("_preprocess", "process_image", "resize", "center_crop", "rescale", "normalize")
"""Methods of transformers' image processors that `ImageSettings` reproduces as the base class has them."""
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def preprocessor_file(folder: Path) -> Path:
    """The file from which transformers builds the image processor; `preprocessor_config.json` if there is none."""
    processor = folder / PROCESSOR
    nested = read_json(processor, BackboneError) if processor.is_file() else None
    return (
        processor if isinstance(nested, dict) and nested.get("image_processor") is not None else folder / PREPROCESSOR
    )


def read_image_settings(folder: Path) -> ImageSettings:
    """The settings of the image processor that transformers builds from the folder's files.

    Raises BackboneError if the processor does something else than resize, crop, rescale by 1/255 and normalize.
    """
    from transformers import AutoImageProcessor, CLIPConfig
    from transformers.image_processing_backends import PilBackend

    path = preprocessor_file(folder)
    with reading(path, BackboneError, "a vision tower needs an image processor's configuration"):
        # Without a type it is CLIP's. The processor's class decides what missing fields mean.
        processor: Any = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            folder, config=CLIPConfig(), backend="pil", trust_remote_code=False, local_files_only=True
        )
        written, _ = processor.get_image_processor_dict(folder, local_files_only=True)
        kind = type(processor).__name__.removesuffix("Pil")
        named = written.get("image_processor_type") or written.get("feature_extractor_type") or kind
        plain = all(getattr(type(processor), step, None) is getattr(PilBackend, step) for step in _STEPS)
        size, crop = processor.size, processor.crop_size if processor.do_center_crop else None
        edge = size.shortest_edge
        supported = {
            f"image_processor_type {named}": plain and kind == _kind(named),
            "do_resize": processor.do_resize,
            "do_center_crop": crop or not edge,
            "do_normalize": processor.do_normalize,
            "do_rescale": processor.do_rescale,
            "do_pad": not processor.do_pad,
            "rescale_factor": abs(255 * processor.rescale_factor - 1) < 1e-4,
            "size.longest_edge": size.longest_edge is None,
            "size": edge or (size.height and size.width),
            f"resample {processor.resample}": processor.resample in _RESAMPLE,
        }
        if unsupported := [field for field, supports in supported.items() if not supports]:
            raise BackboneError(
                f"{path}: {unsupported[0]} is not supported: pixels are resized to a shorter edge and cropped, or "
                "resized to height and width, then rescaled by 1/255 and normalized"
            )
        return ImageSettings(
            size=(edge, edge) if edge else (size.height, size.width),
            resize="shortest_edge" if edge else "squash",
            crop=(crop.height, crop.width) if crop else None,
            mean=_per_channel(processor.image_mean),
            std=_per_channel(processor.image_std),
            interpolation=_RESAMPLE[processor.resample],  # type: ignore[arg-type]
        )


def _kind(named: str) -> str:
    """The class that transformers 5 has for the name of an image processor or an older feature extractor."""
    return named.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")


def _per_channel(value: Any) -> Any:
    """A mean or standard deviation; one number stands for all channels."""
    return (value,) * 3 if isinstance(value, int | float) else value
