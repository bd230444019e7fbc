"""One run per shard, signals, traces, and what the report says of waits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import TinyEngine, read_outputs
from hypothesis import given
from hypothesis import strategies as st

from fastembed import MultiCrop, NpyPerSample, Percentile, TensorCsv, Tsv, extract
from fastembed.report import STAGES, Report, Stage
from fastembed.runlock import FolderBusy, RunLock

RECIPE = MultiCrop(Percentile(), n_crops=3)


def run(plates, folder, engine=None, source=None, **options) -> Report:
    return extract(
        source or TensorCsv(plates.manifest), RECIPE, engine or TinyEngine(3),
        NpyPerSample(folder), Tsv(folder), **options,
    )  # fmt: skip


def vectors(folder) -> int:
    return len(list(folder.glob("emb_*.npy")))


class Slow(TinyEngine):
    """Takes its time over each batch, and says when the first has started."""

    def __init__(self, seconds: float = 0.05) -> None:
        super().__init__(batch_size=3)
        self.seconds, self.started = seconds, threading.Event()

    def __call__(self, batch):
        self.started.set()
        time.sleep(self.seconds)
        return super().__call__(batch)


# Locks ----------------------------------------------------------------------------------


def test_a_second_run_is_refused_and_told_who_has_the_folder(tmp_path):
    with RunLock(tmp_path / "out"), pytest.raises(FolderBusy) as refusal:
        RunLock(tmp_path / "out", patience=0).__enter__()
    assert f"process {os.getpid()} on " in str(refusal.value)
    assert "--shard" in str(refusal.value)
    with RunLock(tmp_path / "out", patience=0):  # over, so free
        pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".fastembed-runs.lock"]


@given(
    st.integers(1, 12).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n))),
    st.integers(1, 12).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n))),
)
def test_shards_exclude_each_other_where_they_share_samples(tmp_path_factory, one, other):
    share = any(n % one[1] == one[0] and n % other[1] == other[0] for n in range(12 * 11 * 7))
    folder = tmp_path_factory.mktemp("lock")
    with RunLock(folder, one):
        try:
            with RunLock(folder, other, patience=0):
                assert not share
        except FolderBusy:
            assert share


def test_names_do_not_exclude_each_other(tmp_path):
    with RunLock(tmp_path, name="volume_000001"), RunLock(tmp_path, name="volume_000002"):
        with pytest.raises(FolderBusy):
            RunLock(tmp_path, name="volume_000001", patience=0).__enter__()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = (
        "import sys, time; from fastembed.runlock import RunLock\n"
        "with RunLock(sys.argv[1]): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(FolderBusy, match=f"process {holder.pid} on "):
        RunLock(tmp_path, (3, 4), patience=0).__enter__()
    holder.kill()
    holder.wait()
    assert (tmp_path / ".fastembed-run-0-of-1.lock").exists()  # stale
    with RunLock(tmp_path, (3, 4), patience=0):
        assert not (tmp_path / ".fastembed-run-0-of-1.lock").exists()


def test_a_holder_that_ends_soon_is_waited_for(tmp_path):
    lock = RunLock(tmp_path)
    lock.__enter__()
    threading.Timer(0.3, lock.__exit__).start()
    with RunLock(tmp_path, patience=30):
        pass


def test_extract_holds_the_lock(plates, tmp_path, monkeypatch):
    monkeypatch.setattr(RunLock.__init__, "__defaults__", ((0, 1), "", 0.0))
    plates.fill(6)
    engine, errors = Slow(0.3), []
    first = threading.Thread(target=run, args=(plates, tmp_path / "out", engine))
    first.start()
    assert engine.started.wait(30)
    try:
        with pytest.raises(FolderBusy):
            run(plates, tmp_path / "out", overwrite=True)
    finally:
        first.join()
    assert not errors
    assert vectors(tmp_path / "out") == 6  # nothing was removed


# Signals --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_batch_in_hand(plates, tmp_path, number):
    """What was embedded is committed; the signal then does what it did before."""
    plates.fill(30)
    run(plates, tmp_path / "whole")
    engine, received = Slow(0.2), []
    before = signal.signal(number, lambda *_: received.append(number))

    def send():
        engine.started.wait(30)
        time.sleep(0.5)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    try:
        with pytest.warns(UserWarning, match="finishing the batch in hand"):
            report = run(plates, tmp_path / "out", engine, workers=2, slots=3)
    finally:
        signal.signal(number, before)
    assert received == [number]
    assert 0 < report.embedded < 30 and report.failed == 0
    # A batch is a sample here: all that the engine finished is committed.
    assert report.embedded == engine.calls
    rows = (tmp_path / "out" / "image_embeddings.tsv").read_text().splitlines()[1:]
    assert len(rows) == report.embedded
    run(plates, tmp_path / "out")
    assert read_outputs(tmp_path / "out") == read_outputs(tmp_path / "whole")


def test_a_second_signal_ends_it_at_once(plates, tmp_path):
    plates.fill(12)
    engine = Slow(1.0)

    def send():
        engine.started.wait(30)
        for _ in range(2):
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send).start()
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning):
        run(plates, tmp_path / "out", engine)
    assert engine.calls == 0  # not even the first batch was waited for
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run(plates, tmp_path / "out").embedded == 12


def test_extract_works_outside_the_main_thread(plates, tmp_path):
    plates.fill(3)
    thread = threading.Thread(target=run, args=(plates, tmp_path / "out"))
    thread.start()
    thread.join()
    assert vectors(tmp_path / "out") == 3


@pytest.mark.parametrize("place", ["read", "fill", "embed", "write", "commit", "items"])
def test_an_unexpected_error_in_any_thread_stops_the_run(plates, tmp_path, place):
    """Promptly, with that very error, and what was committed stays."""
    plates.fill(40)
    folder, calls = tmp_path / "out", []
    source, engine = TensorCsv(plates.manifest), TinyEngine(3)
    sink, index = NpyPerSample(folder), Tsv(folder)

    class Broken(Exception):
        pass

    def breaking(function):
        def call(*arguments, **keywords):
            calls.append(None)
            if len(calls) > 2:
                raise Broken(place)
            return function(*arguments, **keywords)

        return call

    recipe = MultiCrop(Percentile(), n_crops=3)
    if place == "read":
        source.read = breaking(source.read)
    elif place == "items":
        whole = source.items
        source.items = lambda: map(breaking(lambda item: item), whole())
    elif place == "fill":
        broken = type("B", (MultiCrop,), {"prepare": breaking(MultiCrop.prepare)})
        recipe = broken(Percentile(), n_crops=3)
    elif place == "embed":
        engine.__class__ = type("B", (TinyEngine,), {"__call__": breaking(TinyEngine.__call__)})
    elif place == "write":
        sink.write = breaking(sink.write)
    else:
        index.commit = breaking(index.commit)
        engine = Slow(0.5)  # several commits
    start = time.monotonic()
    with pytest.raises(Broken, match=place):
        extract(source, recipe, engine, sink, index, workers=2)
    assert time.monotonic() - start < 60
    assert run(plates, folder).failed == 0
    assert vectors(folder) == 40


# Traces and reports ---------------------------------------------------------------------


def test_the_trace_is_strict_json_and_tells_of_every_thread(plates, tmp_path):
    plates.fill(9)
    report = run(plates, tmp_path / "out", Slow(), workers=2, profile=tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())
    names = {event["tid"]: event["args"]["name"] for event in events
             if event["name"] == "thread_name"}  # fmt: skip
    assert {"reader-0", "reader-1", "writer", "device"} <= set(names.values())
    work = [event for event in events if event["ph"] == "X"]
    assert sum(event["name"] == "read" for event in work) == 9
    assert {"wait for a full batch", "wait for finished samples", *STAGES} <= {
        event["name"] for event in work
    }
    for stage in ("read", "engine"):
        spent = sum(event["dur"] for event in work if event["name"] == stage) / 1e6
        assert spent == pytest.approx(report.stages[stage].seconds, abs=1e-3)
    counters = {event["name"] for event in events if event["ph"] == "C"}
    assert counters == {"full batches", "bytes to write"}


def test_waits_are_told(plates, tmp_path):
    """Readers that wait for a slow engine, an engine that waits for slow readers."""
    plates.fill(10)
    slow_engine = run(plates, tmp_path / "a", Slow(0.1), workers=1)
    assert slow_engine.stages["gather"].waited > 0.2
    assert slow_engine.bottleneck == "engine"
    source = TensorCsv(plates.manifest)
    read = source.read

    def slow_read(*arguments):
        time.sleep(0.1)
        return read(*arguments)

    source.read = slow_read
    slow_reader = run(plates, tmp_path / "b", source=source, workers=1)
    assert slow_reader.stages["engine"].waited > 0.5
    assert slow_reader.bottleneck == "read"
    assert "faster storage" in slow_reader.advice


def test_the_bottleneck_is_what_the_others_wait_for():
    def report(busy: float, **stages: Stage) -> Report:
        every = {name: stages.get(name, Stage()) for name in STAGES}
        return Report(embedded=9, seconds=10, engine_seconds=busy, engine_span=10, stages=every)

    engine = Stage(5.0, waited=4.0)
    assert report(9.9, read=Stage(30.0), engine=engine).bottleneck == "engine"
    assert report(5.0, read=Stage(9.0), quantize=Stage(3.0), engine=engine).bottleneck == "read"
    blocked = Stage(9.0, 10, 10**9, waited=8.0)
    slow = report(5.0, read=Stage(20.0), engine=engine, write=blocked, commit=Stage(1.0))
    assert slow.bottleneck == "write"
    assert "0.11 GB/s" in slow.advice
    assert Report().bottleneck == Report().advice == ""


def test_a_report_has_busy_wait_rate_and_speed_of_every_stage(plates, tmp_path):
    plates.fill(3)
    report = run(plates, tmp_path / "out", workers=1)
    lines = {line.split()[0]: line for line in str(report).splitlines() if line.strip()}
    assert lines["stage"].split() == [
        "stage", "seconds", "busy", "waits", "ms", "each", "each/s", "speed",
    ]  # fmt: skip
    assert set(STAGES) <= lines.keys()
    assert np.isfinite([float(part.rstrip("%")) for part in lines["read"].split()[1:6]]).all()
