"""Photos to pixels: decode whatever a user (or an attacker) hands over, resize it as the tower expects it.

Resizing and cropping follow transformers' `CLIPImageProcessor` (Pillow backend) to the pixel.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from .errors import ImageError
from .settings import ImageSettings

Source: TypeAlias = str | Path | bytes | Image.Image | NDArray[Any]
"""What counts as an image: a path, an encoded file's bytes, a Pillow image, or an array (see `decode`)."""

MAX_PIXELS = 89_478_485
"""Pillow's own decompression-bomb limit, where it only warns; decoded, that is 360 MB."""
MAX_ASPECT = 500
_LARGE = 25_000_000
_ONE_LARGE = threading.Lock()
"""Held while an image of more than _LARGE pixels is decoded: threads must not multiply what the largest one takes."""

# Not every format that Pillow knows: opening an EPS file would start Ghostscript on it.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", "ICO", "AVIF")
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".webp"}
    | {".tif", ".tiff", ".jp2", ".ico", ".avif"}
)
"""Of the files that count as images in a folder; a file that is named itself may have any."""
_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(source: Source, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image to 8-bit RGB: upright (EXIF), first frame, transparency on white.

    Arrays are uint8, or float in 0..1, of shape [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (alpha last).

    Raises:
        ImageError: in one sentence that names the file, if it is not an image, damaged or too large.
    """
    name = _name(source)
    with _no_warnings():  # bombs are refused below, and broken metadata does no harm
        if isinstance(source, Image.Image):
            return _finish(source, name, max_pixels)
        if isinstance(source, np.ndarray):
            return _finish(_from_array(source), name, max_pixels)
        with _open(source, name) as file:
            return _finish(_identify(file, name), name, max_pixels)


def preprocess(image: Image.Image, settings: ImageSettings) -> NDArray[np.uint8]:
    """Resize an RGB image and crop its centre (padding with black what is missing) -> uint8 [H, W, 3]."""
    size, box = _placement(image.size, settings)
    resized = image.resize(size, Image.Resampling[settings.interpolation.upper()])
    return np.array(resized.crop(box), dtype=np.uint8)


def seen_box(size: tuple[int, int], settings: ImageSettings) -> tuple[float, float, float, float]:
    """What the tower sees of a photo of `size` = (width, height): left, top, right, bottom in the photo's pixels.

    Negative, or beyond the size, where `preprocess` pads.
    """
    resized, box = _placement(size, settings)
    x, y = size[0] / resized[0], size[1] / resized[1]
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def _placement(size: tuple[int, int], settings: ImageSettings) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """(width, height) that a photo of `size` is resized to, and the box that is cropped out of it then."""
    height, width = settings.size
    if settings.resize == "shortest_edge":
        short = settings.size[0]
        if size[0] <= size[1]:
            width, height = short, int(short * size[1] / size[0])
        else:
            width, height = int(short * size[0] / size[1]), short
    crop_height, crop_width = settings.output_size
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return (width, height), (left, top, left + crop_width, top + crop_height)


class _Decoding(threading.local):
    """Whether this thread decodes; matches the module of a warning as a filter's regular expression would.

    `warnings.catch_warnings` changes the filters of all threads, and threads that use it at the same time restore
    each other's.
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


def _name(source: Source) -> str:
    if isinstance(source, str | Path):
        return str(source)
    return str(getattr(source, "filename", "")) or "the image"


def _open(source: object, name: str) -> IO[bytes]:
    if isinstance(source, bytes | bytearray):
        return io.BytesIO(source)
    if not isinstance(source, str | Path):
        kind = type(source).__name__
        raise ImageError(f"a {kind} is not an image: give a path, bytes, a Pillow image or an array")
    try:
        return Path(source).open("rb")
    except IsADirectoryError as error:
        raise ImageError(f"{name} is a folder without images, not an image") from error
    except OSError as error:
        raise ImageError(f"{name} cannot be read ({error.strerror})") from error
    except ValueError as error:  # a null character in the path
        raise ImageError(f"{name!r} is not a path ({error})") from error


def _identify(file: IO[bytes], name: str) -> Image.Image:
    Image.preinit()  # else Pillow imports all its formats to try the first of _FORMATS
    try:
        return Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError as error:
        if file.seekable() and not file.seek(0, os.SEEK_END):
            raise ImageError(f"{name} is empty") from error
        raise ImageError(f"{name} is in no known image format ({', '.join(_FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large ({error})") from error
    except Exception as error:  # as in _finish
        raise ImageError(f"{name} is damaged ({error})") from error


def _finish(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{name} is too large: {width} x {height} = {width * height} pixels, over {max_pixels}")
    # A thin strip, resized by its short edge, would fill the memory.
    if not 0 < max(width, height) <= MAX_ASPECT * min(width, height):
        raise ImageError(f"{name} is no photo: {width} x {height} pixels, longer than {MAX_ASPECT} : 1")
    with _ONE_LARGE if width * height > _LARGE else nullcontext():
        try:
            image.load()
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
            raise ImageError(f"{name} is truncated or damaged ({error})") from error
        try:
            return _to_rgb(_upright(image), name)
        except ValueError as error:
            raise ImageError(f"{name}: pixels of mode {image.mode} cannot become RGB ({error})") from error


def _from_array(array: NDArray[Any]) -> Image.Image:
    described = f"an array of {array.dtype} {list(array.shape)}"
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(f"{described} is not an image: its shape must be [H, W], or [H, W, 1, 3 or 4 channels]")
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # false for NaN too
            raise ImageError(f"{described} is not an image: its values must lie in 0..1")
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ImageError(f"{described} is not an image: its values must be uint8, or float in 0..1")
    return Image.fromarray(np.ascontiguousarray(array))


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # a broken EXIF block is no reason to refuse good pixels
        return image
    method = _ORIENTATIONS.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_8_bit(np.asarray(image), image.mode, name))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(values: NDArray[Any], mode: str, name: str) -> NDArray[np.uint8]:
    """Scale grey values. Modes I and F do not say what white is: the first usual value above all pixels."""
    low, high = float(values.min()), float(values.max())
    whites = [65535.0] if mode.startswith("I;16") else [255.0, 65535.0]
    if mode == "F":
        whites.insert(0, 1.0)
    white = next((white for white in whites if high <= white), None)
    if white is None or not low >= 0:
        raise ImageError(f"{name} has grey values from {low:g} to {high:g}, which no known range explains")
    return np.rint(values * (255 / white)).astype(np.uint8)
