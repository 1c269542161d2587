"""What an encoded image says outside its pixels: the sizes that it declares, the scans of a JPEG, and its metadata.

Pillow decodes some formats before their size is known, and refuses photos of which only the metadata is damaged.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
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
_EXIF_ITEM = re.compile(rb"(infe.{8})Exif", re.DOTALL)


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


def without_metadata(content: bytes) -> bytes | None:
    """An image file without the metadata that its format allows to be left out; None for other formats.

    Transparency stays, and so does the orientation in the EXIF block of a JPEG, or of a PNG where it is intact.
    """
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content[:8] + b"".join(_png_chunks(content)) + b"\0\0\0\0IEND\xaeB`\x82"
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        chunks = b"".join(_webp_chunks(content))
        return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks
    if content.startswith(b"\xff\xd8\xff"):
        return b"".join(_jpeg_segments(content))
    if content[4:12] in (b"ftypavif", b"ftypavis"):
        return _EXIF_ITEM.sub(rb"\1skip", content)  # decoders skip items of an unknown type
    return None


def _png_chunks(content: bytes) -> Iterator[bytes]:
    """Critical chunks as they are; of the others, intact transparency and EXIF."""
    position, transparency = 8, {0: 2, 2: 6}.get(content[25]) if len(content) > 25 else None
    while len(head := content[position : position + 8]) == 8 and head[4:] != b"IEND":
        length = int.from_bytes(head[:4], "big")
        chunk = content[position : position + 12 + length]
        critical = not head[4] & 0x20
        intact = chunk[-4:] == struct.pack(">I", zlib.crc32(chunk[4:-4]))
        kept = head[4:] == b"eXIf" or (head[4:] == b"tRNS" and length == (transparency or length))
        if critical or (kept and intact):
            yield chunk
        position += 12 + length


def _jpeg_segments(content: bytes) -> Iterator[bytes]:
    """All but comments and application data; whole JFIF and Adobe segments say how colours are stored, EXIF stays."""
    yield content[:2]
    position = 2
    while len(head := content[position : position + 4]) == 4 and head[0] == 0xFF and head[1] != 0xDA:
        marker, length = head[1], int.from_bytes(head[2:], "big")
        segment = content[position : position + 2 + length]
        other = not (0xE0 <= marker <= 0xEF or marker == 0xFE)
        if {0xE0: length >= 16, 0xE1: segment[4:8] == b"Exif", 0xEE: length >= 14}.get(marker, other):
            yield segment
        position += 2 + length
    yield content[position:]


def _webp_chunks(content: bytes) -> Iterator[bytes]:
    position = 12
    while len(head := content[position : position + 8]) == 8:
        length = int.from_bytes(head[4:], "little")
        chunk = content[position : position + 8 + length + length % 2]
        if head[:4] == b"VP8X":  # without the flags of ICC, EXIF and XMP
            chunk = chunk[:8] + bytes([chunk[8] & 0b00010010]) + chunk[9:]
        if head[:4] in (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"):
            yield chunk
        position += 8 + length + length % 2
