"""Draw an explanation with Pillow: the photo, then a heatmap tile for every token, as in Figure 3 of the paper."""

from __future__ import annotations

from math import ceil

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .explanation import Explanation

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_font = ImageFont.load_default
WIDTH = 1280  # of the figure; all lengths are in pixels and scale with it
MARGIN, GAP = 30, 16
MOST_COLUMNS = 6
TITLE, LABEL, SMALL = 32, 22, 15  # text sizes
BAR = (220, 12)  # the colour scale
PAPER, INK, FAINT = (255, 255, 255), (24, 24, 28), (120, 120, 128)
MOST_HEIGHT = 1.5
"""Maximum height of a tile / its width; taller photos become narrower tiles."""
_COLOURS = np.array([(64, 10, 96), (148, 30, 110), (222, 73, 70), (252, 150, 30), (255, 214, 80), (255, 252, 190)])
"""From none to the largest attention; lightness rises steadily, so that it also reads in grey."""
_GAMMA = 0.6
"""Exponent of the colour scale: keeps small attention visible beside the largest."""


def draw_heatmap(explanation: Explanation, width: int = WIDTH) -> Image.Image:
    """A figure `width` pixels wide: the photo as the tower saw it, then a tile for every token.

    All tiles share one colour scale. It ends at the largest attention of a token to a patch, as a multiple of uniform
    attention, 1 / N. The tiles interpolate between patches.
    """
    scale = width / WIDTH
    margin, gap, title, label, small = (max(1, round(v * scale)) for v in (MARGIN, GAP, TITLE, LABEL, SMALL))
    count = 1 + len(explanation.tokens)
    columns = max(ceil(count / ceil(count / MOST_COLUMNS)), 3)
    column = (width - 2 * margin - (columns - 1) * gap) // columns
    view = _view(explanation, column, round(MOST_HEIGHT * column))
    rows = ceil(count / columns)
    pitch = view.height + round(2.2 * label)
    lines = _wrap(explanation.caption or "(no caption)", title, width - 2 * margin)
    top = margin + round(1.35 * title) * len(lines) + round(0.5 * title)
    canvas = Image.new("RGB", (width, top + rows * pitch + round(2.2 * small) + margin), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        draw.text((margin, margin + i * round(1.35 * title)), line, INK, _font(title))

    most = _largest(explanation) or 1.0
    tiles = [view, *(_overlay(view, heat / most) for heat in explanation.patches)]
    for i, (tile, word) in enumerate(zip(tiles, ("photo", *_labels(explanation)), strict=True)):
        row, place = divmod(i, columns)
        x, y = margin + place * (column + gap), top + row * pitch
        canvas.paste(tile, (x + (column - tile.width) // 2, y))
        position, font = (x + column / 2, y + view.height + round(0.95 * label)), _font(label if i else small)
        draw.text(position, _fit(word, font, column), INK if i else FAINT, font, "mm")
    _legend(canvas, explanation, (margin, top + rows * pitch + round(1.1 * small)), scale)
    return canvas


def _largest(explanation: Explanation) -> float:
    """The largest attention of a token to a patch."""
    return float(explanation.patches.max(initial=0))


def _labels(explanation: Explanation) -> list[str]:
    """The tokens, with a hyphen before one that continues the word of the token before."""
    labels, end = [], 0
    for token in explanation.tokens:
        start = explanation.caption.find(token, end)
        joined = token[:1].isalnum() and start == end > 0
        labels.append(f"-{token}" if joined else token)
        end = start + len(token) if start >= 0 else end
    return labels


def _view(explanation: Explanation, column: int, most_height: int) -> Image.Image:
    """The part of the photo that the tower saw, with the photo's aspect ratio, scaled to a tile."""
    left, top, right, bottom = (round(edge) for edge in explanation.box)
    seen = explanation.photo.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    shrink = min(column / seen.width, most_height / seen.height)
    width, height = (max(1, round(side * shrink)) for side in seen.size)
    return seen.resize((width, height), Image.Resampling.LANCZOS)


def _overlay(view: Image.Image, heat: NDArray[np.float32]) -> Image.Image:
    """A dim grey view, coloured by `heat` [rows, columns] in 0..1."""
    smooth = Image.fromarray(np.ascontiguousarray(heat, np.float32)).resize(view.size, Image.Resampling.BICUBIC)
    strength = np.clip(np.asarray(smooth), 0, 1)[..., None] ** _GAMMA
    grey = np.asarray(view.convert("L"), np.float32)[..., None]
    dim = 0.52 * (0.15 * np.asarray(view, np.float32) + 0.85 * grey) + 14
    glow = _colour(strength[..., 0]) * (0.66 + 0.34 * grey / 255)  # the view shows through
    weight = np.clip(1.15 * strength - 0.06, 0, 0.92)
    return Image.fromarray(np.clip(dim * (1 - weight) + glow * weight, 0, 255).astype(np.uint8))


def _colour(strength: NDArray[np.float32]) -> NDArray[np.float32]:
    """Colours [..., 3] of strengths in 0..1."""
    stops = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(strength, stops, channel) for channel in _COLOURS.T], axis=-1)


def _legend(canvas: Image.Image, explanation: Explanation, corner: tuple[int, int], scale: float) -> None:
    """The colour scale, and a text that says what it shows."""
    draw, (x, y) = ImageDraw.Draw(canvas), corner
    width, height = round(BAR[0] * scale), round(BAR[1] * scale)
    font = _font(round(SMALL * scale))
    strength = np.linspace(0, 1, width, dtype=np.float32)[None].repeat(height, 0) ** _GAMMA
    canvas.paste(Image.fromarray(_colour(strength).astype(np.uint8)), (x, y))
    tokens = explanation.attention.shape[1]
    middle, text = y + height / 2, f"0 to {_largest(explanation) * tokens:.1f} times uniform attention"
    draw.text((x + width + 10 * scale, middle), text, FAINT, font, "lm")
    layers = explanation.layers
    which = f"layer {layers[0]}" if len(layers) == 1 else f"mean of {len(layers)} layers"
    heads = f", mean of {explanation.heads} heads" if explanation.heads > 1 else ""
    rows, columns = explanation.grid
    text = f"{which}{heads}, {rows} x {columns} patches"
    if tokens > rows * columns and len(explanation.cls_share):
        text += f", {100 * float(explanation.cls_share.mean()):.0f} % on no patch (CLS)"
    draw.text((canvas.width - x, middle), text, FAINT, font, "rm")


def _fit(word: str, font: Font, width: int) -> str:
    """A word, shortened to `width`."""
    shown = word
    while len(shown) > 2 and font.getlength(shown) > width:
        shown = f"{shown[:-2]}…"
    return shown


def _wrap(text: str, size: int, width: int) -> list[str]:
    """Break a text into lines of at most `width`."""
    font, lines = _font(size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [_fit(line, font, width) for line in lines]
