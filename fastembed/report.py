"""What a run did and where its time went."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

# What to change when a stage is the one that the others wait for.
_ADVICE = {
    "list": "the listing of the samples: is the database or the CSV far away?",
    "read": "reading and decoding: faster storage, or more --workers",
    "quantize": "percentiles over whole images: more --workers",
    "gather": "cutting and normalising crops: more --workers",
    "engine": "the model, which is how it should be",
    "pool": "pooling the crops",
    "write": "writing: faster storage for the outputs",
    "commit": "committing to the index: is the database far away?",
}


@dataclass
class Stage:
    """One stage's work, summed over its threads."""

    seconds: float = 0.0
    items: int = 0
    bytes: int = 0


class Clock:
    """Adds up the time of every stage, from any thread."""

    def __init__(self) -> None:
        self.stages = {name: Stage() for name in _ADVICE}
        self._lock = threading.Lock()

    @contextmanager
    def measure(self, stage: str, items: int = 1, nbytes: int = 0) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start, items, nbytes)

    def add(self, stage: str, seconds: float, items: int = 0, nbytes: int = 0) -> None:
        with self._lock:
            record = self.stages[stage]
            record.seconds += seconds
            record.items += items
            record.bytes += nbytes


class Busy:
    """How much of the time from an engine's first batch to its last it computed.

    Batches on CUDA overlap, and are timed by the device itself.

    Attributes:
        seconds: in which it computed, copies to and from the device included.
        span: seconds from the start of the first batch to the end of the last.
    """

    def __init__(self) -> None:
        self.seconds = self.span = 0.0
        self._first: float | torch.cuda.Event | None = None

    def mark(self, stream: torch.cuda.Stream | None) -> float | torch.cuda.Event:
        """Now, on the stream's own clock if there is one."""
        if stream is None:
            moment = time.perf_counter()
        else:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record(stream)
        if self._first is None:
            self._first = moment
        return moment

    def add(self, start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> None:
        """A batch between two marks that have passed; in the order of the batches."""
        start, end = self._seconds(start), self._seconds(end)
        self.seconds += max(0.0, end - max(start, self.span))
        self.span = max(self.span, end)

    def _seconds(self, moment: float | torch.cuda.Event) -> float:
        if isinstance(moment, float):
            return moment - self._first
        return self._first.elapsed_time(moment) / 1e3  # milliseconds


@dataclass
class Report:
    """The counts and times of one `extract`.

    Attributes:
        listed: rows of the source that fall to this shard.
        already_done: committed by an earlier run with the same settings.
        duplicates: rows that repeat an earlier row of this run.
        embedded: committed by this run.
        vectors: how many vectors or maps those samples gave; `unit` says which.
        failed: written to failures.jsonl; of a sample that lacks some of its parts the others
            are committed.
        seconds: wall time, from the first read on.
        engine_seconds: in which the engine computed.
        engine_span: seconds from the start of its first batch to the end of its last.
        workers: reader threads.
        stages: seconds, items and bytes per stage, summed over its threads.
    """

    listed: int = 0
    already_done: int = 0
    duplicates: int = 0
    embedded: int = 0
    vectors: int = 0
    unit: str = "vectors"
    failed: int = 0
    seconds: float = 0.0
    engine_seconds: float = 0.0
    engine_span: float = 0.0
    workers: int = 1
    output: str = ""
    index: str = ""
    failures_file: str = ""
    stages: dict[str, Stage] = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.embedded / self.seconds if self.seconds else 0.0

    @property
    def engine_busy(self) -> float:
        """Share of the time from the first batch to the last in which the engine computed."""
        return self.engine_seconds / self.engine_span if self.engine_span else 0.0

    @property
    def bottleneck(self) -> str:
        """The stage with the largest share of wall time per thread that serves it."""
        if not self.embedded:
            return ""
        return max(self.stages, key=self._busy)

    def _busy(self, stage: str) -> float:
        threads = self.workers if stage in ("read", "quantize", "gather") else 1
        return self.stages[stage].seconds / threads / max(self.seconds, 1e-9)

    def to_json(self) -> str:
        return json.dumps(
            {
                **asdict(self),
                "rate": self.rate,
                "engine_busy": self.engine_busy,
                "bottleneck": self.bottleneck,
            },
            indent=2,
        )

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n")

    def __str__(self) -> str:
        vectors = f" ({self.vectors} {self.unit})" if self.vectors != self.embedded else ""
        lines = [
            f"{self.embedded} embedded{vectors}, {self.already_done} already done, "
            f"{self.failed} failed"
            + (f", {self.duplicates} duplicate rows" if self.duplicates else "")
            + (f" in {self.seconds:.1f} s ({self.rate:.2f} samples/s)" if self.embedded else "")
        ]
        if self.embedded:
            lines.append(f"{'stage':>10} {'seconds':>9} {'busy':>6} {'ms each':>9} {'GB/s':>7}")
            for name, stage in self.stages.items():
                each = stage.seconds / stage.items * 1e3 if stage.items else 0.0
                speed = f"{stage.bytes / stage.seconds / 1e9:7.2f}" if stage.bytes else ""
                lines.append(
                    f"{name:>10} {stage.seconds:9.2f} {self._busy(name):6.0%} {each:9.2f} {speed}"
                )
            lines.append(
                f"Engine busy: {self.engine_busy:.1%} of {self.engine_span:.1f} s from the first "
                f"batch to the last, {self.engine_seconds / self.seconds:.1%} of all "
                f"{self.seconds:.1f} s."
            )
            lines.append(f"Slowest stage: {_ADVICE[self.bottleneck]}.")
        lines.append(f"Embeddings: {self.output}")
        lines.append(f"Index:      {self.index}")
        if self.failed:
            lines.append(f"Failures:   {self.failures_file}")
        return "\n".join(lines)


def versions() -> dict[str, str]:
    """Of the packages that can change a bit."""
    found = {"torch": torch.__version__, "numpy": np.__version__}
    for package in (
        "fastembed-vision",
        "numba",
        "timm",
        "transformers",
        "open_clip_torch",
        "pillow",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
