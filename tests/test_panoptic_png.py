"""Panoptic PNG files: every filter, files of others, and every way to be damaged."""

from __future__ import annotations

import io
import itertools
import json
import struct
import zlib

import numpy as np
import pytest
from conftest import need_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastembed import dispatch, ops, png
from fastembed.ops import panoptic
from fastembed.testing import (
    colours_of,
    oracle_panoptic,
    oracle_segments,
    panoptic_map,
    segment_rows,
)


# Files are read on the CPU, also beside a GPU; Triton has no room for them.
@pytest.fixture(params=["reference", "numba", "native"])
def backend(request) -> str:
    need_backend(request.param, "panoptic", ("scanline_segments",), "cpu")
    return request.param


@pytest.fixture(params=["libdeflate", "zlib"])
def inflate(request, monkeypatch):
    """Each inflate library in turn."""
    if request.param == "libdeflate":
        pytest.importorskip("deflate", reason="the package deflate is not installed")
        assert png.inflater()[0] == "libdeflate"
    else:
        monkeypatch.setattr(png, "inflater", lambda: ("zlib", png._zlib_decompress))


def filtered(rgb: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """Scanlines [H, 1 + 3 W] of an image, row y by filter type filters[y]."""
    height, width, _ = rgb.shape
    image = np.zeros((1 + height, 3 + 3 * width), dtype=np.int16)
    image[1:, 3:] = rgb.reshape(height, -1)
    x, a, b, c = image[1:, 3:], image[1:, :-3], image[:-1, 3:], image[:-1, :-3]
    p = a + b - c
    near_a, near_b, near_c = abs(p - a), abs(p - b), abs(p - c)
    paeth = np.where(
        (near_a <= near_b) & (near_a <= near_c), a, np.where(near_b <= near_c, b, c)
    )  # fmt: skip
    predictions = np.stack([np.zeros_like(x), a, b, (a + b) // 2, paeth])
    chosen = predictions[filters, np.arange(height)]
    return np.column_stack([filters, x - chosen]).astype(np.uint8)


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I4s", len(body), kind) + body + struct.pack(">I", checksum)


def header(height: int, width: int, depth=8, colour=2, compression=0, filtering=0, interlace=0):
    values = width, height, depth, colour, compression, filtering, interlace
    return chunk(b"IHDR", struct.pack(">IIBBBBB", *values))


def encoded(rgb: np.ndarray, filters: np.ndarray, parts: int = 1) -> bytes:
    """A PNG file whose pixel data lie in so many IDAT chunks."""
    stream = zlib.compress(filtered(rgb, filters).tobytes(), 1)
    bounds = np.linspace(0, len(stream), parts + 1).astype(int)
    idat = [chunk(b"IDAT", stream[i:j]) for i, j in itertools.pairwise(bounds)]
    return b"".join([png.SIGNATURE, header(*rgb.shape[:2]), *idat, chunk(b"IEND")])


def pillow_file(image: np.ndarray | Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(stream, "PNG", **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", [*png.FILTERS, "mixed"])
@pytest.mark.parametrize("height,width", [(1, 1), (3, 2), (5, 21), (7, 22), (40, 150)])
@pytest.mark.parametrize("content", ["map", "noise"])
def test_every_filter(content, height, width, kind, backend):
    rng = np.random.default_rng(height)
    if content == "map":
        rgb = colours_of(panoptic_map(height, width, seed=width))
    else:
        rgb = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    filters = rng.integers(0, 5, height) if kind == "mixed" else png.FILTERS.index(kind)
    data = encoded(rgb, np.broadcast_to(filters, height), parts=3)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), rgb)
    expected = oracle_segments(oracle_panoptic(rgb), None)
    alone, nothing = ops.panoptic_png_segments(data, void=None, backend=backend)
    assert nothing is None
    both, ids = ops.panoptic_png_segments(data, void=None, with_ids=True, backend=backend)
    np.testing.assert_array_equal(segment_rows(alone), expected)
    np.testing.assert_array_equal(segment_rows(both), expected)
    np.testing.assert_array_equal(ids, oracle_panoptic(rgb))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), width=st.integers(1, 80), density=st.sampled_from([2, 30, 100]))
def test_any_scanlines(data, width, density):
    """Residuals that no encoder would choose, and every mixture of filters."""
    filters = np.array(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=8)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    residuals = rng.integers(0, 256, (len(filters), 3 * width))
    residuals *= rng.random(residuals.shape) * 100 < density
    lines = np.column_stack([filters, residuals]).astype(np.uint8)
    rgb = panoptic.unfilter_reference(lines).reshape(len(lines), width, 3)
    np.testing.assert_array_equal(filtered(rgb, filters), lines)
    stream = chunk(b"IDAT", zlib.compress(lines.tobytes()))
    file = png.SIGNATURE + header(len(lines), width) + stream + chunk(b"IEND")
    expected = oracle_segments(oracle_panoptic(rgb))
    for backend in ("numba", "native"):
        if dispatch.find("panoptic", "scanline_segments", "cpu", backend)[0] is None:
            continue  # test_every_filter skips it, visibly
        out = np.full((len(lines), width), -1, dtype=np.int32)
        found, ids = ops.panoptic_png_segments(file, out=out, backend=backend)
        assert ids is out
        np.testing.assert_array_equal(ids, oracle_panoptic(rgb))
        np.testing.assert_array_equal(segment_rows(found), expected)


def test_files_of_others(backend, inflate, tmp_path):
    cv2 = pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    ids = panoptic_map(61, 93, seed=2)
    rgb = colours_of(ids)
    files = {"pillow": pillow_file(rgb), "small": pillow_file(rgb, optimize=True)}
    for name in ("NONE", "SUB", "UP", "AVG", "PAETH"):
        flags = [cv2.IMWRITE_PNG_FILTER, getattr(cv2, f"IMWRITE_PNG_FILTER_{name}")]
        files[name] = cv2.imencode(".png", rgb[:, :, ::-1], flags)[1].tobytes()
    for name, data in files.items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(data)
        for source in (data, bytearray(data), memoryview(data), path, str(path)):
            found, decoded = ops.panoptic_png_segments(source, with_ids=True, backend=backend)
            np.testing.assert_array_equal(segment_rows(found), oracle_segments(ids))
            np.testing.assert_array_equal(decoded, ids)


def test_the_image_of_the_data_set(real_data, backend):
    folder = real_data / "coco_panoptic"
    content = json.loads((folder / "annotations/panoptic_val2017.json").read_text())
    (annotation,) = content["annotations"]
    path = folder / "panoptic_val2017" / annotation["file_name"]
    expected = []
    for segment in annotation["segments_info"]:
        x, y, width, height = segment["bbox"]
        box = (y, x, y + height - 1, x + width - 1)
        expected.append((segment["id"], *box, segment["area"]))
    assert len(expected) == 18
    found, ids = ops.panoptic_png_segments(path, with_ids=True, backend=backend)
    assert list(map(tuple, segment_rows(found).tolist())) == sorted(expected)
    np.testing.assert_array_equal(ids, oracle_panoptic(np.asarray(Image.open(path))))
    again = ops.panoptic_segments(ids, void=None, backend=backend)
    assert again.areas.sum() == ids.size and again.ids[0] == 0


def body_of(file: bytes) -> bytes:
    """What lies between the signature and IEND of a file with a 25-byte IHDR."""
    return file[8 : -len(chunk(b"IEND"))]


GOOD = encoded(colours_of(panoptic_map(20, 30, seed=3)), np.arange(20) % 5)
LINES = filtered(colours_of(panoptic_map(20, 30, seed=3)), np.arange(20) % 5).tobytes()
IHDR = header(20, 30)
IEND = chunk(b"IEND")


def with_stream(stream: bytes, head: bytes = IHDR) -> bytes:
    return png.SIGNATURE + head + chunk(b"IDAT", stream) + IEND


BAD_FILES = {
    "empty": (b"", "must start with the PNG signature; got b''"),
    "jpeg": (b"\xff\xd8\xff\xe0" + GOOD, "must start with the PNG signature"),
    "only a signature": (png.SIGNATURE, "ends at byte 8, before its IEND"),
    "no IEND": (GOOD[: -len(IEND)], "before its IEND"),
    "cut in a chunk": (GOOD[:60], "inside its chunk IDAT"),
    "length beyond the file": (
        GOOD[:33] + b"\xff\xff\xff\xff" + GOOD[37:],
        "inside its chunk IDAT",
    ),
    "CRC": (GOOD[:50] + bytes([GOOD[50] ^ 1]) + GOOD[51:], "IDAT at byte 33 is corrupted"),
    "IHDR late": (png.SIGNATURE + chunk(b"tEXt") + GOOD[8:], "IHDR as its first.*got tEXt"),
    "IHDR twice": (png.SIGNATURE + IHDR + GOOD[8:], "critical chunk IHDR"),
    "IHDR short": (png.SIGNATURE + chunk(b"IHDR", b"1234") + IEND, "13 bytes; got 4"),
    "no IDAT": (png.SIGNATURE + IHDR + IEND, "no IDAT"),
    "IDAT apart": (
        png.SIGNATURE + IHDR + chunk(b"IDAT") + chunk(b"tIME") + chunk(b"IDAT") + IEND,
        "neighbours; got tIME between",
    ),
    "PLTE late": (
        png.SIGNATURE + body_of(GOOD) + chunk(b"PLTE", b"123") + IEND,
        "critical chunk PLTE",
    ),
    "critical unknown": (png.SIGNATURE + IHDR + chunk(b"ABCD") + IEND, "critical chunk ABCD"),
    "IEND not empty": (png.SIGNATURE + body_of(GOOD) + chunk(b"IEND", b"x"), "IEND must be empty"),
    "side 0": (png.SIGNATURE + header(0, 30) + GOOD[33:], "got 0x30"),
    "side 2^31": (png.SIGNATURE + header(2**31, 30) + GOOD[33:], "got 2147483648x30"),
    "grey": (pillow_file(np.zeros((4, 4), np.uint8)), "got 8-bit grey"),
    "RGBA": (pillow_file(np.zeros((4, 4, 4), np.uint8)), "got 8-bit RGBA"),
    "palette": (pillow_file(Image.new("P", (4, 4))), "got 1-bit palette"),
    "grey 16": (pillow_file(np.zeros((4, 4), np.uint16)), "got 16-bit grey"),
    "RGB 16": (png.SIGNATURE + header(20, 30, depth=16) + GOOD[33:], "got 16-bit RGB"),
    "colour 5": (png.SIGNATURE + header(20, 30, colour=5) + GOOD[33:], "8-bit colour type 5"),
    "interlaced": (png.SIGNATURE + header(20, 30, interlace=1) + GOOD[33:], "RGB, interlaced"),
    "compression": (png.SIGNATURE + header(20, 30, compression=1) + GOOD[33:], "got 1 and 0"),
    "filter method": (png.SIGNATURE + header(20, 30, filtering=1) + GOOD[33:], "got 0 and 1"),
    "huge": (png.SIGNATURE + header(2**31 - 1, 2**31 - 1) + GOOD[33:], "cannot be so many"),
    "bomb": (
        with_stream(zlib.compress(bytes(100_000_000)), header(20_000, 20_000)),
        "cannot be so many",
    ),
    "too few rows": (with_stream(zlib.compress(LINES[:-1])), "stream of 1820 bytes; got 1819"),
    "too many rows": (with_stream(zlib.compress(LINES + b"\0")), "longer"),
    "stream cut": (with_stream(zlib.compress(LINES)[:-5]), "truncated"),
    "checksum cut": (with_stream(zlib.compress(LINES)[:-1]), "truncated"),
    "checksum wrong": (with_stream(zlib.compress(LINES)[:-1] + b"\0"), "corrupted"),
    "no zlib stream": (with_stream(b"\0" * 100), "corrupted"),
    "filter 5": (with_stream(zlib.compress(b"\5" + LINES[1:])), "0..4; got 5 in row 0"),
    "filter 255": (with_stream(zlib.compress(LINES[:-91] + b"\xff" + LINES[-90:])), "in row 19"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name, inflate):
    data, message = BAD_FILES[name]
    with pytest.raises(ValueError, match=message):
        ops.panoptic_png_segments(data)


def test_bytes_after_the_stream_and_after_iend_are_ignored_as_libpng_does(inflate):
    expected, _ = ops.panoptic_png_segments(GOOD)
    for data in (GOOD + b"garbage", with_stream(zlib.compress(LINES) + b"more")):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))).shape, (20, 30, 3))
        found, _ = ops.panoptic_png_segments(data)
        np.testing.assert_array_equal(segment_rows(found), segment_rows(expected))


