"""PostgreSQL under many writers, and connections that are lost and made again."""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from itertools import pairwise

import psycopg2
import pytest

from fastembed import Postgres, TensorPostgres
from fastembed.database import DatabaseError, DBConfig, Session, session
from fastembed.records import Item

WRITERS, COMMITS, ROWS, KEYS = 16, 12, 25, 500


def item(number: int) -> Item:
    return Item(f"key {number}", "", f"emb_{number:04d}", {"text_id": number})


def draws(writer: int) -> list[list[int]]:
    """What a writer commits: in each commit keys in no order, and most of them not its alone."""
    draw = random.Random(writer)
    return [draw.sample(range(KEYS), ROWS) for _ in range(COMMITS)]


def write(url: str, folder: str, writer: int, together) -> None:
    index = Postgres(DBConfig(url=url, retries=0), folder)
    together.wait(60)
    index.open()
    mine = set()
    for numbers in draws(writer):
        index.commit([item(number) for number in numbers])
        mine |= {item(number).name for number in numbers}
    if missing := mine - index.open():
        raise AssertionError(f"writer {writer} misses {missing}")


def rows(connection, query: str = "SELECT embedding_path, text_id FROM image_embeddings") -> list:
    with connection, connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchall()


@pytest.mark.parametrize("table", ["none yet", "without a unique index"])
def test_sixteen_writers(table, database, connection, tmp_path):
    if table != "none yet":
        with connection, connection.cursor() as cursor:
            cursor.execute(
                "CREATE TABLE image_embeddings"
                "(id SERIAL PRIMARY KEY, embedding_path TEXT, text_id INTEGER)"
            )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastembed.indexes"])
    together = context.Barrier(WRITERS)
    writers = [
        context.Process(target=write, args=(database.url, str(tmp_path), number, together))
        for number in range(WRITERS)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0] * WRITERS

    numbers = {n for writer in range(WRITERS) for some in draws(writer) for n in some}
    assert sorted(rows(connection)) == [(f"{tmp_path}/emb_{n:04d}.npy", n) for n in sorted(numbers)]
    # A deadlock would have been repeated, and so gone unnoticed.
    query = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    assert rows(connection, query) == [(0,)]


def test_writers_that_remove(database, connection, tmp_path):
    """Rows that come and go at once: each commit is whole, and nobody waits in a circle."""
    Postgres(database, tmp_path).open()
    errors = []

    def work(seed: int) -> None:
        draw, index = random.Random(seed), Postgres(database, tmp_path)
        index.open()
        try:
            for _ in range(30):
                some = draw.sample(range(60), 40)
                if seed % 2:
                    index.commit([item(number) for number in some])
                else:
                    index.remove({item(number).name for number in some})
        except Exception as error:
            errors.append(error)
        finally:
            index.close()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    there = rows(connection)
    assert len(there) == len(set(there)) and {f"{tmp_path}/emb_{n:04d}.npy" for _, n in there} == {
        path for path, _ in there
    }
    query = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    assert rows(connection, query) == [(0,)]


@pytest.mark.parametrize(
    "constraint",
    [
        "CREATE UNIQUE INDEX ON image_embeddings (embedding_path) WHERE text_id > 3",
        "CREATE UNIQUE INDEX ON image_embeddings (embedding_path, text_id)",
        "CREATE UNIQUE INDEX ON image_embeddings (lower(embedding_path))",
        "CREATE INDEX ON image_embeddings (embedding_path)",
        "ALTER TABLE image_embeddings ADD UNIQUE (embedding_path) DEFERRABLE",
        "CREATE UNIQUE INDEX ON image_embeddings (embedding_path) INCLUDE (text_id)",
    ],
)
def test_tables_of_others(constraint, database, connection, tmp_path):
    """Whatever their indexes: a row once, also where a commit is repeated."""
    with connection, connection.cursor() as cursor:
        cursor.execute(
            "CREATE TABLE image_embeddings(id SERIAL PRIMARY KEY, embedding_path TEXT, "
            "text_id INTEGER, path TEXT, new TEXT)"
        )
        cursor.execute(constraint)
        cursor.execute("INSERT INTO image_embeddings (embedding_path) VALUES (NULL), ('/x/y.npy')")
    index = Postgres(database, tmp_path)
    assert index.open() == set()
    for _ in range(2):
        index.commit([item(5), item(3), item(5)])
    assert index.open() == {"emb_0003", "emb_0005"}
    assert len(rows(connection)) == 4
    index.remove({"emb_0003", "emb_9999"})
    assert index.open() == {"emb_0005"}
    index.close()


