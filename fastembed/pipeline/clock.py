"""Where a run's time goes: how long each stage worked, and how long it waited."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..report import STAGES, Stage
from .trace import Trace


class Clock:
    """Adds up the work and the waits of every stage, from any thread; tells a trace of them."""

    def __init__(self, trace: Trace | None = None) -> None:
        self.stages = {name: Stage() for name in STAGES}
        self.trace = trace
        self._lock = threading.Lock()

    @contextmanager
    def measure(self, stage: str, items: int = 1, nbytes: int = 0) -> Iterator[None]:
        """Work."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, start, items, nbytes)

    def add(self, stage: str, start: float, items: int = 0, nbytes: int = 0) -> None:
        """Work from `start` (of perf_counter) until now."""
        seconds = time.perf_counter() - start
        with self._lock:
            record = self.stages[stage]
            record.seconds += seconds
            record.items += items
            record.bytes += nbytes
        if self.trace is not None:
            self.trace.add(stage, start, seconds, items=items, bytes=nbytes)

    @contextmanager
    def wait(self, stage: str, reason: str) -> Iterator[None]:
        """A thread stands before a stage, for want of input or of room; in a word for which."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            with self._lock:
                self.stages[stage].waited += seconds
            if self.trace is not None:
                self.trace.add(f"wait for {reason}", start, seconds)


class Busy:
    """How much of the time from an engine's first batch to its last it computed.

    Batches on CUDA overlap, and are timed by the device itself.

    Attributes:
        seconds: in which it computed, copies to and from the device included.
        span: seconds from the start of the first batch to the end of the last.
    """

    def __init__(self, trace: Trace | None = None) -> None:
        self.seconds = self.span = 0.0
        self._trace = trace
        self._first: float | torch.cuda.Event | None = None
        self._began = 0.0

    def mark(self, stream: torch.cuda.Stream | None) -> float | torch.cuda.Event:
        """Now, on the stream's own clock if there is one."""
        if stream is None:
            moment = time.perf_counter()
        else:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record(stream)
        if self._first is None:
            self._first = moment
            self._began = time.perf_counter()
        return moment

    def add(self, start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> None:
        """A batch between two marks that have passed; in the order of the batches."""
        start, end = self._seconds(start), self._seconds(end)
        self.seconds += max(0.0, end - max(start, self.span))
        self.span = max(self.span, end)
        if self._trace is not None:
            self._trace.add("batch", self._began + start, end - start, thread="device")

    def _seconds(self, moment: float | torch.cuda.Event) -> float:
        if isinstance(moment, float):
            return moment - self._first
        return self._first.elapsed_time(moment) / 1e3  # milliseconds
