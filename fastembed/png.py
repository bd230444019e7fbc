"""PNG files up to their filtered scanlines; the kernels undo the filters.

Read here is only what panoptic maps are: 8-bit RGB, not interlaced. Everything that a file
says is checked before it is believed: signature, chunk order, every CRC, the image's size
against what so many compressed bytes can hold, and the zlib stream's own length and checksum.
"""

from __future__ import annotations

import functools
import os
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}
FILTERS = ("None", "Sub", "Up", "Average", "Paeth")

# A deflate stream spends at least two bits on a match of at most 258 bytes.
_LARGEST_EXPANSION = 1032

_CHUNK = struct.Struct(">I4s")
_HEADER = struct.Struct(">IIBBBBB")


def read_scanlines(png: bytes | bytearray | memoryview | str | os.PathLike) -> np.ndarray:
    """The scanlines of an 8-bit RGB PNG, each its filter type and its filtered bytes.

    Args:
        png: the file's bytes, or its path.

    Returns:
        [H, 1 + 3 W] uint8, read-only; every [y, 0] is an index into `FILTERS`.

    Raises:
        ValueError: not a PNG; truncated or corrupted; another kind of PNG (grey, palette,
            alpha, 16-bit, interlaced). Memory stays within about 1032 times the file's size.
        OSError: the path cannot be read.
        TypeError: neither bytes nor a path.
    """
    if isinstance(png, (str, os.PathLike)):
        with open(png, "rb") as file:
            png = file.read()
    try:
        data = memoryview(png).cast("B")
    except TypeError as error:
        raise TypeError(f"png must be bytes or a path; got {type(png).__name__}") from error
    if data[:8] != SIGNATURE:
        raise ValueError(f"png must start with the PNG signature; got {bytes(data[:8])!r}")
    chunks = _chunks(data)
    kind, body = next(chunks)
    if kind != b"IHDR":
        raise ValueError(f"png must have IHDR as its first chunk; got {_name(kind)}")
    height, width = _size(body)
    lines = np.frombuffer(_inflate(_pixel_data(chunks), height, width), dtype=np.uint8)
    lines = lines.reshape(height, 1 + 3 * width)
    filters = lines[:, 0]
    if filters.max() >= len(FILTERS):
        row = int(np.argmax(filters >= len(FILTERS)))
        raise ValueError(f"png filter types must be 0..4; got {filters[row]} in row {row}")
    return lines


@functools.cache
def inflater() -> tuple[str, Callable[[memoryview | bytes, int], bytes]]:
    """The name of the inflate library, and (zlib stream, size) -> bytes, size at the most.

    libdeflate where the package `deflate` is installed, else Python's own zlib.
    """
    try:
        import deflate
    except ImportError:
        return "zlib", _zlib_decompress
    return "libdeflate", functools.partial(_libdeflate_decompress, deflate)


def _libdeflate_decompress(deflate, stream: memoryview | bytes, size: int) -> bytes:
    try:
        return deflate.zlib_decompress(stream, size)
    except deflate.DeflateError as error:
        raise ValueError("it is truncated, corrupted or longer") from error


def _zlib_decompress(stream: memoryview | bytes, size: int) -> bytes:
    decompressor = zlib.decompressobj()
    try:
        result = decompressor.decompress(stream, size + 1)
    except zlib.error as error:
        raise ValueError(f"it is corrupted: {error}") from error
    if len(result) > size or not decompressor.eof:  # zlib compares the checksum at the end
        raise ValueError("it is truncated or longer")
    return result


def _inflate(stream: memoryview | bytes, height: int, width: int) -> bytes:
    size = height * (1 + 3 * width)
    message = f"png of {height}x{width} must hold a zlib stream of {size} bytes"
    if size > len(stream) * _LARGEST_EXPANSION:
        raise ValueError(f"{message}; its {len(stream)} compressed bytes cannot be so many")
    try:
        result = inflater()[1](stream, size)
    except ValueError as error:
        raise ValueError(f"{message}; {error}") from error
    if len(result) != size:
        raise ValueError(f"{message}; got {len(result)}")
    return result


def _chunks(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Type and body of every chunk up to IEND; what follows that is not read."""
    at = len(SIGNATURE)
    kind = b""
    while kind != b"IEND":
        if len(data) < at + 12:
            raise ValueError(f"png ends at byte {len(data)}, before its IEND chunk")
        length, kind = _CHUNK.unpack_from(data, at)
        end = at + 8 + length
        if len(data) < end + 4:
            raise ValueError(f"png ends at byte {len(data)}, inside its chunk {_name(kind)}")
        if zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError(f"png chunk {_name(kind)} at byte {at} is corrupted: wrong CRC")
        yield kind, data[at + 8 : end]
        at = end + 4


def _size(header: memoryview) -> tuple[int, int]:
    """(height, width) of an IHDR body, once it is one of an 8-bit RGB image."""
    if len(header) != _HEADER.size:
        raise ValueError(f"png IHDR must have {_HEADER.size} bytes; got {len(header)}")
    width, height, depth, colour, compression, filtering, interlace = _HEADER.unpack(header)
    if not (0 < width < 2**31 and 0 < height < 2**31):
        raise ValueError(f"png sides must be in 1..2147483647; got {height}x{width}")
    if (depth, colour) != (8, 2) or interlace != 0:
        kind = COLOUR_TYPES.get(colour, f"colour type {colour}")
        raise ValueError(
            "png must be 8-bit RGB and not interlaced, as panoptic maps are; got "
            f"{depth}-bit {kind}{', interlaced' * (interlace != 0)}. An image decoder may read "
            "it: pass its array to panoptic_segments"
        )
    if (compression, filtering) != (0, 0):
        raise ValueError(
            f"png compression and filter methods must be 0; got {compression} and {filtering}"
        )
    return height, width


def _pixel_data(chunks: Iterator[tuple[bytes, memoryview]]) -> memoryview | bytes:
    """The bodies of all IDAT chunks, which must be neighbours, joined."""
    parts: list[memoryview] = []
    before = b"IHDR"
    for kind, body in chunks:
        if kind == b"IDAT":
            if parts and before != b"IDAT":
                raise ValueError(f"png IDAT chunks must be neighbours; got {_name(before)} between")
            parts.append(body)
        elif kind == b"IEND":
            if len(body):
                raise ValueError(f"png IEND must be empty; got {len(body)} bytes")
        elif not kind[0] & 0x20 and not (kind == b"PLTE" and not parts):
            raise ValueError(f"png has a critical chunk {_name(kind)} that has no place here")
        before = kind
    if not parts:
        raise ValueError("png has no IDAT chunk")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _name(kind: bytes) -> str:
    return kind.decode("latin-1") if kind.isalpha() else repr(kind)
