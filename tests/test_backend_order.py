"""The automatic backend order against the committed benchmark CSVs."""

from __future__ import annotations

import csv
import itertools
import math
from collections import defaultdict
from pathlib import Path

import pytest

from fastembed.dispatch import ORDER

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
# Two backends closer than this are equal: timings of shared machines drift by as much.
SLACK = 1.25


def mean_times(path: Path) -> dict[str, dict[str, float]]:
    """Per op the geometric mean of each backend's medians, over the dtypes that all have."""
    times: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    with path.open(newline="") as stream:
        for row in csv.DictReader(stream):
            if row["group"].startswith("op "):
                op = row["group"].removeprefix("op ").split("[")[0]
                case = row["group"] + row["dtype"]
                times[op][row["contender"]][case] = float(row["p50_ms"])
    means = {}
    for op, backends in times.items():
        cases = set.intersection(*(set(medians) for medians in backends.values()))
        means[op] = {
            backend: math.exp(sum(math.log(medians[case]) for case in cases) / len(cases))
            for backend, medians in backends.items()
        }
    return means


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.csv")), ids=lambda path: path.stem)
def test_the_order_is_the_one_that_was_measured(path):
    with path.open(newline="") as stream:
        device = "cuda" if "nvidia" in next(csv.DictReader(stream))["device"].lower() else "cpu"
    means = mean_times(path)
    assert means, f"{path} has no rows of ops"
    for op, backends in means.items():
        ordered = [name for name in ORDER[device] if name in backends]
        for faster, slower in itertools.pairwise(ordered):
            assert backends[faster] <= SLACK * backends[slower], (
                f"{op} on {device}: ORDER prefers {faster} ({backends[faster]:.3f} ms) to "
                f"{slower} ({backends[slower]:.3f} ms)"
            )


def test_there_is_a_figure_behind_the_cpu_order():
    assert list(RESULTS.glob("cpu-*.csv"))
