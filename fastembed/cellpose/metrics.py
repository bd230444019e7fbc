"""Segmentation metrics of the study: AP per image, precision, recall and F1 pooled.

An object is found if its intersection over union (IoU) with a predicted one reaches the threshold.
``TP`` pairs them one to one, ``FP`` and ``FN`` are those left over on either side, and
``AP = TP / (TP + FP + FN)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching

from .._numba.overlaps import count_pairs
from .images import as_mask

THRESHOLDS = (0.5, 0.75, 0.9)
_EPSILON = 1e-8


@dataclass(frozen=True)
class Overlaps:
    """Objects of two masks that share a pixel.

    Args:
        true, predicted: int64 [P], which object of either mask, from 0, in order of the labels.
        iou: float64 [P], above 0.
        n_true, n_predicted: objects of either mask.
    """

    true: np.ndarray
    predicted: np.ndarray
    iou: np.ndarray
    n_true: int
    n_predicted: int


def overlaps(true: np.ndarray, predicted: np.ndarray) -> Overlaps:
    """Intersection over union of all pairs of objects that touch, in memory for those alone.

    Args:
        true, predicted: label masks [H, W]; 0 is background, gaps between labels are fine.

    Raises:
        ValueError: other labels (see `as_mask`), or masks of different shapes.
    """
    true, predicted = as_mask(true, "true"), as_mask(predicted, "predicted")
    if true.shape != predicted.shape:
        raise ValueError(
            f"masks must have one shape; got {list(true.shape)} and {list(predicted.shape)}"
        )
    keys, counts = count_pairs(np.ravel(true), np.ravel(predicted))
    first, second = keys >> np.uint64(32), keys & np.uint64(0xFFFFFFFF)
    true_labels, true_index = np.unique(first, return_inverse=True)
    predicted_labels, predicted_index = np.unique(second, return_inverse=True)
    true_area = np.bincount(true_index, counts)
    predicted_area = np.bincount(predicted_index, counts)
    objects = (first > 0) & (second > 0)
    rows, columns, shared = true_index[objects], predicted_index[objects], counts[objects]
    iou = shared / (true_area[rows] + predicted_area[columns] - shared)
    # Where there is background it sorts first: objects then start at 1.
    true_start, predicted_start = int(true_labels[0] == 0), int(predicted_labels[0] == 0)
    return Overlaps(
        rows - true_start,
        columns - predicted_start,
        iou,
        len(true_labels) - true_start,
        len(predicted_labels) - predicted_start,
    )


def true_positives(pairs: Overlaps, threshold: float) -> int:
    """How many objects can be paired one to one with IoU >= `threshold`.

    cellpose assigns at the lowest sum of ``-(IoU >= threshold) - IoU / (2 n)``, n the smaller
    number of objects. All second terms together are at most 1/2, so no assignment beats one that
    has a pair more above the threshold: its count is that of a maximum matching of those pairs,
    which needs no dense matrix.
    """
    good = pairs.iou >= threshold
    if not good.any():
        return 0
    graph = csr_matrix(
        (np.ones(good.sum(), np.int8), (pairs.true[good], pairs.predicted[good])),
        shape=(pairs.n_true, pairs.n_predicted),
    )
    return int((maximum_bipartite_matching(graph, "column") >= 0).sum())


@dataclass(frozen=True)
class Score:
    """One image: counts at each of `THRESHOLDS`."""

    tp: tuple[int, ...]
    fp: tuple[int, ...]
    fn: tuple[int, ...]

    @property
    def both_empty(self) -> bool:
        return self.tp[0] + self.fp[0] + self.fn[0] == 0

    @property
    def ap(self) -> tuple[float, ...]:
        """TP / (TP + FP + FN); 1 where there is nothing to find and nothing was found."""
        if self.both_empty:
            return (1.0,) * len(self.tp)
        return tuple(
            tp / (tp + fp + fn) for tp, fp, fn in zip(self.tp, self.fp, self.fn, strict=True)
        )


def score(true: np.ndarray, predicted: np.ndarray) -> Score:
    """Compares two label masks [H, W].

    Raises:
        ValueError: labels that are none, or masks of different shapes.

    Exactness: counts equal `cellpose.metrics.average_precision` (4.2). Without any background
    pixel that function misses an object (it takes the lowest label for background); this does not.
    """
    pairs = overlaps(true, predicted)
    tp = tuple(true_positives(pairs, threshold) for threshold in THRESHOLDS)
    return Score(
        tp,
        tuple(pairs.n_predicted - count for count in tp),
        tuple(pairs.n_true - count for count in tp),
    )


def summarize(scores: Sequence[Score]) -> dict[str, float | int]:
    """What a group of images gives.

    Returns:
        ap50, ap75, ap90: mean over images of AP at that IoU. tp, fp, fn: objects of all images at
        IoU 0.5. precision, recall, f1: of those sums, with 1e-8 in each denominator, as the study
        has it. n_images; n_both_empty: images without objects on either side (their AP is 1).

    Raises:
        ValueError: no scores.
    """
    if not scores:
        raise ValueError("scores must not be empty")
    ap = np.mean([score.ap for score in scores], axis=0)
    tp, fp, fn = (sum(getattr(score, name)[0] for score in scores) for name in ("tp", "fp", "fn"))
    precision = tp / (tp + fp + _EPSILON)
    recall = tp / (tp + fn + _EPSILON)
    return {
        **{f"ap{100 * t:.0f}": float(value) for t, value in zip(THRESHOLDS, ap, strict=True)},
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall + _EPSILON),
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "n_images": len(scores),
        "n_both_empty": sum(score.both_empty for score in scores),
    }


def summarize_groups(
    stems: Sequence[str], markers: Sequence[str], scores: Sequence[Score]
) -> dict[str, object]:
    """The content of a ``metrics.json``.

    Returns:
        ``overall`` and every marker: see `summarize`. ``per_image``: marker, and tp, fp, fn and ap
        at each of ``thresholds``, by stem. ``both_empty``: stems that count as perfect because
        neither mask has objects.
    """
    groups = {"overall": list(scores)}
    for marker in sorted(set(markers)):
        groups[marker] = [s for s, m in zip(scores, markers, strict=True) if m == marker]
    per_image = {
        stem: {"marker": marker, "tp": s.tp, "fp": s.fp, "fn": s.fn, "ap": s.ap}
        for stem, marker, s in zip(stems, markers, scores, strict=True)
    }
    return {
        **{name: summarize(members) for name, members in groups.items()},
        "thresholds": THRESHOLDS,
        "both_empty": [stem for stem, s in zip(stems, scores, strict=True) if s.both_empty],
        "per_image": per_image,
    }
