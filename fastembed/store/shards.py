"""The array: written through TensorStore, read through memory maps.

Not compressed: the mantissas of embeddings are noise. zstd (level 3) takes 92 % of the space of
float16 SigLIP features of photos, at 0.1 to 0.2 GB/s; LZ4 100 %.

Reading does without TensorStore, which ends a process that was forked after its first use, and so
a DataLoader's workers. In an uncompressed shard the rows of every inner chunk stand as they are,
each chunk followed by its checksum, so that a memory map with strides is the array.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Set
from pathlib import Path

import numpy as np
import torch

SHARD_ROWS = 4096
CHUNK_ROWS = 64
_CHECKSUM = 4  # bytes of the CRC-32C after a chunk, and after a shard's index
_WRITES = 3  # shards that are on their way to the disk


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
        if not len(indices):
            return result
        shards, rows = np.divmod(indices, SHARD_ROWS)
        chunks, rows = np.divmod(rows, CHUNK_ROWS)
        order = np.argsort(shards, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            result[group] = self._views[shards[group[0]]][chunks[group], rows[group]]
        return result

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
    shard: Callable[[int], np.ndarray | Path],
) -> None:
    """Writes a new array; what is written is not synced.

    Args:
        shard: gives the rows of a shard by its number, or a file that holds them already, which
            is then linked.

    Raises:
        OSError: disk full and the like.
    """
    writes: deque = deque()
    try:
        array = create(path, shape, dtype, attributes)
        for number in range(-(-shape[0] // SHARD_ROWS)):
            rows = shard(number)
            if isinstance(rows, Path):
                _link(rows, shard_path(path, number))
                continue
            start = number * SHARD_ROWS
            target = array[start : start + len(rows)]
            writes.append(target.write(rows, can_reference_source_data_indefinitely=True))
            if len(writes) > _WRITES:
                writes.popleft().result()
        for pending in writes:
            pending.result()
    except (ValueError, RuntimeError) as error:  # what TensorStore makes of the disk's errors
        raise OSError(f"cannot write {path}: {error}") from error


def create(path: Path, shape: tuple[int, int], dtype: np.dtype, attributes: dict):
    """A new array without rows, open in TensorStore; ValueError of its where that fails."""
    import tensorstore

    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path)},
        "context": {
            "file_io_sync": False,
            "file_io_locking": {"mode": "none"},
            "cache_pool": {"total_bytes_limit": 0},
        },
        "store_data_equal_to_fill_value": True,  # a zero row has its place in the file too
        "metadata": {
            "shape": shape,
            "data_type": dtype.name,
            "fill_value": 0,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [SHARD_ROWS, shape[1]]},
            },
            "codecs": _codecs(shape[1]),
            "dimension_names": ["row", "feature"],
            "attributes": attributes,
        },
    }
    return tensorstore.open(spec, create=True).result()


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


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True)
    os.link(source, target)


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
