"""Tests of donors: correlation, stability, sensitivity and two models against each other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .. import stats
from ..stats.correlation import correlation_of_ranks, doubled_ranks
from .clinical import Clinical, TileCounts

METRICS = ("ratio", "pos_density_mpx", "total_density_mpx")
PER_MPX = 1e6
SEED, DRAWS, SENSITIVITY_DRAWS = 2024, 200, 100


@dataclass(frozen=True)
class Settings:
    """How donors are tested; the defaults are the study's.

    Attributes:
        metrics: of `METRICS`.
        draws, sensitivity_draws: tile bootstrap draws of the tests, and of the percentiles'.
        fraction: of a donor's tiles, drawn with replacement.
        seed, generator: of `stats.resample_tiles`; every test is seeded anew.
        alpha: of the false discovery rate.
        family: columns of `e5_spearman.tsv` whose values make a family for `fdr_family`.
        interval_draws, confidence: of the confidence intervals, by bootstrap over donors.
        swaps: of the paired tests, at most.
    """

    metrics: tuple[str, ...] = METRICS
    draws: int = DRAWS
    sensitivity_draws: int = SENSITIVITY_DRAWS
    fraction: float = 0.8
    seed: int = SEED
    generator: str = "python-choice"
    alpha: float = 0.05
    family: tuple[str, ...] = ("model", "metric")
    interval_draws: int = 2000
    confidence: float = 0.95
    swaps: int = 9999

    def __post_init__(self) -> None:
        for name, values, known in (
            ("metrics", self.metrics, METRICS),
            ("family", self.family, ("model", "marker", "metric", "outcome")),
        ):
            unknown = [value for value in values if value not in known]
            if unknown or not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must be some of {', '.join(known)}; got {list(values)}")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must be in 0..1; got {self.alpha}")


@dataclass(frozen=True)
class Group:
    """The tiles of one model and marker whose donors have a clinical row.

    Attributes:
        donors: D of them, in order of their first tile: that of the study's random draws.
        donor: int64 [T], which of `donors` a tile is of.
        outcomes: float64 [D, Q].
    """

    tiles: TileCounts
    donors: tuple[str, ...]
    donor: np.ndarray
    outcomes: np.ndarray

    def parts(self, metrics: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Numerators and denominators [T, M], and the scales [M]."""
        columns = {
            "ratio": (self.tiles.positive, self.tiles.total, 1.0),
            "pos_density_mpx": (self.tiles.positive, self.tiles.area, PER_MPX),
            "total_density_mpx": (self.tiles.total, self.tiles.area, PER_MPX),
        }
        above, below, scale = zip(*(columns[metric] for metric in metrics), strict=True)
        return np.stack(above, axis=1), np.stack(below, axis=1), np.array(scale)

    def values(self, metrics: Sequence[str]) -> np.ndarray:
        """Of each donor, [D, M]; NaN where the denominator is 0."""
        above, below, scale = self.parts(metrics)
        sums = stats.donor_sums(self.donor, np.concatenate([above, below], 1), len(self.donors))
        above, below = sums[:, : len(metrics)] * scale, sums[:, len(metrics) :]
        return np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0)


def correlate_metrics(
    key: dict, group: Group, clinical: Clinical, settings: Settings
) -> tuple[list[dict], list[dict]]:
    if not group.donors:
        return _untested(key, [{"metric": metric} for metric in settings.metrics], clinical)
    above, below, scale = group.parts(settings.metrics)
    found = _resampled(group, above, below, scale, settings.draws, settings)
    names = [{"metric": metric} for metric in settings.metrics]
    values = group.values(settings.metrics)
    return _rows(key, names, found, group, values, clinical, settings, intervals=True)


def correlate_percentiles(
    key: dict, group: Group, clinical: Clinical, settings: Settings
) -> tuple[list[dict], list[dict]]:
    percentiles = sorted(group.tiles.by_percentile)
    names = [{"q": f"{percentile:g}"} for percentile in percentiles]
    if not group.donors:
        return _untested(key, names, clinical)
    above = np.stack([group.tiles.by_percentile[q] for q in percentiles], axis=1)
    below = np.broadcast_to(group.tiles.total[:, None], above.shape)
    found = _resampled(group, above, below, 1.0, settings.sensitivity_draws, settings)
    values = np.repeat(group.values(["ratio"]), len(names), axis=1)
    return _rows(key, names, found, group, values, clinical, settings, intervals=False)


def _resampled(group, above, below, scale, draws, settings: Settings) -> stats.SpearmanBootstrap:
    return stats.spearman_bootstrap(
        group.donor,
        above,
        below,
        group.outcomes,
        scale=scale,
        draws=draws,
        fraction=settings.fraction,
        seeds=settings.seed,
        generator=settings.generator,
        confidence=settings.confidence,
    )


