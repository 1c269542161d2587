"""Photos to pixels: decode any image file safely, then resize it as the vision tower expects.

Resizing and cropping match transformers' `CLIPImageProcessor` (Pillow backend) exactly.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from .errors import ImageError, reading
from .settings import ImageSettings

Source: TypeAlias = str | Path | bytes | Image.Image | NDArray[Any]
"""An image: a path, the bytes of an encoded file, a Pillow image, or an array (see `decode`)."""

MAX_PIXELS = 89_478_485
"""Pillow's limit for decompression bombs, at which it only warns; decoded, this is 360 MB."""
MAX_ASPECT = 500
"""Longest side / shortest side: a thinner strip, resized by its short edge, would fill the memory."""
_LARGE = 25_000_000
_ONE_LARGE = threading.Lock()
"""Held while an image of more than _LARGE pixels is decoded, so that threads do not multiply its memory."""

# Not every format that Pillow knows: opening an EPS file would start Ghostscript on it.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", "ICO", "AVIF")
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".webp"}
    | {".tif", ".tiff", ".jp2", ".ico", ".avif"}
)
"""Suffixes of the image files in a folder; a file that the user names may have any suffix."""
_ORIENTATION_TAG = 0x0112
_ORIENTATIONS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(source: Source) -> Image.Image:
    """Decode an image to 8-bit RGB: upright (EXIF), first frame, transparency on white.

    Arrays are uint8, or float in 0..1, of shape [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (alpha last).

    Raises:
        ImageError: not an image, damaged or too large; one sentence that names the file.
    """
    name = str(source) if isinstance(source, str | Path) else str(getattr(source, "filename", "")) or "the image"
    # Bombs are refused in _finish, and broken metadata does no harm.
    with reading(name, ImageError), _no_warnings():
        if isinstance(source, Image.Image):
            return _finish(source)
        if isinstance(source, np.ndarray):
            return _finish(_from_array(source))
        Image.preinit()  # else Pillow imports all its formats to try the first of _FORMATS
        try:
            with io.BytesIO(source) if isinstance(source, bytes | bytearray) else Path(source).open("rb") as file:
                return _finish(Image.open(file, formats=_FORMATS))
        except (UnidentifiedImageError, IsADirectoryError) as error:
            raise ValueError(f"no image in a supported format ({', '.join(_FORMATS)})") from error


def preprocess(image: Image.Image, settings: ImageSettings) -> NDArray[np.uint8]:
    """Resize an RGB image and crop its centre, padding with black where it is smaller -> uint8 [H, W, 3]."""
    size, box = _placement(image.size, settings)
    resized = image.resize(size, Image.Resampling[settings.interpolation.upper()])
    return np.array(resized.crop(box), dtype=np.uint8)


def seen_box(size: tuple[int, int], settings: ImageSettings) -> tuple[float, float, float, float]:
    """The part of a photo of `size` = (width, height) that the tower sees: left, top, right, bottom in its pixels.

    Negative, or beyond the size, where `preprocess` pads.
    """
    resized, box = _placement(size, settings)
    x, y = size[0] / resized[0], size[1] / resized[1]
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def _placement(size: tuple[int, int], settings: ImageSettings) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """The (width, height) that a photo of `size` is resized to, and the box that is then cropped."""
    height, width = settings.size
    if settings.resize == "shortest_edge":
        width, height = (int(height * side / min(size)) for side in size)
    crop_height, crop_width = settings.output_size
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return (width, height), (left, top, left + crop_width, top + crop_height)


class _Decoding(threading.local):
    """Matches the module of a warning, as a filter's regular expression would, while this thread decodes.

    `warnings.catch_warnings` does not work here: it changes the filters of all threads, and threads that use it at the
    same time restore each other's.
    """

    active = False

    def match(self, _module: str) -> bool:
        return self.active


_decoding = _Decoding()
_FILTER: Any = ("ignore", None, Warning, _decoding, 0)


@contextmanager
def _no_warnings() -> Iterator[None]:
    filters: list[Any] = warnings.filters  # type: ignore[assignment]
    if filters[:1] != [_FILTER]:
        if _FILTER in filters:
            filters.remove(_FILTER)
        filters.insert(0, _FILTER)
    _decoding.active = True
    try:
        yield
    finally:
        _decoding.active = False


def _finish(image: Image.Image) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS or not 0 < max(width, height) <= MAX_ASPECT * min(width, height):
        raise ValueError(
            f"{width} x {height} = {width * height} pixels; at most {MAX_PIXELS} pixels and sides of "
            f"{MAX_ASPECT} : 1 are supported"
        )
    with _ONE_LARGE if width * height > _LARGE else nullcontext():
        image.load()
        return _to_rgb(_upright(image))


def _from_array(array: NDArray[Any]) -> Image.Image:
    pixels = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    image_shape = pixels.size and (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4)))
    if image_shape and np.issubdtype(pixels.dtype, np.floating) and pixels.min() >= 0 and pixels.max() <= 1:
        pixels = np.rint(pixels * 255).astype(np.uint8)
    if not image_shape or pixels.dtype != np.uint8:
        raise ValueError(
            f"an array of {array.dtype} {list(array.shape)}; arrays must be uint8, or float in 0..1, of shape [H, W] "
            "or [H, W, 1, 3 or 4 channels]"
        )
    return Image.fromarray(np.ascontiguousarray(pixels))


def _upright(image: Image.Image) -> Image.Image:
    try:
        method = _ORIENTATIONS.get(image.getexif().get(_ORIENTATION_TAG))
    except Exception:  # a broken EXIF block is no reason to refuse good pixels
        return image
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_8_bit(np.asarray(image), image.mode))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(values: NDArray[Any], mode: str) -> NDArray[np.uint8]:
    """Scale grey values. Modes I and F do not define white: take the first usual value above all pixels."""
    low, high = float(values.min()), float(values.max())
    whites = [65535.0] if mode.startswith("I;16") else [1.0] * (mode == "F") + [255.0, 65535.0]
    white = next((white for white in whites if high <= white), None)
    if white is None or not low >= 0:
        raise ValueError(f"grey values from {low:g} to {high:g} are outside 0 to {whites[-1]:g}")
    return np.rint(values * (255 / white)).astype(np.uint8)
