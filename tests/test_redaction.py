"""Passwords in every form that a database can be given, and every place where they could show."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import traceback
from pathlib import Path
from urllib.parse import quote

import psycopg2
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from fastembed import Postgres, Report, TensorPostgres, cli
from fastembed.cli.options import add_database
from fastembed.database import DatabaseError, DBConfig, database_error, get_db_connection
from fastembed.redaction import redact, redact_arguments

# No NUL: neither a command line nor libpq takes one. No surrogates: they are no text.
passwords = st.text(
    st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), min_size=1, max_size=24
)
hard = ["p@ss", "a b", "it's", "\\'", "pa/ss", "x:y@z", "%41", "a=b", '"', "pässwörd", "#?&", "***"]


def examples(function):
    for password in hard:
        function = example(password)(function)
    return function


def escaped(password: str) -> str:
    return password.replace("\\", "\\\\").replace("'", "\\'")


PLACE = {"host": "127.0.0.1", "port": 1, "database": "d", "user": "u", "retries": 0}


def forms(password: str) -> dict[str, DBConfig]:
    """The same database and password in all ways to write them."""
    encoded = quote(password, safe="")
    return {
        "arguments": DBConfig(**PLACE, password=password),
        "url": DBConfig(url=f"postgresql://u:{encoded}@127.0.0.1:1/d", retries=0),
        "query": DBConfig(url=f"postgresql://u@127.0.0.1:1/d?password={encoded}", retries=0),
        "key=value": DBConfig(
            url=f"host=127.0.0.1 port=1 dbname=d user=u password = '{escaped(password)}'",
            retries=0,
        ),
        "ssl": DBConfig(
            url=f"host=127.0.0.1 port=1 dbname=d user=u sslpassword='{escaped(password)}'",
            retries=0,
        ),
    }


def told(config: DBConfig) -> list[str]:
    """All that this library says of a configuration and of what goes wrong with it."""
    texts = [str(config), repr(config), str(TensorPostgres(config)), str(Postgres(config, "/o"))]
    for use in (
        lambda: get_db_connection(config),
        lambda: TensorPostgres(config).count(),
        lambda: list(TensorPostgres(config).items()),
        lambda: Postgres(config, "/o").open(),
    ):
        with pytest.raises(DatabaseError) as error:
            use()
        texts += [str(error.value), repr(error.value), *traceback.format_exception(error.value)]
    texts.append(Report(index=str(Postgres(config, "/o"))).to_json())
    return texts


@examples
@given(passwords)
def test_nothing_that_is_told_depends_on_the_password(password):
    """Neither the password nor anything that it changes: what is said is the same for another."""
    one, other = forms(password), forms("another")
    for form, config in one.items():
        assert config.parameters()["sslpassword" if form == "ssl" else "password"] == password
        assert config.has_password
        texts = (str(config), repr(config), str(TensorPostgres(config)))
        assert texts == (str(other[form]), repr(other[form]), str(TensorPostgres(other[form])))


@pytest.mark.parametrize("password", ["s3cr3t hunter's", "p@ss/w0rd:%", "wörd\\"])
def test_errors_do_not_depend_on_the_password(password):
    one, other = forms(password), forms("another")
    for form in one:
        assert told(one[form]) == told(other[form])
        assert not any(password in text for text in told(one[form]))


@examples
@given(passwords)
def test_a_driver_that_repeats_what_it_was_given(password):
    """Should an error have the password in it, in any form: it does not get through."""
    assume(password.strip("*") and len(password) > 2)
    for config in forms(password).values():
        for text in (
            f"bad {password!r}", f"bad {password} here", f"password={password}", config.url or "",
            f"no {quote(password)}", f"no {quote(password, safe='')}", f"no '{escaped(password)}'",
            psycopg2.extensions.make_dsn(user="u", password=password),
        ):  # fmt: skip
            shown = str(database_error("cannot", Exception(text), config))
            rest = "cannot: bad here no password= user=u ***" + str(forms("another"))
            if password not in rest and password == " ".join(password.split()):
                assert password not in shown, (text, shown)


@given(passwords)
@example("p@ss")
@example("a/b")
@example("a?b")
@example("a/b@c?d#e")
def test_an_unencoded_password_is_used_or_refused_and_never_shown(password):
    """postgresql://u:p@ss@host: libpq would take half a password for the host and name it."""
    try:
        config = DBConfig(url=f"postgresql://u:{password}@example.invalid:1/d")
    except ValueError as error:
        assert password not in str(error) or password in str(_refusals())
        assert error.__context__ is None or error.__suppress_context__
        return
    assert str(config) == "u@example.invalid:1/d"


def _refusals() -> list[str]:
    found = []
    for url in ("postgresql://u:a@b@c/d", "x y"):
        with pytest.raises(ValueError, match=r"database") as error:
            DBConfig(url=url)
        found.append(str(error.value))
    return found


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:hunter2@x@h/d", "postgres://u:hunter2/x@h/d", "postgresql://u:a/hunter2@h",
        "host=x password=a hunter2", "host=x password='hunter2", "hunter2", "password=a hunter2=b",
        "postgresql://u:%zhunter2@h/d", "postgresql://u@h/d?hunter2=1", "postgresql://u@h/d?hunter2",
        "https://u:hunter2@h/d",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_unseen(url, capsys):
    with pytest.raises(ValueError, match="database") as error:
        DBConfig(url=url)
    assert "hunter2" not in "".join(traceback.format_exception(error.value))
    command = ["multichannel", "--output-dir", "o", "--model", "dinov3:vits16", "--db", url]
    assert cli.main(command) == 1
    said = capsys.readouterr()
    assert "hunter2" not in said.err + said.out


