"""itune-datastore: Build, extend, describe and search a store of captions.

A captioner retrieves captions of similar images from it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from pydantic import Field

from ..retrieval.options import CaptionSource, DatastoreOptions
from . import common
from .program import Flags, Options, Program, Switch, chosen

if TYPE_CHECKING:
    from ..progress import OnStage
    from ..retrieval.build import Added

Store = Annotated[Path, Parameter(name="STORE", help="Folder of the datastore.")]


Captions = Annotated[Options, Flags(CaptionSource, "Captions")]


class _Build(Options, title="Datastore"):
    encoder: str
    """Vision tower of the captioner: CLIP (hub id or folder), or the folder of an ONNX tower."""
    output: Annotated[Path, Parameter(name=["--output", "-o"])]
    """Folder to write."""


class _Threads(Options, title="Options"):
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads. Default: all."""


class _Encoder(Options, title="Encoder"):
    encoder: str | None = None
    """Hub id or folder of the datastore's encoder. Default: the one recorded when it was built."""


class _Search(_Encoder, title="Search"):
    k: Annotated[int, Field(ge=1), Parameter(name="-k")] = 4
    """Captions of each image."""
    json_: Switch = False
    """One JSON object per line."""


def build(
    *,
    captions: Captions,
    build: _Build,
    options: Annotated[Options, Flags(DatastoreOptions, "Datastore")],
    threads: _Threads,
) -> None:
    """Build a datastore from the captions of a file.

    Examples:
        itune-datastore build --captions Flickr8k.token.txt --encoder openai/clip-vit-base-patch32 -o store
    """
    source, how = CaptionSource(**chosen(captions)), DatastoreOptions(**chosen(options))
    _prepare(threads)
    from ..retrieval.build import build_datastore

    with _reporting() as progress:
        added = build_datastore(source, build.encoder, build.output, how, progress)
    _summarise(build.output, added)


def add(store: Store, /, *, captions: Captions, options: _Encoder, threads: _Threads) -> None:
    """Add a file's captions, except of photos in the datastore already. The datastore changes only at the end.

    Examples:
        itune-datastore add store --captions more.jsonl
    """
    source = CaptionSource(**chosen(captions))
    _prepare(threads)
    from ..retrieval.build import add_to_datastore

    with _reporting() as progress:
        added = add_to_datastore(store, source, encoder=options.encoder, progress=progress)
    _summarise(store, added)


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
    threads: _Threads,
) -> int:
    """Print the captions that are found for images, and their scores. Exit status 1 if an image could not be read.

    Examples:
        itune-datastore search store photo.jpg -k 4
    """
    _prepare(threads)
    from ..data.features import Features
    from ..retrieval.build import encoder_of
    from ..runtime.retrieval.datastore import Datastore
    from .photos import expand

    datastore = Datastore.load(store)
    tower, head = encoder_of(datastore, options.encoder)
    features = Features(tower)
    failures = 0
    for name in expand(images):
        visual, unreadable = features.embed([Path(name)])
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


def _prepare(options: _Threads) -> None:
    """Make PyTorch ready, and let the signals that end a program remove temporary files."""
    common.require("train", "torch", "transformers", "safetensors")
    common.exit_when_asked()
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)


@contextmanager
def _reporting() -> Iterator[OnStage]:
    with common.console().status("loading the encoder") as status:
        yield lambda what, done, total: status.update(f"{what}: {done:,} of {total:,}")


def _summarise(store: Path, added: Added) -> None:
    for reason in added.unreadable.values():
        common.warn(f"left out: {reason}")
    if added.known:
        common.say(f"{added.known:,} photos were there already")
    manifest = added.manifest
    common.say(f"{store}: {manifest.captions:,} captions of {manifest.images:,} photos, {manifest.entries:,} entries")


PROGRAM = Program("itune-datastore", build, add, info, search, help=__doc__.partition(": ")[2])
main = PROGRAM.run

if __name__ == "__main__":
    main()
