"""Caches whose index is a table of parquet: a zarr store, and the files that `convert` makes."""

from __future__ import annotations

import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

try:
    import pyarrow.parquet as pq
except ImportError as error:
    raise ImportError(
        f"zarr, parquet and safetensors need pyarrow ({error}): "
        "pip install 'fastembed-vision[zarr]'"
    ) from error

from ..store.shards import Shards

INDEX = "index.parquet"
VECTORS = "embedding"  # the column of vectors, where they stand in the table

Key = str | tuple[str, int]


class _TableCache(ABC):
    """Keys and columns of a table, one row per vector, in the vectors' order."""

    form: ClassVar[str]

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connect()

    @abstractmethod
    def _connect(self) -> None:
        """Opens index and vectors."""

    # Maps and readers are opened anew in another process.
    def __getstate__(self) -> Path:
        return self._path

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)

    def __len__(self) -> int:
        return self._index.metadata.num_rows

    @abstractmethod
    def rows(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of these rows [n]: [n, D]."""

    def block(self, start: int, stop: int) -> np.ndarray:
        return self.rows(np.arange(start, stop))

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        names = self._index.schema_arrow.names
        return tuple(name for name in names if name not in ("row", VECTORS))

    def keys(self) -> Iterator[Key]:
        for batch in self._index.iter_batches(columns=list(self._key_columns)):
            columns = [column.to_pylist() for column in batch.columns]
            yield from columns[0] if len(columns) == 1 else zip(*columns, strict=True)

    def column(self, name: str) -> np.ndarray:
        if name not in (*self.columns, "row") or name not in self._index.schema_arrow.names:
            raise KeyError(name)
        return self._index.read([name])[name].to_numpy()

    def row(self, key: Key) -> int:
        hashes, order = self._hashes
        first, last = (np.searchsorted(hashes, hash(key), side) for side in ("left", "right"))
        for row in order[first:last]:
            found = tuple(column[row].as_py() for column in self._keys)
            if (found if len(found) > 1 else found[0]) == key:
                return int(row)
        raise KeyError(key)

    @functools.cached_property
    def _key_columns(self) -> tuple[str, ...]:
        return ("image_id", "segment_id") if "segment_id" in self.columns else ("name",)

    @functools.cached_property
    def _keys(self) -> list:
        table = self._index.read(list(self._key_columns)).combine_chunks()
        return [table[name] for name in self._key_columns]

    @functools.cached_property
    def _hashes(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted hashes of the keys, and their rows: 16 bytes a key, where a dict takes 200."""
        hashes = np.fromiter(map(hash, self.keys()), np.int64, len(self))
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order


class ZarrCache(_TableCache):
    """One store-<digest>; index and array are of the same run, whatever happens meanwhile."""

    form = "zarr"

    def _connect(self) -> None:
        try:
            self._open()
        except FileNotFoundError:  # a run has just put another in its place
            self._open()

    def _open(self) -> None:
        path = self._path.resolve()
        self._array = Shards(path)
        self._index = pq.ParquetFile(path.parent / INDEX, memory_map=True)
        self._path = path

    def rows(self, rows: np.ndarray) -> np.ndarray:
        return self._array.rows(rows)


class SafetensorsCache(_TableCache):
    """One array in a file that is mapped, and index.parquet beside it.

    The format is read here and not by its library, which maps the file anew for every slice and
    has no rows by index.
    """

    form = "safetensors"

    def _connect(self) -> None:
        with self._path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        about = header["embeddings"]
        dtype = {"F16": "<f2", "F32": "<f4"}[about["dtype"]]
        self._array = np.memmap(
            self._path, dtype, "r", 8 + length + about["data_offsets"][0], tuple(about["shape"])
        ).view(np.ndarray)
        self._index = pq.ParquetFile(self._path.with_name(INDEX), memory_map=True)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        return self._array[rows]

    def block(self, start: int, stop: int) -> np.ndarray:
        return self._array[start:stop]


class ParquetCache(_TableCache):
    """Vectors as a column of the table, read by the row group."""

    form = "parquet"

    def _connect(self) -> None:
        self._index = pq.ParquetFile(self._path, memory_map=True, page_checksum_verification=True)
        about = self._index.schema_arrow.field(VECTORS).type
        self._dim, self._dtype = about.list_size, about.value_type.to_pandas_dtype()
        counts = [
            self._index.metadata.row_group(i).num_rows for i in range(self._index.num_row_groups)
        ]
        self._ends = np.cumsum(counts)
        self._group: tuple[int, np.ndarray] | None = None

    def rows(self, rows: np.ndarray) -> np.ndarray:
        result = np.empty((len(rows), self._dim), self._dtype)
        groups = np.searchsorted(self._ends, rows, side="right")
        for group in np.unique(groups):
            first = self._ends[group - 1] if group else 0
            result[groups == group] = self._read(int(group))[rows[groups == group] - first]
        return result

    def _read(self, group: int) -> np.ndarray:
        """The vectors of a row group; the last one is kept."""
        kept = self._group
        if kept is None or kept[0] != group:
            column = self._index.read_row_group(group, columns=[VECTORS])[VECTORS]
            flat = column.combine_chunks().flatten().to_numpy()
            kept = self._group = group, flat.reshape(-1, self._dim)
        return kept[1]
