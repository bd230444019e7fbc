"""From counts of tiles to donors, and from donors to their clinical outcomes.

A donor's ratio is the sum of its tiles' positive objects over that of their objects, a density
the sum of objects over that of pixels, per 1e6. Donors are the sample of every test; tiles show
how far a result depends on which of them there are.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .associations import (
    PER_MPX,
    Group,
    Settings,
    adjust,
    compare_models,
    correlate_metrics,
    correlate_percentiles,
)
from .clinical import Clinical, TileCounts
from .tables import write_json, write_tsv
from .tile_store import UNKNOWN

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
        tests, stability = correlate_metrics(key, group, clinical, settings)
        tables["spearman"] += tests
        tables["bootstrap"] += stability
        if len(group.tiles.by_percentile) > 1:
            tests, stability = correlate_percentiles(key, group, clinical, settings)
            tables["sensitivity"] += tests
            tables["sensitivity_bootstrap"] += stability
    for name in ("spearman", "sensitivity"):
        adjust(tables[name], settings)
    if compare:
        for marker in markers:
            pair = groups[compare[0], marker], groups[compare[1], marker]
            tables["comparison"] += compare_models(marker, *pair, clinical, compare, settings)
    summary = _summary(models, clinical, markers, settings, compare, tables)
    return Analysis(tables, summary)


def _group(counts: TileCounts, marker: str, clinical: Clinical) -> Group:
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
    return Group(
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
