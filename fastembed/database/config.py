"""Where the database is, told without its secrets."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from ..redaction import redact


class DatabaseError(RuntimeError):
    """PostgreSQL could not be reached, or refused; the message is safe to print.

    Attributes:
        sqlstate: the server's code for the reason; None where it gave none.
    """

    def __init__(self, message: str, sqlstate: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


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
        retries: how often a run tries again when the server is away or the connection lost, with
            pauses that double from half a second on: 8 take about two minutes. 0 for never.

    Raises:
        ValueError: `url` cannot be parsed, or has what must be percent-encoded; the message does
            not repeat it.
        ImportError: there is a `url`, and psycopg2, which parses it, is not installed.
    """

    host: str | None = None
    port: int | None = None
    database: str | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    url: str | None = field(default=None, repr=False)
    retries: int = 8

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise ValueError(f"retries must be at least 0; got {self.retries}")
        self.parameters()

    def __str__(self) -> str:
        """Like ``user@host:port/database``, without secrets."""
        parts = self.parameters()

        def part(name: str, variable: str) -> str:
            return parts.get(name) or os.environ.get(variable, "")

        if service := part("service", "PGSERVICE"):
            return f"service {service}"
        user, port = part("user", "PGUSER"), part("port", "PGPORT")
        host = part("host", "PGHOST") or parts.get("hostaddr", "localhost")
        database = part("dbname", "PGDATABASE")
        return f"{user and user + '@'}{host}{port and ':' + port}/{database}"

    @property
    def has_password(self) -> bool:
        """Whether a password stands in this configuration itself."""
        return not {"password", "sslpassword"}.isdisjoint(self.parameters())

    def redact(self, text: str) -> str:
        """`text` without this configuration's passwords, and without that of the environment."""
        parts = self.parameters()
        passwords = (parts.get("password"), parts.get("sslpassword"), os.environ.get("PGPASSWORD"))
        return redact(text, passwords)

    def parameters(self) -> dict[str, str]:
        """libpq's keyword parameters, secrets included; only those that are set."""
        parts = _parse(self.url) if self.url else {}
        given = {
            "host": self.host,
            "port": self.port,
            "dbname": self.database,
            "user": self.user,
            "password": self.password,
        }
        parts.update({name: str(value) for name, value in given.items() if value is not None})
        return parts


def database_error(what: str, error: Exception, config: DBConfig) -> DatabaseError:
    """The error to raise for `error`, with its reason on one line and without secrets."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return DatabaseError(f"{what}: {config.redact(reason)}", getattr(error, "pgcode", None))


def import_psycopg2():
    try:
        import psycopg2
        import psycopg2.errors
        import psycopg2.extensions
    except ImportError as error:
        raise ImportError(
            "PostgreSQL needs psycopg2: pip install 'fastembed-vision[postgres]'"
        ) from error
    return psycopg2


def _parse(url: str) -> dict[str, str]:
    psycopg2 = import_psycopg2()
    scheme, _, rest = url.partition("://")
    if scheme in ("postgresql", "postgres") and _is_ambiguous(rest):
        # libpq would take a part of the password for the host, and say so in its errors.
        raise ValueError(
            "the database's URL has more than one @, or a / before it: in a user or a password "
            "these must be percent-encoded, as %40 and %2F"
        )
    try:
        return psycopg2.extensions.parse_dsn(url)
    except psycopg2.Error:  # its message repeats the string, and with it a password
        raise ValueError("the database must be a libpq URL or key=value string") from None


def _is_ambiguous(rest: str) -> bool:
    """Whether an @ stands where libpq ends no user and password with it; see its conninfo parser,
    which looks for the first @ or /."""
    user, at, after = rest.partition("@")
    if "/" in user:
        after = rest
    return bool(at) and "@" in after.partition("?")[0]
