"""Stage 0: the captions of all sources, cleaned: JSON Lines for `itune-train`, plain text for the language model.

The adapters must see exactly the text that the language model was trained on. For scores, give `itune-eval` the
original files, so that the references stay as people wrote them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from recipes.captions import (
    Photos,
    clean,
    cleaned,
    read_flickr8k,
    read_flickr30k,
    read_jsonl,
    write_jsonl,
    write_lines,
)


def main() -> None:
    """Write a JSON Lines file for each set of photos, and `text.txt`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder of flickr8k, coco, imagenet_sample and text")
    parser.add_argument("--output", type=Path, required=True, help="folder in which to write")
    arguments = parser.parse_args()
    data, output = arguments.data.resolve(), arguments.output
    output.mkdir(parents=True, exist_ok=True)

    flickr30k = read_flickr30k(data / "text" / "flickr30k.jsonl")
    # Most of Flickr8k's training photos are in Flickr30k too; about one in ten of them has other captions there.
    flickr8k = {
        photo: captions + flickr30k.get(photo.name.partition("_")[0], [])
        for photo, captions in read_flickr8k(data / "flickr8k", "train").items()
    }
    sets: dict[str, Photos] = {
        "flickr8k-train": cleaned(flickr8k),
        "coco-train": cleaned(read_jsonl(data / "coco" / "train.jsonl") | read_jsonl(data / "coco" / "extra.jsonl")),
        "imagenet-train": cleaned(read_jsonl(data / "imagenet_sample" / "captions.jsonl")),
        "flickr8k-dev": cleaned(read_flickr8k(data / "flickr8k", "dev")),
        "coco-dev": cleaned(read_jsonl(data / "coco" / "dev.jsonl")),
    }
    for name, photos in sets.items():
        write_jsonl(output / f"{name}.jsonl", photos)

    texts = (data / "text" / "coco.txt").read_text(encoding="utf-8").splitlines()
    texts += [caption for captions in flickr30k.values() for caption in captions]
    texts = [text for text in map(clean, texts) if text]
    texts += [text for name in sets if name.endswith("train") for captions in sets[name].values() for text in captions]
    write_lines(output / "text.txt", dict.fromkeys(texts))


if __name__ == "__main__":
    main()
