"""itune-datastore: captions that a captioner can retrieve, built, added to, described and searched."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runtime.errors import ItuneError, reading
from . import common

if TYPE_CHECKING:
    from ..progress import OnStage
    from ..retrieval.build import Added
    from ..retrieval.options import CaptionSource

Captions = Annotated[
    Path, typer.Option(help="Captions: Flickr8k/30k token file or its folder, Karpathy JSON, or JSONL.")
]
Images = Annotated[Path | None, typer.Option(help="Folder of the photos, if not beside the captions.")]
Split = Annotated[str, typer.Option(help="Split whose captions are taken: train, dev, test, or all.")]
Cache = Annotated[
    Path | None, typer.Option(help="Feature cache, as of itune-train, to read photos' embeddings from and to fill.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all.")]


class Kind(StrEnum):
    """What is embedded."""

    text = "text"
    image = "image"


class Pooling(StrEnum):
    """What an image's embedding is."""

    mean = "mean"
    projection = "projection"


def build(
    captions: Captions,
    encoder: Annotated[
        str,
        typer.Option(help="Vision tower of the captioner: CLIP (hub id or folder), or the folder of an ONNX tower."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    images: Images = None,
    split: Split = "train",
    kind: Annotated[
        Kind | None,
        typer.Option(
            help="text: captions are embedded, by the text tower of a full CLIP checkpoint. image: photos are, by any "
            "tower, and found with their captions. [default: text where the encoder has a text tower]"
        ),
    ] = None,
    pooling: Annotated[
        Pooling | None,
        typer.Option(help="Of a photo's embedding. [default: CLIP's projection where there is one, else the mean]"),
    ] = None,
    center: Annotated[
        bool | None,
        typer.Option("--center/--no-center", help="Subtract the embeddings' mean. [default: with --kind image]"),
    ] = None,
    cache_features: Cache = None,
    threads: Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a datastore.")] = False,
    _version: common.Version = False,
) -> None:
    """Build a datastore from the captions of a file."""
    source = _source(captions, images, split, cache_features, threads)
    from ..retrieval.build import build_datastore
    from ..retrieval.options import DatastoreOptions

    with reading("itune-datastore build"):
        options = DatastoreOptions(
            kind=kind.value if kind else None, pooling=pooling.value if pooling else None, center=center, force=force
        )
    with _reporting() as progress:
        _report(output, build_datastore(source, encoder, output, options, progress))


def add(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Datastore to add to.")],
    captions: Captions,
    images: Images = None,
    split: Split = "train",
    encoder: Annotated[
        str | None, typer.Option(help="Where its encoder is. [default: where it was when it was built]")
    ] = None,
    cache_features: Cache = None,
    threads: Threads = None,
    _version: common.Version = False,
) -> None:
    """Add the captions of a file, but for photos that are there already; till the end the datastore stays as it is."""
    source = _source(captions, images, split, cache_features, threads)
    from ..retrieval.build import add_to_datastore

    with _reporting() as progress:
        _report(store, add_to_datastore(store, source, encoder=encoder, progress=progress))


def info(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Datastore to describe.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print its manifest.")] = False,
    _version: common.Version = False,
) -> None:
    """Say what a datastore holds, after checking every file's hash."""
    from ..runtime.retrieval.datastore import Datastore

    manifest = Datastore.load(store, verify=True).manifest
    if as_json:
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
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Datastore to search.")],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Files, folders or quoted globs.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Captions of each image.")] = 4,
    encoder: Annotated[
        str | None, typer.Option(help="Where its encoder is. [default: where it was when it was built]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    threads: Threads = None,
    _version: common.Version = False,
) -> int:
    """Print the captions that are found for images, and their scores. Exit status 1 if an image could not be read."""
    _require_torch(threads)
    from ..data.features import LiveFeatures
    from ..retrieval.build import encoder_of
    from ..runtime.retrieval.datastore import Datastore
    from .run import expand

    datastore = Datastore.load(store)
    tower, head = encoder_of(datastore, encoder)
    features = LiveFeatures(tower)
    failures = 0
    for name in expand(images):
        visual, unreadable = features.embed([Path(name)], [False])
        if unreadable:
            failures += 1
            reason = next(iter(unreadable.values()))
            print(json.dumps({"image": name, "error": reason}) if as_json else "", end="\n" if as_json else "")
            if not as_json:
                print(f"itune-datastore: {reason}", file=sys.stderr)
            continue
        (found,) = datastore.search(head.pool(visual).cpu().numpy(), k)
        if as_json:
            retrieved = [{"caption": each.caption, "score": each.score, "image": each.image} for each in found]
            common.emit(json.dumps({"image": name, "retrieved": retrieved}), beside_progress=False)
        else:
            for each in found:
                common.emit(f"{name}\t{each.score:.3f}\t{each.caption}", beside_progress=False)
    return 1 if failures else 0


def _require_torch(threads: int | None) -> None:
    common.require("train", "torch", "transformers", "safetensors")
    if threads:
        import torch

        torch.set_num_threads(threads)


def _source(captions: Path, images: Path | None, split: str, cache: Path | None, threads: int | None) -> CaptionSource:
    _require_torch(threads)
    common.exit_when_asked()
    from ..retrieval.options import CaptionSource

    return CaptionSource(captions=captions, images=images, split=split, cache_features=cache)


@contextmanager
def _reporting() -> Iterator[OnStage]:
    with common.console().status("loading the encoder") as status:
        yield lambda what, done, total: status.update(f"{what}: {done:,} of {total:,}")


def _report(store: Path, added: Added) -> None:
    console, manifest = common.console(), added.manifest
    for reason in added.unreadable.values():
        console.print(f"left out: {reason}", style="yellow", markup=False)
    if added.known:
        console.print(f"{added.known:,} photos were there already", highlight=False)
    console.print(
        f"{store}: {manifest.captions:,} captions of {manifest.images:,} photos, {manifest.entries:,} entries",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


COMMANDS: dict[str, Any] = {"build": build, "add": add, "info": info, "search": search}


def main() -> None:
    """Entry point: the first argument names a command."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        del sys.argv[1]
        common.run(COMMANDS[name], f"itune-datastore {name}")
    common.run(datastore)


def datastore(
    command: Annotated[str | None, typer.Argument(metavar="COMMAND", help=f"{', '.join(COMMANDS)}.")] = None,
    _version: common.Version = False,
) -> None:
    """Captions for retrieval: build a datastore, add to it, describe it (info), search it for images.

    itune-datastore COMMAND --help says what each takes.
    """
    raise ItuneError(f"COMMAND must be one of {', '.join(COMMANDS)}, not {command!r}; see itune-datastore --help")


if __name__ == "__main__":
    main()
