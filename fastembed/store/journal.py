"""What is committed and not merged yet: one append-only log per run, a record per commit.

A record is a header, index rows (an Arrow IPC stream), padding, and the vectors. It starts and its
vectors start at a multiple of a vector's bytes from the start of the file, so that the file as an
array [., D] holds every vector as a row, and a merge gathers rows with one index.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import uuid
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa

from .. import staging

_NAME = re.compile(r"staged-[0-9a-f]{32}\.log")
_MAGIC = b"fembed01"
_PREFIX = struct.Struct("<8sI")  # magic; CRC-32 of all that follows in the record
_SIZES = struct.Struct("<IQQ")  # bytes of a vector, of the index rows; number of vectors
_HEADER = _PREFIX.size + _SIZES.size


def paths(folder: Path) -> list[Path]:
    """The logs in `folder`."""
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if _NAME.fullmatch(entry.name))


class LogWriter:
    """A run's own log; the file comes with the first record."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"staged-{uuid.uuid4().hex}.log"
        self._descriptor: int | None = None
        self._end = 0

    def append(self, rows: pa.Table, vectors: np.ndarray) -> None:
        """Commits vectors [n, D] and their n index rows: on disk when this returns.

        Raises:
            OSError: disk full and the like; the log is as it was.
        """
        if vectors.ndim != 2 or len(vectors) != len(rows) or vectors.dtype not in ("f4", "f2"):
            raise ValueError(
                f"vectors must be float32 or float16 [{len(rows)}, D]; "
                f"got {vectors.dtype} {list(vectors.shape)}"
            )
        record = _record(rows, np.ascontiguousarray(vectors))
        if self._descriptor is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._descriptor = os.open(self.path, flags, 0o666)
            sync(self.path.parent)
        try:
            for piece in record:
                staging.write_fully(self._descriptor, piece)
            os.fdatasync(self._descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._end)
                os.lseek(self._descriptor, self._end, os.SEEK_SET)
            raise
        self._end += sum(len(piece) for piece in record)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Log:
    """The whole records of a log.

    Attributes:
        index: their index rows.
        places: int64 [n], where the vector of each is: the row number in the file.
        damaged: records that are there, but are not what was written.
        dtype, dim: of the vectors.
    """

    def __init__(self, path: Path) -> None:
        data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
        tables, places, width = [], [], 1
        start = self.damaged = 0
        while (sizes := _sizes(data, start)) is not None:
            width, index_bytes, count = sizes
            first = -(-(start + _HEADER + index_bytes) // width)
            end = (first + count) * width
            if end > len(data):  # torn: the run was killed in this commit
                break
            body = memoryview(data)[start + _PREFIX.size : end]
            # A record that was damaged later is as good as none: its samples are made again.
            if zlib.crc32(body) == _PREFIX.unpack_from(data, start)[1]:
                index = body[_SIZES.size : _SIZES.size + index_bytes]
                with pa.ipc.open_stream(pa.py_buffer(index)) as stream:
                    tables.append(stream.read_all())
                places.append(np.arange(first, first + count))
            else:
                self.damaged += 1
            start = end
        if sizes is None and len(data) - start >= _HEADER:  # nothing that a torn commit leaves
            self.damaged += 1
        self.index = pa.concat_tables(tables) if tables else None
        self.places = np.concatenate(places) if places else np.empty(0, np.int64)
        if tables:
            self.dtype = np.dtype(self.index.schema.metadata[b"dtype"].decode())
            self.dim = width // self.dtype.itemsize
            self._vectors = data[:start].view(self.dtype).reshape(-1, self.dim)

    def __len__(self) -> int:
        return len(self.places)

    def rows(self, places: np.ndarray) -> np.ndarray:
        """The vectors at these places [n]: [n, D]."""
        return self._vectors[places]


def sync(path: Path) -> None:
    """What was written to a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _record(rows: pa.Table, vectors: np.ndarray) -> list[memoryview]:
    """The bytes of a record, in pieces."""
    rows = rows.replace_schema_metadata({"dtype": vectors.dtype.name})
    index = pa.BufferOutputStream()
    with pa.ipc.new_stream(index, rows.schema) as stream:
        stream.write_table(rows)
    index = index.getvalue()
    width = vectors.shape[1] * vectors.itemsize
    sizes = _SIZES.pack(width, len(index), len(vectors))
    body = [sizes, index, bytes(-(_HEADER + len(index)) % width), vectors.view(np.uint8)]
    crc = 0
    for piece in body:
        crc = zlib.crc32(piece, crc)
    return [memoryview(piece).cast("B") for piece in (_PREFIX.pack(_MAGIC, crc), *body)]


def _sizes(data: np.ndarray, start: int) -> tuple[int, int, int] | None:
    """The sizes in the header at `start`; None where no record starts."""
    if len(data) < start + _HEADER or _PREFIX.unpack_from(data, start)[0] != _MAGIC:
        return None
    sizes = _SIZES.unpack_from(data, start + _PREFIX.size)
    return sizes if sizes[0] > 0 else None
