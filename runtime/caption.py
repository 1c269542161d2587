"""What captioning an image gives: the caption, the other candidates, the time; and how a notebook shows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from .errors import ImageError
from .image import decode, jpeg_url

_INLINE = "data:image/jpeg;base64,"


@dataclass(frozen=True)
class Candidate:
    """One of the captions that the search found for an image."""

    caption: str
    score: float


@dataclass(frozen=True)
class Timings:
    """Milliseconds spent on one image; a batch's time is divided evenly over its images."""

    decode_image: float
    encode: float
    search: float


@dataclass(frozen=True)
class Caption:
    """The best caption of an image, and the other candidates. A notebook shows them with the picture."""

    caption: str
    score: float
    """Sum of the tokens' log-probabilities / their number ** length_penalty."""
    tokens: tuple[int, ...]
    """Token ids of `caption`, without the begin, prompt and end tokens."""
    candidates: tuple[Candidate, ...]
    """The captions of all beams, best first, or the samples in the order of drawing; the first is `caption`."""
    ms: Timings
    retrieved: tuple[str, ...] | None = None
    """The datastore's captions in the prompt, the most similar first; None: nothing is retrieved."""
    picture: str | None = field(default=None, repr=False, compare=False)
    """The photo's path, or, if it came without one, what the tower saw of it, as a small JPEG in a data: URL. Never the
    photo itself, so that many captions need little memory."""

    def _repr_html_(self) -> str:
        url = self.picture and (self.picture if self.picture.startswith(_INLINE) else _thumbnail(self.picture))
        image = f'<img src="{escape(url)}" alt=""><br>' if url else ""
        others = "".join(f"<li>{escape(each.caption)} ({each.score:.2f})</li>" for each in self.candidates[1:])
        return f"<div>{image}<b>{escape(self.caption)}</b> ({self.score:.2f})<ul>{others}</ul></div>"


def _thumbnail(path: str) -> str | None:
    """The photo at a path, as a data: URL; None if it is no longer there."""
    try:
        return jpeg_url(decode(Path(path)))
    except ImageError:
        return None
