"""Reads Flickr8k's captions, and cleans them in the same way for every stage of the recipe."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

IMAGE_FOLDER = "images"
TOKEN_FILE = "Flickr8k.token.txt"
SPLIT_FILES = {"train": "Flickr_8k.trainImages.txt", "dev": "Flickr_8k.devImages.txt"}


def clean(caption: str) -> str:
    """Undo Flickr8k's tokenisation: "A dog , wet , runs ." becomes "a dog, wet, runs".

    Lower case, no quotation marks, no space before punctuation or a clitic ('s, n't), no final period.
    """
    text = " ".join(caption.lower().replace('"', " ").split())
    text = re.sub(r" +(?=[,.;:!?]|'s\b|n't\b)", "", text)
    return text.rstrip(" .,;:")


def read_split(data: Path, split: str) -> dict[Path, list[str]]:
    """Photo -> its original captions, in the order of the split's list."""
    names = (data / SPLIT_FILES[split]).read_text(encoding="utf-8").split()
    captions: dict[str, list[str]] = defaultdict(list)
    for line in (data / TOKEN_FILE).read_text(encoding="utf-8").splitlines():
        key, _, caption = line.partition("\t")
        captions[key.partition("#")[0]].append(caption)
    return {data / IMAGE_FOLDER / name: captions[name] for name in names}


def clean_captions(data: Path, split: str) -> list[str]:
    """All cleaned captions of a split, without the few that are empty."""
    texts = (clean(caption) for captions in read_split(data, split).values() for caption in captions)
    return [text for text in texts if text]
