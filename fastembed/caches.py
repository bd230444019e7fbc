"""What the jobs leave, read by row and by key: a zarr store, or folders of .npy and .npz files."""

from __future__ import annotations

import csv
import functools
import operator
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from .indexes import ImageTsv, SegmentTsv, Tsv

Key = str | tuple[str, int]
_STORE = "embeddings.zarr"
_STAGED = f"staged-{'[0-9a-f]' * 32}.log"


class EmbeddingStore(Dataset):
    """The vectors of ``fastembed multichannel`` or ``panoptic``, in whichever --format.

    A key is the output's name (``emb_<sha1>``), of segments the pair (image_id, segment_id). Rows
    are in the order of the index. As a dataset it gives vectors by row. It works in forked and in
    spawned DataLoader workers, which share one page cache; nothing is read before it is asked for.

    Of a zarr store it goes on to read what was there when it was opened, also while and after a
    run adds to it.

    Args:
        folder: the job's output folder.

    Raises:
        FileNotFoundError: no run has finished there. ValueError: it holds caches of two formats.
        ImportError: a zarr store, and pyarrow is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._cache = _open(self.folder)

    def __len__(self) -> int:
        """Number of vectors, N."""
        return len(self._cache)

    def keys(self) -> list[Key]:
        """All keys, in the order of the rows."""
        return list(self._cache.keys())

    def column(self, name: str) -> np.ndarray:
        """A field of all rows [N], such as text_id, tensor_path, image_id or label.

        Raises:
            KeyError: the cache's index does not hold it.
        """
        return self._cache.column(name)

    def row(self, key: Key) -> int:
        """The row of a key; KeyError where the cache does not hold it."""
        return self._cache.row(key)

    def __getitem__(self, where) -> torch.Tensor:
        """A copy of vectors, of the dtype that is stored.

        Args:
            where: a row or a key, for [D]; a slice of rows, or a list, array or tensor of rows,
                or a list of keys, for [n, D].

        Raises:
            IndexError, KeyError: there is no such row or key. OSError: a file is gone.
        """
        if isinstance(where, str | tuple):
            where = self.row(where)
        if hasattr(where, "__index__") and not getattr(where, "shape", ()):
            return torch.from_numpy(self._cache.rows(self._rows([operator.index(where)]))[0])
        return torch.from_numpy(self._cache.rows(self._rows(where)))

    def __getitems__(self, rows: Sequence[int]) -> list[torch.Tensor]:
        """What a DataLoader asks for: a batch at once."""
        return list(self[rows])

    def as_numpy(self) -> np.ndarray:
        """All vectors [N, D], read into memory."""
        return self._cache.rows(np.arange(len(self)))

    def as_torch(self) -> torch.Tensor:
        """All vectors [N, D], read into memory."""
        return torch.from_numpy(self.as_numpy())

    def _rows(self, where) -> np.ndarray:
        if isinstance(where, slice):
            return np.arange(*where.indices(len(self)))
        if isinstance(where, list) and where and isinstance(where[0], str | tuple):
            where = [self.row(key) for key in where]
        rows = np.asarray(where)
        if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
            raise TypeError(f"rows must be integers [n]; got {rows.dtype} {list(rows.shape)}")
        rows = rows.astype(np.int64)
        if rows.size and not -len(self) <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows must be in 0..{len(self) - 1}; got {rows.min()}..{rows.max()}")
        return np.where(rows < 0, rows + len(self), rows)


def holds_store(folder: Path) -> bool:
    """Whether a run of --format zarr left anything in the folder."""
    return (folder / _STORE).is_symlink() or any(folder.glob(_STAGED))


def _open(folder: Path) -> _ZarrCache | _FileCache:
    kinds: dict[str, Callable[[], _ZarrCache | _FileCache]] = {
        f"{_STORE}/zarr.json": lambda: _ZarrCache(folder),
        Tsv.file_name: lambda: _samples(folder),
        SegmentTsv.file_name: lambda: _segments(folder),
        ImageTsv.file_name: lambda: _photos(folder),
    }
    there = [name for name in kinds if (folder / name).exists()]
    staged = sum(path.stat().st_size for path in folder.glob(_STAGED))
    unfinished = f"a run is at work or was stopped ({staged} bytes are committed, not merged)"
    if not there:
        detail = f"{unfinished}; the same command again ends it" if staged else "no run ended there"
        raise FileNotFoundError(
            f"{folder} has none of {_STORE}, {', '.join([*kinds][1:])}: {detail}"
        )
    if len(there) > 1:
        raise ValueError(f"{folder} holds {len(there)} caches, of different --format: {there}")
    if staged:
        warnings.warn(f"{folder}: {unfinished}; read as before it", stacklevel=3)
    return kinds[there[0]]()


class _ZarrCache:
    """One store-<digest>; index and array are of the same run, whatever happens meanwhile."""

    def __init__(self, folder: Path) -> None:
        try:
            self._connect((folder / _STORE).resolve().parent)
        except FileNotFoundError:  # a run has just put another in its place
            self._connect((folder / _STORE).resolve().parent)

    def _connect(self, store: Path) -> None:
        import pyarrow.parquet as pq

        from .store.shards import Shards

        self._store = store
        self._array = Shards(store / _STORE)
        self._index = pq.ParquetFile(store / "index.parquet", memory_map=True)

    def __getstate__(self) -> Path:
        return self._store

    def __setstate__(self, store: Path) -> None:
        self._connect(store)

    def __len__(self) -> int:
        return len(self._array)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        return self._array.rows(rows)

    def keys(self) -> Iterator[Key]:
        for batch in self._index.iter_batches(columns=list(self._key_columns)):
            columns = [column.to_pylist() for column in batch.columns]
            yield from columns[0] if len(columns) == 1 else zip(*columns, strict=True)

    def column(self, name: str) -> np.ndarray:
        if name not in self._index.schema_arrow.names:
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
        segments = "segment_id" in self._index.schema_arrow.names
        return ("image_id", "segment_id") if segments else ("name",)

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


class _FileCache:
    """A file per sample, per segment or per photo; files are opened when they are asked for."""

    def __init__(
        self, folder: Path, places: dict[Key, tuple[str, int]], columns: dict[str, list]
    ) -> None:
        self.folder = folder
        self._row = {key: i for i, key in enumerate(places)}
        self._places = list(places.values())  # where each vector is: its file, and its row in it
        self._columns = columns

    def __len__(self) -> int:
        return len(self._places)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        places = [self._places[row] for row in rows]
        files = {name: self._load(name) for name in {name for name, _ in places}}
        if not places:
            return self._load(self._places[0][0])[:0] if self._places else np.empty((0, 0), "f4")
        return np.stack([files[name][row] for name, row in places])

    def keys(self) -> Iterator[Hashable]:
        return iter(self._row)

    def column(self, name: str) -> np.ndarray:
        return np.array(self._columns[name])

    def row(self, key: Key) -> int:
        return self._row[key]

    def _load(self, name: str) -> np.ndarray:
        """All vectors of a file: [V, D]."""
        with open(self.folder / name, "rb") as stream:
            content = np.load(stream, allow_pickle=False)
            return content[None] if name.endswith(".npy") else content["embeddings"]


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, dialect="excel-tab"))


def _samples(folder: Path) -> _FileCache:
    rows = _table(folder / Tsv.file_name)
    places = {Path(row["embedding_path"]).stem: (row["embedding_path"], 0) for row in rows}
    columns = {
        "name": list(places),
        "tensor_path": [row["tensor_path"] for row in rows],
        "text_id": [int(row["text_id"]) for row in rows],
    }
    return _FileCache(folder, places, columns)


def _segments(folder: Path) -> _FileCache:
    rows = _table(folder / SegmentTsv.file_name)
    places = {(row["image_id"], int(row["segment_id"])): (row["feat_file"], 0) for row in rows}
    return _FileCache(folder, places, _of_segments(places))


def _photos(folder: Path) -> _FileCache:
    """All files are opened once, for the segments' ids."""
    places, labels = {}, []
    for row in _table(folder / ImageTsv.file_name):
        with np.load(folder / row["feat_file"], allow_pickle=False) as arrays:
            for i, segment in enumerate(arrays["segment_ids"].tolist()):
                places[row["image_id"], segment] = row["feat_file"], i
            labels += arrays["labels"].tolist()
    return _FileCache(folder, places, {**_of_segments(places), "label": labels})


def _of_segments(keys) -> dict[str, list]:
    return {
        "name": [f"{image}_{segment}" for image, segment in keys],
        "image_id": [image for image, _ in keys],
        "segment_id": [segment for _, segment in keys],
    }
