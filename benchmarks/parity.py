"""Compare a bundle's captions with eager PyTorch's, token for token, on real photos.

    python benchmarks/parity.py CHECKPOINT BUNDLE --images FOLDER --limit 200 --num-beams 1 3 5 [--datastore STORE]

Prints, for every number of beams, how many captions are identical, how many are distinct (a model that ignores its
image would agree with anything), and how often exchanging the visual states of two photos exchanges their captions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from itune import Captioner, ItuneError
from itune.loading import load_captioner
from itune.runtime.image import SUFFIXES, decode, preprocess
from itune.runtime.search import SearchConfig
from itune.runtime.search.loop import PADDING, search

BATCH = 4


def captions(captioner: Captioner, photos: Sequence[Path], config: SearchConfig, *, swap: bool) -> list[list[int]]:
    """Token ids of every photo's caption; `swap` exchanges the visual states within each pair of photos."""
    found: list[list[int]] = []
    for start in range(0, len(photos), BATCH):
        pixels = np.stack([preprocess(decode(photo), captioner.image) for photo in photos[start : start + BATCH]])
        state: Any = captioner.engine.encode(pixels)
        prompts, _ = captioner.prompts(state, config)
        if swap:
            order = np.arange(len(pixels)) ^ 1
            order = np.where(order < len(pixels), order, order - 1)
            state.keep(order)
            prompts = [prompts[i] for i in order]
        multiple = 1 if captioner.retriever is None else PADDING
        hypotheses = search(captioner.engine, state, prompts, config, captioner.tokens.end, multiple=multiple)
        found += [list(best[0].tokens) for best in hypotheses]
    return found


def compare(
    checkpoint: Path,
    bundle: Path,
    photos: Sequence[Path],
    beams: Sequence[int],
    new_tokens: int,
    datastore: Path | None = None,
) -> list[Any]:
    """One row per number of beams; prompts contain captions from `datastore`, or none."""
    retrieve = 0 if datastore is None else None
    eager = load_captioner(checkpoint, datastore=datastore, retrieve=retrieve)
    exported = Captioner.load(bundle, datastore=datastore, retrieve=retrieve)
    rows = []
    for num_beams in beams:
        config = SearchConfig(num_beams=num_beams, max_new_tokens=new_tokens)
        same, swapped, texts = 0, 0, set()
        for start in track(range(0, len(photos), BATCH), f"{num_beams} beams", transient=True):
            part = photos[start : start + BATCH]
            expected, found = (captions(c, part, config, swap=False) for c in (eager, exported))
            same += sum(a == b for a, b in zip(expected, found, strict=True))
            pairs = len(part) // 2 * 2
            crossed = captions(exported, part[:pairs], config, swap=True)
            swapped += sum(crossed[i] == found[i ^ 1] for i in range(pairs))
            texts |= {tuple(tokens) for tokens in expected}
        rows.append(
            {
                "num_beams": num_beams,
                "photos": len(photos),
                "identical": same,
                "distinct": len(texts),
                "exchanged": swapped,
                "paired": len(photos) // 2 * 2,
            }
        )
    return rows


def main() -> int:
    """Print a JSON line for every number of beams; exit 1 unless every caption is identical."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=Path, required=True, help="folder of photos, or a list of their paths")
    parser.add_argument("--limit", type=int, default=200, help="photos")
    parser.add_argument("--num-beams", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--new-tokens", type=int, default=24, help="longest caption")
    parser.add_argument("--datastore", type=Path, help="for a model that retrieves; default: none are retrieved")
    arguments = parser.parse_args()
    if arguments.images.is_dir():
        photos = sorted(p for p in arguments.images.iterdir() if p.suffix.lower() in SUFFIXES)
    else:
        photos = [arguments.images.parent / name for name in arguments.images.read_text(encoding="utf-8").split()]
    try:
        rows = compare(
            arguments.checkpoint,
            arguments.bundle,
            photos[: arguments.limit],
            arguments.num_beams,
            arguments.new_tokens,
            arguments.datastore,
        )
    except ItuneError as error:
        print(f"parity: error: {error}", file=sys.stderr)
        return 2
    for row in rows:
        print(json.dumps(row))
    return 0 if all(row["identical"] == row["photos"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
