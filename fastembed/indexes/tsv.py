"""Indexes in a file of tab-separated values in the output folder."""

from __future__ import annotations

import csv
import fcntl
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..records import Item
from ..staging import append_lines, no_link

EMBEDDING_TABLE = "image_embeddings"


class Tsv:
    """``image_embeddings.tsv`` in the output folder: embedding_path, text_id, tensor_path.

    Paths of embeddings are relative to the folder, so the folder can be moved. Any number of
    processes (shards) may append; a finished run leaves the rows sorted, so that one run and
    the union of shards give the same bytes.
    """

    file_name = f"{EMBEDDING_TABLE}.tsv"
    columns = ("embedding_path", "text_id", "tensor_path")
    path_column = 0

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder).resolve() / self.file_name
        self._names: set[str] = set()

    def open(self) -> set[str]:
        """Names of the samples that are committed. A torn last line is cut off."""
        with self._locked():
            if not self.path.exists():
                self._replace([])
            with open(self.path, "r+b", opener=no_link) as stream:
                data = stream.read()
                if not data.endswith(b"\n"):
                    stream.truncate(data.rfind(b"\n") + 1)
            self._names = {self._name(row) for row in self._rows()}
            return set(self._names)

    def commit(self, items: Sequence[Item]) -> None:
        """Adds rows: all on disk when this returns. One whose path has a row adds none."""
        rows = {self._name(row): row for item in items for row in self._rows_of(item)}
        text = io.StringIO()
        writer = csv.writer(text, dialect="excel-tab", lineterminator="\n")
        writer.writerows(row for name, row in rows.items() if name not in self._names)
        self._names |= rows.keys()
        with self._locked():
            append_lines(self.path, text.getvalue().encode())

    def remove(self, names: set[str]) -> None:
        """Drops the rows of these samples."""
        with self._locked():
            self._replace([row for row in self._rows() if self._name(row) not in names])
            self._names -= names

    def keep(self, rows: Iterable[Sequence[str]]) -> None:
        """Leaves these rows, sorted, and no others; whatever is in the file."""
        with self._locked():
            self._replace(sorted(map(tuple, rows)))

    def close(self) -> None:
        with self._locked():
            self._replace(sorted({tuple(row) for row in self._rows()}))

    def exists(self) -> bool:
        """Whether the folder holds an output of this form."""
        return self.path.exists()

    def __str__(self) -> str:
        return str(self.path)

    def _rows_of(self, item: Item) -> list[tuple]:
        return [(f"{item.name}.npy", item.fields["text_id"], item.path)]

    def _name(self, row: Sequence[str]) -> str:
        return Path(row[self.path_column]).stem

    def _rows(self) -> list[list[str]]:
        try:
            with self.path.open(encoding="utf-8", newline="") as stream:
                rows = list(csv.reader(stream, dialect="excel-tab"))[1:]
        except (UnicodeDecodeError, csv.Error) as error:
            raise self._damaged(str(error)) from error
        for row in rows:
            if len(row) != len(self.columns):
                raise self._damaged(f"a row has {len(row)} of {len(self.columns)} columns: {row}")
        return rows

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(
            f"{self.path} is damaged ({reason}); `fastembed verify {self.path.parent} --repair` "
            "takes out what is broken and makes it again"
        )

    def _replace(self, rows: Sequence[Sequence[str]]) -> None:
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with open(temporary, "w", encoding="utf-8", newline="", opener=no_link) as stream:
            writer = csv.writer(stream, dialect="excel-tab", lineterminator="\n")
            writer.writerow(self.columns)
            writer.writerows(rows)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, self.path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time; the lock ends with its process, however it ends."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = self.path.with_name(f".{self.path.name}.lock")
        with open(lock, "w", opener=no_link) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


class SegmentTsv(Tsv):
    """``inst2feat.tsv``, a row per segment: image_id, segment_id, feat_file."""

    file_name = "inst2feat.tsv"
    columns = ("image_id", "segment_id", "feat_file")
    path_column = 2

    def _rows_of(self, item: Item) -> list[tuple]:
        return [(item.name, part, f"{item.part_name(part)}.npy") for part in item.parts]


class ImageTsv(Tsv):
    """``image_index.tsv``, a row per image: image_id, feat_file, num_segments."""

    file_name = "image_index.tsv"
    columns = ("image_id", "feat_file", "num_segments")
    path_column = 1

    def _rows_of(self, item: Item) -> list[tuple]:
        return [(item.name, f"{item.name}.npz", len(item.parts))]


class MapTsv(Tsv):
    """``maps.tsv``, a row per image: name, source, shape and dtype of its map.

    Args:
        folder: of the outputs.
        paths: what the source has under each name, as `ImageFolder.paths`. A row of another path
            than that is dropped: the name stands for another image now.
    """

    file_name = "maps.tsv"
    columns = ("name", "source", "shape", "dtype")

    def __init__(self, folder: str | Path, paths: Mapping[str, str] | None = None) -> None:
        super().__init__(folder)
        self._paths = paths or {}

    def open(self) -> set[str]:
        super().open()
        changed = {name for name, path, *_ in self._rows() if self._paths.get(name, path) != path}
        if changed:
            self.remove(changed)
        return set(self._names)

    def _rows_of(self, item: Item) -> list[tuple]:
        return [(item.name, item.path, item.fields["shape"], item.fields["dtype"])]

    def _name(self, row: Sequence[str]) -> str:
        return row[0]
