"""Samples that are computed and wait to be written: as many as fit in a number of bytes."""

from __future__ import annotations

import threading
import time
from collections import deque

from .ring import Aborted


class Backlog:
    """A queue between the engine and the writer, bounded by the bytes of its samples.

    A sample counts until it is written, not only until it is taken. One that is larger than the
    limit is let in alone. Samples have `nbytes`.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._samples: deque = deque()
        self._waiting = False
        self._closed = False
        self._aborted = False
        self._changed = threading.Condition()

    def put(self, sample) -> None:
        """Adds a sample once there is room for it; for one thread.

        Raises:
            Aborted: the run is being stopped.
        """
        with self._changed:
            while self._held and self._held + sample.nbytes > self._limit and not self._aborted:
                self._waiting = True
                self._changed.notify_all()
                # With a timeout, so that the main thread still sees signals.
                self._changed.wait(timeout=0.2)
            self._waiting = False
            if self._aborted:
                raise Aborted
            self._held += sample.nbytes
            self._samples.append(sample)
            self._changed.notify_all()

    def take(self, count: int, seconds: float) -> list | None:
        """Up to `count` samples of those that come within `seconds`; None at the end.

        Sooner where no more can come: another waits for room.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            while len(self._samples) < count and not (self._closed or self._waiting):
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(timeout=left)
            if self._closed and not self._samples:
                return None
            return [self._samples.popleft() for _ in range(min(count, len(self._samples)))]

    def written(self, samples: list) -> None:
        """Their memory is free again."""
        with self._changed:
            self._held -= sum(sample.nbytes for sample in samples)
            self._changed.notify_all()

    def close(self) -> None:
        """No more will come; what is there can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def abort(self) -> None:
        """Whoever waits for room goes home; what is there can still be taken."""
        with self._changed:
            self._aborted = True
            self._changed.notify_all()
