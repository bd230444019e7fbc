"""N-channel tensors that a CSV file or a PostgreSQL table lists."""

from __future__ import annotations

import csv
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import npy
from ..database import DatabaseError, DBConfig, database_error, get_db_connection, import_psycopg2
from ..records import Item

TENSOR_TABLE = "cpjump1_dinov3_tensors"


class TensorTable(ABC):
    """N-channel ``.npy`` tensors, one row (tensor_path, text_id) each.

    The rows stand in a CSV file or in a PostgreSQL table; see the two subclasses.
    """

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """The rows in a fixed order, streamed."""

    @abstractmethod
    def count(self) -> int:
        """Number of rows."""

    def selection(self) -> dict:
        """Which parts of a sample are taken: tensors have none."""
        return {}

    def read(self, item: Item, channels: int, buffer: npy.PixelBuffer) -> torch.Tensor:
        """The item's first `channels` channels, [channels, H, W]; see `npy.read_channels`."""
        return npy.read_channels(self.locate(item), channels, buffer)

    def locate(self, item: Item) -> Path:
        return Path(item.path)


class TensorCsv(TensorTable):
    """Rows of a CSV file with a header that names ``tensor_path`` and ``text_id``.

    Args:
        path: UTF-8 CSV; further columns (``text`` is one that the datasets read) are left
            alone. Relative tensor paths are relative to the CSV's folder.

    Raises:
        ValueError: the header lacks a column.
        OSError: the file cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._open() as stream:
            header = csv.DictReader(stream).fieldnames or []
        for column in ("tensor_path", "text_id"):
            if column not in header:
                raise ValueError(f"{self.path} must have a column {column}; its header is {header}")

    def items(self) -> Iterator[Item]:
        with self._open() as stream:
            for row in csv.DictReader(stream):
                yield tensor_item(row["tensor_path"], row["text_id"])

    def count(self) -> int:
        with self._open() as stream:
            return sum(1 for _ in csv.DictReader(stream))

    def locate(self, item: Item) -> Path:
        return self.path.parent / item.path

    def _open(self):
        return self.path.open(encoding="utf-8-sig", newline="")

    def __str__(self) -> str:
        return str(self.path)


class TensorPostgres(TensorTable):
    """Rows of a PostgreSQL table (tensor_path TEXT, text_id INTEGER), ordered by both.

    A server-side cursor streams them: memory does not grow with the table.

    Raises:
        DatabaseError: the server cannot be reached, or the table is missing.
    """

    def __init__(self, config: DBConfig, table: str = TENSOR_TABLE) -> None:
        self.config = config
        self.table = table

    def items(self) -> Iterator[Item]:
        query = "SELECT tensor_path, text_id FROM {} ORDER BY tensor_path, text_id"
        for tensor_path, text_id in self._rows(query, cursor="fastembed_items"):
            yield tensor_item(tensor_path, text_id)

    def count(self) -> int:
        return next(self._rows("SELECT count(*) FROM {}"))[0]

    def _rows(self, query: str, cursor: str | None = None) -> Iterator[tuple]:
        psycopg2 = import_psycopg2()
        from psycopg2 import sql

        connection = get_db_connection(self.config)
        try:
            with connection.cursor(name=cursor) as rows:
                rows.execute(sql.SQL(query).format(sql.Identifier(*self.table.split("."))))
                yield from rows
        except psycopg2.errors.UndefinedTable:
            raise DatabaseError(
                f"{self.config} has no table {self.table}: create it with the columns "
                "(tensor_path TEXT, text_id INTEGER), or list the samples in a CSV (--manifest)"
            ) from None
        except psycopg2.Error as error:
            what = f"cannot read table {self.table} of {self.config}"
            raise database_error(what, error, self.config) from None
        finally:
            connection.close()

    def __str__(self) -> str:
        return f"{self.config} {self.table}"


def tensor_item(tensor_path: str | None, text_id: str | int | None) -> Item:
    """One row as an item; its output is named emb_<sha1("<tensor_path>|<text_id>")>."""
    key = f"{tensor_path}|{text_id}"
    name = "emb_" + hashlib.sha1(key.encode(), usedforsecurity=False).hexdigest()
    defect = ""
    number = None
    if not tensor_path:
        defect = "the row has no tensor_path"
    elif "\0" in tensor_path:
        defect = "tensor_path contains a NUL character"
    try:
        number = int(text_id)
    except (TypeError, ValueError):
        defect = defect or f"text_id must be an integer; got {text_id!r}"
    return Item(key, tensor_path or "", name, {"text_id": number}, defect)
