"""Caches of a file per sample, per segment or per photo."""

from __future__ import annotations

import csv
from collections.abc import Hashable, Iterator
from pathlib import Path

import numpy as np

from ..database import DBConfig
from ..indexes import ImageTsv, Postgres, SegmentTsv, Tsv

Key = str | tuple[str, int]


class FileCache:
    """Files are opened when they are asked for.

    Args:
        places: by key, where each vector is: its file, and its row in it.
        columns: of the index, by name.
    """

    def __init__(
        self, folder: Path, form: str, places: dict[Key, tuple[str, int]], columns: dict[str, list]
    ) -> None:
        self.folder, self.form = folder, form
        self._row = {key: i for i, key in enumerate(places)}
        self._places = list(places.values())
        self.columns = columns

    def __len__(self) -> int:
        return len(self._places)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        places = [self._places[row] for row in rows]
        files = {name: self._load(name) for name in {name for name, _ in places}}
        if not places:
            return self._load(self._places[0][0])[:0] if self._places else np.empty((0, 0), "f4")
        return np.stack([files[name][row] for name, row in places])

    def block(self, start: int, stop: int) -> np.ndarray:
        return self.rows(np.arange(start, stop))

    def keys(self) -> Iterator[Hashable]:
        return iter(self._row)

    def column(self, name: str) -> np.ndarray:
        return np.array(self.columns[name])

    def row(self, key: Key) -> int:
        return self._row[key]

    def _load(self, name: str) -> np.ndarray:
        """All vectors of a file: [V, D]."""
        with open(self.folder / name, "rb") as stream:
            content = np.load(stream, allow_pickle=False)
            return content[None] if name.endswith(".npy") else content["embeddings"]


def samples(folder: Path) -> FileCache:
    rows = _table(folder / Tsv.file_name)
    places = {Path(row["embedding_path"]).stem: (row["embedding_path"], 0) for row in rows}
    columns = {
        "name": list(places),
        "tensor_path": [row["tensor_path"] for row in rows],
        "text_id": [int(row["text_id"]) for row in rows],
    }
    return FileCache(folder, "npy", places, columns)


def samples_in(database: DBConfig, folder: Path) -> FileCache:
    """Of an index in a database, which holds no paths of tensors."""
    index = Postgres(database, folder)
    try:
        rows = index.rows()
    finally:
        index.close()
    if not rows:
        raise FileNotFoundError(f"{index} has no embedding_path in {index.prefix}")
    places = {name: (f"{name}.npy", 0) for name in rows}
    return FileCache(folder, "npy", places, {"name": list(rows), "text_id": list(rows.values())})


def segments(folder: Path) -> FileCache:
    rows = _table(folder / SegmentTsv.file_name)
    places = {(row["image_id"], int(row["segment_id"])): (row["feat_file"], 0) for row in rows}
    return FileCache(folder, "npy", places, _of_segments(places))


def photos(folder: Path) -> FileCache:
    """All files are opened once, for the segments' ids."""
    places, labels = {}, []
    for row in _table(folder / ImageTsv.file_name):
        with np.load(folder / row["feat_file"], allow_pickle=False) as arrays:
            for i, segment in enumerate(arrays["segment_ids"].tolist()):
                places[row["image_id"], segment] = row["feat_file"], i
            labels += arrays["labels"].tolist()
    return FileCache(folder, "npz", places, {**_of_segments(places), "label": labels})


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, dialect="excel-tab"))


def _of_segments(keys) -> dict[str, list]:
    return {
        "name": [f"{image}_{segment}" for image, segment in keys],
        "image_id": [image for image, _ in keys],
        "segment_id": [segment for _, segment in keys],
    }
