"""From counts of tiles to donors, and from donors to their clinical outcomes.

A donor's ratio is the sum of its tiles' positive objects over that of their objects, a density
the sum of objects over that of pixels, per 1e6. Donors are the sample of every test; tiles show
how far a result depends on which of them there are.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import stats
from ..stats.correlation import correlation_of_ranks, doubled_ranks
from .clinical import Clinical, TileCounts
from .infer import UNKNOWN
from .tables import write_json, write_tsv

METRICS = ("ratio", "pos_density_mpx", "total_density_mpx")
PER_MPX = 1e6
SEED, DRAWS, SENSITIVITY_DRAWS = 2024, 200, 100

FILES = {
    "donors": "e5_donor_marker_ratio_from_tiles.tsv",
    "spearman": "e5_spearman.tsv",
    "bootstrap": "e5_bootstrap_stability.tsv",
    "comparison": "e5_comparison.tsv",
    "sensitivity": "e5_threshold_sensitivity.tsv",
    "sensitivity_bootstrap": "e5_threshold_sensitivity_bootstrap.tsv",
}
SUMMARY = "e5_summary.json"


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
class Analysis:
    """All tables, a list of rows by the names of `FILES`, and the summary."""

    tables: dict[str, list[dict]]
    summary: dict

    def save(self, folder: str | Path) -> None:
        """Writes them; the summary last. A table without rows is not left from before."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        outputs = {}
        for name, file in FILES.items():
            if self.tables[name]:
                write_tsv(folder / file, self.tables[name])
                outputs[name] = file
            else:
                (folder / file).unlink(missing_ok=True)
        write_json(folder / SUMMARY, {**self.summary, "outputs": outputs})


@dataclass(frozen=True)
class _Group:
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


def analyse(
    models: Mapping[str, TileCounts],
    clinical: Clinical,
    settings: Settings | None = None,
    *,
    markers: Sequence[str] | None = None,
    compare: tuple[str, str] | None = None,
) -> Analysis:
    """Correlates donor ratios and densities with clinical outcomes, model by model.

    ``e5_spearman.tsv``: model, marker, metric, outcome; n, donors that count; rho; pval
    (Student's t); fdr, adjusted over all tests of the table; pass_fdr, 1 where fdr is below
    alpha; fdr_family, adjusted within the family; rho_low, rho_high, BCa interval over donors;
    n_tiles, of donors with a clinical row; n_without_outcome and n_without_metric, donors left
    out because that value is missing or its denominator 0; reason, why there is no rho.

    ``e5_bootstrap_stability.tsv``: var_rho (of the population), sign_consistency, p_pass (share
    of draws with p < 0.05), mean_rho, rho_q_low and rho_q_high (percentiles of the draws),
    n_draws that gave a rho.

    ``e5_comparison.tsv``, of two models on the donors of both: n, rho of each, difference of
    rho, p_paired of swapping the two models' ranks of a donor, swaps, exact (1 where all swaps
    were made), reason.

    ``e5_threshold_sensitivity.tsv`` and ``.._bootstrap.tsv``: the ratio at each percentile q,
    with the columns above.

    Args:
        models: tile counts by the name of the model.
        clinical: of `read_clinical`.
        settings: None is the study's.
        markers: None is all that the tables have; tiles of others are left out and counted.
        compare: (first, second) of `models`: differences are second - first; None compares the
            first two, if there are two.

    Raises:
        ValueError: no models; a marker or model that is not there; no donor with a clinical
            row; settings that the statistics refuse.
    """
    settings = settings or Settings()
    if not models:
        raise ValueError("models must not be empty")
    if compare is None:
        compare = tuple(models)[:2] if len(models) > 1 else None
    elif unknown := [name for name in compare if name not in models]:
        raise ValueError(f"compare must name two of {', '.join(models)}; got {unknown[0]!r}")
    there = sorted(set().union(*(set(counts.marker) for counts in models.values())) - {UNKNOWN})
    if unknown := [marker for marker in markers or () if marker not in there]:
        raise ValueError(f"no tiles of marker {', '.join(unknown)}; found {', '.join(there)}")
    markers = list(markers or there)
    groups = {
        (model, marker): _group(counts, marker, clinical)
        for model, counts in models.items()
        for marker in markers
    }
    if not any(group.donors for group in groups.values()):
        raise ValueError(
            "no donor of the tiles has a row in the clinical table: "
            f"tiles have {sorted(set().union(*(set(c.donor) for c in models.values())))[:3]}, "
            f"the table {list(clinical.donors[:3])}"
        )

    tables: dict[str, list[dict]] = {name: [] for name in FILES}
    for (model, marker), group in groups.items():
        key = {"model": model, "marker": marker}
        tables["donors"] += _donor_rows(key, models[model], marker, clinical)
        tests, stability = _tests(key, group, clinical, settings)
        tables["spearman"] += tests
        tables["bootstrap"] += stability
        if len(group.tiles.by_percentile) > 1:
            tests, stability = _sensitivity(key, group, clinical, settings)
            tables["sensitivity"] += tests
            tables["sensitivity_bootstrap"] += stability
    for name in ("spearman", "sensitivity"):
        _adjust(tables[name], settings)
    if compare:
        for marker in markers:
            pair = groups[compare[0], marker], groups[compare[1], marker]
            tables["comparison"] += _compare(marker, *pair, clinical, compare, settings)
    summary = _summary(models, clinical, markers, settings, compare, tables)
    return Analysis(tables, summary)