def test_not_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        ops.panoptic_png_segments(tmp_path / "none.png")
    with pytest.raises(TypeError, match="png must be bytes or a path; got int"):
        ops.panoptic_png_segments(3)
    with pytest.raises(ValueError, match=r"out must have shape \(20, 30\)"):
        ops.panoptic_png_segments(GOOD, out=np.zeros((30, 20), np.int32))


@settings(max_examples=600, deadline=None)
@given(data=st.data())
def test_damage_is_noticed_or_harmless(data):
    """Bytes changed, cut or put in: a ValueError, or an image that Pillow reads the same."""
    file = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        if not file:
            break
        at = data.draw(st.integers(0, len(file) - 1))
        action = data.draw(st.sampled_from(["change", "cut", "insert", "end"]))
        if action == "change":
            file[at] ^= data.draw(st.integers(1, 255))
        elif action == "cut":
            del file[at : at + data.draw(st.integers(1, 8))]
        elif action == "insert":
            file[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        else:
            del file[at:]
    if data.draw(st.booleans()):
        file = repaired(file)
    try:
        _, ids = ops.panoptic_png_segments(bytes(file), with_ids=True)
    except ValueError:
        return
    rgb = np.asarray(Image.open(io.BytesIO(bytes(file))))
    np.testing.assert_array_equal(ids, oracle_panoptic(rgb))


def repaired(file: bytearray) -> bytearray:
    """Right CRCs wherever there still are chunks, so that damage gets past them."""
    at = 8
    while at + 12 <= len(file):
        (length,) = struct.unpack_from(">I", file, at)
        end = at + 8 + length
        if end + 4 > len(file):
            break
        struct.pack_into(">I", file, end, zlib.crc32(file[at + 4 : end]))
        at = end + 4
    return file


@settings(max_examples=300, deadline=None)
@given(noise=st.binary(max_size=200), signed=st.booleans())
def test_noise_is_no_file(noise, signed):
    with pytest.raises(ValueError, match="png"):
        ops.panoptic_png_segments((png.SIGNATURE + IHDR if signed else b"") + noise)


def test_memory_is_bounded_by_the_file(inflate):
    """A small file that declares as much as its bytes could hold gets no more than that."""
    import tracemalloc

    file = with_stream(zlib.compress(bytes(10_000_000), 9), header(3000, 1000))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="9003000 bytes"):
            ops.panoptic_png_segments(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * 9_003_000
