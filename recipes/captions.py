"""Reads and cleans the captions of every source in the same way, for every stage of a recipe."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

Photos = dict[Path, list[str]]
"""Photo -> its captions."""


def clean(caption: str) -> str:
    """Undo Flickr8k's tokenisation: "A dog , wet , runs ." becomes "a dog, wet, runs".

    Lower case, no quotation marks, no space before punctuation or a clitic ('s, n't), no final period.
    """
    text = " ".join(caption.lower().replace('"', " ").split())
    text = re.sub(r" +(?=[,.;:!?]|'s\b|n't\b)", "", text)
    return text.rstrip(" .,;:")


def cleaned(photos: Photos) -> Photos:
    """The same photos with cleaned captions, each once, without the few that are empty."""
    return {photo: [text for text in dict.fromkeys(map(clean, captions)) if text] for photo, captions in photos.items()}


def read_flickr8k(data: Path, split: str) -> Photos:
    """The photos of an official split, "train" or "dev", in the order of its list."""
    names = (data / f"Flickr_8k.{split}Images.txt").read_text(encoding="utf-8").split()
    captions: dict[str, list[str]] = defaultdict(list)
    for line in (data / "Flickr8k.token.txt").read_text(encoding="utf-8").splitlines():
        key, _, caption = line.partition("\t")
        captions[key.partition("#")[0]].append(caption)
    return {data / "images" / name: captions[name] for name in names}


def read_jsonl(path: Path) -> Photos:
    """The photos of a JSON Lines file of {"image", "captions"}."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {path.parent / row["image"]: row["captions"] for row in rows}


def write_jsonl(path: Path, photos: Photos) -> None:
    """Write {"image", "captions"}, a line for each photo, as `itune-train` reads it."""
    write_lines(path, [json.dumps({"image": str(photo), "captions": own}) for photo, own in photos.items()])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write or replace a text file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    partial.replace(path)
    print(path)


def read_flickr30k(path: Path) -> dict[str, list[str]]:
    """The number of each Flickr30k photo -> its captions; the photos themselves are not needed."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {row["image"].removesuffix(".jpg"): row["captions"] for row in rows}
