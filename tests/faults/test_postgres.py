"""PostgreSQL goes away in the middle of a run, and comes back: nothing is lost, nothing is twice.

Real servers, stopped with pg_ctl or killed, under a real `extract`.
"""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from conftest import TinyEngine, new_postgres_folder, read_outputs
from postgres_server import PostgresServer, rows

from fastembed import MultiCrop, NpyPerSample, Percentile, Postgres, TensorPostgres, extract
from fastembed.database import DatabaseError, DBConfig, get_db_connection, session

SAMPLES = 60
RECIPE = MultiCrop(Percentile(), n_crops=1)

pytestmark = pytest.mark.filterwarnings("ignore:cannot (use|read) table")


class SlowEngine(TinyEngine):
    """Slow enough that a run outlasts what happens to its server."""

    seconds = 0.05

    def __call__(self, batch):
        time.sleep(self.seconds)
        return super().__call__(batch)


@pytest.fixture(scope="module")
def server():
    return PostgresServer(new_postgres_folder())


@pytest.fixture
def job(server, plates, tmp_path, monkeypatch):
    """extract(config, name of folder and table, progress), in many small commits and fetches."""
    monkeypatch.setattr("fastembed.pipeline.run._COMMIT_SECONDS", 0.1)
    monkeypatch.setattr(session, "_FETCHED_ROWS", 5)
    monkeypatch.setattr(session, "_FIRST_PAUSE", 0.1)
    plates.fill(SAMPLES, size=32)
    with get_db_connection(server.config) as connection, connection.cursor() as cursor:
        cursor.execute("DROP TABLE IF EXISTS image_embeddings, cpjump1_dinov3_tensors")
        cursor.execute("CREATE TABLE cpjump1_dinov3_tensors(tensor_path TEXT, text_id INTEGER)")
        cursor.executemany("INSERT INTO cpjump1_dinov3_tensors VALUES (%s, %s)", plates.rows)
    connection.close()

    def run(config: DBConfig, name: str, progress=None):
        out = tmp_path / name
        return extract(
            TensorPostgres(config), RECIPE, SlowEngine(batch_size=2, size=16), NpyPerSample(out),
            Postgres(config, out, table=f"index_{name}"), workers=2, slots=3, progress=progress,
        )  # fmt: skip

    yield run
    with get_db_connection(server.config) as connection, connection.cursor() as cursor:
        cursor.execute("DROP TABLE IF EXISTS index_whole, index_out")
    connection.close()


def in_the_middle(happens, *, commits: int):
    """A progress callback that after so many commits starts a thread, and that thread."""
    thread = threading.Thread(target=happens)
    count = 0

    def progress(report, total) -> None:
        nonlocal count
        count += report.embedded > 0
        if count == commits:
            thread.start()

    return progress, thread


@pytest.mark.parametrize("how", ["fast", "immediate", "kill -9", "kill -9 of a backend"])
def test_the_server_is_restarted(how, server, job, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(SlowEngine, "seconds", 0)
        assert job(server.config, "whole").embedded == SAMPLES

    def restart() -> None:
        if how == "kill -9 of a backend":
            server.kill_a_backend()
        else:
            server.stop(how)
            time.sleep(0.3)
            server.start()

    progress, thread = in_the_middle(restart, commits=3)
    with pytest.warns(UserWarning, match="trying again in"):
        report = job(server.config, "out", progress)
    thread.join()
    assert (report.embedded, report.failed, report.duplicates) == (SAMPLES, 0, 0)
    assert read_outputs(tmp_path / "out") == read_outputs(tmp_path / "whole")
    expected = rows(server.config, "index_whole")
    assert len(expected) == len(set(expected)) == SAMPLES
    assert rows(server.config, "index_out") == expected
    assert job(server.config, "out").already_done == SAMPLES


def test_a_server_that_does_not_come_back(server, job, tmp_path):
    """The run ends with the reason, within its patience; the same call finishes the work."""
    impatient = DBConfig(url=server.config.url, retries=2)
    progress, thread = in_the_middle(lambda: server.stop("fast"), commits=3)
    with pytest.raises(DatabaseError, match=r"cannot (use|read) table"):
        job(impatient, "out", progress)
    thread.join()
    server.start()
    done = rows(server.config, "index_out")
    assert 0 < len(done) < SAMPLES
    assert {name for name, _ in done} <= set(read_outputs(tmp_path / "out"))
    report = job(server.config, "out")
    assert report.embedded + report.already_done == SAMPLES
    assert report.already_done == len(done)
    assert len(rows(server.config, "index_out")) == SAMPLES


def test_a_server_that_starts_late(server, job):
    """It is waited for before the first row too."""
    server.stop("fast")
    timer = threading.Timer(0.5, server.start)
    timer.start()
    with pytest.warns(UserWarning, match=r"index_out of .*trying again in"):
        assert job(server.config, "out").embedded == SAMPLES
    timer.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_waiting(number, server, job):
    """Also where minutes of patience are left."""
    signalled = []

    def leave() -> None:
        server.stop("fast")
        time.sleep(1)  # by now they wait
        signalled.append(time.monotonic())
        os.kill(os.getpid(), number)

    progress, thread = in_the_middle(leave, commits=2)
    patient = DBConfig(url=server.config.url, retries=20)
    # What could not be committed is worth saying, and so comes before the signal.
    with pytest.raises(DatabaseError, match=r"cannot (use|read) table"):
        job(patient, "out", progress)
    waited = time.monotonic() - signalled[0]
    thread.join()
    server.start()
    assert waited < 5
    report = job(server.config, "out")
    assert report.embedded + report.already_done == SAMPLES
    assert len(rows(server.config, "index_out")) == SAMPLES
