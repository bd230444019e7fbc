"""Reader threads, slots and batch size by a short probe, where nobody named them.

The probe prepares the first samples, one after another, and embeds batches of them:

- reader threads: as many as keep up with the engine, and a half more;
- slots: room for what the readers are filling beside what is at the engine and ready;
- batch size: the engine's own, which its settings name, or a larger one that is faster and gives
  the same bits. All features of a batch are compared; a kernel that adds in another order shows in
  thousands of numbers at once. Larger ones are tried only while a batch is short: beyond that
  nothing is left to gain.

So none of the three changes an output, and a folder may go on with others.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..engines.engine import Engine
from ..nouns import Recipe, Source
from ..npy import PixelBuffer
from ..records import Item
from .run import SAMPLE_ERRORS, batches_in_flight, least_slots

_WORTH = 100  # samples: a smaller run is over before a probe has paid for itself
_SAMPLES = 6
_SHORT = 0.25  # seconds of a batch
_LARGEST = 8  # times the engine's own batch
_GAIN = 1.03
_MARGIN = 1.5
_RING_BYTES = 1 << 30
_MOST_WAITING = 32  # threads, where a reader mostly waits for its storage


@dataclass(frozen=True)
class Plan:
    """What a run is made with, and why: `str` says both."""

    engine: Engine
    workers: int
    slots: int
    why: str

    def __str__(self) -> str:
        return (
            f"batch {self.engine.batch_size}, {self.workers} "
            f"reader{'s' if self.workers > 1 else ''}, {self.slots} slots ({self.why})"
        )


@dataclass(frozen=True)
class _Cost:
    """Of preparing a row of model input, by one thread alone.

    Attributes:
        seconds: wall time.
        computing: share of it in which the thread computed.
        rows: of a sample, at the most.
        batch: rows of real input, as many as fit into a batch of the engine.
    """

    seconds: float
    computing: float
    rows: int
    batch: torch.Tensor


def tune(
    source: Source,
    recipe: Recipe,
    engine: Engine,
    todo: Callable[[], Iterator[Item]],
    count: int,
    workers: int | None,
    slots: int | None,
) -> Plan:
    """The plan for a run over about `count` samples.

    Args:
        todo: lists them, from the start at every call.
        workers, slots: what the user asked for; None where it is to be chosen.
    """
    cores = len(os.sched_getaffinity(0))
    given = Plan(engine, workers or min(8, cores), slots or least_slots(engine), "as given")
    resizable = getattr(engine, "resizable", False)
    if workers and slots and not resizable:
        return given
    if count < _WORTH:
        return Plan(engine, given.workers, given.slots, f"no probe for fewer than {_WORTH} samples")
    start = time.perf_counter()
    cost = _prepare(source, recipe, engine, itertools.islice(todo(), _SAMPLES))
    if cost is None:
        return Plan(engine, given.workers, given.slots, "too few of the first samples can be read")
    engine, embedding = _embed(engine, cost.batch, resizable)
    workers = workers or _workers(cost, embedding, cores)
    slots = slots or _slots(cost, engine, workers)
    why = (
        f"probe of {time.perf_counter() - start:.1f} s: a row takes {cost.seconds * 1e3:.2f} ms to "
        f"prepare and {embedding * 1e3:.2f} ms to embed"
    )
    return Plan(engine, workers, slots, why)


def _prepare(source: Source, recipe: Recipe, engine: Engine, items: Iterator[Item]) -> _Cost | None:
    contract, buffer = engine.contract, PixelBuffer()
    batch = torch.zeros((engine.batch_size, *contract.shape), dtype=contract.dtype)
    held = rows = most = 0
    wall = computing = 0.0
    for item in items:
        start, ran = time.perf_counter(), time.thread_time()
        try:
            image = source.read(item, recipe.channels_to_read, buffer)
            inputs = recipe.prepare(image, item.key, contract)
            count = min(len(inputs), engine.batch_size)
            part = torch.empty((count, *contract.shape), dtype=contract.dtype)
            inputs.fill(0, part)
        except SAMPLE_ERRORS:
            continue  # the run will say so
        if not count:
            continue
        if most:  # the first sample also pays for what is compiled or opened once
            wall += time.perf_counter() - start
            computing += time.thread_time() - ran
            rows += count
        most = max(most, len(inputs))
        fits = min(count, engine.batch_size - held)
        batch[held : held + fits] = part[:fits]
        held += fits
    if not rows:
        return None
    for row in range(held, engine.batch_size):
        batch[row] = batch[row % held]
    return _Cost(wall / rows, computing / max(wall, 1e-9), most, batch)


def _embed(engine: Engine, batch: torch.Tensor, resizable: bool) -> tuple[Engine, float]:
    """The engine in its best batch size, and the seconds that a row takes it."""
    features, seconds = _timed(engine, batch)
    best, per_row = engine, seconds / engine.batch_size
    size = engine.batch_size * 2
    while resizable and seconds < _SHORT and size <= engine.batch_size * _LARGEST:
        candidate = engine.resized(size)
        repeated = size // engine.batch_size
        try:
            other, seconds = _timed(candidate, batch.repeat(repeated, 1, 1, 1))
        except torch.OutOfMemoryError:
            break
        same = all(
            torch.equal(feature.repeat(repeated, *[1] * (feature.ndim - 1)), found)
            for feature, found in zip(features, other, strict=True)
        )
        if not same or seconds / size * _GAIN > per_row:
            break
        best, per_row = candidate, seconds / size
        size *= 2
    return best, per_row


def _timed(engine: Engine, batch: torch.Tensor) -> tuple[list[torch.Tensor], float]:
    """Features on the host, and the seconds of the better of two calls after a first one."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        results = engine(batch)
        results = list(results.values()) if isinstance(results, dict) else [results]
        results = [result.cpu() for result in results]  # waits for the device
        times.append(time.perf_counter() - start)
        if sum(times) > 8 * _SHORT:  # a slow model needs no more than this to be told
            break
    return results, min(times[1:] or times)


def _workers(cost: _Cost, embedding: float, cores: int) -> int:
    needed = 1 + math.ceil(_MARGIN * cost.seconds / embedding)
    most = cores if cost.computing > 0.5 else _MOST_WAITING
    return max(1, min(needed, most))


def _slots(cost: _Cost, engine: Engine, workers: int) -> int:
    filling = math.ceil(workers * cost.rows / engine.batch_size)
    room = _RING_BYTES // (cost.batch[0].nbytes * engine.batch_size)
    return max(least_slots(engine), min(batches_in_flight(engine) + 1 + filling, room))
