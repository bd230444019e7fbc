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
        self._held = self._fresh = 0  # bytes of samples: not written yet, not taken yet
        self._samples: deque = deque()
        self._waiting = False
        self._closed = False
        self._aborted = False
        self._changed = threading.Condition()

    @property
    def held(self) -> int:
        """Bytes of the samples that are not written yet."""
        return self._held

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
            self._fresh += sample.nbytes
            self._samples.append(sample)
            if self._fresh * 2 >= self._limit:
                self._changed.notify_all()

    def take(self, seconds: float) -> list | None:
        """The samples that come within `seconds`; None at the end.

        Sooner where it is enough for a commit (half the limit), or where no more can come: another
        waits for room.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            while self._fresh * 2 < self._limit and not (self._closed or self._waiting):
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(timeout=left)
            if self._closed and not self._samples:
                return None
            taken, self._samples, self._fresh = list(self._samples), deque(), 0
            return taken

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
