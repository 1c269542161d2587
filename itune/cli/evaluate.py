"""itune-eval: caption a split with a checkpoint or a bundle, or take captions from a file, and score them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..runtime.errors import ItuneError
from . import common

if TYPE_CHECKING:
    from ..data.records import Record
    from ..runtime import Captioner

_ONLY_CAPTIONS = {"references"}
_ONLY_MODEL = {"model", "data", "images", "limit", "num_beams", "max_new_tokens", "length_penalty", "batch_size"}
_ONLY_MODEL |= {"engine", "threads", "datastore", "retrieve", "output"}


def evaluate(
    context: typer.Context,
    model: Annotated[
        Path | None, typer.Argument(metavar="CHECKPOINT_OR_BUNDLE", help="Adapter checkpoint, bundle, or `default`.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Captions: Flickr8k/30k token file or its folder, Karpathy JSON, COCO or NoCaps annotations, or JSONL."
        ),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the photos, if not beside the captions.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Split to caption: train, dev, test, or all. Default: dev; of --references, all.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many photos.")] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams of the search.")] = 5,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest caption, in tokens.")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="> 0 favours long captions, < 0 short ones.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Photos at once.")] = 8,
    engine: Annotated[
        str, typer.Option(help="Of a bundle: auto, tensorrt, onnxruntime-cuda or onnxruntime (the CPU).")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all.")] = None,
    datastore: Annotated[
        Path | None, typer.Option(help="Folder of itune-datastore to retrieve captions from. Default: the bundle's.")
    ] = None,
    retrieve: Annotated[
        int | None, typer.Option(min=0, help="Captions of similar images in the prompt. Default: the model's.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the captions here, in COCO's results format (which EvalAI takes)."),
    ] = None,
    captions: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RESULTS",
            help="Score these captions, in COCO's results format, instead of a model's; twice: compare two captioners.",
        ),
    ] = None,
    references: Annotated[
        Path | None, typer.Option(help="What --captions are scored against: any file that --data takes.")
    ] = None,
    json_output: Annotated[
        str | None,
        typer.Option("--json", metavar="[FILE]", help="Write the scores here as JSON; without FILE, or -, print them."),
    ] = None,
    per_image: Annotated[Path | None, typer.Option(help="Write each caption's own scores here, as JSON Lines.")] = None,
    no_java: Annotated[bool, typer.Option("--no-java", help="Leave METEOR and SPICE out, which take Java.")] = False,
    _version: common.Version = False,
) -> None:
    """Caption a split, or take --captions, and print CIDEr-D, BLEU, METEOR, ROUGE-L and SPICE with 95 % intervals."""
    wrong = _ONLY_MODEL if captions else _ONLY_CAPTIONS
    for parameter in context.command.params:
        if parameter.name in wrong and context.get_parameter_source(parameter.name).name == "COMMANDLINE":  # type: ignore[union-attr]
            flag = "CHECKPOINT_OR_BUNDLE" if parameter.name == "model" else parameter.opts[0]
            reason = "contradicts --captions, which come from a file" if captions else "is for --captions: give both"
            raise ItuneError(f"{flag} {reason}")
    json_file = None if json_output in (None, "-") else Path(json_output)
    outputs = {"--output": output, "--per-image": per_image, "--json": json_file}
    written = [(option, path) for option, path in outputs.items() if path is not None]
    for option, path in written:
        common.check_writable(option, path)
    common.check_apart(written, _inputs(data, references, captions or []))
    from ..data.formats import read_results
    from ..data.records import load_records
    from .scores import Captioned, report

    wanted = None if split == "all" else split
    failed = 0
    if captions:
        if references is None:
            raise ItuneError("--captions needs --references, the captions to score against")
        if len(captions) > 2:
            raise ItuneError(f"--captions is there {len(captions)} times; two captioners at a time can be compared")
        records = load_records(references, split=wanted, check_images=False)
        found = [Captioned(str(path), read_results(path)) for path in captions]
        what = f"{references.name}{f', {split}' if split else ''}"
    else:
        if model is None or data is None:
            lacking = "CHECKPOINT_OR_BUNDLE" if model is None else "--data"
            raise ItuneError(f"{lacking} is missing: give a model and --data, or --captions and --references")
        common.require("train", "torch", "transformers", "safetensors")
        from ..loading import load_captioner
        from ..retrieval.build import photos_in

        wanted = wanted or (None if split else "dev")
        records = load_records(data, images=images, split=wanted, captioned=False)[:limit]
        scored = any(record.captions for record in records)
        if not scored and (json_output or per_image):
            raise ItuneError(f"{data}: has no captions to score against, which --json and --per-image need")
        if not scored and not output:
            raise ItuneError(
                f"{data}: has no captions to score against; --output FILE writes the file that EvalAI takes"
            )
        options = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "length_penalty": length_penalty}
        if threads:
            import torch

            torch.set_num_threads(threads)
        captioner = load_captioner(model, engine=engine, threads=threads, datastore=datastore, retrieve=retrieve)
        store = None if captioner.retriever is None else captioner.retriever.datastore
        if scored and store and (shown := photos_in(store, records)):
            common.console().print(
                f"{shown} of these {len(records)} photos are in {store.folder} with their own captions, which prompts "
                "may hold: these are not the scores of new photos",
                style="yellow",
                markup=False,
                highlight=False,
            )
        captioned, reasons = _caption(captioner, records, {**options, "batch_size": batch_size})
        failed = len(reasons)
        for reason in reasons:
            common.console().print(f"left out: {reason}", style="yellow", markup=False)
        if not captioned:
            raise ItuneError(f"{data}: no photo of the {wanted or 'whole'} split can be read")
        if output:
            from ..evaluate import write_results

            write_results(captioned, output)
        if not scored:
            _say_unscored(output, len(captioned), failed)
            return
        found = [Captioned(str(model), captioned)]
        what = f"{split or 'dev'}, beam {num_beams}"
    report(found, records, what, failed=failed, java=not no_java, json_output=json_output, per_image=per_image)


def _inputs(data: Path | None, references: Path | None, captions: list[Path]) -> Iterator[tuple[str, Path]]:
    """What is read, and where."""
    from ..data.formats import find_caption_file
    from ..files import holds

    for what, path in (("the captions of --data", data), ("the references", references)):
        if path is not None:
            yield what, find_caption_file(path) if holds(path.is_dir) else path
    yield from (("the captions", path) for path in captions)


def _caption(
    captioner: Captioner, records: list[Record], options: dict[str, object]
) -> tuple[dict[str, str], list[str]]:
    from ..evaluate import caption_records

    if captioner.engine_notice:
        common.console().print(captioner.engine_notice, markup=False, highlight=False)
    with common.progress("photos") as update:
        captions, failed = caption_records(captioner, records, progress=update, **options)
    return captions, list(failed.values())


def _say_unscored(output: Path | None, count: int, failed: int) -> None:
    common.console().print(
        f"{output}: {count} captions; there are no references to score against", markup=False, highlight=False
    )
    if failed:
        common.console().print(
            f"EvalAI wants a caption of every photo: {failed} could not be read", style="yellow", highlight=False
        )


def main() -> None:
    """Entry point; `--json` may stand alone, which no option with a value can."""
    following = [*sys.argv[2:], "--"]
    arguments = []
    for argument, after in zip(sys.argv[1:], following, strict=False):
        alone = argument == "--json" and after != "-" and after.startswith("-")
        arguments += [argument, "-"] if alone else [argument]
    sys.argv[1:] = arguments
    common.run(evaluate, "itune-eval")


if __name__ == "__main__":
    main()
