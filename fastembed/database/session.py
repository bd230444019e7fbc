"""A connection that is made again where the server went away.

Work is done in transactions that may be repeated: whether a commit that got no answer has
happened, nobody can know. What is repeated, and what is an error at once, `_is_passing` decides.
"""

from __future__ import annotations

import os
import random
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

from .config import DBConfig, database_error, import_psycopg2

T = TypeVar("T")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0
_GLANCE = 0.1  # seconds between looks at whether the run is to end
_FETCHED_ROWS = 2000

# Where the configuration says nothing else: a host that went silent is noticed within a minute or
# two, not by the kernel's patience of hours.
_DEFAULTS = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
}

# SQLSTATE of what passes: connections (08), the server's end or start (57P), too many clients, a
# listing that stood idle for too long, and transactions that the server asks to repeat (40).
_PASSING_CLASSES = ("08", "40")
_PASSING_CODES = ("57P01", "57P02", "57P03", "57P05", "53300", "25P03")

# An attempt to connect fails without an SQLSTATE: its text is all there is. In other languages
# than English a server's refusal is an error at once.
_PASSING_TEXTS = (
    "the database system is",  # starting up, shutting down, in recovery mode, not yet accepting
    "too many clients",
    "too many connections",
    "remaining connection slots",
    "no more connections allowed",  # PgBouncer
    "cannot connect to server",
    "connection refused",
    "connection reset",
    "connection timed out",
    "timeout expired",
    "broken pipe",
    "no route to host",
    "network is unreachable",
    "temporary failure in name resolution",
    "server closed the connection",
    "terminating connection",
    "could not receive data",
    "could not send data",
    "ssl connection has been closed",
    "ssl syscall error",
    "is the server running locally",
    "session is read-only",  # of several hosts none is the primary yet
    "server is in hot standby mode",
)


def get_db_connection(config: DBConfig):
    """A psycopg2 connection, by one attempt.

    Raises:
        DatabaseError: server down, wrong password, no such database; without secrets.
        ImportError: psycopg2 is not installed.
    """
    psycopg2 = import_psycopg2()
    try:
        return _connect(config)
    except psycopg2.Error as error:
        raise database_error(f"cannot connect to PostgreSQL {config}", error, config) from None


def identifier(table: str):
    """A table's name, or schema.table, quoted for SQL."""
    from psycopg2 import sql

    return sql.Identifier(*table.split("."))


class Session:
    """One connection, made at the first need and again whenever it is lost.

    For one thread at a time; `stop_waiting` alone may come from another.

    Args:
        config: where to; its `retries` bound the waiting.
    """

    def __init__(self, config: DBConfig) -> None:
        self.config = config
        self._connection = None
        # Not an Event: signal handlers set it, and may take no lock.
        self.stopped = False

    def transact(self, work: Callable[..., T], what: str) -> T:
        """The result of `work(cursor)`, whose transaction is committed when this returns.

        Args:
            work: must be such that doing it twice is doing it once.
            what: for messages, such as "cannot use table t".

        Raises:
            DatabaseError: the server refuses, or does not come back.
        """
        psycopg2 = import_psycopg2()
        pauses = _Pauses(self, what)
        while True:
            try:
                if self._connection is None:
                    self._connection = _connect(self.config)
                with self._connection.cursor() as cursor:
                    result = work(cursor)
                self._connection.commit()
                return result
            except psycopg2.Error as error:
                passing = _is_passing(error, self._connection)
                self.close()
                if not passing:
                    raise database_error(what, error, self.config) from None
                pauses.take(error)
            except BaseException:
                self.close()  # and with it what the transaction did
                raise

    def stream(self, query: Callable[[tuple | None], tuple], what: str) -> Iterator[tuple]:
        """The rows of an ordered query, from a server-side cursor on a connection of its own:
        memory does not grow with their number.

        After a lost connection it goes on behind the last row: none is lost, none comes twice,
        and rows that are there twice come twice.

        Args:
            query: of None, what to execute for all rows, (SQL, arguments); of a row, for those
                from that one on, its equals included, in the same order.
            what: for messages.

        Raises:
            DatabaseError: as above.
        """
        psycopg2 = import_psycopg2()
        pauses = _Pauses(self, what)
        last: tuple | None = None
        equal = 0  # rows like the last, itself included, that came so far
        while True:
            connection = None
            try:
                connection = _connect(self.config)
                cursor = connection.cursor(name="fastembed_rows")
                cursor.itersize = _FETCHED_ROWS
                cursor.execute(*query(last))
                known = equal
                for row in cursor:
                    if known and row == last:
                        known -= 1
                        continue
                    known = 0
                    equal = equal + 1 if row == last else 1
                    last = row
                    pauses.reset()
                    yield row
                return
            except psycopg2.Error as error:
                if not _is_passing(error, connection):
                    raise database_error(what, error, self.config) from None
                pauses.take(error)
            finally:
                if connection is not None:
                    connection.close()

    def stop_waiting(self) -> None:
        """Whoever waits for the server, now or later, gets the error instead. For a run that
        ends; from any thread and from signal handlers."""
        self.stopped = True

    def allow_waiting(self) -> None:
        """Undoes `stop_waiting`, for another run."""
        self.stopped = False

    def close(self) -> None:
        """Gives the connection back. The next transaction makes another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class _Pauses:
    """The waits between attempts: they double, and are drawn from half to one and a half times
    that, so that an array's tasks do not come back all at once."""

    def __init__(self, session: Session, what: str) -> None:
        self.session, self.what = session, what
        self._taken = 0

    def reset(self) -> None:
        """To the shortest, after something was achieved."""
        self._taken = 0

    def take(self, error: Exception) -> None:
        """Waits; raises DatabaseError where it was the last time, or the run is to end."""
        config = self.session.config
        failed = database_error(self.what, error, config)
        if self._taken == config.retries or self.session.stopped:
            raise failed
        seconds = min(_FIRST_PAUSE * 2**self._taken, _LONGEST_PAUSE) * random.uniform(0.5, 1.5)
        self._taken += 1
        warnings.warn(
            f"{failed}; trying again in {seconds:.1f} s ({self._taken} of {config.retries})",
            stacklevel=4,
        )
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, _GLANCE))
            if self.session.stopped:
                raise failed


def _connect(config: DBConfig):
    parameters = config.parameters()
    defaults = {"fallback_application_name": "fastembed"}
    # A service's file may set them, and would lose to what stands here.
    if "service" not in parameters and "PGSERVICE" not in os.environ:
        defaults |= _DEFAULTS
    if "PGCONNECT_TIMEOUT" in os.environ:
        defaults.pop("connect_timeout", None)
    # Paths are text: whatever the server's encoding, they travel as UTF-8.
    connection = import_psycopg2().connect(**{**defaults, "client_encoding": "UTF8", **parameters})
    # Under a lock a statement has to see what was committed before it began, not before the lock.
    connection.set_session(isolation_level="READ COMMITTED")
    return connection


def _is_passing(error: Exception, connection) -> bool:
    """Whether an error tells of the server's moment only, not of what was asked for."""
    if error.pgcode is not None:
        return error.pgcode.startswith(_PASSING_CLASSES) or error.pgcode in _PASSING_CODES
    # Without a code it is libpq that speaks; not always does psycopg2 call the connection closed.
    if connection is not None and connection.closed:
        return True
    # A name can have several addresses: the last is where libpq gave up.
    text = str(error).lower().rpartition("connection to server")[2]
    return any(passing in text for passing in _PASSING_TEXTS)