def _group(counts: TileCounts, marker: str, clinical: Clinical) -> _Group:
    row_of = {donor: row for row, donor in enumerate(clinical.donors)}
    kept = np.array(
        [
            m == marker and d in row_of
            for m, d in zip(counts.marker, counts.donor, strict=True)
        ],
        dtype=bool,
    )  # fmt: skip
    tiles = counts.of(kept)
    donors = tuple(dict.fromkeys(tiles.donor.tolist()))
    number = {donor: i for i, donor in enumerate(donors)}
    return _Group(
        tiles,
        donors,
        np.array([number[donor] for donor in tiles.donor], dtype=np.int64),
        clinical.values[[row_of[donor] for donor in donors]].reshape(-1, len(clinical.outcomes)),
    )


def _donor_rows(key: dict, counts: TileCounts, marker: str, clinical: Clinical) -> list[dict]:
    """All donors of the marker, also those without a clinical row."""
    rows = []
    of_marker = counts.of(counts.marker == marker)
    for donor in sorted(set(of_marker.donor.tolist()) - {UNKNOWN}):
        tiles = of_marker.of(of_marker.donor == donor)
        total, positive, area = (int(c.sum()) for c in (tiles.total, tiles.positive, tiles.area))
        rows.append(
            {
                "model": key["model"],
                "donor": donor,
                "marker": marker,
                "n_tiles": len(tiles),
                "n_total_cells": total,
                "n_marker_positive": positive,
                "area_px": area,
                "total_density_mpx": total / area * PER_MPX,
                "pos_density_mpx": positive / area * PER_MPX,
                "ratio": positive / total if total else "",
                "in_clinical": int(donor in clinical.donors),
            }
        )
    return rows


def _tests(
    key: dict, group: _Group, clinical: Clinical, settings: Settings
) -> tuple[list[dict], list[dict]]:
    if not group.donors:
        return _untested(key, [{"metric": metric} for metric in settings.metrics], clinical)
    above, below, scale = group.parts(settings.metrics)
    found = _resampled(group, above, below, scale, settings.draws, settings)
    names = [{"metric": metric} for metric in settings.metrics]
    values = group.values(settings.metrics)
    return _rows(key, names, found, group, values, clinical, settings, intervals=True)


