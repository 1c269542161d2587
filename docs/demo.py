"""Draw the README's picture: the example photos with what the default model says about them.

python docs/demo.py    # writes docs/demo.jpg
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from itune.runtime.image import decode
from PIL import Image, ImageDraw, ImageFont, ImageOps

from itune import Captioner

SIDE, GAP, TEXT = 300, 16, 110  # pixels
WHITE, INK = (255, 255, 255), (30, 30, 30)


def main() -> None:
    """Caption and draw."""
    folder = Path(__file__).parent
    photos = sorted((folder.parent / "examples").glob("*.jpg"))
    captions = Captioner.load().caption(photos)
    canvas = Image.new("RGB", (len(photos) * (SIDE + GAP) + GAP, SIDE + TEXT + GAP), WHITE)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(20)
    for i, (photo, caption) in enumerate(zip(photos, captions, strict=True)):
        left = GAP + i * (SIDE + GAP)
        canvas.paste(ImageOps.fit(decode(photo), (SIDE, SIDE)), (left, GAP))
        text = "\n".join(textwrap.wrap(caption.caption, 30))
        draw.multiline_text((left, GAP + SIDE + 8), text, INK, font, spacing=6)
    canvas.save(folder / "demo.jpg", quality=88, optimize=True)


if __name__ == "__main__":
    main()
