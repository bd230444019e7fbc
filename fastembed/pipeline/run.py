"""The one loop: read -> quantise and cut -> engine -> pool -> write -> commit.

What a sample gives is the recipe's to say: a vector pooled over its crops, one per part of it,
a feature map.

Threads and what they own:

- `workers` readers list, read and prepare samples, and fill their rows of the ring's batches;
- the calling thread runs the engine, batch after batch;
- one writer collects samples whose crops are all embedded, pools them, writes their files
  (through a small pool, since some wait for a network), has all of them flushed to the disk at
  once and then commits them to the index.

A sample is done when its index row is committed, and that comes after its file is on disk.
So a run that dies anywhere leaves at worst files without rows, which the next run makes
again, to the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..engines.engine import Engine
from ..nouns import Index, Inputs, Recipe, Result, Sink, Source, Waiting
from ..npy import PixelBuffer
from ..records import Item
from ..report import Report
from ..staging import no_link
from .backlog import Backlog
from .clock import Busy, Clock
from .ring import Aborted, Ring, Segment, Slot
from .trace import Trace

_COMMIT_SECONDS = 1.0
_BACKLOG_BYTES = 64 << 20
_WRITERS = 4
# What one bad file can raise. Anything else is the machine's or our own fault: it stops the run.
SAMPLE_ERRORS = (OSError, ValueError, TypeError)
_MACHINE_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class SampleFailed(RuntimeError):
    """A sample failed in a strict run."""


class _Pending:
    """A sample whose rows are on their way through the engine."""

    def __init__(self, item: Item, rows: int, outputs: Mapping[str, tuple[int, ...]], rest) -> None:
        self.item = item
        self.features = {
            name: np.empty((rows, *shape), dtype=np.float32) for name, shape in outputs.items()
        }
        self.rest = rest
        self.missing = rows
        self.error: Exception | None = None
        self.absent: Exception | None = None  # says which listed parts the file lacks

    @property
    def nbytes(self) -> int:
        return sum(feature.nbytes for feature in self.features.values())


class _Flight(NamedTuple):
    """A batch at the engine: its features on the host, on CUDA there once its stream has finished,
    and when it started and ended (`Busy.mark`)."""

    slot: Slot
    results: list[torch.Tensor]
    start: float | torch.cuda.Event
    end: float | torch.cuda.Event


class Run:
    """One extraction, from the list of its samples to the last commit."""

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        engine: Engine,
        sink: Sink,
        index: Index,
        report: Report,
        *,
        slots: int | None = None,
        strict: bool = False,
        progress: Callable[[Report, int], None] | None = None,
        total: int = 0,
        trace: Trace | None = None,
    ) -> None:
        self.source, self.recipe, self.engine = source, recipe, engine
        self.sink, self.index, self.report = sink, index, report
        self.strict, self.progress, self.total = strict, progress, total
        self.trace = trace
        self.clock = Clock(trace)
        self.busy = Busy(trace)
        self.in_flight = batches_in_flight(engine)
        slots = slots or least_slots(engine)
        shape = (engine.batch_size, *engine.contract.shape)
        self.ring = Ring(slots, shape, engine.contract.dtype, engine.device)
        self.completed = Backlog(_BACKLOG_BYTES)
        self.error: BaseException | None = None
        self.stopping = False
        self._lock = threading.Lock()
        self._listing = threading.Lock()

    def stop(self) -> None:
        """Has the run end after the batches at the engine, with what is complete committed. For
        signal handlers: takes no lock."""
        self.stopping = True
        self.ring.interrupt()
        self._stop_waiting()

    def go(self, items: Iterator[Item], done: Set[str], shard: tuple[int, int]) -> None:
        start = time.perf_counter()
        self.report.stages = self.clock.stages
        failures = Path(self.report.failures_file)
        failures.unlink(missing_ok=True)
        todo = self._todo(items, done, shard)
        writer = threading.Thread(target=self._guarded, args=(self._write,), name="writer")
        feeder = threading.Thread(target=self._feed, args=(todo,), name="feeder")
        try:
            writer.start()
            feeder.start()
            with contextlib.suppress(Aborted):
                self._embed()
        except BaseException as error:  # an interrupt too: commit what is finished, then leave
            self._stop(error)
        finally:
            _join(feeder)
            self.completed.close()
            _join(writer)
            self.report.seconds = time.perf_counter() - start
            self.report.engine_seconds = self.busy.seconds
            self.report.engine_span = self.busy.span
            for noun in (self.sink, self.index):
                try:
                    noun.close()
                except BaseException as error:
                    self.error = self.error or error
        if self.error is not None:
            raise self.error

    def _todo(
        self, items: Iterator[Item], done: Set[str], shard: tuple[int, int]
    ) -> Iterator[Item]:
        """The items that this run has to embed, counted on the way."""
        seen: set[str] = set()
        for item in items:
            if not item.in_shard(*shard):
                continue
            self.report.listed += 1
            todo = item if item.defect else self.sink.todo(item, done)
            if todo is None:
                self.report.already_done += 1
            elif item.name in seen:
                self.report.duplicates += 1
            else:
                seen.add(item.name)
                yield todo

    # Reader threads -------------------------------------------------------------------

    def _feed(self, todo: Iterator[Item]) -> None:
        readers = [
            threading.Thread(target=self._guarded, args=(self._read, todo), name=f"reader-{i}")
            for i in range(self.report.workers)
        ]
        try:
            for reader in readers:
                reader.start()
        except RuntimeError as error:  # the machine gives no more threads
            self._stop(error)
        for reader in readers:
            _join(reader)
        self.ring.close()

    def _read(self, todo: Iterator[Item]) -> None:
        buffer = PixelBuffer()
        while self.error is None and not self.stopping:
            with self.clock.wait("list", "the list"):
                self._listing.acquire()
            try:
                with self.clock.measure("list"):
                    item = next(todo, None)
            finally:
                self._listing.release()
            if item is None:
                return
            try:
                crops = self._prepare(item, buffer)
            except SAMPLE_ERRORS as error:
                if isinstance(error, OSError) and error.errno in _MACHINE_ERRNOS:
                    raise
                self._fail(item, error)
                continue
            self._fill(item, crops)

    def _prepare(self, item: Item, buffer: PixelBuffer) -> Inputs:
        if item.defect:
            raise ValueError(item.defect)
        start = time.perf_counter()
        image = self.source.read(item, self.recipe.channels_to_read, buffer)
        self.clock.add("read", start, 1, image.nbytes)
        with self.clock.measure("quantize", 1, image.nbytes):
            return self.recipe.prepare(image, item.key, self.engine.contract)

    def _fill(self, item: Item, crops: Inputs) -> None:
        there = crops.parts
        pending = _Pending(item.only(there), len(crops), self.engine.outputs, crops.rest)
        if absent := sorted(item.parts.keys() - set(there)):
            pending.absent = ValueError(f"listed, but not in the file: {absent}")
        start = 0
        while start < len(crops):
            with self.clock.wait("gather", "a free batch"):
                slot, segment = self.ring.reserve(pending, start, len(crops) - start)
            rows = slot.batch[segment.row : segment.row + segment.count]
            with self.clock.measure("gather", 1, rows.nbytes):
                try:
                    crops.fill(start, rows)
                except SAMPLE_ERRORS as error:
                    pending.error = error
                    rows.zero_()
            self.ring.filled(slot, segment)
            start += segment.count

    # Engine: the calling thread -------------------------------------------------------

    def _embed(self) -> None:
        flying: deque[_Flight] = deque()
        with contextlib.suppress(Aborted):  # what is at the engine then lands all the same
            while (slot := self._next_batch()) is not None:
                flying.append(self._launch(slot))
                if len(flying) == self.in_flight:
                    self._land(flying.popleft())
        while flying:
            self._land(flying.popleft())

    def _next_batch(self) -> Slot | None:
        if self.trace is not None:
            self.trace.count("full batches", self.ring.ready)
            self.trace.count("bytes to write", self.completed.held)
        with self.clock.wait("engine", "a full batch"):
            return self.ring.take()

    def _launch(self, slot: Slot) -> _Flight:
        stream = slot.stream
        with self.clock.measure("engine", slot.reserved), torch.cuda.stream(stream):
            start = self.busy.mark(stream)
            results = self.engine(slot.batch[: slot.reserved])
            results = list(results.values()) if isinstance(results, dict) else [results]
            if stream is not None:
                results = [
                    torch.empty(result.shape, dtype=result.dtype, pin_memory=True).copy_(
                        result, non_blocking=True
                    )
                    for result in results
                ]
            return _Flight(slot, results, start, self.busy.mark(stream))

    def _land(self, flight: _Flight) -> None:
        slot = flight.slot
        if slot.stream is not None:
            with self.clock.measure("engine", 0):
                slot.stream.synchronize()
        self.busy.add(flight.start, flight.end)
        arrays = [result.numpy() for result in flight.results]
        for segment in slot.segments:
            self._collect(segment, arrays)
        self.ring.release(slot)

    def _collect(self, segment: Segment, arrays: list[np.ndarray]) -> None:
        pending = segment.owner
        rows = slice(segment.row, segment.row + segment.count)
        for feature, array in zip(pending.features.values(), arrays, strict=True):
            feature[segment.start : segment.start + segment.count] = array[rows]
        pending.missing -= segment.count
        if pending.missing:
            return
        if pending.error is not None:
            self._fail(pending.item, pending.error)
            return
        with self.clock.wait("write", "room at the writer"):
            self.completed.put(pending)

    # Writer thread --------------------------------------------------------------------

    def _write(self) -> None:
        with ThreadPoolExecutor(_WRITERS, thread_name_prefix="write") as pool:
            while (group := self._next_group()) is not None:
                self._write_group(group, pool)
                self.completed.written(group)
                if self.progress is not None:
                    self.progress(self.report, self.total)

    def _next_group(self) -> list[_Pending] | None:
        with self.clock.wait("pool", "finished samples"):
            return self.completed.take(_COMMIT_SECONDS)

    def _write_group(self, group: list[_Pending], pool: ThreadPoolExecutor) -> None:
        made = [(result, p.absent) for p in group if (result := self._result(p)) is not None]
        ready = [result for result, _ in made]
        if ready:
            with self.clock.measure("write", len(ready), sum(result.nbytes for result in ready)):
                list(pool.map(self.sink.write, ready))
                self.sink.flush()
            with self.clock.measure("commit", len(ready)):
                self.index.commit([result.item for result in ready])
        for result, absent in made:
            self.report.vectors += len(result)
            if absent is None:
                self.report.embedded += 1
            else:
                self._fail(result.item, absent)

    def _result(self, pending: _Pending) -> Result | None:
        try:
            with self.clock.measure("pool"):
                return self.recipe.embed(pending.item, pending.features, pending.rest)
        except ValueError as error:
            self._fail(pending.item, error)
            return None

    # Trouble --------------------------------------------------------------------------

    def _fail(self, item: Item, error: Exception) -> None:
        record = {"key": item.key, "path": item.path, **item.fields, "reason": _reason(error, item)}
        with self._lock:
            self.report.failed += 1
            with open(self.report.failures_file, "a", encoding="utf-8", opener=no_link) as stream:
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        if self.strict:
            self._stop(SampleFailed(f"{item.path}: {record['reason']}"))

    def _guarded(self, function: Callable, *arguments: object) -> None:
        """A thread's body: its error stops the run and is raised by the calling thread."""
        try:
            function(*arguments)
        except Aborted:
            pass
        except BaseException as error:
            self._stop(error)

    def _stop(self, error: BaseException) -> None:
        with self._lock:
            self.error = self.error or error
        self.ring.abort()
        self.completed.abort()
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        """Whatever waits for a server that is away: the run ends, and does not wait for it."""
        for noun in (self.source, self.index):
            if isinstance(noun, Waiting):
                noun.stop_waiting()


def _join(thread: threading.Thread) -> None:
    """Waits for a thread, unless it could not be started."""
    if thread.is_alive():
        thread.join()


def batches_in_flight(engine: Engine) -> int:
    """How many batches are at the engine: on CUDA one is uploaded while another is computed."""
    return 2 if engine.device.type == "cuda" else 1


def least_slots(engine: Engine) -> int:
    """Beside the batches at the engine one that is ready and one that is being filled."""
    return batches_in_flight(engine) + 2


def _reason(error: Exception, item: Item) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        # The record names the item's path: another file of it is worth naming here.
        path = str(error.filename or "")
        where = "" if not path or path.endswith(item.path) else f"{path}: "
        return f"{where}{os.strerror(error.errno)} ({type(error).__name__})"
    return str(error) or type(error).__name__
