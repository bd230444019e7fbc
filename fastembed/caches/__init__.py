"""What the jobs leave, and what `convert` makes of it, read by row and by key.

A zarr store, folders of .npy or .npz files, or one file of parquet or safetensors.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from ..database import DBConfig
from ..indexes import ImageTsv, SegmentTsv, Tsv
from .files import photos, samples, samples_in, segments

Key = str | tuple[str, int]
ARRAY = "embeddings.zarr"
PARQUET = "embeddings.parquet"
SAFETENSORS = "embeddings.safetensors"
_STAGED = f"staged-{'[0-9a-f]' * 32}.log"


class EmbeddingStore(Dataset):
    """The vectors of ``fastembed multichannel`` or ``panoptic``, in whichever form.

    A key is the output's name (``emb_<sha1>``), of segments the pair (image_id, segment_id). Rows
    are in the order of the index. As a dataset it gives vectors by row. It works in forked and in
    spawned DataLoader workers, which share one page cache; nothing is read before it is asked for.

    Of a zarr store it goes on to read what was there when it was opened, also while and after a
    run adds to it. Of parquet a row costs the reading of its row group (32 MiB), of which the last
    one is kept: read it in order, or convert it.

    Args:
        folder: the job's output folder.
        database: of a folder whose index is a table: where that is.

    Raises:
        FileNotFoundError: no run has finished there. ValueError: it holds caches of two formats, or
            its index is in a database and none was given. DatabaseError: that cannot be reached.
        ImportError: zarr, parquet or safetensors, and pyarrow is not installed.
    """

    def __init__(self, folder: str | Path, database: DBConfig | None = None) -> None:
        self.folder = Path(folder)
        self._cache = _open(self.folder, database)

    def __len__(self) -> int:
        """Number of vectors, N."""
        return len(self._cache)

    @property
    def form(self) -> str:
        """``npy``, ``npz``, ``zarr``, ``parquet`` or ``safetensors``."""
        return self._cache.form

    @property
    def columns(self) -> tuple[str, ...]:
        """What `column` has: name, then the fields that the index holds."""
        return tuple(self._cache.columns)

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

    def blocks(self, rows: int = 8192) -> Iterator[np.ndarray]:
        """All vectors in order, up to `rows` at a time: for more than fits into memory.

        Yields:
            [n, D], read-only where it is a view of the mapped file, as of safetensors.
        """
        if rows < 1:
            raise ValueError(f"rows must be at least 1; got {rows}")
        for start in range(0, len(self), rows):
            yield self._cache.block(start, min(start + rows, len(self)))

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
    return (folder / ARRAY).is_symlink() or any(folder.glob(_STAGED))


def unfinished(folder: Path) -> str:
    """What a run left in the folder that no reader sees; empty where there is nothing."""
    staged = sum(path.stat().st_size for path in folder.glob(_STAGED))
    what = f"a run is at work or was stopped ({staged} bytes are committed, not merged)"
    return what if staged else ""


def _open(folder: Path, database: DBConfig | None):
    if database is not None:
        return samples_in(database, folder)
    kinds = {
        f"{ARRAY}/zarr.json": _zarr,
        Tsv.file_name: samples,
        SegmentTsv.file_name: segments,
        ImageTsv.file_name: photos,
        PARQUET: _parquet,
        SAFETENSORS: _safetensors,
    }
    there = [name for name in kinds if (folder / name).exists()]
    staged = unfinished(folder)
    if not there:
        detail = f"{staged}; the same command again ends it" if staged else "no run ended there"
        if not staged and next(folder.glob("emb_*.npy"), None) is not None:
            detail = (
                "its .npy files may be indexed in PostgreSQL: give database=DBConfig(..) "
                "(fastembed convert and search: --db)"
            )
        raise FileNotFoundError(
            f"{folder} has none of {ARRAY}, {', '.join([*kinds][1:])}: {detail}"
        )
    if len(there) > 1:
        raise ValueError(f"{folder} holds {len(there)} caches, of different --format: {there}")
    if staged:
        warnings.warn(f"{folder}: {staged}; read as before it", stacklevel=3)
    return kinds[there[0]](folder)


def _zarr(folder: Path):
    from .tables import ZarrCache  # pyarrow is an extra

    return ZarrCache(folder / ARRAY)


def _parquet(folder: Path):
    from .tables import ParquetCache

    return ParquetCache(folder / PARQUET)


def _safetensors(folder: Path):
    from .tables import SafetensorsCache

    return SafetensorsCache(folder / SAFETENSORS)
