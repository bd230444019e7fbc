"""Panoptic maps: ids, segments, and PNG files, on every backend against masks per id."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEVICE, need_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from fastembed import dispatch, ops, png
from fastembed.dispatch import BACKENDS
from fastembed.ops import panoptic
from fastembed.testing import (
    colours_of,
    oracle_panoptic,
    oracle_segments,
    panoptic_map,
    segment_rows,
)

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 2**24 - 1
CPU_BACKENDS = ("reference", "numba", "native")


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    need_backend(request.param, "panoptic", ("decode_panoptic", "panoptic_segments"))
    return request.param


@pytest.fixture(params=BACKENDS)
def png_backend(request) -> str:
    need_backend(request.param, "panoptic", ("scanline_segments",))
    return request.param


@pytest.fixture(params=["libdeflate", "zlib"])
def inflate(request, monkeypatch):
    """Each inflate library in turn."""
    if request.param == "libdeflate":
        pytest.importorskip("deflate", reason="the package deflate is not installed")
        assert png.inflater()[0] == "libdeflate"
    else:
        monkeypatch.setattr(png, "inflater", lambda: ("zlib", png._zlib_decompress))


def on_device(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)


# --- a PNG encoder that takes orders ------------------------------------------------------


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


# --- ids and segments ----------------------------------------------------------------------

id_maps = hnp.arrays(
    dtype=np.int32,
    shape=st.tuples(st.integers(1, 12), st.integers(1, 80)),
    elements=st.one_of(st.sampled_from([0, 1, 255, 256, 65536, LARGEST]), st.integers(0, LARGEST)),
)


@settings(max_examples=200, deadline=None)
@given(ids=id_maps, void=st.sampled_from([0, None, 255, LARGEST]), step=st.sampled_from([1, 2, -1]))
def test_any_map(ids, void, step):
    ids = ids[:, ::step]  # not contiguous
    colours = colours_of(ids)[:, ::-1][:, ::-1]
    expected = oracle_segments(ids, void)
    for backend in CPU_BACKENDS:
        if dispatch.find("panoptic", "panoptic_segments", "cpu", backend)[0] is None:
            continue  # test_case_equals_its_oracle skips it, visibly
        np.testing.assert_array_equal(ops.decode_panoptic(colours, backend=backend), ids)
        for pixels in (ids, colours):
            found = ops.panoptic_segments(pixels, void=void, backend=backend)
            np.testing.assert_array_equal(segment_rows(found), expected)


@pytest.mark.parametrize("colours", [False, True])
@pytest.mark.parametrize("width", [1, 2, 21, 22, 23, 42, 43, 64, 65, 513])
def test_every_width(width, colours, backend):
    """Rows shorter and longer than the blocks that kernels look at, down to one pixel."""
    rng = np.random.default_rng(width)
    ids = np.repeat(rng.integers(0, 9, (3, width)), 5, axis=1)[:, 2 : 2 + width].astype(np.int32)
    ids[2] += rng.integers(0, 2, width, dtype=np.int32) * 65536
    found = ops.panoptic_segments(on_device(colours_of(ids) if colours else ids), backend=backend)
    np.testing.assert_array_equal(segment_rows(found), oracle_segments(ids))
    decoded = ops.decode_panoptic(on_device(colours_of(ids)), backend=backend)
    np.testing.assert_array_equal(decoded.cpu(), ids)


def test_one_pixel_and_nothing_but_void(backend):
    for value in (0, 7):
        pixel = on_device(np.full((1, 1), value, dtype=np.int32))
        every = ops.panoptic_segments(pixel, void=None, backend=backend)
        assert [part.tolist() for part in every] == [[value], [[0, 0, 0, 0]], [1]]
        segments = ops.panoptic_segments(pixel, backend=backend)
        assert len(segments.ids) == (1 if value else 0)
        assert segments.boxes.shape == (len(segments.ids), 4)
        assert (segments.ids.dtype, segments.boxes.dtype) == (torch.int32, torch.int32)
        assert segments.areas.dtype == torch.int64


@pytest.mark.parametrize("distinct", [128, 129, 1024, 1025, 5000])
def test_more_ids_than_the_first_table_holds(distinct, backend):
    assert panoptic.FIRST_SLOTS // 2 == 128
    rng = np.random.default_rng(distinct)
    ids = rng.permutation(LARGEST)[:distinct].astype(np.int32) + 1
    found = ops.panoptic_segments(on_device(ids[None]), backend=backend)
    order = np.argsort(ids)
    np.testing.assert_array_equal(found.ids.cpu(), ids[order])
    box = np.column_stack([0 * order, order, 0 * order, order])
    np.testing.assert_array_equal(found.boxes.cpu(), box)
    np.testing.assert_array_equal(found.areas.cpu(), np.ones(distinct))


@pytest.mark.parametrize("cpu_backend", CPU_BACKENDS)
def test_every_pixel_its_own_id(cpu_backend):
    need_backend(cpu_backend, "panoptic", ("panoptic_segments",))
    height, width = 300, 400
    ids = np.random.default_rng(0).permutation(LARGEST)[: height * width].astype(np.int32) + 1
    order = np.argsort(ids)
    box = np.column_stack([order // width, order % width] * 2)
    ids = ids.reshape(height, width)
    for pixels in (ids, colours_of(ids)):
        found = ops.panoptic_segments(pixels, backend=cpu_backend)
        np.testing.assert_array_equal(found.ids, ids.ravel()[order])
        np.testing.assert_array_equal(found.boxes, box)
        assert (found.areas == 1).all() and len(found.areas) == ids.size


@pytest.mark.parametrize("spacing", [2**8, 2**12, 2**16, 0x144CBC89])
def test_ids_that_are_alike_do_not_crowd_one_slot(spacing, backend):
    """Multiples of powers of two, and of the hash's inverse: neighbours in the table."""
    ids = (np.arange(1, 101, dtype=np.int64) * spacing).astype(np.int32)  # wraps: any int32 is fine
    found = ops.panoptic_segments(on_device(np.stack([ids, ids[::-1]])), void=None, backend=backend)
    expected = oracle_segments(np.stack([ids, ids[::-1]]), None)
    np.testing.assert_array_equal(segment_rows(found), expected)


