"""The options of an export: the source of `itune-export`'s flags, their help and their checks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, DirectoryPath, Field, FilePath, model_validator

from ..runtime.settings import Settings

Precision = Literal["fp32", "fp16", "int8", "int4"]
_Count = Annotated[int, Field(ge=1)]


class VerifyOptions(Settings):
    """How the graphs are compared with PyTorch before the bundle is written."""

    model_config = ConfigDict(title="Verification")

    images: DirectoryPath | None = None
    """Folder of photos to verify the graphs on, besides synthetic images; also the photos of
    `--dev-data`. Default: beside that file."""
    dev_data: Path | None = None
    """Captions whose dev split (or whole file, if it has no splits) the graphs and PyTorch
    caption; they are compared by CIDEr-D and equal captions."""
    dev_images: _Count | None = None
    """At most this many photos of `--dev-data`. Default: 200."""
    verify: bool = True
    """Compare the graphs with PyTorch."""


class TensorRTOptions(Settings):
    """What TensorRT plans are built for."""

    model_config = ConfigDict(title="TensorRT plans")

    gpu: str | None = None
    """Compute capabilities, such as sm86,sm89. Default: all that the library can build for."""
    max_beams: _Count | None = None
    """Maximum number of beams. Default: 8."""
    max_batch: _Count | None = None
    """Maximum number of images at once. Default: 8."""
    calibration_data: Path | None = None
    """Folder of photos like those to caption; 64 of them give the ranges of int8 activations. `random` is noise, which
    costs quality."""


class ExportOptions(VerifyOptions, TensorRTOptions):
    """How a checkpoint becomes a bundle."""

    model_config = ConfigDict(title="Bundle")

    target: Literal["onnx", "tensorrt"] = "onnx"
    """ONNX graphs, or TensorRT plans for NVIDIA GPUs beside the ONNX graphs they are built from; with TensorRT-RTX no
    GPU is needed to build them."""
    precision: Precision | None = None
    """Precision of the decoder. fp16: half the size, the speed of fp32. int8: a quarter; weights and activations are
    rounded. int4: an eighth, except the language-model head. In plans: fp16 or int8 products, fp32 where it matters.
    Default: fp32; fp16 for TensorRT."""
    vision_precision: Precision | None = None
    """Precision of the vision tower. Default: the decoder's; int8 for int4; fp32 for an ONNX tower in fp16 plans, whose
    convolutions lose too much."""
    name: str | None = None
    """Name of the model. Default: the output folder's."""
    license: str | None = None
    """Licence of the weights, for the model card."""
    model_card: FilePath | None = None
    """Use this file as the model card."""
    vocabulary: Annotated[str, Field(min_length=1)] | None = None
    """N or FILE: keep only the N most frequent tokens of the training captions (`--data`), or those of a text file with
    a word, phrase or caption per line. Smaller and faster, but captions may use other words,
    and the bundle cannot be restored."""
    data: Path | None = None
    """Captions whose train split `--vocabulary N` counts."""
    retrieve: Annotated[int, Field(ge=0)] | None = None
    """Make a bundle that retrieves this many captions of similar images from a datastore of its vision tower
    (itune-datastore); 0: only when itune-run asks for it."""
    patch_grid: str | None = None
    """ROWSxCOLUMNS: how an ONNX tower's last embeddings lie in the image, row by row, for heatmaps. Default: a CLIP
    tower's own; else the square that all of them make, or all but a CLS."""
    layer_names: bool = False
    """Of TensorRT plans, print the tensors that compute in each type, and not only their number."""
    force: bool = False
    """Replace the output of an earlier run."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        def first(*names: str) -> str | None:
            return next((f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None), None)

        wrong = None
        if not self.verify and (photos := first("images", "dev_data")):
            wrong = f"{photos} contradicts --no-verify: the photos are for the verification"
        elif self.dev_images is not None and self.dev_data is None:
            wrong = "--dev-images needs --dev-data"
        elif self.data is not None and self.vocabulary is None:
            wrong = "--data needs --vocabulary N, which counts the tokens of the captions"
        elif self.target != "tensorrt" and (plans := first(*TensorRTOptions.model_fields)):
            wrong = f"{plans} needs --target tensorrt"
        if wrong:
            raise ValueError(wrong)
        return self


class ImportOptions(Settings):
    """What a published checkpoint (a state dict of ClipCap's or SmallCap's code) does not say itself."""

    model_config = ConfigDict(title="Import a published checkpoint")

    # The parts that the published checkpoints were trained on, except ClipCap's on CLIP RN50x4.
    language_model: str = "openai-community/gpt2"
    """Hub id or folder of the GPT-2, whose weights are used if the file has none. Default: openai-community/gpt2."""
    vision: str = "openai/clip-vit-base-patch32"
    """Hub id or folder of the vision tower. Default: openai/clip-vit-base-patch32."""
    normalize: bool = False
    """ClipCap: it was trained with --normalize_prefix."""


class CompareOptions(Settings):
    """What `itune-export --compare` measures."""

    model_config = ConfigDict(title="Comparison")

    precisions: str = "fp32,fp16,int8,int4"
    """LIST of DECODER[+VISION][@N|FILE], separated by commas: precisions, and a shortlist as in `--vocabulary`. fp32 is
    always included. Default: fp32,fp16,int8,int4."""
    data: Path | None = None
    """Captions to score against; a shortlist @N counts their train split. Default: only caption `--images`."""
    images: Path | None = None
    """Folder of the photos. Default: beside the captions."""
    split: str = "dev"
    """Split to caption: train, dev, test, or all. Default: dev."""
    dev_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Hold out this fraction of the train split as dev split, as itune-train does with seed 0."""
    limit: _Count | None = None
    """Use only the first N photos."""
    batch_size: _Count = 16
    """Photos at once, except while latency is measured. Default: 16."""
    latency_photos: _Count = 40
    """Photos for the latency, one at a time. Default: 40."""
    threads: _Count | None = None
    """CPU threads. Default: all."""
    verify: bool = True
    """Compare the graphs with PyTorch."""
