"""Photos to pixels: decode any image file safely, then resize it as the vision tower expects.

Resizing and cropping match transformers' `CLIPImageProcessor` (Pillow backend) exactly.
"""

from __future__ import annotations

import base64
import errno
import io
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from .errors import ImageError, reading
from .image_files import check_scans, declared_size, is_heif, max_pixels
from .image_metadata import without_metadata
from .settings import ImageSettings

Source: TypeAlias = str | Path | bytes | BinaryIO | Image.Image | NDArray[Any]
"""An image: a path, an encoded file as bytes or open, a Pillow image, or an array (see `decode`)."""

_THUMBNAIL = 320
MAX_ASPECT = 500
"""Longest side / shortest side: a thinner strip, resized by its short edge, would fill the memory."""
_LARGE = 25_000_000
_ONE_LARGE = threading.Lock()
"""Held while an image of more than _LARGE pixels is decoded, so that threads do not multiply its memory."""
_BAND = 1_000_000
"""Pixels that are converted to RGB at a time."""

# Not every format that Pillow knows: opening an EPS file would start Ghostscript on it.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", "ICO", "AVIF")
HEIF_SUFFIXES = frozenset({".heic", ".heif"})
_HEIF = find_spec("pillow_heif") is not None
SUFFIXES = (HEIF_SUFFIXES if _HEIF else frozenset()) | frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".webp"}
    | {".tif", ".tiff", ".jp2", ".ico", ".avif"}
)
"""Suffixes of the image files in a folder; a file that the user names may have any suffix."""
_TILE_TAGS = (322, 323)
"""TileWidth and TileLength."""
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


def is_one(source: object) -> bool:
    """Whether this is one image, and not an iterable of images."""
    one = isinstance(source, str | bytes | bytearray | memoryview | np.ndarray) or hasattr(source, "read")
    return one or not isinstance(source, Iterable)


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
        with _open(source) as opened:
            file = opened if opened.seekable() else io.BytesIO(opened.read())
            try:
                return _read(file)
            except Exception:  # Pillow raises nearly everything
                file.seek(0)
                content = without_metadata(file.read())
                if content is None:
                    raise
        return _read(io.BytesIO(content))  # here, where the first attempt's pixels are released


