"""A run as a picture: what each thread did when, for chrome://tracing and ui.perfetto.dev.

The file is Chrome's Trace Event Format, events in a JSON array. They go to the file as they come,
so memory stays flat, and a viewer also opens what a killed run left (the closing bracket may be
missing).
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

_BUFFER = 1 << 20  # bytes


class Trace:
    """Writes a trace while in a with block; its methods are for any thread.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._zero = time.perf_counter()
        self._lock = threading.Lock()
        self._threads: dict[str, int] = {}

    def __enter__(self) -> Trace:
        self._stream = self.path.open("w", buffering=_BUFFER, encoding="utf-8")
        self._stream.write("[\n")
        self._write({"ph": "M", "name": "process_name", "args": {"name": "fastembed"}})
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            # A last event without a comma after it, so that the array is strict JSON.
            self._stream.write(json.dumps({"ph": "M", "name": "end", "pid": os.getpid()}) + "\n]\n")
            self._stream.close()

    def add(
        self, name: str, start: float, seconds: float, thread: str | None = None, **facts: object
    ) -> None:
        """What a thread, by default this one, did from `start` (of perf_counter) on."""
        with self._lock:
            event = {"ph": "X", "name": name, "ts": self._us(start), "dur": round(seconds * 1e6, 1)}
            event["tid"] = self._thread(thread or threading.current_thread().name)
            if facts:
                event["args"] = facts
            self._write(event)

    def count(self, name: str, value: float) -> None:
        """A number that changes over time, such as the length of a queue."""
        with self._lock:
            now = self._us(time.perf_counter())
            self._write({"ph": "C", "name": name, "ts": now, "args": {name: value}})

    def _us(self, moment: float) -> float:
        return round((moment - self._zero) * 1e6, 1)

    def _thread(self, name: str) -> int:
        if name not in self._threads:
            self._threads[name] = len(self._threads) + 1
            args = {"name": name}
            number = self._threads[name]
            self._write({"ph": "M", "name": "thread_name", "tid": number, "args": args})
        return self._threads[name]

    def _write(self, event: dict) -> None:
        if not self._stream.closed:  # a thread that outlived the block has nothing more to tell
            self._stream.write(json.dumps({**event, "pid": os.getpid()}) + ",\n")
