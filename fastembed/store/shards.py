"""The array, written by the shard and read through memory maps.

Not compressed: the mantissas of embeddings are noise. zstd (level 3) takes 92 % of the space of
float16 SigLIP features of photos, at 0.1 to 0.2 GB/s; LZ4 100 %.

In an uncompressed shard the rows of every inner chunk stand as they are, each chunk followed by its
checksum, so that a memory map with strides is the array, and a buffer with strides, written as it
is, a shard. TensorStore takes several copies more to write the same bytes; and it ends a process
that was forked after its first use, and so a DataLoader's workers.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import zlib
from collections.abc import Callable, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import torch

SHARD_ROWS = 4096
CHUNK_ROWS = 64
_CHECKSUM = 4  # bytes of the CRC-32C after a chunk, and after a shard's index
_PIECES = 1024  # that Linux takes in one call
_WRITERS = 4  # shards that are on their way to the disk


class Shards:
    """The rows of an array that `write` wrote. All its files are mapped when this returns, so it
    reads the same array for ever, also when a run has put another in its place.

    Args:
        lost: shards that are not mapped, because they cannot be; their rows must not be asked for.

    Raises:
        FileNotFoundError: there is no such array, or a shard is missing.
        ValueError: an array of another layout, or a damaged one.
    """

    def __init__(self, path: Path, lost: Set[int] = frozenset()) -> None:
        metadata = json.loads((path / "zarr.json").read_text())
        self.path = path
        self._count, self.dim = metadata["shape"]
        self.dtype = np.dtype(metadata["data_type"])
        if metadata["codecs"] != _codecs(self.dim):
            raise ValueError(f"{path} must be an array of fastembed's; it has {metadata['codecs']}")
        self._views = [
            None if number in lost else self._map(number)
            for number in range(-(-len(self) // SHARD_ROWS))
        ]

    def __len__(self) -> int:
        return self._count

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The rows at `indices` [n], each in 0..N-1: [n, D]."""
        result = np.empty((len(indices), self.dim), self.dtype)
        self.rows_into(result, indices)
        return result

    def rows_into(self, out: np.ndarray, indices: np.ndarray) -> None:
        """The rows at `indices` [n] into `out` [n, D]."""
        shards, rows = np.divmod(indices, SHARD_ROWS)
        chunks, rows = np.divmod(rows, CHUNK_ROWS)
        order = np.argsort(shards, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            if len(group):
                out[group] = self._views[shards[group[0]]][chunks[group], rows[group]]

    def _map(self, number: int) -> np.ndarray:
        """A shard's rows, [chunks, CHUNK_ROWS, D]."""
        path = shard_path(self.path, number)
        chunks, stride, index, size = _layout(shard_rows(len(self), number), self.dim, self.dtype)
        if path.stat().st_size != size:
            raise ValueError(f"{path} must have {size} bytes; it has {path.stat().st_size}")
        # Keeps no descriptor open, as np.memmap does: there are thousands of shards.
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
        if data[chunks * stride : -_CHECKSUM].tobytes() != index:
            raise ValueError(f"{path} is damaged, or was not written by fastembed")
        row = stride // CHUNK_ROWS
        view = np.ndarray(
            (chunks, CHUNK_ROWS, self.dim), self.dtype, data, 0,
            (stride, row, self.dtype.itemsize),
        )  # fmt: skip
        view.flags.writeable = False
        return view


def write(
    path: Path,
    shape: tuple[int, int],
    dtype: np.dtype,
    attributes: dict,
    fill: Callable[[int, np.ndarray], Path | None],
) -> None:
    """Writes a new array. Its shards are on disk when this returns; their names, and
    ``zarr.json``, are for the caller to sync.

    Args:
        fill: puts the rows of a shard, by its number, into an array [n, D], or gives a file that
            holds them already, which is then linked. Called from several threads.

    Raises:
        OSError: disk full and the like.
    """
    create(path, shape, dtype, attributes)
    buffers = threading.local()

    def one(number: int) -> None:
        target = shard_path(path, number)
        target.parent.mkdir(parents=True)
        if not hasattr(buffers, "rows"):  # fresh memory costs as much as writing it
            buffers.rows = np.empty((SHARD_ROWS, shape[1]), dtype)
        count = shard_rows(shape[0], number)
        source = fill(number, buffers.rows[:count])
        if source is None:
            buffers.rows[count:] = 0
            _write_shard(target, buffers.rows, count)
        else:
            os.link(source, target)

    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="shard") as pool:
        list(pool.map(one, range(-(-shape[0] // SHARD_ROWS))))


def create(path: Path, shape: tuple[int, int], dtype: np.dtype, attributes: dict) -> None:
    """A new array without rows: its folder and its metadata."""
    path.mkdir()
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype.name,
        "fill_value": 0.0,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [SHARD_ROWS, shape[1]]},
        },
        "chunk_key_encoding": {"name": "default"},
        "codecs": _codecs(shape[1]),
        "dimension_names": ["row", "feature"],
        "attributes": attributes,
    }
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
    (path / "zarr.json").write_text(text)


def fingerprint(path: Path, rows: int, dim: int, dtype: np.dtype) -> str:
    """What tells a shard from others: the CRC-32 of its chunks' checksums, 8 hexadecimal digits.

    A chunk's checksum does not say where the chunk belongs: two shards that change places, or one
    of an older store, have sound chunks.
    """
    chunks, stride, _, _ = _layout(rows, dim, dtype)
    sums = []
    with path.open("rb") as stream:
        for chunk in range(chunks):
            stream.seek((chunk + 1) * stride - _CHECKSUM)
            sums.append(stream.read(_CHECKSUM))
    return f"{zlib.crc32(b''.join(sums)):08x}"


def faults(
    path: Path,
    rows: int,
    dim: int,
    dtype: np.dtype,
    expected: str | None = None,
    read: bool = True,
) -> tuple[str, list[int]]:
    """What is wrong with a shard of so many rows: with all of it, or else which of its chunks are
    not what was written.

    Args:
        expected: its fingerprint; None where it is not known.
        read: look into the chunks.

    Raises:
        ImportError: zarr, and with it google-crc32c, is not installed.
    """
    from google_crc32c import value as crc32c

    chunks, stride, index, size = _layout(rows, dim, dtype)
    try:
        found = path.stat().st_size
        if found != size:
            return f"it has {found} bytes instead of {size}", []
        with path.open("rb") as stream:
            stream.seek(chunks * stride)
            tail = stream.read()
            if tail != index + crc32c(index).to_bytes(_CHECKSUM, "little"):
                return "its index is damaged", []
            stream.seek(0)
            bad = []
            for chunk in range(chunks if read else 0):
                content = stream.read(stride)
                sum_ = int.from_bytes(content[-_CHECKSUM:], "little")
                if crc32c(content[:-_CHECKSUM]) != sum_:
                    bad.append(chunk)
        if expected is not None and not bad and fingerprint(path, rows, dim, dtype) != expected:
            return "it is another shard than was written here", []
        return "", bad
    except FileNotFoundError:
        return "it is not there", []
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}", []


