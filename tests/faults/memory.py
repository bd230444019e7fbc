"""Is memory flat over very many tiny samples? Embeds them and watches its own resident memory.

    python tests/faults/memory.py [--samples 100000] [--format npy|zarr] [--files] [--csv FILE]
                                  [--trace]

The samples are [5, 8, 8] tensors that a source makes from their keys; with --files they are read
from real .npy files. All else is the multichannel job's own, but for an engine that is small. What
may grow is what a run must remember of each sample: its names. Prints samples and memory, and the
slope by least squares after the first third; exits with 1 where it is above BOUND. --trace names
the lines that hold the most memory near the end (and takes memory itself).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from conftest import TinyEngine

from fastembed import MultiCrop, NpyPerSample, Percentile, TensorCsv, Tsv, extract
from fastembed.records import Item

BOUND = 1.0  # MB per 1,000 samples
SHAPE = (5, 8, 8)


class Made:
    """A source of `count` samples whose pixels follow from their keys."""

    def __init__(self, count: int) -> None:
        self._count = count

    def items(self) -> Iterator[Item]:
        for number in range(self._count):
            path = f"plates/{number // 1000:04d}/{number:07d}.npy"
            digest = hashlib.sha1(path.encode(), usedforsecurity=False).hexdigest()
            yield Item(f"{path}|1", path, f"emb_{digest}", {"text_id": 1})

    def count(self) -> int:
        return self._count

    def selection(self) -> dict:
        return {}

    def read(self, item: Item, channels: int, buffer: object) -> torch.Tensor:
        return torch.from_numpy(pixels(item.key))


held: list[tracemalloc.Statistic] = []  # near the end of a run that is traced


def pixels(key: str) -> np.ndarray:
    stretched = hashlib.shake_128(key.encode()).digest(int(np.prod(SHAPE)))
    return np.frombuffer(stretched, np.uint8).reshape(SHAPE).copy()


def write_files(folder: Path, count: int) -> TensorCsv:
    """The same samples as real files, a thousand in a folder, and their manifest."""
    manifest = folder / "tensors.csv"
    with manifest.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("tensor_path", "text_id"))
        for item in Made(count).items():
            path = folder / item.path
            if not path.parent.exists():
                path.parent.mkdir(parents=True)
            np.save(path, pixels(item.key))
            writer.writerow((path, 1))
    return TensorCsv(manifest)


def resident() -> float:
    """MB of this process that no file backs."""
    with open("/proc/self/status") as stream:
        sizes = dict(line.split(":", 1) for line in stream)
    return int(sizes["RssAnon"].split()[0]) / 1024


def traced() -> float:
    """MB that Python and NumPy hold, while tracemalloc is on."""
    return tracemalloc.get_traced_memory()[0] / 2**20


Reading = tuple[float, int, float]
"""Seconds, samples done, MB."""


def measure(
    count: int,
    form: str,
    source,
    out: Path,
    size: Callable[[], float] = resident,
    engine: TinyEngine | None = None,
) -> list[Reading]:
    """Readings of `size`, now and then during a run."""
    if form == "zarr":
        from fastembed.store import Parquet, Zarr

        sink = Zarr(out)
        index = Parquet(sink)
    else:
        sink, index = NpyPerSample(out), Tsv(out)
    engine = engine or TinyEngine(batch_size=64, size=8)
    start, seen = time.perf_counter(), []

    def progress(report, total: int) -> None:
        seen.append((time.perf_counter() - start, report.embedded, size()))
        if tracemalloc.is_tracing() and report.embedded >= 0.9 * count and not held:
            held.extend(tracemalloc.take_snapshot().statistics("lineno")[:12])

    report = extract(
        source, MultiCrop(Percentile(), n_crops=1), engine, sink, index,
        workers=2, slots=3, progress=progress,
    )  # fmt: skip
    if (report.embedded, report.failed) != (count, 0):
        raise RuntimeError(f"{report.embedded} embedded, {report.failed} failed of {count}")
    return seen


def slope(seen: list[Reading], count: int) -> float:
    """MB per 1,000 samples after the first third, by least squares."""
    later = [(done, size) for _, done, size in seen if count / 3 <= done]
    if len(later) < 5:
        raise RuntimeError(
            f"only {len(later)} readings after the first third: more samples, please"
        )
    return float(np.polyfit(*np.array(later).T, 1)[0]) * 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--format", choices=("npy", "zarr"), default="npy")
    parser.add_argument("--files", action="store_true", help="read real files")
    parser.add_argument("--csv", type=Path, help="write all readings there")
    parser.add_argument("--trace", action="store_true", help="say which lines hold memory")
    arguments = parser.parse_args()
    count = arguments.samples
    with tempfile.TemporaryDirectory(prefix="fastembed-memory-") as folder:
        place = Path(folder)
        source = write_files(place, count) if arguments.files else Made(count)
        if arguments.trace:
            tracemalloc.start()
        seen = measure(count, arguments.format, source, place / "out")
        for line in held:
            print(f"{line.size / 2**20:8.2f} MB {line.count:>8} blocks  {line.traceback}")
    for seconds, done, size in seen[:: max(1, len(seen) // 10)]:
        print(f"{seconds:8.1f} s {done:>9,} samples {size:9.1f} MB")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerows([("seconds", "samples", "anonymous_mb"), *seen])
    growth = slope(seen, count)
    print(
        f"{arguments.format}: {growth:+.3f} MB per 1,000 samples after the first third of "
        f"{count:,} (bound {BOUND}), {seen[-1][1] / seen[-1][0]:.0f} samples/s"
    )
    return int(growth > BOUND)


if __name__ == "__main__":
    sys.exit(main())
