"""Commits per second into one PostgreSQL table, by 1 and by 16 processes.

    python benchmarks/writers.py [--rows 256] [--commits 160]

Ours (`indexes.Postgres`) beside the way before it, NOT EXISTS under a lock that lasts for the
commit, and beside what a script does, INSERT .. ON CONFLICT DO NOTHING row by row. Each process
commits rows of its own into a table of its own kind, all in one server on this machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path

from fastembed import Postgres
from fastembed.database import DBConfig, embedded, get_db_connection
from fastembed.records import Item

TABLE = "(id SERIAL PRIMARY KEY, embedding_path TEXT NOT NULL UNIQUE, text_id INTEGER)"


class Ours:
    def __init__(self, config: DBConfig, folder: str) -> None:
        self.index = Postgres(config, folder, table="ours")
        self.index.open()

    def commit(self, items: list[Item]) -> None:
        self.index.commit(items)


class Locked:
    """What `indexes.Postgres` was."""

    def __init__(self, config: DBConfig, folder: str) -> None:
        self.folder, self.connection = folder, get_db_connection(config)

    def commit(self, items: list[Item]) -> None:
        paths = [f"{self.folder}/{item.name}.npy" for item in items]
        with self.connection, self.connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(1)")
            cursor.execute(
                "INSERT INTO locked (embedding_path, text_id) SELECT path, text FROM "
                "unnest(%s::text[], %s::integer[]) AS new(path, text) WHERE NOT EXISTS "
                "(SELECT 1 FROM locked WHERE embedding_path = path)",
                (paths, [item.fields["text_id"] for item in items]),
            )


class Rows(Locked):
    """A statement per row."""

    def commit(self, items: list[Item]) -> None:
        with self.connection, self.connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO rows (embedding_path, text_id) VALUES (%s, %s) "
                "ON CONFLICT (embedding_path) DO NOTHING",
                [(f"{self.folder}/{item.name}.npy", item.fields["text_id"]) for item in items],
            )


WAYS = {"ours": Ours, "locked": Locked, "rows": Rows}


def write(way: str, config: DBConfig, writer: int, commits: int, rows: int, together) -> None:
    index = WAYS[way](config, f"/out/{writer}")
    together.wait()
    for number in range(commits):
        names = [f"emb_{number * rows + row:040x}" for row in range(rows)]
        index.commit([Item(name, "", name, {"text_id": row}) for row, name in enumerate(names)])


def measure(way: str, config: DBConfig, writers: int, commits: int, rows: int) -> float:
    """Commits per second."""
    with get_db_connection(config) as connection, connection.cursor() as cursor:
        cursor.execute("DROP TABLE IF EXISTS ours, locked, rows")
        for table in ("CREATE TABLE ours ", "CREATE TABLE locked ", "CREATE TABLE rows "):
            cursor.execute(table + TABLE)
    connection.close()
    context = multiprocessing.get_context("fork")
    together = context.Barrier(writers + 1)
    processes = [
        context.Process(target=write, args=(way, config, i, commits // writers, rows, together))
        for i in range(writers)
    ]
    for process in processes:
        process.start()
    together.wait()
    start = time.perf_counter()
    for process in processes:
        process.join()
    return commits // writers * writers / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256, help="of a commit; default 256")
    parser.add_argument("--commits", type=int, default=160, help="of all writers; default 160")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        config = embedded(Path(folder) / "data", "writers")
        print(f"{'writers':>7} " + " ".join(f"{way:>8}" for way in WAYS) + "  commits per second")
        for writers in (1, 16):
            rates = [
                measure(way, config, writers, arguments.commits, arguments.rows) for way in WAYS
            ]
            print(f"{writers:>7} " + " ".join(f"{rate:8.1f}" for rate in rates), flush=True)


if __name__ == "__main__":
    main()
