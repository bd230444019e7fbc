"""Reading only what is needed."""

from __future__ import annotations

import io
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fastembed import npy
from fastembed.npy import PixelBuffer, read_channels


def image(dtype: str = "uint16") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 250, (8, 13, 17)).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", ">u2", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_prefix_equals_np_load(tmp_path, dtype, order, version):
    array = np.asarray(image(dtype), order=order)
    path = tmp_path / "a b é.npy"
    with path.open("wb") as stream:
        np.lib.format.write_array(stream, array, version=version)
    result = read_channels(path, 5, PixelBuffer())
    assert result.shape == (5, 13, 17)
    assert result.numpy().dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(result.numpy(), np.load(path)[:5])


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (8, 13, 17), (1, 2, 3, 4)])
@pytest.mark.parametrize("dtype", ["<u2", ">f4", "|u1", "<c8", "<U3", "|b1", "<f2"])
def test_header_as_numpy_reads_it(tmp_path, shape, dtype):
    for version in ((1, 0), (2, 0)):
        path = tmp_path / "a.npy"
        with path.open("wb") as stream:
            np.lib.format.write_array(stream, np.zeros(shape, dtype), version=version)
            end = stream.tell()
        with path.open("rb") as stream:
            header = npy._read_header(stream.fileno(), end)
        array = np.load(path)
        assert header == (shape, False, array.dtype, end - array.nbytes)


def test_a_header_by_another_writer(tmp_path):
    """Another order of keys, no spaces: left to NumPy's own parser."""
    array = image()
    text = b"{'shape':(8,13,17),'fortran_order':False,'descr':'<u2'}\n"
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + bytes([len(text), 0]) + text + array.tobytes())
    np.testing.assert_array_equal(read_channels(path, 5, PixelBuffer()), array[:5])


def test_the_usual_header_needs_no_parser(tmp_path, monkeypatch):
    """Python 3.11's parser fails when it is interrupted by itself in another thread."""
    np.save(tmp_path / "a.npy", image())
    monkeypatch.delattr(npy, "_parse_header")
    assert read_channels(tmp_path / "a.npy", 5, PixelBuffer()).shape == (5, 13, 17)


def test_the_parser_runs_in_one_thread_at_a_time(tmp_path, monkeypatch):
    path = tmp_path / "a.npy"
    np.save(path, image())
    path.write_bytes(path.read_bytes().replace(b"'descr': '<u2'", b"'descr':'<u2' "))
    parse, inside, most = npy._parse_header, [], []

    def slow(stream):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.002)
        inside.pop()
        return parse(stream)

    monkeypatch.setattr(npy, "_parse_header", slow)
    with ThreadPoolExecutor(8) as pool:
        reads = pool.map(lambda _: read_channels(path, 5, PixelBuffer()).shape, range(64))
        assert set(reads) == {(5, 13, 17)}
    assert max(most) == 1


def test_only_the_prefix_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.npy"
    np.save(path, image())
    read = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: read.append(preadv(*a)) or read[-1])
    read_channels(path, 2, PixelBuffer())
    assert sum(read) == 2 * 13 * 17 * 2


def test_short_reads_are_continued(tmp_path, monkeypatch):
    path = tmp_path / "a.npy"
    np.save(path, image())
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:100]], at))
    np.testing.assert_array_equal(read_channels(path, 5, PixelBuffer()), image()[:5])


def test_the_buffer_is_reused(tmp_path):
    buffer = PixelBuffer()
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", image())
    first = read_channels(tmp_path / "a.npy", 5, buffer)
    second = read_channels(tmp_path / "b.npy", 3, buffer)
    assert first.data_ptr() == second.data_ptr()


def as_bytes(array: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    "content,error,message",
    [
        (b"", ValueError, "empty"),
        (b"PK\x03\x04 not an array", ValueError, r"not a readable \.npy"),
        (b"\x93NUMPY", ValueError, r"not a readable \.npy"),
        (
            as_bytes(image())[:-1],
            ValueError,
            "truncated: the header promises 3664 bytes; found 3663",
        ),
        (as_bytes(image())[:200], ValueError, "truncated"),
        (as_bytes(image()[:3]), ValueError, "at least 5 channels; found 3"),
        (as_bytes(image()[0]), ValueError, r"\[C, H, W\]; found shape \[13, 17\]"),
        (as_bytes(image()[:, :0]), ValueError, r"found shape \[8, 0, 17\]"),
        (as_bytes(image("float64")), TypeError, "found float64"),
        (as_bytes(image("int32")), TypeError, "found int32"),
        (as_bytes(np.array([{}] * 5)[:, None, None]), TypeError, "found object"),
    ],
)
def test_refusals(tmp_path, content, error, message):
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    with pytest.raises(error, match=message):
        read_channels(path, 5, PixelBuffer())


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_channels(tmp_path / "no.npy", 5, PixelBuffer())


def test_buffer_grows():
    buffer = PixelBuffer()
    assert len(buffer.take(10)) == 10
    assert len(buffer.take(100)) == 100
    assert buffer.take(50).dtype == torch.uint8
