"""Reading a stored array into memory that is there already.

Chunks that lie on disk as they are in memory (zarr v2, uncompressed, as `VolumeFiles` writes them
by default) are read with plain reads, in pieces that stay in the processor's cache on their way to
their place. All others go through TensorStore.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ..dispatch import load_native

# Fits into a core's second-level cache beside all else that is there.
_PIECE_BYTES = 1 << 18
# TensorStore's threads do not survive a fork, and it ends the process that tries.
_tensorstore_owner = 0


class ChunkedArray:
    """A zarr array in a folder.

    Args:
        path: its folder.
        threads, cache_bytes: of TensorStore's, where it is read through that.

    Raises:
        FileNotFoundError: there is no array. ValueError: its metadata are damaged.
    """

    def __init__(self, path: Path, threads: int = 8, cache_bytes: int = 0) -> None:
        self.path = path
        self._threads, self._cache_bytes = threads, cache_bytes
        self._store = None
        layout = _plain_layout(path)
        if layout is None:
            self._open()
            self.shape, self.dtype = tuple(self._store.shape), self._store.dtype.numpy_dtype
        else:
            self.shape, self._chunks, self.dtype, self._separator = layout

    def read_into(
        self, out: np.ndarray, part: Sequence[slice], pool: ThreadPoolExecutor
    ) -> list[Future]:
        """Starts to read a part into `out`, of that part's shape and any dtype that holds it.

        The futures raise OSError or ValueError where a chunk is missing or damaged.
        """
        ranges = [range(n)[cut] for cut, n in zip(part, self.shape, strict=True)]
        if self._store is not None:
            return [pool.submit(self._read_store, out, ranges)]
        touched = [
            range(r.start // size, -(-r.stop // size))
            for r, size in zip(ranges, self._chunks, strict=True)
        ]
        return [
            pool.submit(self._read_chunk, out, ranges, chunk)
            for chunk in itertools.product(*touched)
        ]

    def _read_store(self, out: np.ndarray, ranges: Sequence[range]) -> None:
        import tensorstore as ts

        view = self._store[tuple(slice(r.start, r.stop) for r in ranges)]
        if out.dtype == self.dtype:
            ts.array(out).write(view).result()
        else:
            out[...] = view.read().result()

    def _read_chunk(self, out: np.ndarray, ranges: Sequence[range], chunk: Sequence[int]) -> None:
        """One chunk's share of the part: runs of its first axis, piece by piece."""
        sizes = self._chunks
        inside, place = [], []  # of each axis what both have: seen from the chunk, from the part
        for r, at, size in zip(ranges, chunk, sizes, strict=True):
            start = at * size
            low, high = max(r.start, start), min(r.stop, start + size)
            inside.append(slice(low - start, high - start))
            place.append(slice(low - r.start, high - r.start))
        target = out[tuple(place)]
        path = self.path / self._separator.join(map(str, chunk))
        row = int(np.prod(sizes[1:], dtype=np.int64)) * self.dtype.itemsize
        buffer = np.empty(max(_PIECE_BYTES // row, 1) * row, np.uint8)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for at in range(0, len(target), len(buffer) // row):
                count = min(len(buffer) // row, len(target) - at)
                read = memoryview(buffer)[: count * row]
                got = os.preadv(descriptor, [read], (inside[0].start + at) * row)
                if got != len(read):
                    raise ValueError(f"{path} is truncated: {len(read) - got} bytes are missing")
                piece = np.frombuffer(read, self.dtype).reshape(count, *sizes[1:])
                _place(piece[(slice(None), *inside[1:])], target[at : at + count])
        finally:
            os.close(descriptor)

    def _open(self) -> None:
        global _tensorstore_owner
        if _tensorstore_owner not in (0, os.getpid()):
            raise RuntimeError(
                f"{self.path} needs TensorStore, which this process' parent has used before the "
                "fork; use DataLoader(multiprocessing_context='spawn') or 'forkserver'"
            )
        import tensorstore as ts

        _tensorstore_owner = os.getpid()
        context = ts.Context({
            "cache_pool": {"total_bytes_limit": self._cache_bytes},
            "data_copy_concurrency": {"limit": self._threads},
            "file_io_concurrency": {"limit": self._threads},
        })  # fmt: skip
        driver = "zarr3" if (self.path / "zarr.json").exists() else "zarr"
        spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{self.path}/"},
                "recheck_cached_data": False}  # fmt: skip
        self._store = ts.open(spec, context=context, read=True).result()


def _place(block: np.ndarray, out: np.ndarray) -> None:
    """``out[...] = block``; natively past the caches, which takes half the time of it."""
    if block.dtype == out.dtype and block.ndim <= 4 and not load_native():
        torch.ops.fastembed.place_block(torch.from_numpy(block), torch.from_numpy(out))
    else:
        out[...] = block


def _plain_layout(path: Path) -> tuple[tuple, tuple, np.dtype, str] | None:
    """(shape, chunks, dtype, separator) of an array whose chunks are plain memory; else None."""
    try:
        metadata = json.loads((path / ".zarray").read_text())
        plain = (
            metadata["compressor"] is None
            and not metadata.get("filters")
            and metadata["order"] == "C"
            and np.dtype(metadata["dtype"]).isnative
        )
        separator = metadata.get("dimension_separator", ".")
        return (
            (tuple(metadata["shape"]), tuple(metadata["chunks"]), np.dtype(metadata["dtype"]),
             separator) if plain else None
        )  # fmt: skip
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}/.zarray is no array's metadata: {error!r}") from error
