"""Image files without their metadata: Pillow refuses photos of which only the metadata is damaged."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator

_EXIF_ITEM = re.compile(rb"(infe.{8})Exif", re.DOTALL)
_TIFF_PIXELS = frozenset(
    (*range(254, 260), 262, 266, 273, 277, 278, 279, 284, 317, 320, *range(322, 326), 338, 339, 347)
)
"""Tags that say how the pixels are stored, and JPEG's in 529 to 532."""
_ORIENTATION = 274
_SHORT = 3


def without_metadata(content: bytes) -> bytes | None:
    """An image file without the metadata that its format allows to be left out.

    None for other formats, and where more than metadata is damaged. Transparency stays, and so does the orientation in
    the EXIF block of a JPEG, or of a PNG or TIFF where it is intact.
    """
    try:
        return next((strip(content) for start, strip in _FORMATS if start.match(content)), None)
    except (struct.error, IndexError):
        return None


def _png(content: bytes) -> bytes:
    return content[:8] + b"".join(_png_chunks(content)) + b"\0\0\0\0IEND\xaeB`\x82"


def _jpeg(content: bytes) -> bytes:
    return b"".join(_jpeg_segments(content))


def _webp(content: bytes) -> bytes:
    chunks = b"".join(_webp_chunks(content))
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def _avif(content: bytes) -> bytes:
    return _EXIF_ITEM.sub(rb"\1skip", content)  # decoders skip items of an unknown type


def _gif(content: bytes) -> bytes:
    """All but extensions before the first image, except a graphic control of the right length."""
    start = position = 13 + (3 << (content[10] & 7) + 1) * (content[10] >> 7)
    control = b""
    while content[position] == 0x21:
        end = position + 2
        while content[end]:
            end += 1 + content[end]
        if content[position + 1] == 0xF9 and content[position + 2] == 4:
            control = content[position : end + 1]
        position = end + 1
    return content[:start] + control + content[position:]


def _tiff(content: bytes) -> bytes:
    """The tags of the first image's pixels, in a directory of their own at the end."""
    order = "<" if content[:2] == b"II" else ">"
    (directory,) = struct.unpack_from(f"{order}I", content, 4)
    (count,) = struct.unpack_from(f"{order}H", content, directory)
    kept = []
    for i in range(count):
        entry = content[directory + 2 + 12 * i : directory + 14 + 12 * i]
        tag, kind, values = struct.unpack(f"{order}HHI", entry[:8])
        oriented = (tag, kind, values) == (_ORIENTATION, _SHORT, 1)
        if tag in _TIFF_PIXELS or 529 <= tag <= 532 or oriented:
            kept.append(entry)
    place = len(content) + len(content) % 2
    header = content[:4] + struct.pack(f"{order}I", place)
    ending = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    return header + content[8:] + bytes(place - len(content)) + ending


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


_FORMATS: tuple[tuple[re.Pattern[bytes], Callable[[bytes], bytes]], ...] = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), _png),
    (re.compile(rb"\xff\xd8\xff"), _jpeg),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), _webp),
    (re.compile(rb".{4}ftypavi[fs]", re.DOTALL), _avif),
    (re.compile(rb"GIF8[79]a"), _gif),
    (re.compile(rb"II\*\0|MM\0\*"), _tiff),
)
