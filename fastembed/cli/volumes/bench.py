"""``fastembed volumes bench``: how fast finished volumes load."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from ..options import Formatter, positive


def add(commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="how fast finished volumes load",
        formatter_class=Formatter,
        description=(
            "Loads batches of finished volumes: the first with the files out of the operating\n"
            "system's cache, the others from it, and beside them a plain read of the same files."
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument("--preprocessed-dir", required=True, type=Path, metavar="DIR")
    parser.add_argument("--batch-size", type=positive, default=4, metavar="N", help="default 4")
    parser.add_argument(
        "--num-batches", type=positive, default=20, metavar="N", help="warm batches; default 20"
    )
    parser.add_argument(
        "--num-threads", type=positive, default=8, metavar="N", help="chunks at a time; default 8"
    )


def run(arguments: argparse.Namespace) -> int:
    from ...volumes.bench import measure

    times = measure(
        arguments.preprocessed_dir,
        arguments.batch_size,
        arguments.num_batches,
        arguments.num_threads,
    )

    def speed(milliseconds: float) -> str:
        return f"{milliseconds:.1f}ms ({times.batch_bytes / milliseconds / 1e6:.2f} GB/s)"

    print("First batch (cold load):")
    for name, shape in times.shapes.items():
        print(f"  {name} shape: {list(shape)}")
    print(f"  Load time: {speed(times.cold) if times.cold else times.why_not_cold}")
    print()
    for number, warm in enumerate(times.warm[:3], start=2):
        print(f"Batch {number}: {warm:.1f}ms")
    if len(times.warm) > 3:
        print("...")
    warm = times.warm
    print("\nWarm loads (cached):")
    print(f"  Mean: {speed(statistics.fmean(warm))}")
    print(f"  Median: {speed(statistics.median(warm))}")
    print(f"  Std: {statistics.pstdev(warm):.1f}ms")
    print(f"  Min: {min(warm):.1f}ms")
    print(f"  Max: {max(warm):.1f}ms")
    plain = statistics.median(times.plain)
    print(f"\nPlain read of the same files, one thread: {speed(plain)}")
    print(f"Warm median against it: {plain / statistics.median(warm):.2f}x its speed")
    if times.cold:
        print(f"Speedup vs cold: {times.cold / statistics.fmean(warm):.1f}x")
    return 0
