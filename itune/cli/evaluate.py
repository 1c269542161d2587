"""itune-eval: caption a split with a checkpoint or a bundle, or take captions from a file, and score them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from pydantic import Field

from ..flags import flag
from ..runtime.errors import ItuneError
from . import common
from .program import BeamSearch, Options, Program, Switch, chosen

if TYPE_CHECKING:
    from ..data.records import Record
    from .scores import Captioned

Count = Annotated[int, Field(ge=1)]


class _Data(Options, title="Data"):
    data: Path | None = None
    """Captions: CSV, JSONL, Flickr token file, Karpathy, COCO or NoCaps JSON, or a folder with one of these."""
    images: Path | None = None
    """Folder of the photos. Default: beside the captions."""
    skip_missing: Switch = False
    """Leave out photos that do not exist."""
    limit: Count | None = None
    """Use only the first N photos."""


class _Model(Options, title="Model"):
    batch_size: Count = 8
    """Photos at once."""
    engine: str = "auto"
    """Of a bundle: auto, tensorrt, onnxruntime-cuda or onnxruntime (the CPU)."""
    threads: Count | None = None
    """CPU threads. Default: all."""
    datastore: Path | None = None
    """Folder of itune-datastore to retrieve captions from. Default: the bundle's."""
    retrieve: Annotated[int, Field(ge=0)] | None = None
    """Captions of similar images in the prompt. Default: the model's."""
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None
    """Write the captions to this file in COCO's results format, which EvalAI takes."""


class _File(Options, title="Captions from a file"):
    captions: Annotated[tuple[Path, ...], Parameter(show_default=False)] = ()
    """Score these captions, in COCO's results format; give it twice to compare two captioners."""
    references: Path | None = None
    """What to score `--captions` against: any file that `--data` takes."""


class _Scores(Options, title="Scores"):
    """What is scored, and where the scores go."""

    split: str | None = None
    """Split to caption: train, dev, test, or all. Default: dev; with `--captions`, all of `--references`."""
    json_: Annotated[bool | str, Parameter(allow_leading_hyphen=False, show_default=False)] = False
    """Write the scores to this file as JSON; without a file, or with -, print them."""
    per_image: Path | None = None
    """Write each caption's own scores to this file, as JSON Lines."""
    no_java: Switch = False
    """Leave out METEOR and SPICE, which need Java."""

    @property
    def json_file(self) -> Path | None:
        """The file of `--json`; None prints the scores, or writes none."""
        return None if isinstance(self.json_, bool) or self.json_ == "-" else Path(self.json_)


def evaluate(
    model: Annotated[
        Path | None, Parameter(name="CHECKPOINT_OR_BUNDLE", help="Adapter checkpoint, bundle, or `default`.")
    ] = None,
    /,
    *,
    data: _Data,
    options: _Model,
    search: BeamSearch,
    file: _File,
    scores: _Scores,
) -> None:
    """Score captions: CIDEr-D, BLEU, METEOR, ROUGE-L and SPICE.

    Captions a split, or takes --captions, and prints the scores with 95 % intervals.

    Examples:
        itune-eval runs/flickr8k --data Flickr8k.token.txt --split test
        itune-eval my-bundle --data dataset_coco.json --split test --json scores.json
        itune-eval --captions ours.json --captions theirs.json --references captions_val2014.json

    """
    _check_source(model, (data, options, search), file)
    outputs = {"--output": options.output, "--per-image": scores.per_image, "--json": scores.json_file}
    written = [(option, path) for option, path in outputs.items() if path is not None]
    for option, path in written:
        common.check_writable(option, path)
    common.check_apart(written, _inputs(data.data, file))
    from ..data.formats import read_results
    from ..data.records import load_records
    from .scores import Captioned, report

    failed = 0
    if file.captions:
        assert file.references is not None
        split = None if scores.split == "all" else scores.split
        records = load_records(file.references, split=split, check_images=False, captioned=False)
        found = [Captioned(str(path), read_results(path)) for path in file.captions]
        what = f"{file.references.name}{f', {scores.split}' if scores.split else ''}"
    else:
        assert data.data is not None
        common.require("train", "torch", "transformers", "safetensors")
        split = None if scores.split == "all" else scores.split or "dev"
        records = load_records(
            data.data, images=data.images, split=split, captioned=False, skip_missing=data.skip_missing
        )[: data.limit]
        scored = any(record.references for record in records)
        if not scored and (scores.json_ or scores.per_image or not options.output):
            raise ItuneError(
                f"{data.data}: has no captions to score against: only --output FILE, for EvalAI, can be written"
            )
        found, failed, beams = _captioned(str(model), records, options, chosen(search))
        if not found[0].captions:
            raise ItuneError(f"{data.data}: no photo of the {split or 'whole'} split can be read")
        if options.output:
            from ..evaluate import write_results

            write_results(dict(found[0].captions), options.output)
        if not scored:
            common.say(f"{options.output}: {len(found[0].captions)} captions; no references to score against")
            if failed:
                common.warn(f"EvalAI needs a caption of every photo, but {failed} could not be read")
            return
        what = f"{scores.split or 'dev'}, beam {beams}"
    json_file = str(scores.json_file or "-") if scores.json_ else None
    report(
        found, records, what, failed=failed, java=not scores.no_java, json_file=json_file, per_image=scores.per_image
    )


