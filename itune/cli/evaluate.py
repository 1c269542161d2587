"""itune-eval: caption a split with a checkpoint or a bundle, and score it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..runtime.errors import ItuneError
from . import common


def evaluate(
    model: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT_OR_BUNDLE", help="Adapter checkpoint, bundle, or `default`.")
    ],
    data: Annotated[
        Path, typer.Option(help="Captions: Flickr8k/30k token file or its folder, Karpathy JSON, or JSONL.")
    ],
    images: Annotated[Path | None, typer.Option(help="Folder of the photos, if not beside the captions.")] = None,
    split: Annotated[str, typer.Option(help="Split to caption: train, dev, test, or all.")] = "dev",
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
        Path | None, typer.Option("--output", "-o", help="Write the captions here, in COCO's results format.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
    _version: common.Version = False,
) -> None:
    """Caption a split with beam search and print CIDEr-D and BLEU-1..4."""
    common.require("train", "torch", "transformers", "safetensors")
    from ..data import load_records
    from ..evaluate import caption_records, load_captioner, score_captions, write_results

    if threads:
        import torch

        torch.set_num_threads(threads)
    records = load_records(data, images=images, split=None if split == "all" else split)[:limit]
    captioner = load_captioner(model, engine=engine, threads=threads, datastore=datastore, retrieve=retrieve)
    if captioner.engine_notice:
        common.console().print(captioner.engine_notice, markup=False, highlight=False)
    with common.progress("photos") as update:
        captions, failed = caption_records(
            captioner,
            records,
            progress=update,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            length_penalty=length_penalty,
            batch_size=batch_size,
        )
    console = common.console()
    for reason in failed.values():
        console.print(f"left out: {reason}", style="yellow", markup=False)
    if not captions:
        raise ItuneError(f"{data}: no photo of the {split} split can be read")
    if output:
        write_results(captions, output)
    scores = score_captions(captions, records)
    if json_output:
        values = {"cider": scores.cider} | {f"bleu{n}": value for n, value in enumerate(scores.bleu, 1)}
        print(json.dumps(values | {"images": scores.num_images, "failed": len(failed)}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model}, {split}: {scores.num_images} photos, beam {num_beams} (x 100, as papers print)")
    for name in ("CIDEr-D", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"):
        table.add_column(name, justify="right")
    table.add_row(*(f"{100 * value:.2f}" for value in (scores.cider, *scores.bleu)))
    Console().print(table)


def main() -> None:
    """Entry point."""
    common.run(evaluate, "itune-eval")


if __name__ == "__main__":
    main()