def test_negative_ids_and_the_extremes(backend):
    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    ids = np.array([[low, -1, -1], [high, 0, low]], dtype=np.int32)
    for void in (0, None, -1, low, high):
        found = ops.panoptic_segments(on_device(ids), void=void, backend=backend)
        np.testing.assert_array_equal(segment_rows(found), oracle_segments(ids, void))


def test_outputs_are_written_whole(backend):
    rgb = colours_of(panoptic_map(33, 65, seed=4))
    for sentinel in (-1, 7):
        out = torch.full((33, 65), sentinel, dtype=torch.int32, device=DEVICE)
        assert ops.decode_panoptic(on_device(rgb), out=out, backend=backend) is out
        np.testing.assert_array_equal(out.cpu(), oracle_panoptic(rgb))


@pytest.mark.parametrize("sentinel", [-1, 0, 1, 2**62])
def test_a_table_may_hold_anything_before(sentinel, backend):
    ids = panoptic_map(20, 40, seed=1)
    run = dispatch.resolve("panoptic", "panoptic_segments", DEVICE, backend)
    table = torch.full((1 + 64, 6), sentinel, dtype=torch.int64, device=DEVICE)
    run(on_device(ids), 0, table)
    header, rows = table.cpu().numpy()[0], table.cpu().numpy()[1:]
    rows = rows[rows[:, 5] > 0]
    np.testing.assert_array_equal(rows[rows[:, 0].argsort()], oracle_segments(ids))
    assert header[0] == len(rows)


def test_results_are_of_the_kind_that_came_in():
    rgb = colours_of(panoptic_map(20, 30, seed=0))
    assert all(isinstance(part, np.ndarray) for part in ops.panoptic_segments(rgb))
    assert all(isinstance(part, torch.Tensor) for part in ops.panoptic_segments(on_device(rgb)))
    assert isinstance(ops.decode_panoptic(rgb), np.ndarray)
    rgb.flags.writeable = False
    np.testing.assert_array_equal(ops.decode_panoptic(rgb), oracle_panoptic(rgb))


