"""Thresholds chosen on val and applied to test once: experiments E1.5 and E4 of the study."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

from .dataset import Example
from .evaluate import Predictor, Thresholds, evaluate
from .masks import MIN_SIZE, candidates, select
from .metrics import Score, score, summarize, summarize_groups
from .tables import read_tsv, write_json, write_tsv

FLOW_THRESHOLDS = (0.2, 0.4, 0.6)
CELLPROB_THRESHOLDS = (-1.0, -0.5, 0.0, 0.5, 1.0)
_COLUMNS = ("ap50", "precision", "recall", "f1", "tp", "fp", "fn", "ap75", "ap90", "n_images")


def grid_scores(
    predictor: Predictor,
    examples: Sequence[Example],
    points: Iterable[Thresholds],
) -> dict[Thresholds, list[Score]]:
    """Scores of every image at every point, from one network pass per image.

    The dynamics run once per cell probability threshold, side by side and while the network is at
    the next image; the flow threshold only chooses among the masks that they gave.
    """
    points = list(points)
    cellprobs = list(dict.fromkeys(point.cellprob for point in points))

    def score_cellprob(true: np.ndarray, flows: np.ndarray, cellprob: float) -> dict:
        found = candidates(flows, cellprob, predictor.network.device)
        return {
            point: score(true, select(found, point.flow, point.min_size))
            for point in points
            if point.cellprob == cellprob
        }

    scores: dict[Thresholds, list[Score]] = {point: [] for point in points}
    threads = min(len(cellprobs), len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        jobs: list[Future] = []
        for example, flows in predictor.flows(examples):
            _collect(jobs, scores)
            true = example.mask(flows[0])
            jobs = [pool.submit(score_cellprob, true, flows, cellprob) for cellprob in cellprobs]
        _collect(jobs, scores)
    return scores


def _collect(jobs: Iterable[Future], scores: dict[Thresholds, list[Score]]) -> None:
    for job in jobs:
        for point, one in job.result().items():
            scores[point].append(one)


def first_best(rows: Sequence[dict], by: str) -> dict:
    """The row with the highest value; of equals the first, as the study breaks ties."""
    return max(rows, key=lambda row: row[by])


def sweep(
    predictor: Predictor,
    val: Sequence[Example],
    test: Sequence[Example],
    output: Path,
    name: str,
    *,
    flow_thresholds: Sequence[float] = FLOW_THRESHOLDS,
    cellprob_thresholds: Sequence[float] = CELLPROB_THRESHOLDS,
    min_size: int = MIN_SIZE,
    by: str = "f1",
) -> dict[str, object]:
    """Scores a grid of thresholds on val, and the best of it on test, once.

    Leaves in `output`: ``reports/e1_threshold_sweep_<name>_val.tsv`` (the grid),
    ``reports/e1_threshold_selected_test.tsv`` (one row per model; that of `name` is replaced),
    ``predictions/<name>_thsel/test`` (masks and ``metrics.json``).

    Args:
        predictor: should have a cache: then test images and further steps cost no second pass.
        by: what is best: f1 or ap50; of equals the first, flow thresholds in the outer loop.

    Returns:
        The row of ``e1_threshold_selected_test.tsv``.

    Raises:
        ValueError: an empty grid, another `by`.
    """
    if by not in ("f1", "ap50"):
        raise ValueError(f"by must be f1 or ap50; got {by!r}")
    points = [
        Thresholds(flow, cellprob, min_size)
        for flow, cellprob in product(flow_thresholds, cellprob_thresholds)
    ]
    if not points:
        raise ValueError("the grid of thresholds must not be empty")
    origin = {"model_alias": name, "model_spec": predictor.network.name, "split": "val"}
    rows = [
        {
            **origin,
            "flow_threshold": point.flow,
            "cellprob_threshold": point.cellprob,
            **_columns(scores),
        }
        for point, scores in grid_scores(predictor, val, points).items()
    ]
    reports = output / "reports"
    write_tsv(reports / f"e1_threshold_sweep_{name}_val.tsv", rows)

    best = first_best(rows, by)
    chosen = Thresholds(best["flow_threshold"], best["cellprob_threshold"], min_size)
    folder = output / "predictions" / f"{name}_thsel" / "test"
    metrics = evaluate(predictor, test, chosen, folder)
    selected = {
        "model_alias": name,
        "selected_by": by,
        "flow_threshold": chosen.flow,
        "cellprob_threshold": chosen.cellprob,
        **{f"val_{key}": best[key] for key in ("ap50", "precision", "recall", "f1")},
        **{f"test_{key}": metrics["overall"][key] for key in ("ap50", "precision", "recall", "f1")},
        "metrics_json": str(folder / "metrics.json"),
    }
    table = reports / "e1_threshold_selected_test.tsv"
    others = read_tsv(table) if table.exists() else []
    write_tsv(table, [row for row in others if row["model_alias"] != name] + [selected])
    write_json(reports / f"e1_threshold_sweep_{name}.json", {"grid": rows, "selected": selected})
    return selected


def flow_threshold_of(points_per_side: int) -> float:
    """The study's stand-in for prompts per side: the denser, the stricter the flow threshold."""
    if points_per_side <= 16:
        return 0.6
    return 0.4 if points_per_side <= 32 else 0.2