def _rows(
    key: dict,
    names: Sequence[dict],
    found: stats.SpearmanBootstrap,
    group: Group,
    values: np.ndarray,
    clinical: Clinical,
    settings: Settings,
    *,
    intervals: bool,
) -> tuple[list[dict], list[dict]]:
    """Rows of tests and of their stability, for each of `names` and every outcome."""
    tests, stability = [], []
    for (i, name), (j, outcome) in itertools.product(
        enumerate(names), enumerate(clinical.outcomes)
    ):
        which = {**key, **name, "outcome": outcome}
        without_outcome = np.isnan(group.outcomes[:, j])
        without_metric = np.isnan(values[:, i]) & ~without_outcome
        tests.append(
            {
                **which,
                "n": int(found.n[i, j]),
                "rho": _number(found.observed[i, j]),
                "pval": _number(found.p[i, j]),
                "fdr": "",
                "pass_fdr": 0,
                "fdr_family": "",
                **(_interval(values[:, i], group.outcomes[:, j], settings) if intervals else {}),
                "n_tiles": len(group.tiles),
                "n_without_outcome": int(without_outcome.sum()),
                "n_without_metric": int(without_metric.sum()),
                "reason": _plain_reason(str(found.reason[i, j]), outcome),
            }
        )
        stability.append(
            {
                **which,
                "var_rho": _number(found.variance[i, j]),
                "sign_consistency": _number(found.sign_consistency[i, j]),
                "p_pass": _number(found.significant[i, j]),
                "mean_rho": _number(found.mean[i, j]),
                "rho_q_low": _number(found.low[i, j]),
                "rho_q_high": _number(found.high[i, j]),
                "n_draws": int(found.valid[i, j]),
            }
        )
    return tests, stability


def _untested(key: dict, names: Sequence[dict], clinical: Clinical) -> tuple[list, list]:
    """A model that has no tiles of a marker, or none of a clinical donor, still has its rows."""
    every = itertools.product(names, clinical.outcomes)
    which = [{**key, **name, "outcome": outcome} for name, outcome in every]
    absent = dict.fromkeys(("rho", "pval", "fdr", "fdr_family"), "")
    tests = [
        {**row, "n": 0, **absent, "pass_fdr": 0, "n_tiles": 0, "reason": "no donors"}
        for row in which
    ]
    return tests, [{**row, "n_draws": 0} for row in which]


def _interval(values: np.ndarray, outcome: np.ndarray, settings: Settings) -> dict:
    pairs = np.stack([values, outcome], axis=1)
    pairs = pairs[~np.isnan(pairs).any(axis=1)]
    if len(pairs) < 3:
        return {"rho_low": "", "rho_high": ""}
    found = stats.confidence_interval(
        pairs,
        stats.rank_correlation,
        draws=settings.interval_draws,
        seed=settings.seed,
        confidence=settings.confidence,
    )
    return {"rho_low": _number(found.low), "rho_high": _number(found.high)}


def adjust(rows: list[dict], settings: Settings) -> None:
    """False discovery rates, over all rows that have a p and within their families."""
    p = np.array([np.nan if row["pval"] == "" else row["pval"] for row in rows])
    family = ["q" if name == "metric" and rows and "q" in rows[0] else name
              for name in settings.family]  # fmt: skip
    label = np.array([" / ".join(str(row[name]) for name in family) for row in rows])
    for row, q, within in zip(rows, stats.fdr_bh(p), stats.fdr_bh(p, label), strict=True):
        row["fdr"], row["fdr_family"] = _number(q), _number(within)
        row["pass_fdr"] = int(q < settings.alpha)


def compare_models(
    marker: str,
    first: Group,
    second: Group,
    clinical: Clinical,
    compare: tuple[str, str],
    settings: Settings,
) -> list[dict]:
    """Whether two models' metrics follow an outcome differently, on the donors of both."""
    both = [donor for donor in first.donors if donor in set(second.donors)]
    places = [[group.donors.index(donor) for donor in both] for group in (first, second)]
    values = [
        group.values(settings.metrics)[place] if both else np.empty((0, len(settings.metrics)))
        for group, place in zip((first, second), places, strict=True)
    ]
    outcomes = first.outcomes[places[0]]
    rows = []
    for (i, metric), (j, outcome) in itertools.product(
        enumerate(settings.metrics), enumerate(clinical.outcomes)
    ):
        columns = np.stack([values[0][:, i], values[1][:, i], outcomes[:, j]])
        columns = columns[:, ~np.isnan(columns).any(axis=0)]
        found = stats.spearman(columns[:2].T, columns[2])
        reason = next((str(text) for text in found.reason if text), "")
        row = {
            "marker": marker,
            "metric": metric,
            "outcome": outcome,
            "n": columns.shape[1],
            f"rho_{compare[0]}": _number(found.rho[0]),
            f"rho_{compare[1]}": _number(found.rho[1]),
            "difference": _number(found.rho[1] - found.rho[0]),
            "p_paired": "",
            "swaps": 0,
            "exact": "",
            "reason": _plain_reason(reason, outcome),
        }
        if not reason:
            row.update(_paired(columns, settings))
        rows.append(row)
    return rows


def _paired(columns: np.ndarray, settings: Settings) -> dict:
    # Ranks, not values: the models may differ in scale, which is no difference of correlation.
    ranks = doubled_ranks(columns)

    def rho(samples: np.ndarray) -> np.ndarray:
        return correlation_of_ranks(doubled_ranks(samples[..., 0]), ranks[2])

    try:
        test = stats.paired_test(
            ranks[1][:, None], ranks[0][:, None], rho, draws=settings.swaps, seed=settings.seed
        )
    except ValueError as error:  # of few donors with many ties: some swaps are constant
        return {"reason": str(error)}
    return {"p_paired": test.p, "swaps": test.swaps, "exact": int(test.exact)}


def _plain_reason(reason: str, outcome: str) -> str:
    names = {
        stats.correlation.CONSTANT_X: "the metric is constant",
        stats.correlation.CONSTANT_Y: f"{outcome} is constant",
        stats.correlation.FEW: "fewer than 3 donors",
    }
    return names.get(reason, reason)


def _number(value: float) -> float | str:
    """NaN is an empty field."""
    return "" if np.isnan(value) else float(value)
