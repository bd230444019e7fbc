"""What is committed and not merged yet: one append-only log per run, a record per commit.

A record is a header, index rows (an Arrow IPC stream), padding, and the vectors. It starts and its
vectors start at a multiple of a vector's bytes from the start of the file, so that the file as an
array [., D] holds every vector as a row, and a merge gathers rows with one index.

The checksum is XXH3. The first version of these records had zlib's CRC-32, which took as long as
the write; both are read.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from .. import staging

_NAME = re.compile(r"staged-[0-9a-f]{32}\.log")
_MAGIC = b"fembed02"
_PREFIX = struct.Struct("<8sQ")  # magic; checksum of all that follows in the record
_SIZES = struct.Struct("<IQQ")  # bytes of a vector, of the index rows; number of vectors
# By magic: the prefix, and the checksum.
_VERSIONS: dict[bytes, tuple[struct.Struct, Callable]] = {
    _MAGIC: (_PREFIX, xxhash.xxh3_64_intdigest),
    b"fembed01": (struct.Struct("<8sI"), zlib.crc32),
}
_PIECE = 1 << 18  # bytes that are gathered for one write: they stay in a core's cache


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

    def append(self, rows: pa.Table, vectors: np.ndarray | Sequence[np.ndarray]) -> None:
        """Commits n vectors and their index rows: on disk when this returns.

        Args:
            rows: n of them.
            vectors: [n, D], or several [n_i, D] that are n together; float32 or float16, each
                contiguous.

        Raises:
            OSError: disk full and the like; the log is as it was.
        """
        pieces = [vectors] if isinstance(vectors, np.ndarray) else vectors
        _check(pieces, len(rows))
        if self._descriptor is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._descriptor = os.open(self.path, flags, 0o666)
            sync(self.path.parent)
        try:
            end = self._write(rows, pieces)
            os.fdatasync(self._descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._end)
            raise
        self._end = end

    def _write(self, rows: pa.Table, pieces: Sequence[np.ndarray]) -> int:
        """Writes a record; where it ends."""
        dtype, dim = pieces[0].dtype, pieces[0].shape[1]
        index = pa.BufferOutputStream()
        rows = rows.replace_schema_metadata({"dtype": dtype.name})
        with pa.ipc.new_stream(index, rows.schema) as stream:
            stream.write_table(rows)
        index, width = index.getvalue(), dim * dtype.itemsize
        sizes = _SIZES.pack(width, len(index), len(rows))
        header = _PREFIX.size + len(sizes) + len(index)
        checksum = xxhash.xxh3_64()
        os.lseek(self._descriptor, self._end + _PREFIX.size, os.SEEK_SET)
        for part in (sizes + index.to_pybytes() + bytes(-header % width), *_gathered(pieces)):
            checksum.update(part)
            staging.write_fully(self._descriptor, part)
        end = os.lseek(self._descriptor, 0, os.SEEK_CUR)
        os.lseek(self._descriptor, self._end, os.SEEK_SET)
        staging.write_fully(self._descriptor, _PREFIX.pack(_MAGIC, checksum.intdigest()))
        return end

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
        while (header := _header(data, start)) is not None:
            prefix, checksum, (width, index_bytes, count) = header
            first = -(-(start + prefix.size + _SIZES.size + index_bytes) // width)
            end = (first + count) * width
            if end > len(data):  # torn: the run was killed in this commit
                break
            body = memoryview(data)[start + prefix.size : end]
            # A record that was damaged later is as good as none: its samples are made again.
            if checksum(body) == prefix.unpack_from(data, start)[1]:
                index = body[_SIZES.size : _SIZES.size + index_bytes]
                with pa.ipc.open_stream(pa.py_buffer(index)) as stream:
                    tables.append(stream.read_all())
                places.append(np.arange(first, first + count))
            else:
                self.damaged += 1
            start = end
        # A commit that was torn leaves no magic: it is written last.
        if header is None and data[start : start + len(_MAGIC)].any():
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

    def rows_into(self, out: np.ndarray, places: np.ndarray) -> None:
        """The vectors at these places [n] into `out` [n, D]."""
        np.take(self._vectors, places, axis=0, out=out, mode="clip")  # "raise" would buffer `out`


def sync(path: Path) -> None:
    """What was written to a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check(pieces: Sequence[np.ndarray], count: int) -> None:
    dtype, shape = (pieces[0].dtype, pieces[0].shape[1:]) if pieces else (None, ())
    alike = all(piece.dtype == dtype and piece.shape[1:] == shape for piece in pieces)
    if not alike or dtype not in ("f4", "f2") or len(shape) != 1 or sum(map(len, pieces)) != count:
        found = sorted({f"{piece.dtype} {list(piece.shape)}" for piece in pieces})
        raise ValueError(
            f"vectors must be float32 or float16 [{count}, D]; got {', '.join(found[:3])}"
        )


def _gathered(pieces: Sequence[np.ndarray]) -> Iterator[memoryview | bytes]:
    """The bytes of many small arrays, about `_PIECE` at a time; a large one as it is."""
    some = max(1, _PIECE * len(pieces) // max(1, sum(piece.nbytes for piece in pieces)))
    if some == 1:
        return (memoryview(piece.reshape(-1).view(np.uint8)) for piece in pieces)
    return (b"".join(pieces[i : i + some]) for i in range(0, len(pieces), some))


def _header(data: np.ndarray, start: int) -> tuple[struct.Struct, Callable, tuple] | None:
    """The prefix, the checksum and the sizes of the record at `start`; None where none starts."""
    version = _VERSIONS.get(data[start : start + len(_MAGIC)].tobytes())
    if version is None or len(data) < start + version[0].size + _SIZES.size:
        return None
    sizes = _SIZES.unpack_from(data, start + version[0].size)
    return (*version, sizes) if sizes[0] > 0 else None
