"""Turns pytest-benchmark's results into one table and one CSV.

A test marks its rows with the `row` fixture: which stage (group), which contender, how many
bytes or images it moves, into how many units (segments, say), and whether it is the baseline
that the ratios are against. Beside them stands a memory-copy probe of the same process: these
machines drift, ratios do not.
"""

from __future__ import annotations

import csv
import os
import platform
import time
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "group", "contender", "dtype", "shape", "p20_ms", "p50_ms", "p80_ms", "bytes", "gb_per_s",
    "percent_of_copy", "images_per_s", "units_per_s", "gflop_per_s", "percent_of_matmul",
    "engine_busy_percent", "ratio", "exactness", "threads", "device", "versions", "date",
)  # fmt: skip

# What the kernels are to reach on one thread of a Zen 5-class core, in ms, by (group, contender,
# dtype); and, measured on the Xeon of results/cpu-xeon-amx.csv, what a miss is made of.
GOALS = {
    ("op percentile_bounds", "native", "uint16"): (
        0.6,
        "the kernel takes 0.57, 1.4 times one read of the same bytes; the rest is the call",
    ),
    ("op percentile_bounds", "native", "float32"): (1.25, ""),
    ("percentiles + 4 crops of 224 -> bf16", "native", "uint16"): (
        1.0,
        "percentiles 0.59, at the speed of one read; crops 0.28, two thirds of it the exact "
        "division; the calls 0.2",
    ),
    ("percentiles + 4 crops of 224 -> bf16", "native", "float32"): (
        1.0,
        "percentiles 1.1 to 1.2, at the speed of one read, which alone takes 0.8; crops 0.3; the "
        "calls 0.2",
    ),
    ("crop 480x640 -> 224", "native pillow-bicubic", ""): (
        0.1,
        "the kernel takes 0.22: across 0.085 (35 cycles a column, vector ports), fade 0.039 "
        "(memory), down 0.031, look-up 0.025, transposes 0.022, weights 0.017; the call 0.07 to "
        "0.09, once per photo",
    ),
    ("panoptic PNG -> segments, boxes, areas", "native", "uint8"): (0.3, ""),
}

# At most how many times as long as another row of the same group, in the same run.
RELATIVE_GOALS = {
    (group, "native", "float16"): {"plain write": 2.0, "torch": 0.2}
    for group in ("chunk 256x64x64x64 of a volume", "64 channels of a volume")
}

# What whole jobs are to reach, at the least, by (group, first word of the contender): a column.
JOB_GOALS = {
    **{
        (f"panoptic, {photos}, files to model input", "recipe"): ("ratio", 15)
        for photos in ("COCO photo", "generated photos")
    },
    **{
        (f"{job}, {photos}, files to files", "engine"): ("engine_busy_percent", 95)
        for job in ("panoptic", "maps")
        for photos in ("COCO photo", "generated photos")
    },
}


@pytest.fixture
def row(benchmark):
    """Call it with what the table shall say of this benchmark."""

    def describe(
        group, contender, *, dtype="", shape="", nbytes=0, images=0, units=0, flops=0,
        exactness="", baseline=False, device="cpu",
    ):  # fmt: skip
        benchmark.group = group
        benchmark.extra_info.update(
            contender=contender, dtype=dtype, shape=shape, bytes=nbytes, images=images, units=units,
            flops=flops, exactness=exactness, baseline=baseline,
            threads=torch.get_num_threads(), device=device,
        )  # fmt: skip
        return benchmark

    return describe


