"""The sink and the index of a store: two faces of one log."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..caches import holds_store
from ..records import Embedded, Item
from ..staging import no_link
from . import journal
from .merge import INDEX, check_writable, current, merge


class Zarr:
    """Vectors on their way into a store; a sample with parts has one per part, done by itself.

    Its index is `Parquet`, or `SegmentParquet` for photos. Both are on disk with the index's
    commit, which is one record with one sync.
    """

    form = "zarr"
    # Which parts were chosen is no setting: others can join them later.
    holds_parts = False

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        self.names: set[str] | None = None
        self.written: dict[str, np.ndarray] = {}
        self.lock = _Lock(self.folder / f".{INDEX}.lock")

    def open(self) -> set[str]:
        """Makes the folder ready; the names that are committed, merged or not.

        Raises:
            FileExistsError: something else has the store's names.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        check_writable(self.folder)
        self.lock.share()
        self.names = set()
        if (store := current(self.folder)) is not None:
            self.names.update(pq.read_table(store / INDEX, columns=["name"])["name"].to_pylist())
        for path in journal.paths(self.folder):
            if len(log := journal.Log(path)):
                self.names.update(log.index["name"].to_pylist())
        return set(self.names)

    def todo(self, item: Item, done: Set[str]) -> Item | None:
        """What of the item is not among the names `done`; None where all is."""
        return item.missing(done)

    def write(self, embedded: Embedded) -> None:
        """Keeps a sample's vectors for the commit."""
        self.written[embedded.item.name] = np.ascontiguousarray(embedded.vectors)

    def flush(self) -> None:
        """Nothing: vectors and rows become durable together, in the commit."""

    def remove(self, name: str) -> None:
        """Nothing: a vector goes with its row."""

    def close(self) -> None:
        """Nothing: the index merges."""


class Parquet:
    """``index.parquet``: name, tensor_path, text_id, row; sorted by path and text.

    Rows are in a log until the last of the runs that write into the folder closes, which merges.

    Args:
        sink: whose vectors it commits.
    """

    columns: ClassVar[dict[str, pa.DataType]] = {
        "tensor_path": pa.large_string(),
        "text_id": pa.int64(),
    }

    def __init__(self, sink: Zarr) -> None:
        self.sink = sink
        self.path = sink.folder / INDEX
        self._log = journal.LogWriter(sink.folder)

    def open(self) -> set[str]:
        """Names that are committed, merged or not."""
        return self.sink.open() if self.sink.names is None else set(self.sink.names)

    def commit(self, items: Sequence[Item]) -> None:
        """Adds samples that the sink has written: all on disk when this returns."""
        if not items:
            return
        names, *columns = self._columns_of(items)
        schema = pa.schema({"name": pa.large_string(), **self.columns})
        table = pa.table([names, *columns], schema=schema)
        vectors = [self.sink.written.pop(item.name) for item in items]
        self._log.append(table, vectors)
        self.sink.names.update(names)

    def remove(self, names: set[str]) -> None:
        """Drops vectors and their rows.

        Raises:
            OSError: another run is writing into the folder.
        """
        self._log.close()
        with self.sink.lock.alone() as alone:
            if not alone:
                raise OSError(f"another run is writing into {self.sink.folder}: try again later")
            merge(self.sink.folder, tuple(self.columns), names)
        self._log = journal.LogWriter(self.sink.folder)
        self.sink.open()

    def close(self) -> None:
        """Merges, unless other runs are writing into the folder: the last of them does then."""
        self._log.close()
        with self.sink.lock.alone() as alone:
            if alone:
                merge(self.sink.folder, tuple(self.columns))

    def exists(self) -> bool:
        """Whether the folder holds a store, or logs of one."""
        return holds_store(self.sink.folder)

    def __str__(self) -> str:
        return str(self.path)

    def _columns_of(self, items: Sequence[Item]) -> tuple[list, ...]:
        """Name and the other columns of their rows."""
        texts = [item.fields["text_id"] for item in items]
        return [item.name for item in items], [item.path for item in items], texts


class SegmentParquet(Parquet):
    """``index.parquet``, a row per segment: name, image_id, segment_id, label, row; sorted by
    image_id and segment_id."""

    columns: ClassVar[dict[str, pa.DataType]] = {
        "image_id": pa.large_string(),
        "segment_id": pa.int32(),
        "label": pa.int32(),
    }

    def _columns_of(self, items: Sequence[Item]) -> tuple[list, ...]:
        return (
            [item.part_name(part) for item in items for part in item.parts],
            [item.name for item in items for _ in item.parts],
            [part for item in items for part in item.parts],
            [label for item in items for label in item.parts.values()],
        )


class _Lock:
    """Shared by the runs that write into a folder, exclusive for the one that merges; it ends
    with its process, however that ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shared = None

    def share(self) -> None:
        """Waits for a merge."""
        if self._shared is None:
            stream = open(self._path, "a", opener=no_link)
            fcntl.flock(stream, fcntl.LOCK_SH)
            self._shared = stream

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Gives up the share; whether no other run has one. Of runs that leave together the last
        to give its share up finds no other, so one of them always merges."""
        if self._shared is not None:
            self._shared.close()
            self._shared = None
        with open(self._path, "a", opener=no_link) as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
