"""Draw the heatmaps of the documentation: the packaged model's attention while it writes captions of free photos.

python docs/images/heatmaps.py  # writes docs/images/heatmap-*.png

The first caption is the model's own; the others come from `benchmarks/attention_boxes.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from itune import Captioner, draw_heatmap

IMAGES = Path(__file__).parent
BOXES = IMAGES.parents[1] / "benchmarks" / "attention_boxes.json"
OWN, FORCED = "camera", ("coffee", "ascent")
WIDTH, COLOURS = 960, 128  # few colours keep the files small


def main() -> None:
    """Caption and draw."""
    captioner = Captioner.load()
    entries = {Path(entry["photo"]).stem: entry for entry in json.loads(BOXES.read_text(encoding="utf-8"))}
    for name in (OWN, *FORCED):
        caption = None if name == OWN else entries[name]["caption"]
        figure = draw_heatmap(captioner.explain(BOXES.parent / entries[name]["photo"], caption), WIDTH)
        palette = figure.quantize(COLOURS, Image.Quantize.MAXCOVERAGE)  # rare colours, such as the brightest, too
        figure.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(
            IMAGES / f"heatmap-{name}.png", optimize=True
        )


if __name__ == "__main__":
    main()