def test_the_environment_and_services(monkeypatch, tmp_path):
    (tmp_path / "services").write_text("[prod]\nhost=127.0.0.1\nport=1\npassword=hunter2\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    (tmp_path / "pass").write_text("*:*:*:*:hunter2\n")
    (tmp_path / "pass").chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "pass"))
    monkeypatch.setenv("PGPASSWORD", "hunter2")
    service = DBConfig(url="service=prod", retries=0)
    assert str(service) == "service prod"
    monkeypatch.setenv("PGHOST", "127.0.0.1")
    monkeypatch.setenv("PGPORT", "1")
    plain = DBConfig(retries=0)
    assert str(plain) == "127.0.0.1:1/"
    for config in (service, plain):
        assert not config.has_password
        assert not any("hunter2" in text for text in told(config))
        assert "hunter2" not in config.redact("it said hunter2")


# Command lines ----------------------------------------------------------------------------


@examples
@given(passwords)
def test_command_lines(password):
    assume(password.strip("*") and not password.startswith("-"))
    encoded = quote(password, safe="")
    for arguments in (
        ["multichannel", "--db-password", password],
        ["multichannel", f"--db-password={password}"],
        ["multichannel", "--db-pa", password],
        ["multichannel", "--db", f"postgresql://u:{encoded}@h/d"],
        ["multichannel", f"--db=postgresql://u:{encoded}@h/d?password={encoded}"],
        ["multichannel", "--db", f"host=h password='{escaped(password)}'"],
    ):
        shown = redact_arguments(arguments)
        assert len(shown) == len(arguments) and shown[0] == "multichannel"
        text = " ".join(shown)
        if password not in "multichannel --db-password= postgresql://u:***@h/d?host=h":
            assert password not in text and encoded not in text


def test_options_that_argparse_takes_for_the_password():
    parser = argparse.ArgumentParser()
    add_database(parser.add_argument_group("g"))
    for end in range(len("--db-p"), len("--db-password") + 1):
        option = "--db-password"[:end]
        try:
            taken = parser.parse_args([option, "x"]).db_password == "x"
        except SystemExit:  # ambiguous
            taken = False
        assert (redact_arguments([option, "x"]) == [option, "***"]) is taken, option


def test_what_is_no_secret_stays():
    command = ["multichannel", "--db", "postgresql://me@host:5432/d", "--output-dir", "pass/word=1"]
    assert redact_arguments(command) == command
    for text in ("the password is wrong", "https://host/a@b", "/data/x.npy: no such file"):
        assert redact(text) == text


def test_mistyped_options_do_not_repeat_a_password(capsys):
    for words in (
        ["--db", "host=x", "password=hunter2"], ["--db-pasword", "hunter2"],
        ["--db-port", "postgresql://u:hunter2@h"],
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            cli.main(["multichannel", "--output-dir", "o", *words])
        said = capsys.readouterr()
        assert "hunter2" not in said.err + said.out and "error" in said.err


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="there is no /proc here")
def test_the_process_list():
    """`ps` sees no password once the program runs, and the program has it all the same."""
    code = (
        "import sys, time; from fastembed import cli; import fastembed.cli as c;"
        "c.build_parser = lambda: (print('hidden', sys.argv[-1], flush=True), time.sleep(60));"
        "cli.main()"
    )
    secret = "hünter 2"
    arguments = ["multichannel", "--db", f"postgresql://u:{secret}@h/d", "--db-password", secret]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == f"hidden {secret}\n"
            shown = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        finally:
            process.kill()
    assert secret.encode() not in shown and b"multichannel\0--db\0postgresql://u:***@h/d" in shown
    assert shown.count(b"\0") == len(arguments) + 3


def test_files_of_a_run(plates, tmp_path, database, monkeypatch):
    """Settings, failures, report and index of a run whose URL has a password."""
    monkeypatch.setenv("PGPASSWORD", "hunter2-environment")
    with get_db_connection(database) as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE cpjump1_dinov3_tensors(tensor_path TEXT, text_id INTEGER)")
        plates.fill(2)
        plates.add("missing.npy", None)
        cursor.executemany("INSERT INTO cpjump1_dinov3_tensors VALUES (%s, %s)", plates.rows)
    connection.close()
    url = psycopg2.extensions.make_dsn(database.url, password="hunter2 it's")
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "fastembed.cli", "multichannel", "--db", url, "--output-dir", out,
         "--model", "dinov3:vits16", "--weights", "random", "--img-size", "32", "--report",
         out / "report.json", "--profile", out / "trace.json"],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert json.loads((out / "report.json").read_text())["failed"] == 1
    written = [path for path in out.rglob("*") if path.is_file()]
    assert {"report.json", "fastembed.json", "failures.jsonl"} <= {path.name for path in written}
    for path in written:
        assert b"hunter2" not in path.read_bytes(), path
    assert "hunter2" not in done.stdout + done.stderr
