from __future__ import annotations

import io
import os
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from itune.runtime.errors import ImageError
from itune.runtime.image import MAX_ASPECT, decode
from itune.runtime.image_files import MAX_PIXELS

LEFT, RIGHT = (200, 30, 40), (10, 60, 250)


def photo(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def refusal(source: object) -> str:
    with pytest.raises(ImageError) as caught:
        decode(source)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "GIF", "WEBP", "JPEG", "JPEG2000", "ICO", "AVIF"])
def test_every_format(kind: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 32), LEFT)
    path = tmp_path / "photo"  # the content tells, not the suffix
    path.write_bytes(encoded(image, kind))
    for source in (path, str(path), path.read_bytes()):
        decoded = decode(source)
        assert decoded.mode == "RGB"
        assert decoded.size == (32, 32)
        np.testing.assert_allclose(np.asarray(decoded), np.asarray(image), atol=4)  # JPEG and its like


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(photo(), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert expected.size == ((40, 30) if orientation < 5 else (30, 40))
    np.testing.assert_array_equal(np.asarray(decode(content)), np.asarray(expected))
    np.testing.assert_array_equal(np.asarray(decode(Image.open(io.BytesIO(content)))), np.asarray(expected))


@pytest.mark.parametrize("exif", [b"Exif\0\0junk", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0", b"?" * 40])
def test_a_broken_exif_block_does_not_matter(exif: bytes) -> None:
    image = photo()
    np.testing.assert_array_equal(np.asarray(decode(encoded(image, "PNG", exif=exif))), np.asarray(image))
    assert decode(encoded(image, "JPEG", exif=exif)).size == image.size


def test_an_orientation_that_does_not_exist() -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    assert decode(encoded(photo(), "PNG", exif=exif)).size == (40, 30)


def test_transparency_lies_on_white() -> None:
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    clear.putpixel((1, 0), (*LEFT, 255))
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    grey = Image.new("LA", (1, 1), (0, 0))
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RIGHT, *LEFT])
    palette.putpixel((1, 0), 1)
    assert pixels(encoded(clear, "PNG")) == [(255, 255, 255), LEFT]
    assert pixels(encoded(half, "PNG")) == [(127, 127, 127)]
    assert pixels(encoded(grey, "PNG")) == [(255, 255, 255)]
    assert pixels(encoded(palette, "PNG", transparency=0)) == [(255, 255, 255), LEFT]
    assert pixels(encoded(palette, "PNG", transparency=b"\0\xff")) == [(255, 255, 255), LEFT]
    assert pixels(encoded(palette, "GIF", transparency=0)) == [(255, 255, 255), LEFT]
    assert pixels(encoded(palette, "PNG")) == [RIGHT, LEFT]
    assert pixels(encoded(Image.new("RGB", (1, 1), LEFT), "PNG", transparency=LEFT)) == [(255, 255, 255)]
    assert pixels(encoded(Image.new("L", (1, 1), 9), "PNG", transparency=9)) == [(255, 255, 255)]
    assert pixels(clear.convert("RGBa")) == [(255, 255, 255), LEFT]


def pixels(source: bytes | Image.Image) -> list[tuple[int, ...]]:
    return [tuple(pixel) for pixel in np.asarray(decode(source)).reshape(-1, 3).tolist()]


@pytest.mark.parametrize("colour_type", [0, 2])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_colour_at_every_depth(depth: int, colour_type: int) -> None:
    """PNG, section 11.3.2.1: samples are compared at the depth of the file, before they are scaled."""
    if colour_type == 2 and depth < 8:  # not in the format
        return
    channels = 1 if colour_type == 0 else 3
    top = (1 << depth) - 1
    clear, nearly = [top // 2] * channels, [top // 2 ^ 1, *[top // 2] * (channels - 1)]
    row = sum(sample << (8 * 16 * 3 - depth * (i + 1)) for i, sample in enumerate(clear + nearly)).to_bytes(48, "big")
    header = struct.pack(">IIBBBBB", 2, 1, depth, colour_type, 0, 0, 0)
    transparency = struct.pack(f">{channels}H", *clear)
    data = zlib.compress(b"\0" + row[: max(1, 2 * channels * depth // 8)])
    content = png_file((b"IHDR", header), (b"tRNS", transparency), (b"IDAT", data), (b"IEND", b""))
    left, right = pixels(content)
    assert left == (255, 255, 255)
    assert right == tuple([sample * 255 / top for sample in nearly] * 3)[:3] or depth == 16
    assert right != (255, 255, 255) or nearly == [top]


def png_file(*chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks)


def test_colour_modes() -> None:
    assert pixels(encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF")) == [(255, 0, 0)]
    assert pixels(encoded(Image.new("CMYK", (1, 1), (0, 0, 0, 255)), "JPEG")) == [(0, 0, 0)]
    assert pixels(encoded(Image.new("1", (1, 1), 1), "PNG")) == [(255, 255, 255)]
    assert pixels(encoded(Image.new("L", (1, 1), 77), "PNG")) == [(77, 77, 77)]
    ycbcr = Image.new("RGB", (1, 1), LEFT).convert("YCbCr")
    np.testing.assert_allclose(pixels(ycbcr), [LEFT], atol=2)
    np.testing.assert_allclose(pixels(Image.new("RGB", (1, 1), LEFT).convert("HSV")), [LEFT], atol=3)


def test_sixteen_bit_greys_keep_their_range() -> None:
    values = np.array([[0, 128, 256, 257, 32768, 65407, 65535]], np.uint16)
    expected = [0, 0, 1, 1, 128, 255, 255]
    big_endian = Image.frombytes("I;16B", (7, 1), values.astype(">u2").tobytes())
    pgm = b"P5 7 1 65535\n" + values.astype(">u2").tobytes()
    integers = Image.fromarray(values.astype(np.int32))
    for source in (
        encoded(Image.fromarray(values), "PNG"),
        encoded(Image.fromarray(values), "TIFF"),
        pgm,
        big_endian,
        integers,
    ):
        assert [pixel[0] for pixel in pixels(source)] == expected
    dark = encoded(Image.fromarray(np.full((1, 1), 200, np.uint16)), "PNG")
    assert pixels(dark) == [(1, 1, 1)]  # 16 bits say what white is, however dark the photo


def test_float_and_integer_greys() -> None:
    def grey(mode: str, *values: float) -> list[int]:
        image = Image.new(mode, (len(values), 1))
        image.putdata(values)
        return [pixel[0] for pixel in pixels(encoded(image, "TIFF"))]

    assert grey("F", 0, 0.5, 1) == [0, 128, 255]
    assert grey("F", 0, 100, 255) == [0, 100, 255]
    assert grey("F", 0, 32768, 65535) == [0, 128, 255]
    assert grey("I", 0, 100, 255) == [0, 100, 255]
    for mode, value in (("F", -0.1), ("F", float("nan")), ("F", 1e9), ("I", -1), ("I", 2**20)):
        assert f"{np.float32(value):g}" in refusal(encoded(Image.new(mode, (1, 1), value), "TIFF"))


def test_only_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (8, 8), LEFT), Image.new("RGB", (8, 8), RIGHT)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        np.testing.assert_allclose(pixels(content), [LEFT] * 64, atol=4)


def test_too_large_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def header(width: int, height: int) -> bytes:  # a PNG without pixels, which decoding would miss
        content = bytearray(encoded(Image.new("L", (1, 1)), "PNG"))
        content[16:24] = struct.pack(">II", width, height)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        return bytes(content)

    large = refusal(header(10_000, 10_000))
    assert "10000 x 10000 = 100000000 pixels" in large
    assert str(MAX_PIXELS) in large
    assert "900000000 pixels" in refusal(header(30_000, 30_000))
    monkeypatch.setattr("itune.runtime.image_files.MAX_PIXELS", 1199)
    assert "1199 pixels" in refusal(photo())
    monkeypatch.setattr("itune.runtime.image_files.MAX_PIXELS", 1200)
    assert decode(photo()).size == (40, 30)
    assert "1 x 501" in refusal(Image.new("L", (1, MAX_ASPECT + 1)))
    assert decode(Image.new("L", (MAX_ASPECT, 1))).size == (MAX_ASPECT, 1)


def test_what_is_no_image(tmp_path: Path) -> None:
    text = tmp_path / "notes.jpg"
    for content, said in ((b"not a photo", "JPEG, PNG"), (b"", "empty")):
        text.write_bytes(content)
        for source, name in ((text, str(text)), (content, "the image")):
            message = refusal(source)
            assert message.startswith(f"{name}: ")
            assert said in message
    for path in (tmp_path / "absent.jpg", str(tmp_path)):
        assert refusal(path).startswith(f"{path}: ")
    assert refusal("a\0b").startswith("a\\x00b: ")
    assert "int" in refusal(3)
    refusal(closed())
    assert "0 x 5" in refusal(Image.new("RGB", (0, 5)))


def test_named_pipes(tmp_path: Path) -> None:
    """What a shell's <(command) hands over."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def feed(content: bytes) -> None:
        threading.Thread(target=pipe.write_bytes, args=[content], daemon=True).start()

    feed(encoded(photo(), "PNG"))
    np.testing.assert_array_equal(np.asarray(decode(pipe)), np.asarray(photo()))
    feed(b"not a photo")
    assert str(pipe) in refusal(pipe)


def closed() -> Image.Image:
    image = Image.open(io.BytesIO(encoded(photo(), "PNG")))
    image.close()
    return image


def test_postscript_is_not_run() -> None:
    assert "JPEG, PNG" in refusal(encoded(photo(), "EPS"))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG", "AVIF"])
def test_truncated(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "photo"
    content = encoded(photo(200, 200), kind)
    for part in (0.9, 0.5):
        path.write_bytes(content[: int(part * len(content))])
        assert refusal(path).startswith(f"{path}: ")


def test_arrays() -> None:
    colour = np.asarray(photo())
    grey = colour[:, :, 0]
    for array, expected in (
        (colour, colour),
        (colour[:, ::-1], colour[:, ::-1]),
        (grey, np.stack([grey] * 3, axis=2)),
        (grey[:, :, None], np.stack([grey] * 3, axis=2)),
        (colour / 255, colour),
        ((colour / 255).astype(np.float32), colour),
        (np.dstack([colour, np.full_like(grey, 255)]), colour),
        (np.dstack([colour, np.zeros_like(grey)]), np.full_like(colour, 255)),
    ):
        np.testing.assert_array_equal(np.asarray(decode(array)), expected)
    for array, described in (
        (colour.transpose(2, 0, 1), "uint8 [3, 30, 40]"),
        (colour[None], "uint8 [1, 30, 40, 3]"),
        (colour[:0], "uint8 [0, 40, 3]"),
        (colour.astype(np.uint16), "uint16 [30, 40, 3]"),
        (colour / 254, "float64 [30, 40, 3]"),
        (colour / 255 - 0.01, "float64 [30, 40, 3]"),
        (np.full((4, 4), np.nan), "float64 [4, 4]"),
    ):
        assert described in refusal(array)


def test_warnings_stay_inside(capfd: pytest.CaptureFixture[str]) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    damaged_tiff = bytearray(encoded(photo(), "TIFF", compression="tiff_lzw"))
    damaged_tiff[-40:] = b"\xff" * 40
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode(encoded(photo(), "JPEG", icc_profile=profile, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09\xff"))
        refusal(Image.new("L", (10_000, 9_000)))
        with pytest.raises(ImageError):
            decode(bytes(damaged_tiff))
    assert caught == []
    assert capfd.readouterr() == ("", "")


FORMATS = st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "JPEG2000", "AVIF"])


def decode_or_refuse(content: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("itune.runtime.image_files.MAX_PIXELS", 100_000)
        try:
            image = decode(content)
        except ImageError as error:
            assert "\n" not in str(error)  # noqa: PT017 (decoding it is right, too)
        else:
            assert image.mode == "RGB"
            image.getpixel((0, 0))


@settings(max_examples=150, deadline=None)
@given(kind=FORMATS, changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_bytes_are_decoded_or_refused(kind: str, changes: list[tuple[float, int]]) -> None:
    content = bytearray(encoded(photo(20, 16), kind))
    for place, value in changes:
        content[int(place * (len(content) - 1))] = value
    decode_or_refuse(bytes(content))


STARTS = st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"P6 9 9 "])


@settings(max_examples=200, deadline=None)
@given(start=STARTS, junk=st.binary())
def test_junk_is_decoded_or_refused(start: bytes, junk: bytes) -> None:
    decode_or_refuse(start + junk)


def test_metadata_never_refuses_a_photo() -> None:
    image = photo()
    long_text = (b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 70_000_000))
    for metadata in (
        long_text,
        (b"tEXt", b"no separator" * 1000),
        (b"iCCP", b"name\0\0junk"),
        (b"iCCP", b"name\0\1"),
        (b"pHYs", b"\0"),
        (b"gAMA", b""),
        (b"cHRM", b"\1"),
        (b"sRGB", b""),
        (b"eXIf", b"junk"),
        (b"acTL", b""),
        (b"fcTL", b"\1\2"),
        (b"tRNS", b""),
    ):
        chunk = png_file(metadata)[8:]
        for part in (chunk, chunk[:-1] + b"?"):  # the second with a wrong checksum
            content = encoded(image, "PNG")
            before, after = content.index(b"IDAT") - 4, len(content) - 12
            for place in (before, after):
                damaged = content[:place] + part + content[place:]
                np.testing.assert_array_equal(np.asarray(decode(damaged)), np.asarray(image))
    png = encoded(image, "PNG")
    np.testing.assert_array_equal(np.asarray(decode(png[:-12] + png_file((b"tEXt", b"a\0b"))[8:-6])), np.asarray(image))
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg = encoded(image, "JPEG", exif=exif)
    expected = np.asarray(decode(jpeg))
    for marker, payload in ((0xE2, b"ICC_PROFILE\0"), (0xEE, b"Adobe"), (0xE0, b"JFIF\0"), (0xED, b"Photoshop 3.0\0")):
        segment = bytes([0xFF, marker]) + struct.pack(">H", 2 + len(payload)) + payload
        found = decode(jpeg[:2] + segment + jpeg[2:])
        np.testing.assert_array_equal(np.asarray(found), expected)
    webp = encoded(image, "WEBP", lossless=True, exif=b"Exif\0\0" + b"x" * 40, icc_profile=b"y" * 40)
    np.testing.assert_array_equal(np.asarray(decode(webp[:-20])), np.asarray(image))
    exif = Image.Exif()
    exif[0x010E] = "a dog"
    avif = encoded(image, "AVIF", exif=exif)
    expected = np.asarray(decode(avif))
    at = avif.index(b"a dog") - 40
    damaged = avif[:at] + b"\xff" * 20 + avif[at + 20 :]
    np.testing.assert_array_equal(np.asarray(decode(damaged)), expected)


def test_damaged_metadata_of_gif_and_tiff() -> None:
    image = photo().convert("P", palette=Image.Palette.ADAPTIVE)
    gif = encoded(image, "GIF", transparency=0)
    expected = np.asarray(decode(gif))
    start = 13 + (3 << (gif[10] & 7) + 1)
    for extension in (b"\x21\xff\x0bNETSCAPE2.0\0", b"\x21\xf9\0", b"\x21\xf9\1\1\0", b"\x21\x01\0", b"\x21\xfe\0"):
        np.testing.assert_array_equal(np.asarray(decode(gif[:start] + extension + gif[start:])), expected)
    for order in ("<", ">"):
        for tag, kind, value in ((270, 2, 10**9), (274, 5, 10**9), (306, 2, 10**9), (34675, 7, 10**9)):
            content = tiff(order, {tag: (kind, 100, value)})
            np.testing.assert_array_equal(np.asarray(decode(content)), np.asarray(decode(tiff(order, {}))))


def tiff(order: str, more: dict[int, tuple[int, int, int]]) -> bytes:
    """A grey TIFF of 8 x 4 pixels with further tags of (type, count, value or offset)."""
    pixels = bytes(range(100, 132))
    fields = {256: (4, 1, 8), 257: (4, 1, 4), 258: (4, 1, 8), 259: (4, 1, 1), 262: (4, 1, 1), 277: (4, 1, 1)}
    fields |= {273: (4, 1, 8), 278: (4, 1, 4), 279: (4, 1, len(pixels)), **more}
    directory = struct.pack(f"{order}H", len(fields)) + b"".join(
        struct.pack(f"{order}HHII", tag, *fields[tag]) for tag in sorted(fields)
    )
    start = b"II*\0" if order == "<" else b"MM\0*"
    return start + struct.pack(f"{order}I", 8 + len(pixels)) + pixels + directory + bytes(4)


def test_damaged_pixels_are_still_refused() -> None:
    content = bytearray(encoded(photo(), "PNG"))
    content[content.index(b"IDAT") + 20] ^= 1
    refusal(bytes(content))


def test_what_a_decoder_raises_is_the_photos_error() -> None:
    without_palette = png_file(
        (b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 3, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(20))), (b"IEND", b"")
    )
    assert "palette" in refusal(without_palette)


def test_sizes_are_checked_before_a_file_is_opened() -> None:
    inner = encoded(Image.new("L", (1, 1)), "PNG")
    bomb = inner[:16] + struct.pack(">II", 20_000, 20_000) + inner[24:]
    icon = b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 1, 1, 0, 0, 1, 32, len(bomb), 22) + bomb
    assert "20000 x 20000" in refusal(icon)
    lossless = b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0/\xfe\x3fU\x15\x07\x10\x11\x11\x88\x88\xfe\x07\0"
    assert "16383 x 5461" in refusal(lossless)


def test_a_jpeg_of_too_many_scans() -> None:
    content = encoded(photo(2000, 1500), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    many = content[:-2] + content[last:-2] * 1000 + content[-2:]
    assert "1010 scans" in refusal(many)
    video = content + b"\xff\xda" * 5000  # what follows the image is not a scan
    np.testing.assert_array_equal(np.asarray(decode(video)), np.asarray(decode(content)))


def test_a_tiff_of_tiles_larger_than_the_image() -> None:
    def entry(tag: int, value: int) -> bytes:
        return struct.pack("<HHII", tag, 4, 1, value)

    side = 32768
    fields = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 140, 325: 9}
    directory = struct.pack("<H", len(fields)) + b"".join(entry(tag, value) for tag, value in fields.items())
    assert f"{side} x {side}" in refusal(b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + zlib.compress(b"\0"))