def _layout(rows: int, dim: int, dtype: np.dtype) -> tuple[int, int, bytes, int]:
    """Of a shard: number of chunks, bytes of each with its checksum, index, bytes in all."""
    chunks = -(-rows // CHUNK_ROWS)
    stride = CHUNK_ROWS * dim * dtype.itemsize + _CHECKSUM
    index = np.full((SHARD_ROWS // CHUNK_ROWS, 2), -1, "<i8")
    index[:chunks] = [(i * stride, stride) for i in range(chunks)]
    return chunks, stride, index.tobytes(), chunks * stride + index.nbytes + _CHECKSUM


def shard_path(path: Path, number: int) -> Path:
    return path / "c" / str(number) / "0"


def shard_rows(rows: int, number: int) -> int:
    """Rows of shard `number` in an array of `rows`."""
    return min(SHARD_ROWS, rows - number * SHARD_ROWS)


def _write_shard(path: Path, rows: np.ndarray, count: int) -> None:
    """The first `count` of these rows as a shard, on disk when this returns."""
    chunks, _, index, _ = _layout(count, rows.shape[1], rows.dtype)
    data = rows.reshape(SHARD_ROWS // CHUNK_ROWS, -1).view(np.uint8)
    data.flags.writeable = False  # which google_crc32c asks for
    pieces = []
    for chunk in data[:chunks]:
        pieces += [chunk, _checksum(chunk)]
    pieces += [index, _checksum(index)]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _write_pieces(descriptor, pieces)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_pieces(descriptor: int, pieces: list[bytes | np.ndarray]) -> None:
    """One after the other, without copying them together."""
    views = [memoryview(piece).cast("B") for piece in pieces]
    while views:
        written = os.writev(descriptor, views[:_PIECES])
        if written == 0:
            raise OSError(errno.EIO, "writev returned 0")
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if written:
            views[0] = views[0][written:]


def _checksum(data: np.ndarray | bytes) -> bytes:
    return google_crc32c.value(data).to_bytes(_CHECKSUM, "little")


def _codecs(dim: int) -> list[dict]:
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    return [
        {
            "name": "sharding_indexed",
            "configuration": {
                "chunk_shape": [CHUNK_ROWS, dim],
                "codecs": [little, {"name": "crc32c"}],
                "index_codecs": [little, {"name": "crc32c"}],
            },
        }
    ]
