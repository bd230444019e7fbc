"""verify of tiles of an inference, volumes, rows in PostgreSQL; and the command."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from test_verify import flip, kinds, tree

from fastembed import cli
from fastembed.commands import FILE_NAME as RUNS
from fastembed.commands import Command
from fastembed.runlock import FolderBusy, RunLock
from fastembed.verify import NotRecognised, findings, repair, verify


@pytest.fixture
def inference(tmp_path):
    """A folder of tiles' counts and masks, and what makes it."""
    pytest.importorskip("cellpose", reason="cellpose is not installed")
    pytest.importorskip("tifffile", reason="tifffile is not installed")
    import test_cellpose_infer as job

    for i in range(5):
        place = tmp_path / "in" / "gfap" / f"{job.DONORS[i % 3]}_slide"
        place.mkdir(parents=True, exist_ok=True)
        for channel, plane in zip(("c0", "c1"), job.tile(i), strict=True):
            job.tifffile.imwrite(place / f"field{i}_b0{channel}.tif", plane)

    def run(out, **options):
        return job.run(tmp_path / "in", out, keep_masks=True,
                       command=Command(("test",), "/", "0"), **options)  # fmt: skip

    run(tmp_path / "whole")
    return run


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


TILE_DAMAGES = {
    "a record": (lambda f: flip(first(f, "tiles/*.json")), findings.DAMAGED),
    "a cut record": (lambda f: os.truncate(first(f, "tiles/*.json"), 9), findings.DAMAGED),
    "a mask": (lambda f: flip(first(f, "pred_masks/*.tif")), findings.DAMAGED),
    "no record": (lambda f: first(f, "tiles/*.json").unlink(), findings.ORPHAN),
    "no mask": (lambda f: first(f, "pred_masks/*.tif").unlink(), findings.MISSING),
    "the table": (lambda f: flip(f / "tile_counts.tsv"), findings.STALE),
    "the list": (lambda f: os.truncate(f / "checksums.tsv", 150), findings.OPEN),
    "the settings": (lambda f: flip(f / "fastembed.json", 30), findings.SETTINGS),
}


@pytest.mark.parametrize("damage", TILE_DAMAGES)
def test_tiles(inference, tmp_path, damage):
    run, out = inference, tmp_path / "out"
    run(out)
    assert tree(out) == tree(tmp_path / "whole")
    verdict = verify(out)
    assert verdict.sound and verdict.outputs == 5 and verdict.verified == 10
    do, kind = TILE_DAMAGES[damage]
    do(out)
    assert kind in kinds(verify(out))
    done = repair(out, lambda names: run(out, only=names))
    assert done.after.sound, done.after.findings
    assert tree(out) == tree(tmp_path / "whole")


