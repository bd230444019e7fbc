"""What a run did and where its time went."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

# The stages in the order of the data, and which threads serve them.
STAGES = {
    "list": "readers",
    "read": "readers",
    "quantize": "readers",
    "gather": "readers",
    "engine": "engine",
    "pool": "writer",
    "write": "writer",
    "commit": "writer",
}
# What to change when a stage is the one that the others wait for.
_ADVICE = {
    "list": "listing the samples: is the database or the CSV far away?",
    "read": "reading and decoding at {speed}: faster storage{more}",
    "quantize": "what needs the whole image (percentiles, segments){more}",
    "gather": "cutting, resizing and normalising{more}",
    "engine": "the model, which is how it should be",
    "pool": "pooling the crops and rounding",
    "write": "writing at {speed}: faster storage, or --format zarr if the files are small and many",
    "commit": "committing to the index: is the database far away?",
}
_BUSY_ENGINE = 0.95


@dataclass
class Stage:
    """One stage's work, summed over its threads.

    Attributes:
        seconds: in which they worked.
        waited: seconds in which they stood before it: readers at `list` for each other and at
            `gather` for a free batch, the engine for a full one, the writer at `pool` for finished
            samples; at `write` the engine, for the writer.
    """

    seconds: float = 0.0
    items: int = 0
    bytes: int = 0
    waited: float = 0.0

    @property
    def rate(self) -> float:
        """Items per second of work."""
        return self.items / self.seconds if self.seconds else 0.0

    @property
    def speed(self) -> str:
        """Bytes per second of work, for a person; empty where it handles none."""
        if not (self.bytes and self.seconds):
            return ""
        gigabytes = self.bytes / self.seconds / 1e9
        return f"{gigabytes:.2f} GB/s" if gigabytes >= 0.1 else f"{gigabytes * 1e3:.2f} MB/s"


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
        plan: batch size, readers and slots, and why these.
        stages: seconds, waits, items and bytes per stage, summed over its threads.
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
    plan: str = ""
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
        """The stage that the others wait for; empty where nothing was embedded.

        The engine, if it was busy. Else one of the writer's stages where the engine waited for the
        writer, one of the readers' where it waited for them: the one that took the most time.
        """
        if not self.embedded:
            return ""
        if self.engine_busy >= _BUSY_ENGINE:
            return "engine"
        blocked = self.stages["write"].waited > self.stages["engine"].waited
        threads = "writer" if blocked else "readers"
        mine = [name for name in self.stages if STAGES[name] == threads]
        return max(mine, key=lambda name: self.stages[name].seconds)

    @property
    def advice(self) -> str:
        """What to change about the bottleneck."""
        if not self.bottleneck:
            return ""
        cores = os.cpu_count() or 1
        more = f", or more --workers than {self.workers}" if self.workers < cores else ""
        stage = self.stages[self.bottleneck]
        return _ADVICE[self.bottleneck].format(speed=stage.speed or "?", more=more)

    def _share(self, stage: str, seconds: float) -> float:
        """Of wall time per thread that serves a stage."""
        threads = self.workers if STAGES[stage] == "readers" else 1
        return seconds / threads / max(self.seconds, 1e-9)

    def to_json(self) -> str:
        return json.dumps(
            {
                **asdict(self),
                "rate": self.rate,
                "engine_busy": self.engine_busy,
                "bottleneck": self.bottleneck,
                "advice": self.advice,
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
            lines.append(
                f"{'stage':>10} {'seconds':>9} {'busy':>6} {'waits':>6} {'ms each':>9} "
                f"{'each/s':>9} {'speed':>11}"
            )
            for name, stage in self.stages.items():
                each = stage.seconds / stage.items * 1e3 if stage.items else 0.0
                busy, waits = self._share(name, stage.seconds), self._share(name, stage.waited)
                lines.append(
                    f"{name:>10} {stage.seconds:9.2f} {busy:6.0%} {waits:6.0%} {each:9.2f} "
                    f"{stage.rate:9.1f} {stage.speed:>11}".rstrip()
                )
            lines.append(
                f"Engine busy: {self.engine_busy:.1%} of {self.engine_span:.1f} s from the first "
                f"batch to the last, {self.engine_seconds / self.seconds:.1%} of all "
                f"{self.seconds:.1f} s."
            )
            lines.append(f"Slowest stage: {self.bottleneck}: {self.advice}.")
            lines.append(f"Run with {self.plan}.")
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