def test_another_unique_column_is_an_error_not_a_lost_row(database, connection, tmp_path):
    index = Postgres(database, tmp_path)
    index.open()
    with connection, connection.cursor() as cursor:
        cursor.execute("CREATE UNIQUE INDEX ON image_embeddings (text_id)")
    index.commit([item(1)])
    other = Item("k", "", "emb_other", {"text_id": 1})
    with pytest.raises(DatabaseError, match="duplicate key") as error:
        index.commit([other])
    assert error.value.sqlstate == "23505"
    index.commit([item(2)])  # and the index goes on
    assert index.open() == {"emb_0001", "emb_0002"}
    index.close()


def test_names_that_text_formats_could_break(database, connection, tmp_path):
    folder = tmp_path / 'a "b"\t\\N,c\nü'
    folder.mkdir()
    index = Postgres(database, folder, table='public.Mixed "Case"')
    names = ["emb_plain", "emb_\\.", 'emb_"', "emb_a,b", "emb_\t\\t", "emb_ü\n"]
    index.open()
    index.commit([Item(name, "", name, {"text_id": None}) for name in names])
    assert index.open() == set(names)
    assert index.exists()
    query = 'SELECT embedding_path FROM "Mixed ""Case"""'
    assert sorted(rows(connection, query)) == sorted((f"{folder}/{name}.npy",) for name in names)
    index.remove(set(names))
    assert index.open() == set()
    index.close()


def test_rows_of_folders_below_are_not_ours(database, connection, tmp_path):
    ours, below = Postgres(database, tmp_path), Postgres(database, tmp_path / "below")
    assert not ours.exists()
    assert rows(connection, "SELECT to_regclass('image_embeddings')") == [(None,)]
    below.open()
    below.commit([item(1)])
    assert ours.open() == set() and not ours.exists()
    assert below.open() == {"emb_0001"}
    ours.close()
    below.close()


# Connections ------------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(session, "_FIRST_PAUSE", 0.002)


def end_connections(connection) -> int:
    """Ends all connections to this database but one; how many there were."""
    query = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    return len(rows(connection, query))


@pytest.mark.filterwarnings("ignore:cannot read table")
def test_a_listing_goes_on_after_the_last_row(database, connection, hasty, monkeypatch):
    """Cut after every row in turn; NULLs and repeated rows count as they are."""
    monkeypatch.setattr(session, "_FETCHED_ROWS", 2)
    table = [("a", 1), ("a", 1), ("a", 2), ("a", None), ("a", None), ("B", 7), ("ä b", 3),
             ("", 1), (None, 4), (None, 4), (None, None), (None, None), ("a'b", -1)]  # fmt: skip
    with connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE cpjump1_dinov3_tensors(tensor_path TEXT, text_id INTEGER)")
        cursor.executemany("INSERT INTO cpjump1_dinov3_tensors VALUES (%s, %s)", table)
    source = TensorPostgres(database)
    whole = [item.key for item in source.items()]
    assert sorted(whole) == sorted(f"{path}|{text}" for path, text in table)
    assert source.count() == len(table)
    ended = 0
    for cut in range(len(table)):
        listed = []
        for item in source.items():
            listed.append(item.key)
            if len(listed) - 1 in (cut, cut + 3):
                ended += end_connections(connection)
        assert listed == whole
    assert ended > len(table)


@pytest.mark.filterwarnings("ignore:cannot read table")
def test_a_listing_whose_rows_change_meanwhile(database, connection, hasty, monkeypatch):
    monkeypatch.setattr(session, "_FETCHED_ROWS", 1)
    with connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE cpjump1_dinov3_tensors(tensor_path TEXT, text_id INTEGER)")
        cursor.execute("INSERT INTO cpjump1_dinov3_tensors VALUES ('a', 1), ('a', 1), ('c', 1)")
    listing = TensorPostgres(database).items()
    assert [next(listing).key, next(listing).key] == ["a|1", "a|1"]
    with connection, connection.cursor() as cursor:
        cursor.execute("DELETE FROM cpjump1_dinov3_tensors WHERE tensor_path = 'a'")
        cursor.execute("INSERT INTO cpjump1_dinov3_tensors VALUES ('b', 1), ('b', 1)")
    end_connections(connection)
    assert [item.key for item in listing] == ["b|1", "b|1", "c|1"]


