"""The ring of batches between the readers and the engine.

Readers reserve rows of the current batch and fill them in place; a batch is ready when all
its rows are reserved and filled. Batches mix the crops of several samples, and a sample may
straddle two. Memory is allocated once, pinned for CUDA.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

import torch


class Aborted(Exception):
    """The run is being stopped: whoever waits on the ring goes home."""


@dataclass
class Segment:
    """`count` rows of a batch from `row` on: crops `start`... of one sample."""

    owner: object
    start: int
    row: int
    count: int


@dataclass
class Slot:
    """One batch: [B, P, size, size], whose rows it holds, and on CUDA the stream it runs on."""

    batch: torch.Tensor
    stream: torch.cuda.Stream | None = None
    segments: list[Segment] = field(default_factory=list)
    reserved: int = 0
    filled: int = 0


class Ring:
    """`slots` batches of `shape` on the host.

    For an engine on CUDA their memory is pinned and each has a stream of its own, so that the
    upload of one batch overlaps the computation of another.
    """

    def __init__(
        self, slots: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        on_cuda = device.type == "cuda"
        self._capacity = shape[0]
        self._free = deque(
            Slot(
                torch.zeros(shape, dtype=dtype, pin_memory=on_cuda),
                torch.cuda.Stream(device) if on_cuda else None,
            )
            for _ in range(slots)
        )
        self._ready: deque[Slot] = deque()
        self._current: Slot | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._aborted = False

    def reserve(self, owner: object, start: int, wanted: int) -> tuple[Slot, Segment]:
        """Up to `wanted` rows, as many as the current batch has left; waits for a free one."""
        with self._changed:
            while self._current is None and not self._free:
                self._wait()
            if self._aborted:
                raise Aborted
            if self._current is None:
                self._current = self._free.popleft()
            slot = self._current
            count = min(wanted, self._capacity - slot.reserved)
            segment = Segment(owner, start, slot.reserved, count)
            slot.segments.append(segment)
            slot.reserved += count
            if slot.reserved == self._capacity:
                self._current = None
            return slot, segment

    def filled(self, slot: Slot, segment: Segment) -> None:
        with self._changed:
            slot.filled += segment.count
            if slot.filled == self._capacity:
                self._ready.append(slot)
                self._changed.notify_all()

    def take(self) -> Slot | None:
        """The next full batch; None when the readers have closed the ring and all is taken."""
        with self._changed:
            while not self._ready or self._aborted:
                if self._closed and not self._aborted:
                    return None
                self._wait()
            return self._ready.popleft()

    def release(self, slot: Slot) -> None:
        with self._changed:
            slot.segments.clear()
            slot.reserved = slot.filled = 0
            self._free.append(slot)
            self._changed.notify_all()

    def close(self) -> None:
        """All rows are filled and no more will come; the last batch goes out as it is."""
        with self._changed:
            self._closed = True
            if self._current is not None and self._current.reserved:
                self._ready.append(self._current)
                self._current = None
            self._changed.notify_all()

    def abort(self) -> None:
        with self._changed:
            self._aborted = True
            self._changed.notify_all()

    def interrupt(self) -> None:
        """As `abort`, for a signal handler: takes no lock, and wakes nobody before their time."""
        self._aborted = True

    @property
    def ready(self) -> int:
        """Batches that are full and wait for the engine."""
        return len(self._ready)

    def _wait(self) -> None:
        if self._aborted:
            raise Aborted
        # With a timeout, so that the main thread still sees signals.
        self._changed.wait(timeout=0.2)
