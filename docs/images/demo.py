"""Draw the README's picture: an example photo and the packaged model's captions.

python docs/images/demo.py  # writes docs/images/demo.png
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from itune import Captioner
from itune.runtime.image import decode

SIDE, GAP, WIDTH = 260, 20, 900  # pixels
WHITE, INK, FAINT = (255, 255, 255), (30, 30, 30), (120, 120, 120)


def main() -> None:
    """Caption and draw."""
    folder = Path(__file__).parent
    photo = folder.parents[1] / "examples" / "camera.jpg"
    result = Captioner.load().caption(photo)
    canvas = Image.new("RGB", (WIDTH, SIDE + 2 * GAP), WHITE)
    canvas.paste(decode(photo).resize((SIDE, SIDE)), (GAP, GAP))
    draw = ImageDraw.Draw(canvas)
    left, top = SIDE + 2 * GAP, GAP
    draw.text((left, top), "$ itune-run examples/camera.jpg", FAINT, ImageFont.load_default(18))
    draw.text((left, top + 34), result.caption, INK, ImageFont.load_default(28))
    draw.text((left, top + 92), "its five candidates and their scores", FAINT, ImageFont.load_default(16))
    for i, candidate in enumerate(result.candidates):
        line = f"{candidate.score:.2f}   {candidate.caption}"
        draw.text((left, top + 120 + 28 * i), line, INK, ImageFont.load_default(18))
    canvas.save(folder / "demo.png", optimize=True)


if __name__ == "__main__":
    main()
