"""Stage 0: Flickr8k's captions, cleaned, as JSON lines {"image", "captions"} for `itune-train`.

The adapters must see exactly the text that the language model was trained on. For scores, give `itune-eval` the
original files, so that the references stay as people wrote them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from captions import SPLIT_FILES, clean, read_split


def main() -> None:
    """Write `train.jsonl` and `dev.jsonl`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="Flickr8k's folder")
    parser.add_argument("--output", type=Path, required=True, help="folder in which to write train.jsonl and dev.jsonl")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for split in SPLIT_FILES:
        lines = []
        for photo, captions in read_split(arguments.data.resolve(), split).items():
            texts = [text for text in map(clean, captions) if text]
            lines.append(json.dumps({"image": str(photo), "captions": texts}))
        partial = arguments.output / f"{split}.jsonl.partial"
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        partial.replace(arguments.output / f"{split}.jsonl")
        print(f"{arguments.output / split}.jsonl: {len(lines)} photos")


if __name__ == "__main__":
    main()