def sample_per_marker(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Up to `count` examples of each marker, markers in order, by `random.Random(seed)`."""
    generator, chosen = random.Random(seed), []
    for marker in sorted({example.marker for example in examples}):
        members = [example for example in examples if example.marker == marker]
        chosen += generator.sample(members, min(count, len(members)))
    return chosen


def sensitivity(
    predictor: Predictor,
    examples: Sequence[Example],
    output: Path,
    *,
    points_per_side: Sequence[int] = (16, 32, 64),
    num_tiles: int = 10,
    seed: int = 2024,
    thresholds: Thresholds | None = None,
) -> list[dict[str, object]]:
    """How results depend on the flow threshold, on a sample of `num_tiles` images per marker.

    The study calls this a sweep of prompt density by a proxy: a density stands for a flow
    threshold (`flow_threshold_of`). Leaves in ``reports/microsam`` the sample and
    ``e4_microsam_proxy_sweep_n<N>_seed<S>.tsv`` and ``.json``.

    Returns:
        Rows of the TSV: a density and a group (overall or marker) each.
    """
    sampled = sample_per_marker(examples, num_tiles, seed)
    base = thresholds or Thresholds()
    point_of = {pps: replace(base, flow=flow_threshold_of(pps)) for pps in points_per_side}
    scores = grid_scores(predictor, sampled, dict.fromkeys(point_of.values()))
    rows, results = [], []
    for pps, point in point_of.items():
        groups = summarize_groups(
            [example.stem for example in sampled],
            [example.marker for example in sampled],
            scores[point],
        )
        head = {"method": "cpsam_proxy", "pps": pps, "flow_threshold": point.flow}
        results.append({**head, "model": predictor.network.name, **groups})
        for group in ["overall", *sorted({example.marker for example in sampled})]:
            rows.append({**head, "group": group, **{k: groups[group][k] for k in _COLUMNS}})
    folder, tag = output / "reports" / "microsam", f"n{num_tiles}_seed{seed}"
    write_tsv(
        folder / f"sampled_tiles_{tag}.tsv",
        [{"image": e.image_path, "mask": e.mask_path, "marker": e.marker} for e in sampled],
    )
    write_tsv(folder / f"e4_microsam_proxy_sweep_{tag}.tsv", rows)
    write_json(folder / f"e4_microsam_proxy_sweep_{tag}.json", results)
    return rows


def _columns(scores: Sequence[Score]) -> dict[str, float | int]:
    summary = summarize(scores)
    return {name: summary[name] for name in _COLUMNS}