def test_a_listing_that_is_left_early_gives_its_connection_back(database, connection):
    with connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE cpjump1_dinov3_tensors(tensor_path TEXT, text_id INTEGER)")
        cursor.execute("INSERT INTO cpjump1_dinov3_tensors VALUES ('a', 1), ('b', 1)")
    listing = TensorPostgres(database).items()
    next(listing)
    end_connections(connection)
    listing.close()
    deadline = time.monotonic() + 10
    while end_connections(connection) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert end_connections(connection) == 0


def test_every_commit_over_a_lost_connection(database, connection, tmp_path, hasty):
    index = Postgres(database, tmp_path)
    index.open()
    for number in range(5):
        assert end_connections(connection)
        with pytest.warns(UserWarning, match=r"trying again in .* \(1 of 8\)"):
            index.commit([item(number), item(number + 1)])
    end_connections(connection)
    with pytest.warns(UserWarning, match="trying again"):
        index.remove({"emb_0000"})
    end_connections(connection)
    with pytest.warns(UserWarning, match="trying again"):
        assert len(index.open()) == 5
    index.close()


def test_a_commit_without_an_answer_is_repeated(database, connection, tmp_path, hasty, monkeypatch):
    """The server committed, and the connection died before it could say so."""
    index = Postgres(database, tmp_path)
    index.open()
    connect = session._connect

    class Deaf:
        def __init__(self, real) -> None:
            self._real = real

        def __getattr__(self, name: str):
            return getattr(self._real, name)

        def commit(self) -> None:
            self._real.commit()
            self._real.close()
            raise psycopg2.OperationalError("server closed the connection unexpectedly")

    answers = iter([Deaf, Deaf, lambda real: real])
    monkeypatch.setattr(session, "_connect", lambda config: next(answers)(connect(config)))
    index.close()
    with pytest.warns(UserWarning, match="trying again"):
        index.commit([item(1), item(2)])
    assert sorted(rows(connection)) == [(f"{tmp_path}/emb_000{n}.npy", n) for n in (1, 2)]
    index.close()


def test_the_end_of_patience(hasty):
    unreachable = DBConfig(host="127.0.0.1", port=1, user="u", database="d", retries=3)
    with (
        pytest.warns(UserWarning, match="trying again") as told,
        pytest.raises(
            DatabaseError, match=r"cannot read table .* of u@127\.0\.0\.1:1/d: .*refused"
        ),
    ):
        TensorPostgres(unreachable).count()
    assert [str(warning.message)[-8:] for warning in told] == [f"({i} of 3)" for i in (1, 2, 3)]
    with pytest.raises(ValueError, match="retries"):
        DBConfig(retries=-1)


def test_pauses_double_to_about_two_minutes(monkeypatch):
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(session.time, "monotonic", lambda: now)
    monkeypatch.setattr(session.time, "sleep", sleep)
    monkeypatch.setattr(session.random, "uniform", lambda low, high: (low + high) / 2)
    pauses = session._Pauses(Session(DBConfig(retries=9)), "cannot")
    ends = [0.0]
    for _ in range(9):
        with pytest.warns(UserWarning, match="trying again"):
            pauses.take(psycopg2.OperationalError("x"))
        ends.append(now)
    waits = [end - start for start, end in pairwise(ends)]
    assert waits == pytest.approx([0.5, 1, 2, 4, 8, 16, 32, 60, 60])
    assert 100 < sum(waits[:8]) < 140
    with pytest.raises(DatabaseError, match="cannot: x"):
        pauses.take(psycopg2.OperationalError("x"))
    pauses.reset()
    with pytest.warns(UserWarning, match=r"0\.5 s \(1 of 9\)"):
        pauses.take(psycopg2.OperationalError("x"))


