"""What decoding an image file would cost: the sizes that it declares, and the scans of a JPEG.

Pillow decodes some formats before it tells their size.
"""

from __future__ import annotations

import re
import struct
from typing import BinaryIO

MAX_PIXELS = 89_478_485
"""Pillow's limit for decompression bombs, at which it only warns. Decoding takes at most 9 bytes for each pixel."""
_HALF = ("WEBP", "JPEG2000", "HEIF")
"""Formats whose decoders take up to 20 bytes for each pixel; half as many pixels are allowed."""
_MAX_SCANNED = 2_000_000_000
"""Pixels of a JPEG, times its scans: each scan passes over all pixels. A progressive JPEG has about 10."""
_START_OF_SCAN = b"\xff\xda"
_MARKER = re.compile(rb"\xff[^\0\1\xd0-\xd8\xff]")
"""A JPEG marker that ends the image or begins a segment with a length."""


def max_pixels(format: str | None) -> int:
    """The most pixels that an image in a format of Pillow's may have: decoding takes at most about 1 GB."""
    return MAX_PIXELS // 2 if format in _HALF else MAX_PIXELS


def is_heif(file: BinaryIO) -> bool:
    """Whether a file is HEIC or HEIF, the photos of recent phones."""
    file.seek(0)
    head = file.read(64)
    file.seek(0)
    heif = head[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
    return head[4:8] == b"ftyp" and heif and b"avif" not in head


def declared_size(file: BinaryIO) -> tuple[str, int, int] | None:
    """(format, width, height) of the largest image in a file that Pillow decodes, or makes room for, while opening it.

    None for the formats whose size Pillow tells first. Raises struct.error if the file is too short.
    """
    file.seek(0)
    head = file.read(30)
    if head.startswith(b"\0\0\1\0"):
        sizes = [_icon_size(file, entry) for entry in range(int.from_bytes(head[4:6], "little"))]
        return ("ICO", *max(sizes, key=lambda size: size[0] * size[1], default=(0, 0)))
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return ("WEBP", *_webp_size(head[12:16], head[20:]))
    return None


def _icon_size(file: BinaryIO, entry: int) -> tuple[int, int]:
    file.seek(6 + 16 * entry + 12)
    file.seek(int.from_bytes(file.read(4), "little"))
    image = file.read(24)
    width, height = struct.unpack(">II", image[16:24]) if image[1:4] == b"PNG" else struct.unpack("<ii", image[4:12])
    return abs(width), abs(height)


def _webp_size(chunk: bytes, content: bytes) -> tuple[int, int]:
    if chunk == b"VP8X":
        return 1 + int.from_bytes(content[4:7], "little"), 1 + int.from_bytes(content[7:10], "little")
    if chunk == b"VP8L":
        sizes = int.from_bytes(content[1:5], "little")
        return 1 + (sizes & 0x3FFF), 1 + (sizes >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", content[6:10])
    return width & 0x3FFF, height & 0x3FFF


def check_scans(jpeg: bytes, pixels: int) -> None:
    """Raise ValueError if a JPEG of so many pixels has so many scans that decoding would take more than seconds."""
    if jpeg.count(_START_OF_SCAN) * pixels <= _MAX_SCANNED:  # fast; also counts what is not a scan, such as thumbnails'
        return
    scans, position = 0, 2
    while (marker := _MARKER.search(jpeg, position)) and marker[0] != b"\xff\xd9":
        scans += marker[0] == _START_OF_SCAN
        position = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")
    if scans * pixels > _MAX_SCANNED:
        raise ValueError(f"{scans} scans; at most {_MAX_SCANNED // pixels} are supported at this size: save it again")
