"""itune-export: a checkpoint to a bundle that runs without PyTorch, or a bundle back to its parts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ..export.options import ExportOptions, ImportOptions
from ..flags import flag
from ..runtime.errors import ItuneError
from . import common
from .program import BeamSearch, Flags, Options, Program, Switch, chosen

if TYPE_CHECKING:
    from ..export.verify.report import Check


class _Task(Options, title="What to write"):
    output: Annotated[Path, Parameter(name=["--output", "-o"])]
    """Folder to write: bundle, restored parts or checkpoint."""
    restore: Path | None = None
    """BUNDLE, or `default`: write its parts: language model, vision tower, adapters."""
    import_: Path | None = None
    """FILE: write a published checkpoint (the state dict of ClipCap's or SmallCap's code) as one of ours."""
    compare: Switch = False
    """Export in several precisions and measure them; `--compare --help` shows its options."""


def export(
    checkpoint: Annotated[
        Path | None, Parameter(name="CHECKPOINT", help="Adapter checkpoint, or the output of itune-train.")
    ] = None,
    /,
    *,
    task: _Task,
    export: Annotated[Options, Flags(ExportOptions)],
    search: BeamSearch,
    published: Annotated[Options, Flags(ImportOptions)],
) -> None:
    """Export a checkpoint to ONNX graphs or TensorRT plans.

    The graphs are verified against PyTorch. With --restore, write a bundle's parts; with --import, convert a published
    checkpoint.

    Examples:
        itune-export runs/flickr8k --precision int8 -o my-bundle
        itune-export runs/flickr8k --target tensorrt -o my-plans
        itune-export --restore default -o parts

    """
    _check_task(checkpoint, task, chosen(export) | chosen(search), chosen(published))
    options = ExportOptions(**chosen(export))
    common.require("export", "torch", "transformers", "safetensors", "onnx")
    common.exit_when_asked()
    output = task.output
    if task.restore is not None:
        from ..export.restore import restore_bundle

        with common.console().status("restoring"):
            restore_bundle(task.restore, output, force=options.force)
        common.say(f"{output}: language-model, vision and checkpoint")
    elif task.import_ is not None:
        from ..export.imports.checkpoint import import_checkpoint

        with common.console().status("importing"):
            import_checkpoint(task.import_, output, ImportOptions(**chosen(published)), force=options.force)
        common.say(f"{output}: try itune-export {output} -o BUNDLE")
    elif checkpoint is not None:
        _export(checkpoint, output, options, chosen(search))
        size = sum(path.stat().st_size for path in output.iterdir())
        where = ", on a machine with a GPU that the plans are for" if options.target == "tensorrt" else ""
        common.say(f"{output}: {size / 1e6:.1f} MB; try itune-run PHOTO --bundle {output}{where}")


def _check_task(checkpoint: Path | None, task: _Task, export: dict[str, object], published: dict[str, object]) -> None:
    """Raise ItuneError for options that do not belong to the task."""
    others = [] if checkpoint is None else ["CHECKPOINT"]
    others += ["--no-verify" if name == "verify" else flag(name) for name in export if name != "force"]
    if task.import_ is None and published:
        wrong = f"{flag(min(published))} needs --import: it describes a published checkpoint"
    elif task.import_ is not None and task.restore is not None:
        wrong = "--import contradicts --restore: one reads a published checkpoint, the other a bundle"
    elif task.import_ is not None and others:
        wrong = f"{others[0]} contradicts --import, which writes a checkpoint: export that afterwards"
    elif task.restore is not None and others:
        wrong = f"{others[0]} contradicts --restore, which takes a bundle apart as it is"
    elif task.import_ is None and task.restore is None and checkpoint is None:
        wrong = "CHECKPOINT is missing: name an adapter checkpoint, or a bundle with --restore"
    else:
        return
    raise ItuneError(wrong)


def _export(checkpoint: Path, output: Path, options: ExportOptions, search: dict[str, object]) -> None:
    from ..data.records import load_records
    from ..export.bundle import export_bundle
    from ..export.tensorrt.library import layer_table
    from ..export.verify.captions import DEV_PHOTOS
    from ..export.verify.report import report_table

    console = common.console()
    tensorrt = options.target == "tensorrt"
    precision = options.precision or ("fp16" if tensorrt else "fp32")
    title = f"{checkpoint} in PyTorch against ONNX Runtime, {precision}"
    if tensorrt and precision != "fp32":
        title += " (whose products on a CPU may be computed in fp32)"
    dev = []
    if options.dev_data is not None:
        dev = load_records(options.dev_data, images=options.images, split="dev", undivided=True)

    def report(checks: list[Check]) -> None:
        console.print(report_table(checks, title))

    with console.status("starting") as status:
        export_bundle(
            checkpoint,
            output,
            options,
            search=search,
            dev=dev[: options.dev_images or DEV_PHOTOS],
            progress=status.update,
            report=report,
            report_plan=lambda role, layers: console.print(layer_table(role, layers, names=options.layer_names)),
        )


PROGRAM = Program("itune-export", export)


def main() -> None:
    """Entry point; with --compare it is another command, with options of its own."""
    if "--compare" in sys.argv[1:]:
        from .compare import compare

        Program("itune-export", compare).run()
    PROGRAM.run()


if __name__ == "__main__":
    main()