@pytest.mark.filterwarnings("ignore:cannot")
def test_waiting_ends_when_the_run_does():
    lonely = Session(DBConfig(host="127.0.0.1", port=1))
    errors = []

    def wait() -> None:
        try:
            lonely.transact(lambda cursor: None, "cannot")
        except DatabaseError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive()
    start = time.monotonic()
    lonely.stop_waiting()
    thread.join(10)
    assert errors and time.monotonic() - start < 2
    with pytest.raises(DatabaseError):  # and nobody begins to wait after that
        lonely.transact(lambda cursor: None, "cannot")
    assert time.monotonic() - start < 4


PREFIX = 'connection to server at "db" (10.0.0.1), port 5432 failed: '


@pytest.mark.parametrize(
    ("text", "passing"),
    [
        ("FATAL:  the database system is starting up", True),
        ("FATAL:  the database system is shutting down", True),
        ("FATAL:  the database system is in recovery mode", True),
        ("FATAL:  sorry, too many clients already", True),
        ("FATAL:  remaining connection slots are reserved for roles with SUPERUSER", True),
        ('FATAL:  too many connections for role "u"', True),
        ("Connection refused\n\tIs the server running on that host and accepting?", True),
        ("timeout expired", True),
        ("could not receive data from server: Connection reset by peer", True),
        ('FATAL:  password authentication failed for user "u"', False),
        ('FATAL:  database "d" does not exist', False),
        ('FATAL:  role "u" does not exist', False),
        ("FATAL:  no pg_hba.conf entry for host", False),
        ("fe_sendauth: no password supplied", False),
        ("FATAL:  es ist zu spät", False),
    ],
)
def test_what_is_worth_another_attempt(text, passing):
    assert session._is_passing(psycopg2.OperationalError(PREFIX + text), None) is passing
    # localhost often has two addresses, and the server listens to the second.
    refused = PREFIX + "Connection refused\n" + PREFIX
    assert session._is_passing(psycopg2.OperationalError(refused + text), None) is passing


def test_an_unknown_host_is_an_error_at_once():
    error = psycopg2.OperationalError(
        'could not translate host name "no.such" to address: Name or service not known'
    )
    assert not session._is_passing(error, None)


def test_missing_table_and_database_are_errors_at_once(database):
    start = time.monotonic()
    with pytest.raises(DatabaseError, match="has no table nowhere"):
        TensorPostgres(database, "nowhere").count()
    with pytest.raises(DatabaseError, match="has no table nowhere"):
        list(TensorPostgres(database, "nowhere").items())
    missing = DBConfig(url=database.url, database="no_such_database")
    with pytest.raises(DatabaseError, match="does not exist"):
        TensorPostgres(missing).count()
    assert time.monotonic() - start < 5


def test_too_many_clients_pass(database, connection, hasty):
    """A role that is at its limit gets its connection when another lets go of one."""
    with connection, connection.cursor() as cursor:
        cursor.execute("DROP ROLE IF EXISTS crowded")
        cursor.execute("CREATE ROLE crowded LOGIN CONNECTION LIMIT 1")
    config = DBConfig(url=database.url, user="crowded", retries=15)
    first = session.get_db_connection(config)
    threading.Timer(0.3, first.close).start()
    with pytest.warns(UserWarning, match="too many connections for role"):
        assert Session(config).transact(lambda cursor: cursor.execute("SELECT 1"), "cannot") is None


def test_a_text_id_that_the_table_cannot_hold_fails_alone(plates, tmp_path, database, connection):
    """One bad row is a failure record, not the end of this run and of every other."""
    from conftest import TinyEngine

    from fastembed import MultiCrop, NpyPerSample, Percentile, TensorCsv, extract

    plates.fill(3)
    plates.add("big.npy", (plates.folder / "plate_000.npy").read_bytes(), text_id=2**31)
    report = extract(
        TensorCsv(plates.manifest), MultiCrop(Percentile(), n_crops=1), TinyEngine(),
        NpyPerSample(tmp_path / "out"), Postgres(database, tmp_path / "out"),
    )  # fmt: skip
    assert (report.embedded, report.failed) == (3, 1)
    assert "integer of 32 bits" in (tmp_path / "out" / "failures.jsonl").read_text()
    assert len(rows(connection)) == 3
