"""itune-datastore: Build, extend, describe and search a datastore of captions that a captioner can retrieve."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from pydantic import Field

from . import common, program
from .program import Options, Switch

if TYPE_CHECKING:
    from ..retrieval.build import Report, Source
    from ..runtime.retrieval.datastore import DatastoreManifest

Store = Annotated[Path, Parameter(name="STORE", help="Folder of the datastore.")]


class _Captions(Options, title="Captions"):
    captions: Path
    """Captions: Flickr8k/30k token file or its folder, Karpathy JSON, or JSONL."""
    images: Path | None = None
    """Folder of the photos. Default: beside the captions."""
    split: str = "train"
    """Split whose captions are taken: train, dev, test, or all."""
    cache_features: Path | None = None
    """Feature cache, as of itune-train, to read photos' embeddings from and to add to."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads. Default: all."""


class _Build(Options, title="Datastore"):
    encoder: str
    """Vision tower of the captioner: CLIP (hub id or folder), or the folder of an ONNX tower."""
    output: Annotated[Path, Parameter(name=["--output", "-o"])]
    """Folder to write."""
    kind: Literal["text", "image"] | None = None
    """text: embed captions with the text tower of a full CLIP checkpoint. image: embed photos with any tower, and find
    their captions. Default: text if the encoder has a text tower."""
    pooling: Literal["mean", "projection"] | None = None
    """Embedding of a photo. Default: CLIP's projection if there is one, else the mean."""
    center: Annotated[bool | None, Parameter(negative="--no-center")] = None
    """Subtract the embeddings' mean. Default: with `--kind image`."""
    force: Switch = False
    """Replace a datastore."""


class _Encoder(Options, title="Encoder"):
    encoder: str | None = None
    """Where its encoder is. Default: where it was when the datastore was built."""


class _Search(_Encoder, title="Search"):
    k: Annotated[int, Field(ge=1), Parameter(name="-k")] = 4
    """Captions of each image."""
    json_: Switch = False
    """One JSON object per line."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads. Default: all."""


def build(*, captions: _Captions, options: _Build) -> None:
    """Build a datastore from the captions of a file.

    Examples:
        itune-datastore build --captions Flickr8k.token.txt --encoder openai/clip-vit-base-patch32 -o store
    """
    from ..retrieval.build import build_datastore

    source = _source(captions)
    with _reporting() as report:
        manifest = build_datastore(
            source,
            options.encoder,
            options.output,
            kind=options.kind,
            pooling=options.pooling,
            center=options.center,
            force=options.force,
            report=report,
        )
    _summarise(options.output, manifest, source)


def add(store: Store, /, *, captions: _Captions, options: _Encoder) -> None:
    """Add the captions of a file, except of photos that are there already; the datastore changes only at the end.

    Examples:
        itune-datastore add store --captions more.jsonl
    """
    from ..retrieval.build import add_to_datastore

    source = _source(captions)
    with _reporting() as report:
        manifest = add_to_datastore(store, source, encoder=options.encoder, report=report)
    _summarise(store, manifest, source)


def info(store: Store, /, *, json_: Switch = False) -> None:
    """Describe a datastore, after checking every file's hash; --json prints its manifest.

    Examples:
        itune-datastore info store
    """
    from ..runtime.retrieval.datastore import Datastore

    manifest = Datastore.load(store, verify=True).manifest
    if json_:
        print(manifest.to_json(), end="")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(str(store)), show_header=False)
    size = sum(file.bytes for file in manifest.files.values())
    rows = {
        "found by": "captions (image to text)" if manifest.kind == "text" else "photos (image to image)",
        "encoder": str(manifest.encoder),
        "captions": f"{manifest.captions:,} of {manifest.images:,} photos",
        "entries": f"{manifest.entries:,}, {'exact search' if manifest.index == 'flat' else 'faiss, inverted lists'}",
        "mean": "subtracted" if manifest.centered else "not subtracted",
        "size": f"{size / 1e6:,.1f} MB",
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    for source in manifest.sources:
        file, split, captions, sha256 = (str(source.get(key, "?")) for key in ("file", "split", "captions", "sha256"))
        table.add_row("from", Text(f"{file} ({split}): {captions} captions, {sha256[:12]}"))
    Console().print(table)


def search(
    store: Store,
    images: Annotated[
        list[str], Parameter(name="IMAGE", help="Files, folders or quoted globs.", allow_leading_hyphen=False)
    ],
    /,
    *,
    options: _Search,
) -> int:
    """Print the captions that are found for images, and their scores. Exit status 1 if an image could not be read.

    Examples:
        itune-datastore search store photo.jpg -k 4
    """
    _require_torch(options.threads)
    from ..data.features import LiveFeatures
    from ..retrieval.build import encoder_of
    from ..runtime.retrieval.datastore import Datastore
    from .run import expand

    datastore = Datastore.load(store)
    tower, head = encoder_of(datastore, options.encoder)
    features = LiveFeatures(tower)
    failures = 0
    for name in expand(images):
        visual, unreadable = features.embed([Path(name)], [False])
        for reason in unreadable.values():
            failures += 1
            if options.json_:
                common.emit(json.dumps({"image": name, "error": reason}))
            else:
                print(f"itune-datastore: {reason}", file=sys.stderr)
        if unreadable:
            continue
        (found,) = datastore.search(head.pool(visual).cpu().numpy(), options.k)
        if options.json_:
            retrieved = [{"caption": each.caption, "score": each.score, "image": each.image} for each in found]
            common.emit(json.dumps({"image": name, "retrieved": retrieved}))
        else:
            for each in found:
                common.emit(f"{name}\t{each.score:.3f}\t{each.caption}")
    return 1 if failures else 0


def _require_torch(threads: int | None) -> None:
    common.require("train", "torch", "transformers", "safetensors")
    if threads:
        import torch

        torch.set_num_threads(threads)


def _source(options: _Captions) -> Source:
    _require_torch(options.threads)
    common.exit_when_asked()
    from ..retrieval.build import Source

    split = None if options.split == "all" else options.split
    return Source(options.captions, options.images, split, options.cache_features)


@contextmanager
def _reporting() -> Iterator[Report]:
    with common.console().status("loading the encoder") as status:
        yield lambda what, done, total: status.update(f"{what}: {done:,} of {total:,}")


def _summarise(store: Path, manifest: DatastoreManifest, source: Source) -> None:
    for reason in source.unreadable.values():
        common.warn(f"left out: {reason}")
    if source.known:
        common.say(f"{source.known:,} photos were there already")
    common.say(f"{store}: {manifest.captions:,} captions of {manifest.images:,} photos, {manifest.entries:,} entries")


def main() -> None:
    """Entry point."""
    program.run("itune-datastore", build, add, info, search, help=__doc__.partition(": ")[2])


if __name__ == "__main__":
    main()