@pytest.fixture
def one_thread():
    """Kernels are compared on one thread; the pipeline's pool is the parallelism."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    rows = _rows(session.benchmarks) if session else []
    if not rows:
        return
    for line in _table(rows):
        terminalreporter.write_line(line)
    target = os.environ.get("FASTEMBED_BENCH_CSV")
    if target:
        path = Path(target) if os.sep in target else RESULTS / target
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        terminalreporter.write_line(f"written: {path}")


def copy_bandwidth() -> float:
    """GB/s, bytes read plus written, of a single-threaded copy that leaves the caches."""
    source = np.ones(64 * 2**20, dtype=np.uint8)
    target = np.empty_like(source)
    times = []
    for _ in range(15):
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / sorted(times)[len(times) // 2] / 1e9


def matmul_rate(dtype: str) -> float:
    """FLOP/s of one large matrix product on all threads: what a model's layers are measured by."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
    times = []
    for _ in range(9):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # .item() waits for the device
        times.append(time.perf_counter() - start)
    return 2 * side**3 / sorted(times)[len(times) // 2]


def device_copy_bandwidth() -> float:
    """GB/s, bytes read plus written, of a copy within the GPU's memory that leaves its cache."""
    source = torch.ones(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(15):
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / sorted(times)[len(times) // 2] / 1e9


def _rows(benchmarks) -> list[dict]:
    copies = {"cpu": copy_bandwidth()}
    names = {"cpu": "np.copyto, one thread", "cuda": "torch copy_ on the GPU"}
    if torch.cuda.is_available():
        copies["cuda"] = device_copy_bandwidth()
    computed = {b.extra_info["dtype"] for b in benchmarks if b.extra_info.get("flops")}
    matmul = {dtype: matmul_rate(dtype) for dtype in computed}
    baselines = {
        # A model's ratio is against the upstream's default, whatever its number format.
        (b.group, "" if b.extra_info.get("flops") else b.extra_info["dtype"]): b.stats.median
        for b in benchmarks
        if b.extra_info.get("baseline")
    }
    rows = [
        {
            "group": "copy probe", "contender": names[device],
            "p50_ms": round(2 * 64 * 2**20 / copy / 1e6, 4),
            "bytes": 2 * 64 * 2**20, "gb_per_s": round(copy, 1), "percent_of_copy": 100,
            **machine(),
        }
        for device, copy in copies.items()
    ]  # fmt: skip
    for b in benchmarks:
        info = b.extra_info
        p20, p50, p80 = np.percentile(b.stats.data, [20, 50, 80])
        speed = info["bytes"] / p50 / 1e9
        flops = info.get("flops", 0) / p50
        baseline = baselines.get((b.group, "" if flops else info["dtype"]))
        rows.append(
            {
                "group": b.group,
                **{name: info[name] for name in ("contender", "dtype", "shape", "exactness")},
                "p20_ms": round(p20 * 1e3, 4),
                "p50_ms": round(p50 * 1e3, 4),
                "p80_ms": round(p80 * 1e3, 4),
                "bytes": info["bytes"] or "",
                "gb_per_s": round(speed, 2) if speed else "",
                "percent_of_copy": round(100 * speed / copies[info["device"]], 1) if speed else "",
                "images_per_s": round(info["images"] / p50, 1) if info["images"] else "",
                "units_per_s": round(info["units"] / p50, 1) if info["units"] else "",
                "gflop_per_s": round(flops / 1e9, 1) if flops else "",
                "percent_of_matmul": round(100 * flops / matmul[info["dtype"]], 1) if flops else "",
                "engine_busy_percent": round(100 * info["busy"], 1) if "busy" in info else "",
                "ratio": round(baseline / p50, 2) if baseline else "",
                "threads": info["threads"],
                **machine(),
            }
        )
    return rows


def machine() -> dict:
    import numba

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
        device = f"{name or platform.machine()}, {os.cpu_count()} cores"
    versions = f"torch {torch.__version__} numpy {np.__version__} numba {numba.__version__}"
    return {"device": device, "versions": versions, "date": date.today().isoformat()}


def _table(rows: list[dict]) -> list[str]:
    lines = ["", f"{rows[0]['device']}; {rows[0]['versions']}", ""]
    lines.append(
        f"{'':<44} {'dtype':<9} {'p50 ms':>10} {'GB/s':>7} {'% copy':>7} {'img/s':>9} "
        f"{'units/s':>9} {'% matmul':>8} {'% busy':>7} {'ratio':>8}"
    )
    group = None
    for row in rows:
        if row["group"] != group:
            group = row["group"]
            lines.append(group)
        lines.append(
            f"  {row['contender']:<42} {row.get('dtype', ''):<9} {row['p50_ms']:>10.3f} "
            f"{row['gb_per_s']!s:>7} {row['percent_of_copy']!s:>7} "
            f"{row.get('images_per_s', '')!s:>9} {row.get('units_per_s', '')!s:>9} "
            f"{row.get('percent_of_matmul', '')!s:>8} {row.get('engine_busy_percent', '')!s:>7} "
            f"{row.get('ratio', '')!s:>8}"
        )
    lines.append("ratio: how many times faster than the row of its group that has 1.0")
    return lines + _goals(rows)


def _goals(rows: list[dict]) -> list[str]:
    lines = []
    for row in rows:
        key = (row["group"], row["contender"], row.get("dtype", ""))
        if key not in GOALS:
            continue
        goal, reason = GOALS[key]
        reached = row["p50_ms"] <= goal
        verdict = "reached" if reached else f"missed: {reason}" if reason else "missed"
        lines.append(f"  {' '.join(key)}: {row['p50_ms']:.3f} ms of {goal}, {verdict}")
    if lines:
        lines = ["", "goals, for one thread of a Zen 5-class core:", *lines]
    return lines + _job_goals(rows) + _relative_goals(rows)


def _relative_goals(rows: list[dict]) -> list[str]:
    times = {(row["group"], row["contender"], row.get("dtype", "")): row["p50_ms"] for row in rows}
    lines = []
    for key, goals in RELATIVE_GOALS.items():
        for other, most in goals.items():
            beside = times.get((key[0], other, key[2]))
            if key in times and beside:
                ratio = times[key] / beside
                verdict = "reached" if ratio <= most else "missed"
                lines.append(
                    f"  {' '.join(key)}: {ratio:.2f} of {other}, at most {most}, {verdict}"
                )
    return ["", "goals beside other rows of this run:", *lines] if lines else []


def _job_goals(rows: list[dict]) -> list[str]:
    lines = []
    for row in rows:
        key = (row["group"], row["contender"].split()[0])
        if key in JOB_GOALS:
            column, goal = JOB_GOALS[key]
            verdict = "reached" if row[column] >= goal else "missed"
            lines.append(f"  {', '.join(key)}: {column} {row[column]} of {goal}, {verdict}")
    return ["", "goals of whole jobs:", *lines] if lines else []
