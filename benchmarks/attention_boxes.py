"""Do the adapters look at what a word names? Attention inside hand-marked boxes, on ten free photos.

    python benchmarks/attention_boxes.py [--bundle BUNDLE] [--layer last] [--json FILE]

`attention_boxes.json` has a hand-written caption of each photo, and boxes (left, top, right, bottom, as fractions of
the photo) around the things that its nouns name. The model is forced to write that caption. The score is a noun's
attention to the patches inside its box (patches on the edge count by area), compared with the box's share of the area,
which uniform attention would give. Three controls:

    other words          of the same caption, on the same photo
    other photos' nouns  the captions of the other photos, written on this photo
    other photos' maps   the nouns' attention on their own photos, laid over this box: a bias towards the centre

Intervals are 95 % bootstrap intervals over photos, as the nouns of one photo are not independent.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from itune import Captioner, Explanation, ItuneError

BOXES = Path(__file__).with_name("attention_boxes.json")
SAMPLES = 10_000
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Noun:
    """A noun of a photo's caption, and shares of attention in its box, each in 0..1."""

    photo: str
    noun: str
    area: float
    inside: float
    other_words: float
    other_nouns: float
    other_maps: float


def box_weights(box: list[float], explanation: Explanation) -> Array:
    """The fraction of every patch [rows, columns] that lies in a box, whose edges are fractions of the photo."""
    left, top, right, bottom = explanation.box
    width, height = explanation.photo.size

    def overlap(low: float, high: float, cells: int) -> Array:
        edges = np.arange(cells)
        return np.clip(np.minimum(edges + 1, high * cells) - np.maximum(edges, low * cells), 0, 1)

    x = [(edge * width - left) / (right - left) for edge in (box[0], box[2])]
    y = [(edge * height - top) / (bottom - top) for edge in (box[1], box[3])]
    rows, columns = explanation.grid
    return np.outer(overlap(y[0], y[1], rows), overlap(x[0], x[1], columns))


def word_tokens(explanation: Explanation, word: str) -> list[int]:
    """The tokens that spell a word of the caption."""
    for start in range(len(explanation.tokens)):
        for end in range(start + 1, len(explanation.tokens) + 1):
            if "".join(explanation.tokens[start:end]) == word:
                return list(range(start, end))
    raise ItuneError(f"{BOXES}: {word!r} does not occur in the caption {explanation.caption!r}")


def noun_map(explanation: Explanation, word: str) -> Array:
    """A word's attention to the patches [rows, columns], averaged over its tokens and without CLS; sums to 1."""
    attention = explanation.patches[word_tokens(explanation, word)].mean(axis=0).astype(np.float64)
    return attention / attention.sum()


def measure(captioner: Captioner, layer: str, entries: list[dict[str, Any]]) -> list[Noun]:
    """The shares of every noun of `entries`, the content of `attention_boxes.json`."""
    # explained[i][j]: the caption of photo j, written on photo i
    explained = [
        [captioner.explain(BOXES.parent / on["photo"], of["caption"], layer=layer) for of in entries] for on in entries
    ]
    nouns = []
    for i, entry in enumerate(entries):
        own = explained[i][i]
        others = [(j, noun) for j, other in enumerate(entries) if j != i for noun in other["nouns"]]
        spelled = {token for noun in entry["nouns"] for token in word_tokens(own, noun)}
        rest = [token for token in range(len(own.tokens)) if token not in spelled]
        other_words = own.patches[rest].astype(np.float64)
        other_words = (other_words / other_words.sum(axis=(1, 2), keepdims=True)).mean(axis=0)
        for noun, box in entry["nouns"].items():
            weights = box_weights(box, own)
            nouns.append(
                Noun(
                    photo=Path(entry["photo"]).stem,
                    noun=noun,
                    area=float(weights.mean()),
                    inside=float((noun_map(own, noun) * weights).sum()),
                    other_words=float((other_words * weights).sum()),
                    other_nouns=float(np.mean([(noun_map(explained[i][j], n) * weights).sum() for j, n in others])),
                    other_maps=float(np.mean([(noun_map(explained[j][j], n) * weights).sum() for j, n in others])),
                )
            )
    return nouns


def interval(differences: Array, photos: list[str]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over nouns; photos are resampled."""
    names = sorted(set(photos))
    groups = [differences[[photo == name for photo in photos]] for name in names]
    sums, counts = np.array([group.sum() for group in groups]), np.array([len(group) for group in groups])
    drawn = np.random.default_rng(0).integers(0, len(names), (SAMPLES, len(names)))
    low, high = np.quantile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), [0.025, 0.975])
    return float(low), float(high)


def summarise(nouns: list[Noun]) -> dict[str, Any]:
    """Means over the nouns, and by how much their attention exceeds each control, with its interval."""
    columns = {name: np.array([getattr(noun, name) for noun in nouns]) for name in asdict(nouns[0])}
    photos = [noun.photo for noun in nouns]
    summary: dict[str, Any] = {"nouns": len(nouns), "photos": len(set(photos)), "inside": columns["inside"].mean()}
    for name in ("area", "other_words", "other_nouns", "other_maps"):
        above = columns["inside"] - columns[name]
        summary[name] = {"mean": columns[name].mean(), "above": above.mean(), "interval": interval(above, photos)}
    return summary


def show(nouns: list[Noun], summary: dict[str, Any], layer: str) -> None:
    """Print a table of the nouns and the summary."""
    console = Console()
    fields = ("area", "inside", "other_words", "other_nouns", "other_maps")
    table = Table(
        *("photo", "noun", *(field.replace("_", " ") for field in fields)), title=f"% in the box, layer {layer}"
    )
    for noun in nouns:
        table.add_row(noun.photo, noun.noun, *(f"{100 * getattr(noun, field):.1f}" for field in fields))
    console.print(table)
    print(f"{summary['nouns']} nouns on {summary['photos']} photos: {100 * summary['inside']:.1f} % inside the box")
    for name, what in (
        ("area", "the box's share of the area"),
        ("other_words", "other words of the caption"),
        ("other_nouns", "other photos' nouns on this photo"),
        ("other_maps", "other photos' maps"),
    ):
        each = summary[name]
        low, high = each["interval"]
        difference = f"{100 * each['above']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        print(f"  {what}: {100 * each['mean']:.1f} %, difference {difference}")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bundle", type=Path, help="default: the packaged model")
    parser.add_argument("--layer", default="last", help="last, mean or a decoder layer")
    parser.add_argument("--json", type=Path, help="also write every noun's shares here")
    arguments = parser.parse_args()
    try:
        entries = json.loads(BOXES.read_text(encoding="utf-8"))
        nouns = measure(Captioner.load(arguments.bundle), arguments.layer, entries)
    except ItuneError as error:
        print(f"attention_boxes: error: {error}", file=sys.stderr)
        return 2
    summary = summarise(nouns)
    show(nouns, summary, arguments.layer)
    if arguments.json:
        result = {"layer": arguments.layer, "summary": summary, "nouns": [asdict(noun) for noun in nouns]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