def jpeg_url(image: Image.Image) -> str:
    """A data: URL of an RGB image as a JPEG whose sides are at most _THUMBNAIL pixels."""
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    small.save(file, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def preprocess(image: Image.Image, settings: ImageSettings) -> NDArray[np.uint8]:
    """Resize an RGB image and crop its centre, padding with black where it is smaller -> uint8 [H, W, 3]."""
    size, box = _placement(image.size, settings)
    left, top, part = 0, 0, None
    if size[0] * size[1] > _LARGE:  # a thin strip: resize what is cropped alone, although its last bit may differ
        left, top, right, bottom = max(box[0], 0), max(box[1], 0), min(box[2], size[0]), min(box[3], size[1])
        x, y = image.width / size[0], image.height / size[1]
        size, part = (right - left, bottom - top), (left * x, top * y, right * x, bottom * y)
    resized = image.resize(size, Image.Resampling[settings.interpolation.upper()], part)
    return np.array(resized.crop((box[0] - left, box[1] - top, box[2] - left, box[3] - top)), dtype=np.uint8)


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


def _open(source: str | Path | bytes | BinaryIO) -> AbstractContextManager[BinaryIO]:
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    if hasattr(source, "read"):
        return nullcontext(cast(BinaryIO, source))  # the caller closes it
    if Path(source).is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder: name the photos in it")
    return Path(source).open("rb")


def _read(file: BinaryIO) -> Image.Image:
    if declared := declared_size(file):
        _check_size(*declared)
    file.seek(0)
    formats: tuple[str, ...] = _FORMATS
    if is_heif(file):
        if not _HEIF:
            raise ValueError("is HEIC, which needs pip install 'itune-captioner[heif]'")
        import pillow_heif

        pillow_heif.register_heif_opener()
        formats = ("HEIF",)
    try:
        image = Image.open(file, formats=formats)
    except UnidentifiedImageError as error:
        empty = not file.seek(0, io.SEEK_END)
        raise ValueError("is empty" if empty else f"no image in a supported format ({', '.join(_FORMATS)})") from error
    _check_size(image.format, *image.size)
    if tags := getattr(image, "tag_v2", None):  # a TIFF, whose tiles may be larger than the image
        _check_size(image.format, *(int(tags.get(tag, 1)) for tag in _TILE_TAGS))
    if image.format in ("JPEG", "MPO"):
        position = file.tell()
        file.seek(0)
        check_scans(file.read(), image.width * image.height)
        file.seek(position)
    if image.format == "PNG" and "transparency" in image.info:
        _scale_transparency(image, file)
    return _finish(image)


def _check_size(format: str | None, width: int, height: int) -> None:
    most = max_pixels(format)
    if width * height > most or not 0 < max(width, height) <= MAX_ASPECT * min(width, height):
        raise ValueError(
            f"{width} x {height} = {width * height} pixels; at most {most} pixels and sides of {MAX_ASPECT} : 1 are "
            "supported"
        )


def _scale_transparency(png: ImageFile.ImageFile, file: BinaryIO) -> None:
    """Make a PNG's transparent colour fit its samples of 2, 4 or 16 bits, which Pillow scales to 8."""
    depth, clear = png.tile[0].args, png.info["transparency"]
    if depth in ("L;2", "L;4"):
        png.info["transparency"] = clear * (85 if depth == "L;2" else 17)
    elif depth == "RGB;16B":
        png.load()
        file.seek(0)
        low = Image.open(file, formats=["PNG"])
        low.tile = [low.tile[0]._replace(args="RGB;16L")]  # the second byte of each sample
        low.load()
        alpha = Image.new("L", png.size)
        for (top, high_bytes), (_, low_bytes) in zip(_bands(png), _bands(low), strict=True):
            samples = np.asarray(high_bytes).astype(np.uint16) << 8 | np.asarray(low_bytes)
            alpha.paste(_opaque(samples != clear), (0, top))
        del low
        png.putalpha(alpha)
        del png.info["transparency"]


def _finish(image: Image.Image) -> Image.Image:
    _check_size(image.format, *image.size)
    with _ONE_LARGE if image.width * image.height > _LARGE else nullcontext():
        image.load()
        orientation = _orientation(image)
        rgb = _to_rgb(image)
        del image  # releases its pixels before the next copy
        return rgb if orientation is None else rgb.transpose(orientation)


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


def _orientation(image: Image.Image) -> Image.Transpose | None:
    try:
        return _ORIENTATIONS.get(image.getexif().get(_ORIENTATION_TAG))
    except Exception:  # a broken EXIF block is no reason to refuse good pixels
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB, with transparency on white; band by band, so that a large image has no further copies."""
    if image.mode in ("P", "PA") and image.palette is None:
        raise ValueError("has no palette")
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    white = _white(image) if image.mode == "F" or image.mode.startswith("I") else None
    rgb = Image.new("RGB", image.size)
    for top, band in _bands(image):
        pixels = band if white is None else _grey_band(band, white)
        if pixels.has_transparency_data:
            pixels = Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels.convert("RGBA"))
        rgb.paste(pixels.convert("RGB"), (0, top))
    return rgb


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    height = max(1, _BAND // image.width)
    for top in range(0, image.height, height):
        yield top, image.crop((0, top, image.width, min(top + height, image.height)))


def _white(image: Image.Image) -> float:
    """The grey value that is white. Modes I and F do not define it: take the first usual value above all pixels."""
    if image.mode.startswith("I;16"):
        return 65535.0
    low, high = (limit([float(limit(np.asarray(band))) for _, band in _bands(image)]) for limit in (np.min, np.max))
    whites = [1.0] * (image.mode == "F") + [255.0, 65535.0]
    white = next((white for white in whites if high <= white), None)
    if white is None or not low >= 0:
        raise ValueError(f"grey values from {low:g} to {high:g} are outside 0 to {whites[-1]:g}")
    return white


def _grey_band(band: Image.Image, white: float) -> Image.Image:
    """Scale grey values of any range to 8 bits; a PNG's transparent value is compared before that."""
    values = np.asarray(band)
    grey = Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
    if isinstance(clear := band.info.get("transparency"), int):
        grey.putalpha(_opaque(values[..., None] != clear))
    return grey


def _opaque(differs: NDArray[np.bool_]) -> Image.Image:
    """Alpha of pixels of which a sample differs from the transparent colour, from bool [H, W, samples]."""
    return Image.fromarray(255 * differs.any(axis=2).astype(np.uint8))
