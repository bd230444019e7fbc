"""Resume, shards, failures, signatures: what makes an extraction trustworthy."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import TinyEngine, read_outputs

from fastembed import (
    MultiCrop,
    NpyPerSample,
    Percentile,
    Postgres,
    TensorCsv,
    Tsv,
    ZScore,
    extract,
    testing,
)
from fastembed.pipeline import SampleFailed
from fastembed.pipeline.clock import Busy
from fastembed.pipeline.ring import Aborted, Ring
from fastembed.records import Item
from fastembed.signature import SignatureMismatch

RECIPE = MultiCrop(Percentile(), n_crops=3)


def run(plates, folder, engine=None, recipe=RECIPE, **options):
    return extract(
        TensorCsv(plates.manifest), recipe, engine or TinyEngine(), NpyPerSample(folder),
        Tsv(folder), **options,
    )  # fmt: skip


def failures(folder) -> list[dict]:
    path = folder / "failures.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_an_embedding_is_the_pooled_crops_of_its_sample(plates, tmp_path):
    """The whole path against NumPy: percentiles, crops, model, mean over the crops."""
    plates.fill(5)
    report = run(plates, tmp_path / "out")
    assert (report.listed, report.embedded, report.failed) == (5, 5, 0)
    from fastembed import crop_origins

    source = TensorCsv(plates.manifest)
    for item in source.items():
        image = np.load(item.path)[:5]
        origins = crop_origins(image.shape, 3, 32, 0, item.key)
        crops = testing.oracle_crops(
            testing.oracle_percentile_levels(image, 1, 99), origins, 32, (0.0,) * 5, (1.0,) * 5,
            "float32",
        )  # fmt: skip
        vectors = crops.reshape(3, 5, 4, 8, 4, 8).mean(axis=(3, 5)).reshape(3, -1)
        stored = np.load(tmp_path / "out" / f"{item.name}.npy")
        assert stored.dtype == np.float32
        np.testing.assert_allclose(stored, vectors.mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_bits_do_not_depend_on_batch_mates_workers_or_order(plates, tmp_path, batch_size):
    plates.fill(11)
    run(plates, tmp_path / "a", TinyEngine(8), workers=1)
    plates.rows.reverse()
    plates.add("last.npy", testing.microscopy("uint16", 48, 48, 99, 8))
    run(plates, tmp_path / "b", TinyEngine(batch_size), workers=4)
    first, second = read_outputs(tmp_path / "a"), read_outputs(tmp_path / "b")
    for name, content in first.items():
        if name.endswith(".npy"):
            assert second[name] == content


def test_resume_recomputes_nothing_and_changes_no_bit(plates, tmp_path):
    plates.fill(6)
    first = run(plates, tmp_path / "out")
    before = read_outputs(tmp_path / "out")
    engine = TinyEngine()
    second = run(plates, tmp_path / "out", engine)
    assert first.embedded == 6
    assert (second.embedded, second.already_done, engine.calls) == (0, 6, 0)
    assert read_outputs(tmp_path / "out") == before


def test_what_is_not_committed_is_made_again(plates, tmp_path):
    """A file without a row, a row without a file, a torn row: none is taken for done."""
    plates.fill(6)
    out = tmp_path / "out"
    run(plates, out)
    complete = read_outputs(out)
    index = out / "image_embeddings.tsv"
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join(lines[:4]) + lines[4][:20])  # rows 0-2, then a torn one
    orphan = out / lines[5].split("\t")[0]
    orphan.write_bytes(b"\x93NUMPY half-written by something else")
    (out / lines[1].split("\t")[0]).unlink()
    report = run(plates, out)
    assert (report.already_done, report.embedded) == (2, 4)
    assert read_outputs(out) == complete


def test_a_row_that_a_killed_shard_left_torn_swallows_none(plates, tmp_path):
    """While another shard goes on."""
    plates.fill(6)
    items = list(TensorCsv(plates.manifest).items())
    index = Tsv(tmp_path)
    index.open()
    index.commit(items[:2])
    with index.path.open("a") as stream:
        stream.write(f"{items[5].name}.npy\t")
    index.commit(items[2:4])
    assert Tsv(tmp_path).open() == {item.name for item in items[:4]}


@pytest.mark.parametrize("damage", [b"one column\n", b"\xff\xfe.npy\t0\tx\n"])
def test_a_damaged_index_is_told_and_how_to_mend_it(plates, tmp_path, damage):
    plates.fill(2)
    run(plates, tmp_path / "out")
    index = tmp_path / "out" / "image_embeddings.tsv"
    index.write_bytes(index.read_bytes() + damage)
    with pytest.raises(ValueError, match=r"image_embeddings\.tsv is damaged .* --repair"):
        run(plates, tmp_path / "out")


def test_union_of_shards_is_the_bytes_of_one_run(plates, tmp_path):
    plates.fill(20)
    run(plates, tmp_path / "one")
    reports = [run(plates, tmp_path / "three", shard=(i, 3)) for i in (2, 0, 1)]
    assert sum(report.listed for report in reports) == 20
    assert all(report.listed for report in reports)
    assert read_outputs(tmp_path / "three") == read_outputs(tmp_path / "one")


def test_shards_may_run_at_once(plates, tmp_path):
    plates.fill(20)
    run(plates, tmp_path / "one")
    threads = [
        threading.Thread(target=run, args=(plates, tmp_path / "four"), kwargs={"shard": (i, 4)})
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_outputs(tmp_path / "four") == read_outputs(tmp_path / "one")


def test_limit_and_duplicates(plates, tmp_path):
    plates.fill(6)
    plates.rows.insert(1, plates.rows[0])
    plates.add("more.npy", None)
    report = run(plates, tmp_path / "out", limit=4)
    assert (report.listed, report.embedded, report.duplicates, report.failed) == (4, 3, 1, 0)


BAD = {
    "missing": (None, "No such file"),
    "truncated": (b"\x93NUMPY\x01\x00v\x00", "not a readable .npy"),
    "3 channels": (np.zeros((3, 40, 40), np.uint16), "at least 5 channels; found 3"),
    "2-D": (np.zeros((40, 40), np.uint16), "[C, H, W]; found shape [40, 40]"),
    "empty": (b"", "empty"),
    "float64": (np.zeros((8, 40, 40)), "found float64"),
    "int32": (np.zeros((8, 40, 40), np.int32), "found int32"),
    "pickle": (np.array([[[{}]]] * 8), "found object"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_sample_is_recorded_and_the_run_goes_on(plates, tmp_path, kind):
    content, reason = BAD[kind]
    plates.fill(2)
    bad = plates.add(f"bad {kind} ü.npy", content, 9)
    plates.add("good.npy", testing.microscopy("uint16", 40, 40, 1, 8))
    report = run(plates, tmp_path / "out")
    assert (report.embedded, report.failed) == (3, 1)
    [record] = failures(tmp_path / "out")
    assert record["path"] == str(bad) and record["text_id"] == 9
    assert record["key"] == f"{bad}|9"
    assert reason in record["reason"]


@pytest.mark.parametrize("rule", [Percentile(), ZScore((1000.0,) * 5, (500.0,) * 5)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("as_on_cuda", [False, True])
def test_a_non_finite_pixel_is_a_failure_that_names_its_channel(
    plates, tmp_path, monkeypatch, rule, value, as_on_cuda
):
    """On CUDA measuring marks the channel and does not raise: its crops do."""
    if as_on_cuda:
        monkeypatch.setattr("fastembed.ops.quantize.check_finite", lambda *a, **k: None)
    image = testing.microscopy("float32", 40, 40, 0, 8)
    image[2, 3, 4] = value
    image[6] = np.nan  # a channel that is not used
    plates.add("bad.npy", image)
    run(plates, tmp_path / "out", recipe=MultiCrop(rule))
    [record] = failures(tmp_path / "out")
    assert "channel 2 has 1 non-finite" in record["reason"]


def test_a_constant_channel_is_no_failure(plates, tmp_path):
    image = testing.microscopy("float32", 40, 40, 0, 8)
    image[1] = 1234.5
    plates.add("constant.npy", image)
    assert run(plates, tmp_path / "out").failed == 0
    [path] = (tmp_path / "out").glob("emb_*.npy")
    assert (np.load(path)[16:32] == 0).all()


def test_failures_are_tried_again(plates, tmp_path):
    plates.fill(1)
    bad = plates.add("late.npy", None)
    assert run(plates, tmp_path / "out").failed == 1
    np.save(bad, testing.microscopy("uint16", 40, 40, 1, 8))
    report = run(plates, tmp_path / "out")
    assert (report.already_done, report.embedded, report.failed) == (1, 1, 0)
    assert not (tmp_path / "out" / "failures.jsonl").exists()


def test_strict_stops_at_the_first_failure(plates, tmp_path):
    plates.add("a.npy", None)
    plates.fill(40)
    with pytest.raises(SampleFailed, match=r"a\.npy: No such file"):
        run(plates, tmp_path / "out", strict=True, workers=1)
    assert len(list((tmp_path / "out").glob("emb_*.npy"))) < 40


def test_non_finite_embeddings_are_failures(plates, tmp_path):
    class Broken(TinyEngine):
        def __call__(self, batch):
            return super().__call__(batch) / 0

    plates.fill(2)
    report = run(plates, tmp_path / "out", Broken())
    assert (report.embedded, report.failed) == (0, 2)
    assert "non-finite values of 80" in failures(tmp_path / "out")[0]["reason"]


def test_other_settings_are_refused_by_name(plates, tmp_path):
    plates.fill(2)
    run(plates, tmp_path / "out")
    before = read_outputs(tmp_path / "out")
    other = MultiCrop(Percentile(0.5, 99.0), n_crops=2)
    with pytest.raises(SignatureMismatch) as error:
        run(plates, tmp_path / "out", TinyEngine(batch_size=4), other)
    message = str(error.value)
    assert "recipe.n_crops: 3 there, 2 now" in message
    assert "recipe.quantize.low: 1.0 there, 0.5 now" in message
    assert "engine.batch_size: 8 there, 4 now" in message
    assert "seed" not in message
    assert read_outputs(tmp_path / "out") == before


def test_overwrite_starts_afresh_and_leaves_foreign_files_alone(plates, tmp_path):
    plates.fill(4)
    out = tmp_path / "out"
    run(plates, out)
    (out / "notes.npy").write_bytes(b"mine")
    del plates.rows[0]
    plates.add("new.npy", testing.microscopy("uint16", 40, 40, 1, 8))
    other = MultiCrop(Percentile(), n_crops=2)
    report = run(plates, out, recipe=other, overwrite=True)
    assert (report.embedded, report.already_done) == (4, 0)
    assert len(list(out.glob("emb_*.npy"))) == 4
    assert len((out / "image_embeddings.tsv").read_text().splitlines()) == 5
    assert (out / "notes.npy").read_bytes() == b"mine"
    assert run(plates, out, recipe=other).already_done == 4
    with pytest.raises(ValueError, match="without shard"):
        run(plates, out, overwrite=True, shard=(0, 2))


def test_disk_full_stops_the_run_and_the_next_one_goes_on(plates, tmp_path, monkeypatch):
    plates.fill(12)
    out = tmp_path / "out"
    write = os.write
    calls = []

    def full_after_a_while(descriptor, data):
        calls.append(len(data))
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full_after_a_while)
        with pytest.raises(OSError, match="No space left"):
            run(plates, out, workers=1)
    assert not list(out.glob(".*.npy.*"))
    run(plates, out)
    run(plates, tmp_path / "whole")
    assert read_outputs(out) == read_outputs(tmp_path / "whole")


def test_a_full_disk_for_real(plates, tmp_path):
    """A file system of 64 KiB, where root can make one."""
    plates.fill(120, size=33)
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=64k tmpfs '{small}' 2>/dev/null"):
        pytest.skip("cannot mount a small tmpfs here (not root, or not allowed)")
    try:
        with pytest.raises(OSError, match="No space left"):
            run(plates, small / "out")
        for path in (small / "out").glob("emb_*.npy"):
            assert np.load(path).shape == (80,)
    finally:
        os.system(f"umount '{small}'")


def test_an_engine_error_stops_the_run_and_keeps_what_is_done(plates, tmp_path):
    class Dying(TinyEngine):
        def __call__(self, batch):
            if self.calls == 2:
                raise RuntimeError("out of memory")
            return super().__call__(batch)

    plates.fill(30)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(plates, tmp_path / "out", Dying())
    rows = (tmp_path / "out" / "image_embeddings.tsv").read_text().splitlines()[1:]
    assert 0 < len(rows) <= 6
    run(plates, tmp_path / "out")
    run(plates, tmp_path / "whole")
    assert read_outputs(tmp_path / "out") == read_outputs(tmp_path / "whole")


def test_a_bug_in_a_reader_is_raised_not_recorded(plates, tmp_path):
    class Buggy(TensorCsv):
        def read(self, item, channels, buffer):
            raise ZeroDivisionError("a bug")

    plates.fill(3)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        extract(
            Buggy(plates.manifest), RECIPE, TinyEngine(), NpyPerSample(tmp_path / "out"),
            Tsv(tmp_path / "out"),
        )  # fmt: skip


def test_an_interrupt_commits_what_is_finished(plates, tmp_path):
    class Interrupted(TinyEngine):
        def __call__(self, batch):
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().__call__(batch)

    plates.fill(30)
    with pytest.raises(KeyboardInterrupt):
        run(plates, tmp_path / "out", Interrupted())
    rows = (tmp_path / "out" / "image_embeddings.tsv").read_text().splitlines()[1:]
    assert len(rows) == len(list((tmp_path / "out").glob("emb_*.npy"))) >= 6


def test_small_images_are_cropped_square_and_enlarged(plates, tmp_path):
    plates.add("small.npy", testing.microscopy("uint16", 20, 29, 0, 8))
    assert run(plates, tmp_path / "out").failed == 0
    [path] = (tmp_path / "out").glob("emb_*.npy")
    vector = np.load(path)
    assert ((vector >= 0) & (vector <= 1)).all() and vector.std() > 0


def test_replicated_planes_reach_the_engine(plates, tmp_path):
    engine = TinyEngine(channels=6)
    contract = engine.contract
    engine.contract = dataclasses.replace(
        contract, channels=2, channel_map=(0, 0, 0, 1, 1, 1), std=(1.0, 0.5, 0.25) * 2
    )
    plates.fill(1)
    run(plates, tmp_path / "out", engine, MultiCrop(Percentile(), channels=(3, 1)))
    [path] = (tmp_path / "out").glob("emb_*.npy")
    planes = np.load(path).reshape(6, 16)
    np.testing.assert_allclose(planes[1], planes[0] * 2, rtol=1e-5)
    np.testing.assert_allclose(planes[5], planes[3] * 4, rtol=1e-5)
    assert not np.allclose(planes[0], planes[3])


def test_recipe_round_trip():
    for rule in (Percentile(0.5, 99.5), ZScore((1.0, 2.0), (3.0, 4.0), 2.5)):
        recipe = MultiCrop(rule, channels=(4, 1), n_crops=7, crops="grid", seed=3, pool="max")
        assert MultiCrop.from_settings(json.loads(json.dumps(recipe.settings()))) == recipe


def test_recipe_refusals():
    for message, arguments in [
        ("low < high", lambda: MultiCrop(Percentile(99, 1))),
        (
            "need 5 values, one per channel; got 4",
            lambda: MultiCrop(ZScore((1.0,) * 4, (1.0,) * 4)),
        ),
        ("same length", lambda: ZScore((1.0,) * 5, (1.0,) * 4)),
        ("crops must be one of", lambda: MultiCrop(Percentile(), crops="corner")),
        ("1 for center", lambda: MultiCrop(Percentile(), crops="center")),
        ("pool must be one of", lambda: MultiCrop(Percentile(), pool="sum")),
        ("non-negative", lambda: MultiCrop(Percentile(), channels=(-1,))),
    ]:
        with pytest.raises(ValueError, match=message):
            arguments()


def test_names_of_outputs_stay_in_their_folder():
    for name in ("", "/a", "a/", "a//b", "../a", "a/../b", ".a", "a/.b", "a\0b"):
        with pytest.raises(ValueError, match="name must be a file name"):
            Item("k", "p", name)
    Item("k", "p", "a/b.c/d")


def test_report_names_the_slowest_stage(plates, tmp_path):
    class Slow(TinyEngine):
        def __call__(self, batch):
            time.sleep(0.2)
            return super().__call__(batch)

    plates.fill(12)
    report = run(plates, tmp_path / "out", Slow(), workers=2)
    assert report.bottleneck == "engine"
    assert report.stages["read"].items == 12
    assert report.stages["read"].bytes == sum(np.load(path)[:5].nbytes for path, _ in plates.rows)
    written = json.loads(report.to_json())
    assert written["embedded"] == 12 and written["stages"]["engine"]["items"] == 36
    assert "Slowest stage: engine: the model" in str(report)


@pytest.mark.parametrize("slow", ["engine", "source"])
def test_report_says_how_busy_the_engine_was(plates, tmp_path, slow):
    class Slow(TinyEngine):
        def __call__(self, batch):
            time.sleep(0.1 * (slow == "engine"))
            return super().__call__(batch)

    class Far(TensorCsv):
        def read(self, item, channels, buffer):
            time.sleep(0.1 * (slow == "source"))
            return super().read(item, channels, buffer)

    plates.fill(12)
    out = tmp_path / "out"
    report = extract(
        Far(plates.manifest), RECIPE, Slow(batch_size=4), NpyPerSample(out), Tsv(out), workers=1
    )
    assert 0 < report.engine_seconds <= report.engine_span <= report.seconds
    assert report.engine_seconds <= report.stages["engine"].seconds
    assert report.engine_busy > 0.6 if slow == "engine" else report.engine_busy < 0.4
    share = f"{report.engine_seconds / report.engine_span:.1%}"
    assert f"Engine busy: {share} of {report.engine_span:.1f} s from the first batch" in str(report)
    assert json.loads(report.to_json())["engine_busy"] == report.engine_busy
    again = run(plates, out, Slow(batch_size=4))
    assert again.engine_busy == 0 and "Engine busy" not in str(again)


def test_busy_counts_overlapping_batches_once(monkeypatch):
    """As on CUDA, where the device's events are in milliseconds from each other."""

    class Event:
        clock: ClassVar[list[float]] = [5.0, 6.0, 5.5, 8.0, 9.0, 10.0]

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream == "stream"
            self.at = Event.clock.pop(0)

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    busy = Busy()
    marks = [busy.mark("stream") for _ in range(6)]
    for start, end in zip(marks[::2], marks[1::2], strict=True):
        busy.add(start, end)
    assert (busy.seconds, busy.span) == (4.0, 5.0)  # 5 to 6, on to 8, and 9 to 10


