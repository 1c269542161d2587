"""The options of an export: the source of `itune-export`'s flags, their help and their checks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ..runtime.settings import Settings

Precision = Literal["fp32", "fp16", "int8", "int4"]
_Count = Annotated[int, Field(ge=1)]


class ExportOptions(Settings):
    """How a checkpoint becomes a bundle."""

    target: Literal["onnx", "tensorrt"] = "onnx"
    """ONNX graphs alone, or TensorRT plans for NVIDIA GPUs beside the ONNX graphs they are built from."""
    precision: Precision | None = None
    """Precision of the decoder. Default: fp32; fp16 for TensorRT."""
    vision_precision: Precision | None = None
    """Precision of the vision tower. Default: the decoder's; int8 for int4; fp32 for an ONNX tower in fp16 plans."""
    name: str | None = None
    """Name of the model. Default: the output folder's."""
    license: str | None = None
    """Licence of the weights, for the model card."""
    model_card: Path | None = None
    """Use this file as the model card."""
    vocabulary: str | None = None
    """N or FILE: keep only the N most frequent tokens of the training captions (`--data`), or those of a text file."""
    data: Path | None = None
    """Captions whose train split `--vocabulary N` counts."""
    retrieve: Annotated[int | None, Field(ge=0)] = None
    """Make a bundle that retrieves this many captions of similar images; 0: only when itune-run asks for it."""
    patch_grid: str | None = None
    """ROWSxCOLUMNS: how an ONNX tower's last embeddings lie in the image, for heatmaps."""
    images: Path | None = None
    """Folder of photos to verify the graphs on; those of `--dev-data` if not beside it."""
    dev_data: Path | None = None
    """Captions whose dev split the graphs are scored on, beside PyTorch, before the bundle is written."""
    dev_images: _Count | None = None
    """At most this many photos of `--dev-data`. Default: 200."""
    verify: bool = True
    """Compare the graphs with PyTorch."""
    force: bool = False
    """Replace the output of an earlier run."""
    gpu: str | None = None
    """Compute capabilities of the TensorRT plans, such as sm86,sm89. Default: all that it can build for."""
    max_beams: _Count | None = None
    """Most beams that the TensorRT plans have room for. Default: 8."""
    max_batch: _Count | None = None
    """Most images at once in the TensorRT plans. Default: 8."""
    calibration_data: Path | None = None
    """Folder of photos to find the ranges of int8 activations in TensorRT plans; `random` is noise."""
