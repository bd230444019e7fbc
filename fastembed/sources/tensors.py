"""N-channel tensors that a CSV file or a PostgreSQL table lists."""

from __future__ import annotations

import csv
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .. import npy
from ..database import DatabaseError, DBConfig, Session, identifier
from ..records import Item

TENSOR_TABLE = "cpjump1_dinov3_tensors"

_UNDEFINED_TABLE = "42P01"  # SQLSTATE

_ALL = "SELECT tensor_path, text_id FROM {table} ORDER BY tensor_path, text_id"
# From a row on, with its equals. NULL comes last; what is compared with NULL is not true.
_FROM = (
    "SELECT tensor_path, text_id FROM {table} "
    "WHERE tensor_path > %(path)s OR (tensor_path IS NULL AND %(path)s IS NOT NULL) "
    "OR (tensor_path IS NOT DISTINCT FROM %(path)s AND (text_id >= %(text)s OR text_id IS NULL)) "
    "ORDER BY tensor_path, text_id"
)


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

    A server-side cursor streams them: memory does not grow with the table. A listing whose
    connection is lost goes on behind the last row (`DBConfig.retries`).

    Raises:
        DatabaseError: the server does not come back, or the table is missing.
    """

    def __init__(self, config: DBConfig, table: str = TENSOR_TABLE) -> None:
        self.config = config
        self.table = table
        self._session = Session(config)

    def items(self) -> Iterator[Item]:
        self._session.allow_waiting()
        return self._items()

    def _items(self) -> Iterator[Item]:
        with self._table_is_there():
            for row in self._session.stream(self._from, self._what):
                yield tensor_item(*row)

    def count(self) -> int:
        def count(cursor) -> int:
            cursor.execute(self._sql("SELECT count(*) FROM {table}"))
            return cursor.fetchone()[0]

        try:
            with self._table_is_there():
                return self._session.transact(count, self._what)
        finally:
            self._session.close()

    def stop_waiting(self) -> None:
        """Ends the wait for a server that is away, with its error; see `nouns.Waiting`."""
        self._session.stop_waiting()

    def _from(self, row: tuple | None) -> tuple:
        if row is None:
            return self._sql(_ALL), ()
        return self._sql(_FROM), dict(zip(("path", "text"), row, strict=True))

    def _sql(self, query: str):
        from psycopg2 import sql

        return sql.SQL(query).format(table=identifier(self.table))

    @property
    def _what(self) -> str:
        return f"cannot read table {self.table} of {self.config}"

    @contextmanager
    def _table_is_there(self) -> Iterator[None]:
        try:
            yield
        except DatabaseError as error:
            if error.sqlstate != _UNDEFINED_TABLE:
                raise
            raise DatabaseError(
                f"{self.config} has no table {self.table}: create it with the columns "
                "(tensor_path TEXT, text_id INTEGER), or list the samples in a CSV (--manifest)"
            ) from None

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
        # What the index's column takes: there it would stop the run, and each run after it.
        if not -(2**31) <= number < 2**31:
            raise ValueError
    except (TypeError, ValueError):
        defect = defect or f"text_id must be an integer of 32 bits; got {text_id!r}"
    return Item(key, tensor_path or "", name, {"text_id": number}, defect)