def _sensitivity(
    key: dict, group: _Group, clinical: Clinical, settings: Settings
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
    group: _Group,
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


def _adjust(rows: list[dict], settings: Settings) -> None:
    """False discovery rates, over all rows that have a p and within their families."""
    p = np.array([np.nan if row["pval"] == "" else row["pval"] for row in rows])
    family = ["q" if name == "metric" and rows and "q" in rows[0] else name
              for name in settings.family]  # fmt: skip
    label = np.array([" / ".join(str(row[name]) for name in family) for row in rows])
    for row, q, within in zip(rows, stats.fdr_bh(p), stats.fdr_bh(p, label), strict=True):
        row["fdr"], row["fdr_family"] = _number(q), _number(within)
        row["pass_fdr"] = int(q < settings.alpha)


def _compare(
    marker: str,
    first: _Group,
    second: _Group,
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


def _summary(
    models: Mapping[str, TileCounts],
    clinical: Clinical,
    markers: Sequence[str],
    settings: Settings,
    compare: tuple[str, str] | None,
    tables: dict[str, list[dict]],
) -> dict:
    of_tiles = set().union(*(set(counts.donor.tolist()) for counts in models.values())) - {UNKNOWN}
    of_table = set(clinical.donors)
    lacking = sorted(of_tiles - of_table)
    return {
        "models": {
            name: _dropped(counts, of_table, markers) for name, counts in models.items()
        },
        "markers": list(markers),
        "outcomes": list(clinical.outcomes),
        "outcomes_not_in_clinical": list(clinical.not_in_table),
        "outcomes_missing_values": {
            outcome: int(np.isnan(clinical.values[:, j]).sum())
            for j, outcome in enumerate(clinical.outcomes)
        },
        "metrics": list(settings.metrics),
        "n_donors_in_tiles": len(of_tiles),
        "n_donors_in_clinical": len(of_table),
        "donors_not_in_clinical": lacking,
        # Spreadsheets drop them: the most frequent reason why a donor seems to have no row.
        "donors_in_clinical_but_for_leading_zeros": sorted(
            donor for donor in lacking if donor.lstrip("0") in {d.lstrip("0") for d in of_table}
        ),
        "clinical_donors_missing_tiles": sorted(of_table - of_tiles),
        "n_corr_rows": len(tables["spearman"]),
        "n_boot_rows": len(tables["bootstrap"]),
        "n_tests": sum(row["pval"] != "" for row in tables["spearman"]),
        "tests_without_rho": dict(
            Counter(row["reason"] for row in tables["spearman"] if row["reason"])
        ),
        "n_pass_fdr": {
            name: sum(row["pass_fdr"] for row in tables["spearman"] if row["model"] == name)
            for name in models
        },
        "compared": list(compare or ()),
        "settings": dataclasses.asdict(settings),
        # Under the study's own names.
        "alpha": settings.alpha,
        "n_bootstrap": settings.draws,
    }  # fmt: skip


def _dropped(counts: TileCounts, of_table: set[str], markers: Sequence[str]) -> dict:
    """Where each tile of a model went: every tile is in one of the numbers."""
    unknown_donor = counts.donor == UNKNOWN
    no_marker = ~np.isin(counts.marker, list(markers)) & ~unknown_donor
    rest = ~unknown_donor & ~no_marker
    known = np.array([donor in of_table for donor in counts.donor], dtype=bool)
    used = rest & known
    return {
        "n_tiles": len(counts),
        "n_tiles_used": int(used.sum()),
        "n_donors_used": len(set(counts.donor[used].tolist())),
        "dropped_tiles": {
            "donor unknown": int(unknown_donor.sum()),
            "marker unknown or not asked for": int(no_marker.sum()),
            "donor not in the clinical table": int((rest & ~known).sum()),
        },
        "n_tiles_without_objects": int((counts.total[used] == 0).sum()),
        "n_total_cells": int(counts.total[used].sum()),
        "n_marker_positive": int(counts.positive[used].sum()),
    }


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
