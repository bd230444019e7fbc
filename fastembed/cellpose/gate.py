"""Drops objects by marker intensity and area, with limits chosen on val: experiment E3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from .dataset import Example
from .evaluate import Predictor, Thresholds, metrics_of
from .images import write_tiff
from .metrics import Score, score, summarize, summarize_groups
from .sweep import first_best
from .tables import write_json, write_tsv

Q_LOW, Q_HIGH, MIN_AREA = (0.0, 0.02, 0.05), (1.0, 0.98, 0.95), (50, 60, 80)
_COMPARED = ("ap50", "precision", "recall", "f1")


@dataclass(frozen=True)
class Gate:
    """Objects that stay: mean marker within two quantiles of the image, and area.

    Args:
        q_low, q_high: quantiles of all pixels of the marker channel, 0 to 1; limits included.
        min_area: pixels.
    """

    q_low: float = 0.0
    q_high: float = 1.0
    min_area: int = 50

    def __post_init__(self) -> None:
        if not 0 <= self.q_low < self.q_high <= 1:
            raise ValueError(
                f"q_low and q_high must be 0 <= q_low < q_high <= 1; got {self.q_low} and "
                f"{self.q_high}"
            )

    @property
    def tag(self) -> str:
        return f"q{100 * self.q_low:g}_{100 * self.q_high:g}_a{self.min_area}"


@dataclass(frozen=True)
class Objects:
    """A predicted mask and what gates ask of it, measured once for all of them."""

    labels: np.ndarray
    area: np.ndarray
    mean: np.ndarray
    marker: np.ndarray

    def gated(self, gate: Gate) -> np.ndarray:
        """The mask with objects that do not pass removed, and the others numbered from 1."""
        low, high = np.percentile(self.marker, [100 * gate.q_low, 100 * gate.q_high])
        keep = (self.area >= gate.min_area) & (self.mean >= low) & (self.mean <= high)
        keep[0] = False
        numbers = np.where(keep, np.cumsum(keep), 0).astype(self.labels.dtype)
        return numbers[self.labels]


def measure(labels: np.ndarray, marker: np.ndarray) -> Objects:
    """Area and mean marker intensity of every object.

    Args:
        labels: [H, W], small numbers without large gaps.
        marker: [H, W], unsigned integers, whose sums are exact.
    """
    area = np.bincount(labels.ravel())
    total = np.bincount(labels.ravel(), marker.ravel())
    return Objects(labels, area, total / np.maximum(area, 1), marker)


def gate(
    predictor: Predictor,
    val: Sequence[Example],
    test: Sequence[Example],
    output: Path,
    name: str,
    *,
    q_low: Sequence[float] = Q_LOW,
    q_high: Sequence[float] = Q_HIGH,
    min_area: Sequence[int] = MIN_AREA,
    thresholds: Thresholds | None = None,
) -> dict[str, object]:
    """Scores a grid of gates on val by F1, and the best of it (the first of equals) on test, once.

    Leaves in `output`: ``reports/e3_gating_val_grid_<name>.tsv``,
    ``reports/e3_gating_test_final_<name>.tsv``, and of the chosen gate on test
    ``reports/e3_gating_<name>_test_<tag>.tsv`` and ``.json`` (raw beside gated, by group) and
    ``predictions/<name>/test/gated/<stem>_pred_gated.tif``.

    Returns:
        The row of ``e3_gating_test_final_<name>.tsv``.

    Raises:
        ValueError: no gate has q_low < q_high.
    """
    thresholds = thresholds or Thresholds()
    gates = [Gate(*limits) for limits in product(q_low, q_high, min_area) if limits[0] < limits[1]]
    if not gates:
        raise ValueError(f"no gate has q_low < q_high; got {list(q_low)} and {list(q_high)}")
    scores: dict[Gate, list[Score]] = {one: [] for one in gates}
    for _, true, objects in _objects(predictor, val, thresholds):
        for one in gates:
            scores[one].append(score(true, objects.gated(one)))
    rows = []
    for one, members in scores.items():
        summary = summarize(members)
        rows.append(
            {
                "model": name,
                "split": "val",
                **vars(one),
                **{f"gated_{key}": summary[key] for key in ("f1", "ap50", "precision", "recall")},
            }
        )
    reports = output / "reports"
    write_tsv(reports / f"e3_gating_val_grid_{name}.tsv", rows)

    best = first_best(rows, "gated_f1")
    chosen = Gate(best["q_low"], best["q_high"], best["min_area"])
    raw, gated = _apply(predictor, test, output / "predictions" / name / "test", chosen, thresholds)
    table = reports / f"e3_gating_{name}_test_{chosen.tag}.tsv"
    write_tsv(table, _compare(raw, gated))
    write_json(
        table.with_suffix(".json"),
        {"model": name, "split": "test", **vars(chosen), "raw": raw, "gated": gated},
    )
    final = {
        "model": name,
        "selected_by": "gated_f1",
        **vars(chosen),
        "val_gated_f1": best["gated_f1"],
        "test_raw_f1": raw["overall"]["f1"],
        "test_gated_f1": gated["overall"]["f1"],
        "test_tsv": str(table),
    }
    write_tsv(reports / f"e3_gating_test_final_{name}.tsv", [final])
    return final


def _apply(
    predictor: Predictor,
    test: Sequence[Example],
    folder: Path,
    chosen: Gate,
    thresholds: Thresholds,
) -> tuple[dict, dict]:
    raw, gated = [], []
    (folder / "gated").mkdir(parents=True, exist_ok=True)
    for example, true, objects in _objects(predictor, test, thresholds):
        labels = objects.gated(chosen)
        raw.append(score(true, objects.labels))
        gated.append(score(true, labels))
        write_tiff(folder / "gated" / f"{example.stem}_pred_gated.tif", labels)
    stems, markers = [e.stem for e in test], [e.marker for e in test]
    return metrics_of(test, raw, predictor, thresholds), summarize_groups(stems, markers, gated)


def _objects(predictor: Predictor, examples: Sequence[Example], thresholds: Thresholds):
    for example, labels in predictor.masks(examples, thresholds):
        yield example, example.mask(labels), measure(labels, example.image()[..., 1])


def _compare(raw: dict, gated: dict) -> list[dict]:
    groups = [name for name, row in raw.items() if isinstance(row, dict) and "ap50" in row]
    return [
        {
            "group": group,
            **{f"raw_{key}": raw[group][key] for key in _COMPARED},
            **{f"gated_{key}": gated[group][key] for key in _COMPARED},
            **{f"delta_{key}": gated[group][key] - raw[group][key] for key in _COMPARED},
        }
        for group in groups
    ]
