"""Stage 0: Flickr8k's captions, cleaned: JSON Lines for `itune-train`, plain text for the language model.

The adapters must see exactly the text that the language model was trained on. For scores, give `itune-eval` the
original files, so that the references stay as people wrote them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from recipes.captions import cleaned, read_flickr8k, write_jsonl, write_lines


def main() -> None:
    """Write `train.jsonl`, `dev.jsonl` and `text.txt`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="Flickr8k's folder")
    parser.add_argument("--output", type=Path, required=True, help="folder in which to write")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    data = arguments.data.resolve()
    train, dev = (cleaned(read_flickr8k(data, split)) for split in ("train", "dev"))
    write_jsonl(arguments.output / "train.jsonl", train)
    write_jsonl(arguments.output / "dev.jsonl", dev)
    write_lines(arguments.output / "text.txt", (text for captions in train.values() for text in captions))


if __name__ == "__main__":
    main()