def test_postgres_index(plates, tmp_path, database, connection):
    plates.fill(5)
    out = tmp_path / "out"
    source = TensorCsv(plates.manifest)

    def go(**options):
        return extract(
            source, RECIPE, TinyEngine(), NpyPerSample(out), Postgres(database, out), **options
        )

    assert go().embedded == 5
    assert go().already_done == 5
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT embedding_path, text_id FROM image_embeddings")
        rows = dict(cursor.fetchall())
        assert rows == {str(out / f"{i.name}.npy"): i.fields["text_id"] for i in source.items()}
        cursor.execute(
            "SELECT column_name, data_type FROM information_schema.columns "
            "WHERE table_name = 'image_embeddings' ORDER BY ordinal_position"
        )
        assert cursor.fetchall() == [
            ("id", "integer"), ("embedding_path", "text"), ("text_id", "integer"),
        ]  # fmt: skip
    assert go(overwrite=True).embedded == 5
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*), count(DISTINCT embedding_path) FROM image_embeddings")
        assert cursor.fetchone() == (5, 5)


def test_a_table_without_a_unique_index_gets_no_duplicate(plates, tmp_path, database, connection):
    with connection, connection.cursor() as cursor:
        cursor.execute(
            "CREATE TABLE image_embeddings"
            "(id SERIAL PRIMARY KEY, embedding_path TEXT, text_id INTEGER)"
        )
        cursor.execute(
            "INSERT INTO image_embeddings(embedding_path) VALUES ('/elsewhere/emb_x.npy')"
        )
    plates.fill(3)
    out = tmp_path / "out"
    source = TensorCsv(plates.manifest)
    sink = NpyPerSample(out)
    extract(source, RECIPE, TinyEngine(), sink, Postgres(database, out))
    next(out.glob("emb_*.npy")).unlink()  # its row stays, the sample is made again
    assert extract(source, RECIPE, TinyEngine(), sink, Postgres(database, out)).embedded == 1
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*), count(DISTINCT embedding_path) FROM image_embeddings")
        assert cursor.fetchone() == (4, 4)


def test_ring_hands_out_every_row_once():
    ring = Ring(2, (4, 1), torch.float32, torch.device("cpu"))
    seen = []

    def produce(owner):
        start = 0
        while start < 10:
            slot, segment = ring.reserve(owner, start, 10 - start)
            for i in range(segment.count):
                slot.batch[segment.row + i] = owner * 100 + start + i
            ring.filled(slot, segment)
            start += segment.count

    threads = [threading.Thread(target=produce, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    closer = threading.Thread(target=lambda: ([t.join() for t in threads], ring.close()))
    closer.start()
    while (slot := ring.take()) is not None:
        assert sum(segment.count for segment in slot.segments) == slot.reserved
        seen += slot.batch[: slot.reserved, 0].tolist()
        ring.release(slot)
    assert sorted(seen) == [owner * 100 + i for owner in range(5) for i in range(10)]


def test_ring_abort_wakes_whoever_waits():
    ring = Ring(1, (2, 1), torch.float32, torch.device("cpu"))
    ring.reserve("a", 0, 2)
    woken = []

    def wait():
        try:
            ring.reserve("b", 0, 1)
        except Aborted:
            woken.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    ring.abort()
    thread.join(5)
    assert woken == [True]
    with pytest.raises(Aborted):
        ring.take()
