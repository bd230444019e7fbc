"""How sure the metrics of a ``metrics.json`` are: images of a donor are alike, donors are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .. import stats

METRICS = ("ap50", "precision", "recall", "f1")
SEED = 2024


def metric_intervals(
    metrics: Mapping[str, object],
    donors: Mapping[str, str] | None = None,
    *,
    draws: int = 2000,
    seed: int = SEED,
    confidence: float = 0.95,
) -> dict[str, dict[str, object]]:
    """Confidence intervals by bootstrap over donors, BCa, of every group of a ``metrics.json``.

    A donor comes with all of its images: AP50 is the mean over images, precision, recall and F1
    are of pooled counts, as `summarize` has them but without its 1e-8 in the denominators.

    Args:
        metrics: the file's content; its ``per_image`` is what is resampled.
        donors: of each image by its stem; None takes the second word of ``<marker>_<donor>_..``.
        draws, seed, confidence: of `stats.confidence_interval`.

    Returns:
        For overall and each marker: n_donors, and for each of `METRICS` (low, high); (None, None)
        with fewer than 3 donors, or where too few draws give a number.

    Raises:
        ValueError: no ``per_image``, or a stem without donor.
    """
    found = {}
    for group, stems in _groups(metrics).items():
        rows = _donor_rows(metrics, stems, donors)
        found[group] = {"n_donors": len(rows)}
        for name in METRICS:
            interval = (None, None)
            if len(rows) >= 3:
                result = stats.confidence_interval(
                    np.array(list(rows.values())),
                    _STATISTICS[name],
                    draws=draws,
                    seed=seed,
                    confidence=confidence,
                )
                interval = _or_none(result.low), _or_none(result.high)
            found[group][name] = interval
    return found


def compare_metrics(
    first: Mapping[str, object],
    second: Mapping[str, object],
    donors: Mapping[str, str] | None = None,
    *,
    draws: int = 9999,
    seed: int = SEED,
) -> list[dict[str, object]]:
    """Paired permutation test of two models on the same images, donors swapped as a whole.

    Returns:
        A row per group and metric: group, metric, n_donors, first, second, difference
        (second - first), p, swaps, exact, reason (why there is no p); None is not defined.

    Raises:
        ValueError: the images differ; see `metric_intervals`.
    """
    if differing := sorted(set(_images(first)) ^ set(_images(second))):
        raise ValueError(f"both models must have the same images; only one has {differing[0]}")
    found = []
    for group, stems in _groups(first).items():
        of_donor = [_donor_rows(metrics, stems, donors) for metrics in (first, second)]
        a, b = (np.array([rows[donor] for donor in of_donor[0]]) for rows in of_donor)
        for name in METRICS:
            statistic = _STATISTICS[name]
            row = {
                "group": group,
                "metric": name,
                "n_donors": len(a),
                "first": _or_none(statistic(a)),
                "second": _or_none(statistic(b)),
                "difference": _or_none(statistic(b) - statistic(a)),
                "p": None,
                "swaps": 0,
                "exact": False,
                "reason": "",
            }
            if row["difference"] is None:
                row["reason"] = "not defined where nothing was predicted, or nothing is there"
                found.append(row)
                continue
            try:
                test = stats.paired_test(b, a, statistic, draws=draws, seed=seed)
                row.update(p=test.p, swaps=test.swaps, exact=test.exact)
            except ValueError as error:  # not defined in some swap
                row["reason"] = str(error)
            found.append(row)
    return found


def _images(metrics: Mapping[str, object]) -> Mapping[str, dict]:
    images = metrics.get("per_image")
    if not isinstance(images, Mapping) or not images:
        raise ValueError("metrics must have per_image, which fastembed cellpose evaluate writes")
    return images


def _groups(metrics: Mapping[str, object]) -> dict[str, list[str]]:
    """Stems of all images, and of each marker."""
    images = _images(metrics)
    groups = {"overall": list(images)}
    for marker in sorted({image["marker"] for image in images.values()}):
        groups[marker] = [stem for stem, image in images.items() if image["marker"] == marker]
    return groups


def _donor_rows(
    metrics: Mapping[str, object], stems: Sequence[str], donors: Mapping[str, str] | None
) -> dict[str, np.ndarray]:
    """Sums over each donor's images: AP50, images, TP, FP, FN."""
    rows: dict[str, np.ndarray] = {}
    for stem in stems:
        image = _images(metrics)[stem]
        donor = donors.get(stem) if donors is not None else (stem.split("_") + [""])[1]
        if not donor:
            raise ValueError(f"donors: image {stem} has no donor")
        row = [image["ap"][0], 1, image["tp"][0], image["fp"][0], image["fn"][0]]
        rows[donor] = rows.get(donor, np.zeros(5)) + row
    return rows


def _or_none(value: np.ndarray) -> float | None:
    return None if np.isnan(value) else float(value)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below != 0)


def _precision(samples: np.ndarray) -> np.ndarray:
    sums = samples.sum(axis=-2)
    return _ratio(sums[..., 2], sums[..., 2] + sums[..., 3])


def _recall(samples: np.ndarray) -> np.ndarray:
    sums = samples.sum(axis=-2)
    return _ratio(sums[..., 2], sums[..., 2] + sums[..., 4])


_STATISTICS = {
    "ap50": lambda samples: stats.mean_ap(samples[..., :2]),
    "precision": _precision,
    "recall": _recall,
    "f1": lambda samples: stats.pooled_f1(samples[..., 2:]),
}
