"""The queue between engine and writer: bounded by bytes, and nobody waits for ever."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import pytest

from fastembed.pipeline.backlog import Backlog
from fastembed.pipeline.ring import Aborted


@dataclass(eq=False)
class Sample:
    nbytes: int


def test_samples_come_out_in_order_and_the_end_is_told():
    backlog = Backlog(1000)
    samples = [Sample(10) for _ in range(5)]
    for sample in samples:
        backlog.put(sample)
    assert backlog.take(0.01) == samples
    backlog.put(samples[0])
    backlog.close()
    assert backlog.take(60.0) == samples[:1]  # no more will come: at once
    assert backlog.take(60.0) is None


def test_enough_for_a_commit_is_taken_at_once():
    backlog = Backlog(100)
    samples = [Sample(30), Sample(30)]
    for sample in samples:
        backlog.put(sample)
    start = time.monotonic()
    assert backlog.take(60.0) == samples
    assert time.monotonic() - start < 30
    assert backlog.held == 60  # taken is not written
    backlog.written(samples)
    assert backlog.held == 0


def test_nothing_in_time_is_an_empty_group():
    assert Backlog(1000).take(0.01) == []


def test_a_sample_waits_until_those_before_it_are_written():
    backlog, done = Backlog(100), threading.Event()
    backlog.put(Sample(80))

    def put():
        backlog.put(Sample(80))
        done.set()

    thread = threading.Thread(target=put)
    thread.start()
    start = time.monotonic()
    taken = backlog.take(60.0)  # another waits for room: no use in waiting for more
    assert len(taken) == 1 and time.monotonic() - start < 30
    assert not done.wait(0.3)  # taken is not written
    backlog.written(taken)
    assert done.wait(30)
    thread.join()


def test_a_sample_beyond_the_limit_is_let_in_alone():
    backlog = Backlog(100)
    backlog.put(Sample(1000))
    assert len(backlog.take(0.0)) == 1


def test_who_waits_for_room_goes_home_when_the_run_stops():
    backlog = Backlog(100)
    backlog.put(Sample(80))
    threading.Timer(0.1, backlog.abort).start()
    with pytest.raises(Aborted):
        backlog.put(Sample(80))
    assert len(backlog.take(0.0)) == 1  # what is finished can still be written
