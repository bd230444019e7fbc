"""Images of every kind that is read: pixels and alpha against the arrays that were written."""

from __future__ import annotations

import io
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from fastembed.photo import read_picture
from fastembed.testing import scene

HEIGHT, WIDTH = 37, 53


def encoded(image: Image.Image, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def png16(pixels: np.ndarray, transparent: tuple[int, ...] | None = None) -> bytes:
    """A PNG of [H, W, 1..4] uint16, by hand: grey with alpha is written by no library here."""
    height, width, count = pixels.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[count]
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    key = b"" if transparent is None else struct.pack(f">{len(transparent)}H", *transparent)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    return b"".join([
        b"\x89PNG\r\n\x1a\n",
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)),
        chunk(b"tRNS", key) if key else b"",
        chunk(b"IDAT", zlib.compress(lines)),
        chunk(b"IEND", b""),
    ])  # fmt: skip


def tiff(pixels: np.ndarray, **options) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, **options)
    return stream.getvalue()


def tiff_pages(*pages: tuple[np.ndarray, dict]) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        for pixels, options in pages:
            writer.write(pixels, metadata=None, **options)
    return stream.getvalue()


def to_8_bits(pixels: np.ndarray) -> np.ndarray:
    return np.floor(pixels.astype(np.float64) * 255 / 65535 + 0.5).astype(np.uint8)


def grey(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels[..., None], 3, axis=2)


