"""The .npy format: read only the channels that are needed.

`numpy.lib.format` writes the headers, and parses those that NumPy itself would not have
written; this file decides what is read.
"""

from __future__ import annotations

import functools
import io
import os
import re
import threading

import numpy as np
import torch
from numpy.lib import format as npy_format

_HEADER_GUESS = 4096  # one page; NumPy pads headers to 64 bytes and most are 128
# What NumPy writes. Python's parser, which reads any header, is not safe in several threads
# before 3.12: "AST constructor recursion depth mismatch" (python/cpython#106905).
_HEADER = re.compile(
    rb"\x93NUMPY(?:\x01\x00(?P<short>..)|\x02\x00(?P<long>....))"
    rb"(?P<text>\{'descr': '(?P<dtype>[<>|](?:[iu][1248]|f[248]))', "
    rb"'fortran_order': (?P<fortran>False|True), "
    rb"'shape': \((?P<shape>(?:\d+, )+\d+|\d+,)\), \} *\n)",
    re.DOTALL,
)
_PARSER = threading.Lock()
_DTYPES = {np.dtype("u1"): torch.uint8, np.dtype("u2"): torch.uint16, np.dtype("f4"): torch.float32}


class PixelBuffer:
    """Memory that is filled by one file after another.

    A fresh buffer per file would cost a mapping and its page faults each time: most of what
    np.load does on a file that the page cache holds.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, count: int) -> torch.Tensor:
        """The first `count` bytes: uint8 [count]. They hold until the next call."""
        if len(self._bytes) < count:
            self._bytes = torch.empty(count, dtype=torch.uint8)
        return self._bytes[:count]


def read_channels(path: str | os.PathLike, count: int, buffer: PixelBuffer) -> torch.Tensor:
    """The first `count` channels of a [C, H, W] array file.

    Args:
        path: a .npy file of uint8, uint16 or float32. C order in native bytes is read
            straight into `buffer`; Fortran order and foreign bytes are right but slower.
        count: channels to read, from 0 on; the file must have at least as many.
        buffer: where the pixels go; the result is a view that the next read overwrites.

    Returns:
        [count, H, W] tensor of the file's dtype.

    Raises:
        ValueError: empty or truncated file, not .npy, another shape, too few channels.
        TypeError: another dtype.
        OSError: the file cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        shape, fortran_order, dtype, offset = _read_header(descriptor, size)
        if len(shape) != 3 or 0 in shape:
            raise ValueError(f"expected an array [C, H, W]; found shape {list(shape)}")
        if shape[0] < count:
            raise ValueError(f"expected at least {count} channels; found {shape[0]}")
        native = dtype.newbyteorder("=")
        if native not in _DTYPES:
            raise TypeError(f"expected uint8, uint16 or float32 pixels; found {dtype}")
        expected = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if size < expected:
            raise ValueError(f"truncated: the header promises {expected} bytes; found {size}")
        if fortran_order or not dtype.isnative:
            order = "F" if fortran_order else "C"
            pixels = np.memmap(path, dtype, "r", offset, tuple(shape), order)[:count]
            return torch.from_numpy(np.array(pixels, dtype=native, order="C"))
        prefix = (count, *shape[1:])
        target = buffer.take(int(np.prod(prefix, dtype=np.int64)) * dtype.itemsize)
        _read_fully(descriptor, target.numpy(), offset)
        return target.view(_DTYPES[native]).view(prefix)
    finally:
        os.close(descriptor)


def encoded(array: np.ndarray) -> bytes:
    """A C-contiguous array as the bytes of a .npy file."""
    return _written_header(array.dtype, array.shape) + array.tobytes()


def decoded(content: bytes) -> np.ndarray:
    """The array that the bytes of a .npy file hold, whole; a view of them.

    Raises:
        ValueError: not .npy, too few bytes or too many.
    """
    shape, fortran_order, dtype, offset = _header_of(content[:_HEADER_GUESS])
    expected = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if len(content) != expected:
        raise ValueError(f"the header promises {expected} bytes; found {len(content)}")
    values = np.frombuffer(content, dtype, offset=offset)
    return values.reshape(shape, order="F" if fortran_order else "C")


@functools.lru_cache(maxsize=64)
def _written_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    fields = {"descr": npy_format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy_format.write_array_header_1_0(stream, fields)
    return stream.getvalue()


def _read_header(descriptor: int, size: int) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """(shape, Fortran order, dtype, offset of the data)."""
    if size == 0:
        raise ValueError("the file is empty (0 bytes)")
    return _header_of(os.pread(descriptor, _HEADER_GUESS, 0))


def _header_of(start: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    usual = _HEADER.match(start)
    if usual and int.from_bytes(usual["short"] or usual["long"], "little") == len(usual["text"]):
        shape = tuple(int(length) for length in usual["shape"].rstrip(b",").split(b", "))
        return shape, usual["fortran"] == b"True", np.dtype(usual["dtype"].decode()), usual.end()
    stream = io.BytesIO(start)
    with _PARSER:
        return _parse_header(stream)


def _parse_header(stream: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    try:
        version = npy_format.read_magic(stream)
        if version == (1, 0):
            shape, fortran_order, dtype = npy_format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, fortran_order, dtype = npy_format.read_array_header_2_0(stream)
        else:
            raise ValueError(f"format version {version} is not one that plain arrays use")
    except ValueError as error:
        raise ValueError(f"not a readable .npy file: {error}") from error
    return shape, fortran_order, dtype, stream.tell()


def _read_fully(descriptor: int, target: np.ndarray, offset: int) -> None:
    view = memoryview(target)
    done = 0
    while done < len(view):
        got = os.preadv(descriptor, [view[done:]], offset + done)
        if got == 0:
            raise ValueError(f"truncated while it was read: {len(view) - done} bytes are missing")
        done += got
