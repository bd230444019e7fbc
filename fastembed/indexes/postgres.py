"""The index in a table of PostgreSQL, for any number of writers."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from ..database import DBConfig, Session, identifier
from ..records import Item
from .tsv import EMBEDDING_TABLE

# First half of our advisory locks' keys, the second names what is locked: "fast" in ASCII.
_LOCKS = 0x66617374
_CREATION = 0
_DELETED_ROWS = 10_000

_INSERT = (
    "INSERT INTO {table} (embedding_path, text_id) "
    'SELECT DISTINCT ON (new.path COLLATE "C") new.path, new.text_id '
    "FROM pg_temp.fastembed_committed AS new "
)
_ABSENT = "WHERE NOT EXISTS (SELECT FROM {table} AS old WHERE old.embedding_path = new.path)"
# Rows are locked by path, as they are inserted: in another order two writers might wait for
# each other.
_BY_PATH = 'ORDER BY new.path COLLATE "C" ON CONFLICT (embedding_path) DO NOTHING'
_DELETE = (
    "DELETE FROM {table} AS old USING (SELECT tableoid, ctid FROM {table} "
    'WHERE embedding_path = ANY(%s) ORDER BY embedding_path COLLATE "C" FOR UPDATE) AS found '
    "WHERE old.tableoid = found.tableoid AND old.ctid = found.ctid"
)


class Postgres:
    """Table ``image_embeddings(id SERIAL PRIMARY KEY, embedding_path TEXT, text_id INTEGER)``.

    Created if it is missing, then with a unique index on embedding_path. Paths are absolute. Rows
    of other folders are left alone.

    Writers do not wait for each other: a commit copies its rows into a temporary table (the role
    needs TEMPORARY, which everyone has by default) and inserts those whose path is not there, by
    path, so that no two can lock each other out. A table of yours without a unique index on
    embedding_path gets no duplicate either: there commits take turns, under an advisory lock that
    lasts as long as one. Other programs do not know that lock; only the index keeps them out too.

    A lost connection is made again, and what had no answer is repeated (`DBConfig.retries`).

    Raises:
        DatabaseError: the server refuses, or does not come back; the run can be repeated.
    """

    def __init__(self, config: DBConfig, folder: str | Path, table: str = EMBEDDING_TABLE) -> None:
        self.config = config
        self.table = table
        self.prefix = f"{Path(folder).resolve()}/"
        self._session = Session(config)
        self._is_unique = False

    def open(self) -> set[str]:
        """Names of the samples that are committed with a path in this folder."""
        self._session.allow_waiting()
        if not self._transact(self._is_there):
            self._transact(self._create)
        self._is_unique = self._transact(self._has_unique_index)
        return self._transact(lambda cursor: {name for name, _ in self._rows(cursor)})

    def rows(self) -> dict[str, int | None]:
        """text_id by name of the samples that are committed with a path in this folder, by path.
        Creates no table."""

        def rows(cursor) -> dict[str, int | None]:
            return dict(self._rows(cursor)) if self._is_there(cursor) else {}

        found = self._transact(rows)
        return {name: found[name] for name in sorted(found, key=lambda name: f"{name}.npy")}

    def commit(self, items: Sequence[Item]) -> None:
        """Adds rows in one transaction: all committed when this returns. One whose path has a row
        adds none."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows((self._path(item.name), item.fields["text_id"]) for item in items)
        self._transact(lambda cursor: self._insert(cursor, text.getvalue()))

    def remove(self, names: set[str]) -> None:
        """Drops the rows of these samples."""
        paths = [self._path(name) for name in sorted(names)]
        for start in range(0, len(paths), _DELETED_ROWS):
            some = paths[start : start + _DELETED_ROWS]
            self._transact(partial(self._execute, query=_DELETE, arguments=(some,)))

    def close(self) -> None:
        self._session.close()

    def stop_waiting(self) -> None:
        """Ends the wait for a server that is away, with its error; see `nouns.Waiting`."""
        self._session.stop_waiting()

    def exists(self) -> bool:
        """Whether the table has rows of this folder."""

        def any_row(cursor) -> bool:
            if not self._is_there(cursor):
                return False
            with closing(self._rows(cursor)) as rows:
                return next(rows, None) is not None

        return self._transact(any_row)

    def __str__(self) -> str:
        return f"{self.config} {self.table}"

    def _path(self, name: str) -> str:
        return f"{self.prefix}{name}.npy"

    def _transact(self, work):
        return self._session.transact(work, f"cannot use table {self.table} of {self.config}")

    def _execute(self, cursor, query: str, arguments: tuple = ()) -> None:
        from psycopg2 import sql

        cursor.execute(sql.SQL(query).format(table=identifier(self.table)), arguments)

    def _is_there(self, cursor) -> bool:
        cursor.execute("SELECT to_regclass(%s)", (identifier(self.table).as_string(cursor),))
        return cursor.fetchone()[0] is not None

    def _create(self, cursor) -> None:
        # IF NOT EXISTS alone fails where two create at once.
        cursor.execute("SELECT pg_advisory_xact_lock(%s, %s)", (_LOCKS, _CREATION))
        self._execute(
            cursor,
            "CREATE TABLE IF NOT EXISTS {table} "
            "(id SERIAL PRIMARY KEY, embedding_path TEXT NOT NULL UNIQUE, text_id INTEGER)",
        )

    def _has_unique_index(self, cursor) -> bool:
        """Whether there is one that ON CONFLICT (embedding_path) can go by."""
        cursor.execute(
            "SELECT EXISTS (SELECT FROM pg_index JOIN pg_attribute "
            "ON attrelid = indrelid AND attnum = indkey[0] "
            "WHERE indrelid = %s::regclass AND attname = 'embedding_path' AND indnkeyatts = 1 "
            "AND indisunique AND indimmediate AND indisvalid AND indpred IS NULL)",
            (identifier(self.table).as_string(cursor),),
        )
        return cursor.fetchone()[0]

    def _rows(self, cursor) -> Iterator[tuple[str, int | None]]:
        with cursor.connection.cursor(name="fastembed_rows") as rows:
            rows.itersize = 10_000
            self._execute(
                rows,
                "SELECT embedding_path, text_id FROM {table} WHERE starts_with(embedding_path, %s)",
                (self.prefix,),
            )
            for path, text_id in rows:
                name = path.removeprefix(self.prefix)
                if "/" not in name:  # what lies in a folder of this folder is another run's
                    yield Path(name).stem, text_id

    def _insert(self, cursor, rows: str) -> None:
        cursor.execute(
            "CREATE TEMPORARY TABLE IF NOT EXISTS fastembed_committed "
            "(path TEXT, text_id INTEGER) ON COMMIT DELETE ROWS"
        )
        cursor.copy_expert(
            "COPY pg_temp.fastembed_committed FROM STDIN WITH (FORMAT csv)", io.StringIO(rows)
        )
        if self._is_unique:
            self._execute(cursor, _INSERT + _BY_PATH)
        else:
            cursor.execute(
                "SELECT pg_advisory_xact_lock(%s, %s::regclass::oid::integer)",
                (_LOCKS, identifier(self.table).as_string(cursor)),
            )
            self._execute(cursor, _INSERT + _ABSENT)