def oriented(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What stands in a file whose upright image is `pixels`: the turn that Pillow would undo."""
    turns = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM], 5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }  # fmt: skip
    image = Image.fromarray(pixels)
    for turn in turns[orientation]:
        image = image.transpose(turn)
    return np.asarray(image)


RGB = scene(HEIGHT, WIDTH, 5, seed=3)[0]
L = RGB[..., 1]
RNG = np.random.default_rng(0)
ALPHA = (np.linspace(0, 255, WIDTH)[None] * np.ones((HEIGHT, 1))).astype(np.uint8)
RGB16 = RNG.integers(0, 65536, (HEIGHT, WIDTH, 3), dtype=np.uint16)
ALPHA16 = ALPHA.astype(np.uint16) * 257 + (ALPHA < 255)
L16 = RGB16[..., 0]
RGBA16 = np.dstack([RGB16, ALPHA16])
RGBA = np.dstack([RGB, ALPHA])
BINARY = L > 100
PALETTE = Image.fromarray(RGB).quantize(16)
SEEN = np.asarray(PALETTE) != 3
CMYK = Image.fromarray(RGB).convert("CMYK")
MULTIPLIED16 = np.dstack([(RGB16 * (ALPHA16[..., None] / 65535)).astype(np.uint16), ALPHA16])


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = orientation
    return data


# Name: (file, RGB, alpha or None).
LOSSLESS = {
    "rgb.png": (encoded(Image.fromarray(RGB), "PNG"), RGB, None),
    "rgba.png": (encoded(Image.fromarray(RGBA), "PNG"), RGB, ALPHA),
    "opaque.png": (encoded(Image.fromarray(RGB).convert("RGBA"), "PNG"), RGB, None),
    "l.png": (encoded(Image.fromarray(L), "PNG"), grey(L), None),
    "la.png": (encoded(Image.fromarray(np.dstack([L, ALPHA]), "LA"), "PNG"), grey(L), ALPHA),
    "binary.png": (encoded(Image.fromarray(BINARY), "PNG"), grey(BINARY * np.uint8(255)), None),
    "palette.png": (encoded(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB")), None),
    "palette_seen.png": (
        encoded(PALETTE, "PNG", transparency=3),
        np.asarray(PALETTE.convert("RGB")),
        SEEN * np.uint8(255),
    ),
    "colour_key.png": (
        encoded(Image.fromarray(RGB), "PNG", transparency=tuple(RGB[0, 0].tolist())),
        RGB,
        (RGB != RGB[0, 0]).any(axis=2) * np.uint8(255),
    ),
    "l16.png": (png16(L16[..., None]), grey(to_8_bits(L16)), None),
    "la16.png": (png16(np.dstack([L16, ALPHA16])), grey(to_8_bits(L16)), to_8_bits(ALPHA16)),
    "rgb16.png": (png16(RGB16), to_8_bits(RGB16), None),
    "rgba16.png": (png16(RGBA16), to_8_bits(RGB16), to_8_bits(ALPHA16)),
    "grey_key16.png": (
        png16(L16[..., None], (int(L16[2, 3]),)),
        grey(to_8_bits(L16)),
        (L16 != L16[2, 3]) * np.uint8(255),
    ),
    "colour_key16.png": (
        png16(RGB16, tuple(RGB16[2, 3].tolist())),
        to_8_bits(RGB16),
        (RGB16 != RGB16[2, 3]).any(axis=2) * np.uint8(255),
    ),
    "rgb.bmp": (encoded(Image.fromarray(RGB), "BMP"), RGB, None),
    "l.bmp": (encoded(Image.fromarray(L), "BMP"), grey(L), None),
    "rgba.webp": (
        encoded(Image.fromarray(RGBA), "WEBP", lossless=True, exact=True), RGB, ALPHA,
    ),
    "rgb.tif": (encoded(Image.fromarray(RGB), "TIFF"), RGB, None),
    "rgba.tiff": (encoded(Image.fromarray(RGBA), "TIFF", compression="tiff_lzw"), RGB, ALPHA),
    "la.tif": (encoded(Image.fromarray(np.dstack([L, ALPHA]), "LA"), "TIFF"), grey(L), ALPHA),
    "binary.tif": (
        encoded(Image.fromarray(BINARY), "TIFF", compression="group4"),
        grey(BINARY * np.uint8(255)),
        None,
    ),
    "cmyk.tif": (encoded(CMYK, "TIFF"), np.asarray(CMYK.convert("RGB")), None),
    "l16.tif": (tiff(L16), grey(to_8_bits(L16)), None),
    "l16_big_endian.tif": (tiff(L16, byteorder=">"), grey(to_8_bits(L16)), None),
    "white16.tif": (tiff(L16, photometric="miniswhite"), grey(to_8_bits(65535 - L16)), None),
    "la16.tif": (
        tiff(np.dstack([L16, ALPHA16]), photometric="minisblack", extrasamples=["unassalpha"],
             planarconfig="contig"),
        grey(to_8_bits(L16)),
        to_8_bits(ALPHA16),
    ),
    "rgb16.tif": (tiff(RGB16, photometric="rgb"), to_8_bits(RGB16), None),
    "rgb16_lzw.tif": (
        tiff(RGB16, photometric="rgb", compression="lzw", predictor=True), to_8_bits(RGB16), None,
    ),
    "rgb16_planar.tif": (
        tiff(RGB16.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"),
        to_8_bits(RGB16),
        None,
    ),
    "rgba16.tif": (
        tiff(RGBA16, photometric="rgb", extrasamples=["unassalpha"], compression="zlib",
             predictor=True, bigtiff=True),
        to_8_bits(RGB16),
        to_8_bits(ALPHA16),
    ),
    "fourth_is_no_alpha16.tif": (
        tiff(RGBA16, photometric="rgb", extrasamples=["unspecified"]), to_8_bits(RGB16), None,
    ),
    "page_and_thumbnail.tif": (
        tiff_pages((RGB[::4, ::4], {"subfiletype": 1}), (RGB, {})), RGB, None,
    ),
    "page_and_thumbnail_that_pillow_does_not_know.tif": (
        tiff_pages(
            (np.dstack([L16, ALPHA16])[::4, ::4], {"planarconfig": "contig", "subfiletype": 1}),
            (np.dstack([L16, ALPHA16]), {"planarconfig": "contig", "extrasamples": [2]}),
        ),
        grey(to_8_bits(L16)),
        to_8_bits(ALPHA16),
    ),
    "page_and_thumbnail16.tif": (
        tiff_pages((RGB16[::4, ::4], {"subfiletype": 1}), (RGB16, {"photometric": "rgb"})),
        to_8_bits(RGB16),
        None,
    ),
    **{
        f"orientation{i}.tif": (
            tiff(oriented(RGB, i), photometric="rgb", extratags=[(274, 3, 1, i, True)]), RGB, None,
        )
        for i in range(2, 9)
    },
    **{
        f"orientation{i}_16.tif": (
            tiff(oriented(L16, i), photometric="miniswhite", extratags=[(274, 3, 1, i, True)]),
            grey(to_8_bits(65535 - L16)),
            None,
        )
        for i in range(2, 9)
    },
    "turned.png": (encoded(Image.fromarray(RGB), "PNG", exif=exif(6)), RGB, None),
}  # fmt: skip
LOSSY = {
    "rgb.jpg": encoded(Image.fromarray(RGB), "JPEG"),
    "l.jpeg": encoded(Image.fromarray(L), "JPEG"),
    "cmyk.jpg": encoded(CMYK, "JPEG"),
    "turned.jpg": encoded(Image.fromarray(RGB), "JPEG", exif=exif(6)),
    "rgb.webp": encoded(Image.fromarray(RGB), "WEBP"),
    "ycbcr.tif": encoded(Image.fromarray(RGB), "TIFF", compression="jpeg"),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_images_are_what_was_written(tmp_path, name):
    content, rgb, alpha = LOSSLESS[name]
    (tmp_path / name).write_bytes(content)
    picture = read_picture(tmp_path / name)
    assert picture.image.dtype == np.uint8
    np.testing.assert_array_equal(picture.image, rgb)
    if alpha is None:
        assert picture.alpha is None
    else:
        assert picture.alpha.dtype == np.uint8
        np.testing.assert_array_equal(picture.alpha, alpha)


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_images_are_as_pillow_decodes_them(tmp_path, name):
    (tmp_path / name).write_bytes(LOSSY[name])
    picture = read_picture(tmp_path / name)
    with Image.open(io.BytesIO(LOSSY[name])) as image:
        np.testing.assert_array_equal(picture.image, np.asarray(image.convert("RGB")))
    assert picture.image.shape == (HEIGHT, WIDTH, 3) and picture.alpha is None
    assert np.abs(picture.image.astype(int) - RGB).mean() < (60 if "l." in name else 20)


def test_opencv_reads_the_same_sixteen_bits(tmp_path):
    cv2 = pytest.importorskip("cv2")
    for name, pixels in {"rgb16.png": RGB16[..., ::-1], "rgb16.tif": RGB16[..., ::-1]}.items():
        assert cv2.imwrite(str(tmp_path / name), np.ascontiguousarray(pixels))
        np.testing.assert_array_equal(read_picture(tmp_path / name).image, to_8_bits(RGB16))


def test_alpha_that_is_multiplied_in_is_divided_out(tmp_path):
    path = tmp_path / "associated.tif"
    path.write_bytes(tiff(MULTIPLIED16, photometric="rgb", extrasamples=["assocalpha"]))
    picture = read_picture(path)
    np.testing.assert_array_equal(picture.alpha, to_8_bits(ALPHA16))
    clear = ALPHA > 25  # below, the colours have lost their bits
    difference = picture.image[clear].astype(int) - to_8_bits(RGB16)[clear]
    assert np.abs(difference).max() <= 1


def test_a_jpeg_with_pictures_behind_it_is_its_first(tmp_path):
    """What phones write: MPO."""
    first, second = Image.fromarray(RGB), Image.fromarray(RGB[::-1].copy())
    stream = io.BytesIO()
    first.save(stream, "MPO", save_all=True, append_images=[second])
    (tmp_path / "phone.jpg").write_bytes(stream.getvalue())
    picture = read_picture(tmp_path / "phone.jpg")
    assert np.abs(picture.image.astype(int) - RGB).mean() < 20


PAGES = [Image.fromarray(RGB), Image.fromarray(RGB[::-1].copy())]
BAD = {
    "empty.png": (b"", "cannot identify image file"),
    "html.jpg": (b"<html>not found</html>", "cannot identify image file"),
    "cut.jpg": (LOSSY["rgb.jpg"][:900], "truncated"),
    "cut.png": (LOSSLESS["rgb.png"][0][:-500], "truncated|incomplete|broken|Truncated"),
    "cut16.png": (LOSSLESS["rgb16.png"][0][:-500], "not a readable photo"),
    "cut16.tif": (LOSSLESS["rgb16_lzw.tif"][0][:900], "not a readable photo|truncated|corrupted"),
    "float.tif": (tiff(L.astype(np.float32)), "mode F"),
    "double.tif": (tiff(L.astype(np.float64)), "float64 pixels"),
    "half.tif": (tiff(L.astype(np.float16)), "float16 pixels"),
    "int16.tif": (tiff(L16.astype(np.int16)), "int16 pixels"),
    "int32.tif": (tiff(L.astype(np.int32)), "mode I"),
    "cmyk16.tif": (
        tiff(RGBA16, photometric="separated"), r"expected 16-bit grey or RGB; found SEPARATED",
    ),
    "two_pages16.tif": (
        tiff(np.stack([L16, L16]), photometric="minisblack"), "found 2 in this TIFF file",
    ),
    "two_pages_that_pillow_does_not_know.tif": (
        tiff_pages(*[(np.dstack([L16, ALPHA16]), {"planarconfig": "contig"})] * 2),
        "found 2 in this TIFF file",
    ),
    "two_pages.tif": (
        encoded(PAGES[0], "TIFF", save_all=True, append_images=PAGES[1:]),
        "found 2 in this TIFF file",
    ),
    "animation.webp": (
        encoded(PAGES[0], "WEBP", save_all=True, append_images=PAGES[1:]),
        "found 2 in this WEBP file",
    ),
    "animation.png": (
        encoded(PAGES[0], "PNG", save_all=True, append_images=PAGES[1:]),
        "found 2 in this PNG file",
    ),
    "bomb.png": (
        encoded(Image.new("1", (30000, 30000)), "PNG"), "not a readable photo: Image size",
    ),
    "bomb16.png": (
        LOSSLESS["rgb16.png"][0].replace(
            struct.pack(">II", WIDTH, HEIGHT), struct.pack(">II", 2**31 - 1, 2**31 - 1)
        ),
        "not a readable photo: 2147483647 x 2147483647 pixels are too many",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_said(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message):
        read_picture(tmp_path / name)


def test_no_file_and_no_regular_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_picture(tmp_path / "none.png")
    with pytest.raises(ValueError, match="not a regular file"):
        read_picture(tmp_path)


@pytest.mark.parametrize("name,package", [("rgb16.png", "imagecodecs"), ("rgb16.tif", "tifffile")])
def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(LOSSLESS[name][0])
    with pytest.raises(ValueError, match=rf"need {package}: pip install .*\[images\]"):
        read_picture(tmp_path / name)


@pytest.mark.parametrize("name", ["l16.png", "l16.tif"])
def test_grey_of_16_bits_needs_no_extra(tmp_path, monkeypatch, name):
    for package in ("imagecodecs", "tifffile"):
        monkeypatch.setitem(sys.modules, package, None)
    test_lossless_images_are_what_was_written(tmp_path, name)
