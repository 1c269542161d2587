"""itune-export: a checkpoint to a bundle that runs without PyTorch, or a bundle back to its parts."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..runtime.errors import ItuneError
from . import common


class Target(StrEnum):
    """What the graphs are written for."""

    onnx = "onnx"
    tensorrt = "tensorrt"


class Precision(StrEnum):
    """How weights are stored and products computed."""

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"
    int4 = "int4"


def export(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write: bundle, restored parts or checkpoint.")
    ],
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="CHECKPOINT", help="Adapter checkpoint, or the output of itune-train.")
    ] = None,
    target: Annotated[
        Target | None,
        typer.Option(
            help="What the graphs are for. tensorrt: plans for NVIDIA GPUs beside the ONNX graphs that they come from; "
            "with tensorrt-rtx no GPU is needed to build them. [default: onnx]"
        ),
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="Of the decoder. fp16: half the size, the speed of fp32. int8: a quarter, weights and activations "
            "rounded. int4: an eighth, but for the language-model head. With --target tensorrt: fp16 or int8 products, "
            "fp32 where it matters. [default: fp32; fp16 for TensorRT]"
        ),
    ] = None,
    vision_precision: Annotated[
        Precision | None,
        typer.Option(
            help="Of the vision tower. [default: the decoder's; int8 for int4; fp32 for an ONNX tower with --target "
            "tensorrt --precision fp16, in which its convolutions lose too much]",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model. [default: the output folder's]")] = None,
    weights_license: Annotated[
        str | None, typer.Option("--license", metavar="TEXT", help="Licence of the weights, for the model card.")
    ] = None,
    model_card: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Use this file as the model card.")
    ] = None,
    num_beams: Annotated[
        int | None, typer.Option(min=1, help="Beams, unless a caption asks otherwise. [default: the training's]")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest caption, in tokens. [default: the training's]")
    ] = None,
    length_penalty: Annotated[float | None, typer.Option(help="> 0 favours long captions, < 0 short ones.")] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="SM,...",
            help="Compute capabilities of the TensorRT plans, such as sm86,sm89. [default: all that it can build for]",
        ),
    ] = None,
    max_beams: Annotated[
        int | None, typer.Option(min=1, help="Most beams that the TensorRT plans have room for. [default: 8]")
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="Most images at once in the TensorRT plans. [default: 8]")
    ] = None,
    calibration_data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER|random",
            help="Photos like those to caption, 64 of which are, to find the ranges of int8 activations in TensorRT "
            "plans; `random` is noise, which costs quality.",
        ),
    ] = None,
    vocabulary: Annotated[
        str | None,
        typer.Option(
            metavar="N|FILE",
            help="Keep only the N most frequent tokens of the training captions (--data), or those of a text file "
            "with a word, phrase or caption a line. Smaller and faster, other words; cannot be restored.",
        ),
    ] = None,
    retrieve: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Make a bundle that retrieves so many captions of similar images from a datastore of its vision tower "
            "(itune-datastore); with 0, only where itune-run is told to.",
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Captions for --vocabulary N (their train split).")] = None,
    patch_grid: Annotated[
        str | None,
        typer.Option(
            metavar="ROWSxCOLUMNS",
            help="How an ONNX tower's last embeddings lie in the image, row by row, for heatmaps. [default: a CLIP "
            "tower's own; the square that all of them make, or all but a CLS]",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder of photos to verify the graphs on, too; those of --dev-data, if not beside it.",
        ),
    ] = None,
    dev_data: Annotated[
        Path | None,
        typer.Option(
            help="Captions whose dev split (all of them in a file without splits) the graphs are scored on, beside "
            "PyTorch, before the bundle or a plan is written: CIDEr-D, equal captions."
        ),
    ] = None,
    dev_images: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many photos of --dev-data. [default: 200]")
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not compare the graphs with PyTorch.")] = False,
    restore: Annotated[
        Path | None,
        typer.Option(
            metavar="BUNDLE", help="Write the parts of a bundle, or of `default`: language model, tower, adapters."
        ),
    ] = None,
    import_: Annotated[
        Path | None,
        typer.Option(
            "--import",
            metavar="FILE",
            help="Write a published checkpoint (the state dict of ClipCap's or SmallCap's code) as one of ours.",
        ),
    ] = None,
    language_model: Annotated[
        str | None,
        typer.Option(help="For --import: the GPT-2 that it was trained on, hub id or folder. [default: gpt2]"),
    ] = None,
    vision: Annotated[
        str | None,
        typer.Option(help="For --import: its vision tower, hub id or folder. [default: CLIP ViT-B/32]"),
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="For --import: it was trained with --normalize_prefix.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output of an earlier run.")] = False,
    _compare: Annotated[
        bool,
        typer.Option("--compare", help="Export in several precisions and measure them: --compare --help says how."),
    ] = False,
    _version: common.Version = False,
) -> None:
    """Export a checkpoint to ONNX graphs or TensorRT plans, verified against PyTorch; or restore a bundle's parts;
    or import a published checkpoint.
    """
    given = dict(locals())
    _check_flags(given)
    common.require("export", "torch", "transformers", "safetensors", "onnx")
    common.exit_when_asked()
    console = common.console()
    if restore is not None:
        from ..export.restore import restore_bundle

        with console.status("restoring"):
            restore_bundle(restore, output, force=force)
        console.print(f"{output}: language-model, vision and checkpoint", highlight=False)
        return

    if import_ is not None:
        from ..export.imports.checkpoint import LANGUAGE_MODEL, VISION, ImportOptions, import_checkpoint

        options = ImportOptions(language_model or LANGUAGE_MODEL, vision or VISION, normalize)
        with console.status("importing"):
            import_checkpoint(import_, output, options, force=force)
        console.print(f"{output}: try itune-export {output} -o BUNDLE", highlight=False)
        return

    from ..data.records import load_records
    from ..export.bundle import export_bundle
    from ..export.options import ExportOptions
    from ..export.tensorrt.library import layer_table
    from ..export.verify.captions import DEV_PHOTOS
    from ..export.verify.report import Check, report_table

    assert checkpoint is not None
    chosen = precision or (Precision.fp16 if target == Target.tensorrt else Precision.fp32)

    title = f"{checkpoint} in PyTorch against ONNX Runtime, {chosen.value}"
    if target == Target.tensorrt and chosen != Precision.fp32:
        title += " (whose products on a CPU may be computed in fp32)"
    wanted = ExportOptions(
        target=target.value if target else "onnx",
        precision=chosen.value,
        vision_precision=vision_precision.value if vision_precision else None,
        name=name,
        license=weights_license,
        model_card=model_card,
        vocabulary=vocabulary,
        data=data,
        retrieve=retrieve,
        patch_grid=patch_grid,
        images=images,
        dev_data=dev_data,
        dev_images=dev_images,
        verify=not no_verify,
        force=force,
        gpu=gpu,
        max_beams=max_beams,
        max_batch=max_batch,
        calibration_data=calibration_data,
    )

    dev = [] if dev_data is None else load_records(dev_data, images=images, split="dev", undivided=True)

    def report(checks: list[Check]) -> None:
        console.print(report_table(checks, title))

    with console.status("starting") as status:
        export_bundle(
            checkpoint,
            output,
            wanted,
            search={"num_beams": num_beams, "max_new_tokens": max_new_tokens, "length_penalty": length_penalty},
            dev=dev[: dev_images or DEV_PHOTOS],
            progress=lambda stage: status.update(stage),
            report=report,
            report_plan=lambda role, layers: console.print(layer_table(role, layers)),
        )
    size = sum(path.stat().st_size for path in output.iterdir())
    where = ", where a GPU of the plans' is" if target == Target.tensorrt else ""
    console.print(f"{output}: {size / 1e6:.1f} MB; try itune-run PHOTO --bundle {output}{where}", highlight=False)


_ONLY_EXPORT = {
    "checkpoint": "CHECKPOINT",
    "target": "--target",
    "precision": "--precision",
    "vision_precision": "--vision-precision",
    "name": "--name",
    "weights_license": "--license",
    "model_card": "--model-card",
    "num_beams": "--num-beams",
    "max_new_tokens": "--max-new-tokens",
    "length_penalty": "--length-penalty",
    "gpu": "--gpu",
    "max_beams": "--max-beams",
    "max_batch": "--max-batch",
    "calibration_data": "--calibration-data",
    "vocabulary": "--vocabulary",
    "retrieve": "--retrieve",
    "data": "--data",
    "patch_grid": "--patch-grid",
    "images": "--images",
    "dev_data": "--dev-data",
    "dev_images": "--dev-images",
    "no_verify": "--no-verify",
}
_ONLY_IMPORT = {"language_model": "--language-model", "vision": "--vision", "normalize": "--normalize"}
_ONLY_TENSORRT = ("gpu", "max_beams", "max_batch", "calibration_data")


def _check_flags(given: dict[str, object]) -> None:
    if given["import_"] is None:
        for field, flag in _ONLY_IMPORT.items():
            if given[field] not in (None, False):
                raise ItuneError(f"{flag} is for a published checkpoint: give --import, too")
    elif given["restore"] is not None:
        raise ItuneError("--import contradicts --restore: one reads a published checkpoint, the other a bundle")
    if given["restore"] is None and given["import_"] is None:
        if given["checkpoint"] is None:
            raise ItuneError("CHECKPOINT is missing: name an adapter checkpoint, or a bundle with --restore")
        for field in ("images", "dev_data"):
            if given[field] is not None and given["no_verify"]:
                raise ItuneError(f"{_ONLY_EXPORT[field]} contradicts --no-verify: the photos are for the verification")
        if given["dev_images"] is not None and given["dev_data"] is None:
            raise ItuneError("--dev-images is how many photos of --dev-data are captioned: give both")
        if given["data"] is not None and given["vocabulary"] is None:
            raise ItuneError("--data is for --vocabulary N, which counts the tokens of the captions: give both")
        for field in _ONLY_TENSORRT:
            if given[field] is not None and given["target"] != Target.tensorrt:
                raise ItuneError(f"{_ONLY_EXPORT[field]} is for TensorRT plans: give --target tensorrt, too")
        return
    for field, flag in _ONLY_EXPORT.items():
        if given[field] not in (None, False):
            if given["restore"] is None:
                raise ItuneError(f"{flag} contradicts --import, which writes a checkpoint: export that afterwards")
            raise ItuneError(f"{flag} contradicts --restore, which takes a bundle apart as it is")


def main() -> None:
    """Entry point; with --compare it is another command, with options of its own."""
    if "--compare" in sys.argv[1:]:
        from .compare import compare

        common.run(compare, "itune-export")
    common.run(export, "itune-export")


if __name__ == "__main__":
    main()