def test_refusals():
    rgb = np.zeros((4, 5, 3), dtype=np.uint8)
    cases = [
        (
            ValueError,
            r"rgb must be \[H, W, 3\].*\[4, 5\]",
            lambda: ops.decode_panoptic(rgb[..., 0]),
        ),
        (ValueError, r"got \[4, 5, 2\]", lambda: ops.decode_panoptic(rgb[..., :2])),
        (ValueError, r"got \[0, 5, 3\]", lambda: ops.decode_panoptic(rgb[:0])),
        (TypeError, "rgb must be uint8; got int32", lambda: ops.decode_panoptic(rgb.astype("i4"))),
        (
            ValueError,
            "out must have dtype torch.int32; got torch.int64",
            lambda: ops.decode_panoptic(rgb, out=np.zeros((4, 5), np.int64)),
        ),
        (ValueError, r"got int32 \[4, 5, 3\]", lambda: ops.panoptic_segments(rgb.astype("i4"))),
        (ValueError, r"got uint8 \[4, 5\]", lambda: ops.panoptic_segments(rgb[..., 0])),
        (
            ValueError,
            r"no axis 0; got uint8 \[4, 0, 3\]",
            lambda: ops.panoptic_segments(rgb[:, :0]),
        ),
        (TypeError, "got int64", lambda: ops.panoptic_segments(np.zeros((4, 5), np.int64))),
        (TypeError, "pixels must be a NumPy array", lambda: ops.panoptic_segments([[1]])),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


# --- PNG -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*png.FILTERS, "mixed"])
@pytest.mark.parametrize("height,width", [(1, 1), (3, 2), (5, 21), (7, 22), (40, 150)])
@pytest.mark.parametrize("content", ["map", "noise"])
def test_every_filter(content, height, width, kind, png_backend):
    rng = np.random.default_rng(height)
    if content == "map":
        rgb = colours_of(panoptic_map(height, width, seed=width))
    else:
        rgb = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    filters = rng.integers(0, 5, height) if kind == "mixed" else png.FILTERS.index(kind)
    data = encoded(rgb, np.broadcast_to(filters, height), parts=3)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), rgb)
    expected = oracle_segments(oracle_panoptic(rgb), None)
    alone, nothing = ops.panoptic_png_segments(data, void=None, backend=png_backend)
    assert nothing is None
    both, ids = ops.panoptic_png_segments(data, void=None, with_ids=True, backend=png_backend)
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


def test_files_of_others(png_backend, inflate, tmp_path):
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
            found, decoded = ops.panoptic_png_segments(source, with_ids=True, backend=png_backend)
            np.testing.assert_array_equal(segment_rows(found), oracle_segments(ids))
            np.testing.assert_array_equal(decoded, ids)


def test_the_image_of_the_data_set(real_data, png_backend):
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
    found, ids = ops.panoptic_png_segments(path, with_ids=True, backend=png_backend)
    assert list(map(tuple, segment_rows(found).tolist())) == sorted(expected)
    np.testing.assert_array_equal(ids, oracle_panoptic(np.asarray(Image.open(path))))
    again = ops.panoptic_segments(ids, void=None, backend=png_backend)
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


def test_the_kernels_stay_inside_their_memory(tmp_path):
    """csrc/panoptic.cpp on noise, under AddressSanitizer and UndefinedBehaviorSanitizer."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "sanitize"
    sources = [ROOT / "tests/sanitize_panoptic.cpp", ROOT / "csrc/panoptic.cpp"]
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    build = subprocess.run(
        [compiler, *flags, "-I", ROOT / "csrc", *sources, "-o", program],
        capture_output=True, text=True,
    )  # fmt: skip
    if build.returncode != 0 and "san" in build.stderr and "error:" not in build.stderr:
        pytest.skip(f"the sanitizers' libraries are not installed: {build.stderr[-200:]}")
    assert build.returncode == 0, build.stderr
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) > 100_000