def test_volumes(tmp_path):
    pytest.importorskip("tensorstore", reason="tensorstore is not installed")
    pytest.importorskip("xxhash", reason="xxhash is not installed")
    import test_volumes_job as job

    sections, out = job.make_sections(tmp_path / "sections"), tmp_path / "out"
    job.run(sections, out)
    stored = job.stored(out)
    verdict = verify(out)
    assert verdict.sound and verdict.form == "volumes" and verdict.outputs == 3
    assert verdict.verified == verdict.files > 3
    chunk = max(
        (p for p in (out / "volume_000001_features.zarr").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    flip(chunk, 0)
    verdict = verify(out)
    assert kinds(verdict) == {findings.DAMAGED} and verdict.to_make == {"volume_000001"}
    made = []

    def make(names):
        made.extend(names)
        job.run(sections, out, only=names)

    done = repair(out, make)
    assert done.after.sound and made == ["volume_000001"]
    assert job.stored(out) == stored
    assert not list(out.glob("*.damaged"))


# PostgreSQL ---------------------------------------------------------------------------------


@pytest.fixture
def in_database(plates, database, tmp_path):
    """A folder whose rows are in PostgreSQL, and what makes it."""
    from conftest import TinyEngine

    from fastembed import MultiCrop, NpyPerSample, Percentile, Postgres, TensorCsv, extract

    plates.fill(6)

    def run(out, **options):
        index = Postgres(database, out)
        return extract(TensorCsv(plates.manifest), MultiCrop(Percentile(), n_crops=2),
                       TinyEngine(), NpyPerSample(out), index, **options)  # fmt: skip

    run(tmp_path / "out")
    return run


def rows_of(connection) -> list[tuple]:
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT embedding_path, text_id FROM image_embeddings ORDER BY 1")
        return cursor.fetchall()


def test_rows_in_postgresql(in_database, database, connection, tmp_path):
    run, out = in_database, tmp_path / "out"
    whole, rows = tree(out), rows_of(connection)
    assert verify(out, database=database).sound
    first(out, "emb_*.npy").unlink()
    flip(sorted(out.glob("emb_*.npy"))[2])
    with connection, connection.cursor() as cursor:
        cursor.execute("DELETE FROM image_embeddings WHERE embedding_path = %s", (rows[1][0],))
        cursor.execute("INSERT INTO image_embeddings (embedding_path, text_id) VALUES (%s, 7)",
                       (f"{out}/emb_gone.npy",))  # fmt: skip
        cursor.execute("INSERT INTO image_embeddings (embedding_path, text_id) VALUES (%s, 7)",
                       ("/elsewhere/emb_1.npy",))  # fmt: skip
    verdict = verify(out, database=database)
    assert verdict.counts == {findings.MISSING: 2, findings.DAMAGED: 1, findings.ORPHAN: 1}
    done = repair(out, lambda names: run(out, only=names), database=database)
    assert done.after.sound and tree(out) == whole
    assert rows_of(connection) == sorted([*rows, ("/elsewhere/emb_1.npy", 7)])


def test_without_the_database_files_are_checked_all_the_same(in_database, tmp_path):
    out = tmp_path / "out"
    verdict = verify(out)
    assert verdict.sound and verdict.verified == 6
    assert "no database was given" in verdict.notes[0]
    flip(first(out, "emb_*.npy"))
    verdict = verify(out)
    assert verdict.counts == {findings.DAMAGED: 1}
    with pytest.raises(ValueError, match="in a database"):
        repair(out, lambda names: None)


def test_verify_makes_no_table(database, connection, in_database, tmp_path):
    with connection, connection.cursor() as cursor:
        cursor.execute("DROP TABLE image_embeddings")
    assert verify(tmp_path / "out", database=database).counts == {findings.ORPHAN: 6}
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT to_regclass('image_embeddings')")
        assert cursor.fetchone() == (None,)


# What cannot be checked or repaired -----------------------------------------------------------


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        verify(tmp_path / "gone")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(NotRecognised):
        verify(tmp_path)


def test_no_repair_while_a_run_is_at_work(in_database, database, tmp_path):
    out = tmp_path / "out"
    flip(first(out, "emb_*.npy"))
    with RunLock(out, (1, 3)), pytest.raises(FolderBusy):
        repair(out, lambda names: None, database=database)


# The command ----------------------------------------------------------------------------------


@pytest.fixture
def tiny_models(monkeypatch):
    from conftest import TinyEngine
    from test_panoptic_job import RgbEngine

    def load(spec, **options):
        return TinyEngine() if options.get("channels") else RgbEngine()

    monkeypatch.setattr("fastembed.engines.load_engine", load)


@pytest.fixture
def photos(tmp_path, tiny_models):
    from test_panoptic_job import Coco

    return Coco(tmp_path / "coco").fill(6)


def panoptic(photos, out, *options: str) -> int:
    return cli.main(["panoptic", "--data_path", str(photos.folder), "--split", "val2017",
                     "--cache_dir", str(out), *options])  # fmt: skip


def test_command_line(photos, tmp_path, capsys):
    out = tmp_path / "out"
    for part in "01":
        assert panoptic(photos, out, "--shard", f"{part}/2", "--workers", "1") == 0
    whole = tree(out)
    assert cli.main(["verify", str(out)]) == 0
    assert capsys.readouterr().out.endswith("sound\n")
    files = sorted(out.glob("*.npy"))
    flip(files[3])
    files[7].unlink()
    damaged = tree(out)
    assert cli.main(["verify", str(out)]) == 3
    shown = capsys.readouterr().out
    assert (
        f"{files[3].name}: its content is not" in shown
        and f"{files[7].name}: it has a row" in shown
    )
    assert cli.main(["verify", str(out), "--json"]) == 3
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["counts"] == {"damaged": 1, "missing": 1} and not verdict["sound"]
    assert cli.main(["verify", str(out), "--repair", "--dry-run"]) == 3
    assert "fastembed panoptic --data_path" in capsys.readouterr().err and tree(out) == damaged
    assert cli.main(["verify", str(out), "--repair"]) == 0
    assert capsys.readouterr().out.endswith("sound\n")
    assert tree(out) == whole
    assert cli.main(["verify", str(out), "--repair", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["withdrawn"] == []


def test_a_folder_is_repaired_where_it_lies_now(photos, tmp_path, capsys, monkeypatch):
    """By all commands that made it, whatever their shards and limits, and by no more."""
    monkeypatch.chdir(tmp_path)
    assert panoptic(photos, Path("out"), "--classes", "person", "--limit", "4") == 0
    assert panoptic(photos, Path("out"), "--classes", "car") == 0
    assert panoptic(photos, Path("out"), "--classes", "car", "--shard", "0/3") == 0
    record = json.loads((tmp_path / "out" / RUNS).read_text())
    assert [command["argv"][-2:] for command in record["commands"]] == [
        ["--split=val2017", "--classes=person"], ["--split=val2017", "--classes=car"],
    ]  # fmt: skip
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    whole = tree(moved)
    for path in sorted(moved.glob("*.npy")):
        flip(path)
    monkeypatch.chdir("/")
    assert cli.main(["verify", str(moved), "--repair"]) == 0
    assert tree(moved) == whole and not (tmp_path / "out").exists()


def test_failures_of_before_stay(photos, tmp_path):
    out = tmp_path / "out"
    photos.add(7, photo=b"")
    assert panoptic(photos, out) == 3
    failures = (out / "failures.jsonl").read_bytes()
    flip(first(out, "*.npy"))
    assert cli.main(["verify", str(out), "--repair"]) == 0
    assert (out / "failures.jsonl").read_bytes() == failures
    assert not (out / "failures-repair.jsonl").exists()


def test_what_cannot_be_made_again_stays_set_aside(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert panoptic(photos, out) == 0
    broken = first(out, "*.npy")
    flip(broken)
    content = broken.read_bytes()
    for path in photos.folder.glob("val2017/*.jpg"):
        path.unlink()
    assert cli.main(["verify", str(out), "--repair"]) == 0  # what is there is sound
    assert (out / "set-aside" / broken.name).read_bytes() == content
    assert "1 files are set aside" in capsys.readouterr().out


def test_without_a_recorded_command(photos, tmp_path, capsys):
    photos.run(tmp_path / "out")
    flip(first(tmp_path / "out", "*.npy"))
    assert cli.main(["verify", str(tmp_path / "out"), "--repair"]) == 0
    assert "no command is recorded" in capsys.readouterr().err
    assert photos.run(tmp_path / "out").embedded == 1
    assert cli.main(["verify", str(tmp_path / "out")]) == 0


def test_passwords_are_not_recorded(plates, database, connection, tmp_path, tiny_models, capsys):
    """And the repair of a folder whose rows are in a database finds it by the record."""
    plates.fill(4)
    out = tmp_path / "out"
    url = f"{database.url}&password=hunter2"
    command = ["multichannel", "--manifest", str(plates.manifest), "--output-dir", str(out),
               "--model", "dinov3:vits16", "--db", url, "--db-pass", "hunter3"]  # fmt: skip
    assert cli.main(command) == 0
    text = (out / RUNS).read_text()
    assert "hunter" not in text and "--db=" in text
    whole = tree(out)
    flip(first(out, "emb_*.npy"))
    assert cli.main(["verify", str(out), "--repair"]) == 0
    assert tree(out) == whole and len(rows_of(connection)) == 4
    assert "hunter" not in capsys.readouterr().out


def test_exit_statuses(tmp_path, capsys):
    assert cli.main(["verify", str(tmp_path / "gone")]) == 1
    assert cli.main(["verify", str(tmp_path), "--dry-run"]) == 2
    assert cli.main(["verify", str(tmp_path), "--repair", "--quick"]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_volumes_are_repaired_by_their_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorstore", reason="tensorstore is not installed")
    import test_volumes_job as job

    def load(*_, **__):
        engine = job.MapEngine()
        engine.weights_id, engine.precision = "tiny", "fp32"
        return engine

    monkeypatch.setattr("fastembed.engines.load_engine", load)
    job.make_sections(tmp_path / "sections")
    command = ["volumes", "preprocess", "--datasets", str(tmp_path / "sections" / "datasets.yaml"),
               "--organelles", "mito", "--base-resolution", "40", "--min-resolution-for-raw", "10",
               "--output-image-dim", "12", "--min-unique-ids", "1", "--chunks", "3,6,6,6",
               "--output-dir", str(tmp_path / "out")]  # fmt: skip
    for index in ("0", "1-2"):
        assert cli.main([*command, "--volume-index", index]) == 0
    out = tmp_path / "out"
    assert len(json.loads((out / RUNS).read_text())["commands"]) == 1
    stored = job.stored(out)
    first(out, "volume_000001_gt.zarr/*.*.*").unlink()
    assert cli.main(["verify", str(out)]) == 3
    assert cli.main(["verify", str(out), "--repair"]) == 0
    assert "--volume-index 1" in capsys.readouterr().err
    assert job.stored(out) == stored