def _check_source(model: Path | None, model_options: tuple[Options, ...], file: _File) -> None:
    """Raise ItuneError unless the captions come from either a model or files, with the options of that."""
    of_model = [] if model is None else ["CHECKPOINT_OR_BUNDLE"]
    of_model += [flag(name) for options in model_options for name in sorted(options.model_fields_set)]
    if file.captions:
        wrong = f"{of_model[0]} contradicts --captions, which come from a file" if of_model else None
        if file.references is None:
            wrong = "--captions needs --references, the captions to score against"
        elif len(file.captions) > 2:
            wrong = f"--captions appears {len(file.captions)} times, but at most two captioners can be compared"
    else:
        missing = "CHECKPOINT_OR_BUNDLE" if model is None else None if "--data" in of_model else "--data"
        wrong = f"{missing} is missing: give a model and --data, or --captions and --references" if missing else None
        if file.references is not None:
            wrong = "--references needs --captions"
    if wrong:
        raise ItuneError(wrong)


def _inputs(data: Path | None, file: _File) -> Iterator[tuple[str, Path]]:
    """The files that are read, with a description."""
    from ..data.formats import find_caption_file

    for what, path in (("the captions of --data", data), ("the file of --references", file.references)):
        if path is not None:
            yield what, find_caption_file(path)
    yield from (("a file of --captions", path) for path in file.captions)


def _captioned(
    model: str, records: list[Record], options: _Model, search: dict[str, object]
) -> tuple[list[Captioned], int, object]:
    """The model's captions, how many photos could not be read, and the number of beams."""
    from ..evaluate import caption_records
    from ..loading import load_captioner
    from ..retrieval.build import photos_in
    from .scores import Captioned

    threads = options.threads
    if threads:
        import torch

        torch.set_num_threads(threads)
    captioner = load_captioner(
        Path(model), engine=options.engine, threads=threads, datastore=options.datastore, retrieve=options.retrieve
    )
    store = None if captioner.retriever is None else captioner.retriever.datastore
    captioned = any(record.references for record in records)
    if captioned and store and (shown := photos_in(store, records)):
        common.warn(
            f"{shown} of these {len(records)} photos are in {store.folder} with their own captions, which the prompts "
            "may contain: these are not the scores of new photos"
        )
    if captioner.engine_notice:
        common.say(captioner.engine_notice)
    with common.progress("photos") as update:
        captions, failed = caption_records(captioner, records, progress=update, batch_size=options.batch_size, **search)
    for reason in failed.values():
        common.warn(f"left out: {reason}")
    return [Captioned(model, captions)], len(failed), search.get("num_beams", captioner.search.num_beams)


PROGRAM = Program("itune-eval", evaluate)
main = PROGRAM.run

if __name__ == "__main__":
    main()
