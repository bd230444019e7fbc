"""Section of the report about donors: E5."""

from __future__ import annotations

import numpy as np

from .writer import Writer


def donors(w: Writer) -> None:
    for path in w.find("downstream/e5_summary.json", "donors")[:1]:
        summary = w.json(path)
        for name, state in summary.get("models", {}).items():
            dropped = [f"{n}: {why}" for why, n in state["dropped_tiles"].items() if n]
            w.section.notes.append(
                f"{name}: {state['n_tiles_used']} of {state['n_tiles']} tiles of "
                f"{state['n_donors_used']} donors"
                + (f"; left out {', '.join(dropped)}" if dropped else "")
            )
        if summary.get("donors_not_in_clinical"):
            w.section.notes.append(
                "Donors without a clinical row: " + ", ".join(summary["donors_not_in_clinical"])
            )
    tests = w.tsv("downstream/e5_spearman.tsv", "donors")
    if tests:
        for metric in dict.fromkeys(row["metric"] for row in tests):
            w.figure(*_rho_map(w, metric, [row for row in tests if row["metric"] == metric]))
        w.figure(*_strongest(w, tests))
        w.table("e5_spearman", "All tests.", tests)
    stability = w.tsv("downstream/e5_bootstrap_stability.tsv", "donors")
    if stability:
        if (figure := _stability(w, stability)) is not None:
            w.figure(*figure)
        w.table("e5_stability", "Tile bootstrap.", stability)
    compared = w.tsv("downstream/e5_comparison.tsv", "donors, with two models,")
    w.table("e5_comparison", "Two models on the same donors, paired permutation test.", compared)
    sensitivity = w.tsv("downstream/e5_threshold_sensitivity.tsv", "donors, of infer's tables,")
    if sensitivity:
        w.figure(*_sensitivity(w, sensitivity))
        w.table("e5_sensitivity", "The ratio at every percentile.", sensitivity)


def _rho_map(w: Writer, metric: str, rows: list[dict]) -> tuple[str, str, object]:
    models, markers, outcomes = (
        list(dict.fromkeys(row[name] for row in rows)) for name in ("model", "marker", "outcome")
    )
    panels = {name: np.full((len(markers), len(outcomes)), np.nan) for name in models}
    marked: dict[str, list] = {name: [] for name in models}
    for row in rows:
        at = markers.index(row["marker"]), outcomes.index(row["outcome"])
        panels[row["model"]][at] = float(row["rho"] or "nan")
        if row["pass_fdr"] == "1":
            marked[row["model"]].append(at)
    figure = w.plots.heatmaps(
        panels, markers, outcomes, title=f"Spearman's rho of {metric}", diverging=True,
        marked=marked, mark="star",
    )  # fmt: skip
    caption = f"rho of {metric} with each outcome; * and bold: false discovery rate below alpha."
    return f"e5_rho_{metric}", caption, figure


def _strongest(w: Writer, rows: list[dict], count: int = 15) -> tuple[str, str, object]:
    """The tests with the largest rho of any model, each model beside the other."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    found: dict[tuple, dict] = {}
    for row in rows:
        if row["rho"]:
            key = row["marker"], row["metric"], row["outcome"]
            found.setdefault(key, {})[row["model"]] = tuple(
                float(row[name]) if row.get(name) else None
                for name in ("rho", "rho_low", "rho_high")
            )
    largest = sorted(found, key=lambda key: -max(abs(v[0]) for v in found[key].values()))[:count]
    series = {
        model: [found[key].get(model, (np.nan, None, None)) for key in largest] for model in models
    }
    figure = w.plots.forest(
        [" ".join(key) for key in largest], series,
        title=f"The {len(largest)} largest correlations", xlabel="Spearman's rho",
    )  # fmt: skip
    caption = "Chosen by size, so their intervals flatter; the false discovery rate does not."
    return "e5_strongest", caption, figure


def _stability(w: Writer, rows: list[dict]) -> tuple[str, str, object] | None:
    models = list(dict.fromkeys(row["model"] for row in rows))
    if len(models) < 2:
        return None
    found = {
        (row["model"], row["marker"], row["metric"], row["outcome"]): float(row["var_rho"])
        for row in rows
        if row["var_rho"]
    }
    first, second = models[:2]
    points: dict[str, tuple[list, list]] = {}
    for (model, *test), variance in found.items():
        if model == first and (second, *test) in found:
            x, y = points.setdefault(test[0], ([], []))
            x.append(variance**0.5)
            y.append(found[second, *test] ** 0.5)
    if not points:
        return None
    figure = w.plots.pairs(
        points, title="Stability under tile bootstrap",
        xlabel=f"standard deviation of rho, {first}",
        ylabel=f"standard deviation of rho, {second}",
    )  # fmt: skip
    return "e5_stability", f"A point per test; below the line {second} is more stable.", figure


def _sensitivity(w: Writer, rows: list[dict]) -> tuple[str, str, object]:
    series: dict[str, tuple[list, list]] = {}
    for row in rows:
        if row["rho"]:
            name = f"{row['model']} {row['marker']} {row['outcome']}"
            x, y = series.setdefault(name, ([], []))
            x.append(float(row["q"]))
            y.append(float(row["rho"]))
    largest = sorted(series, key=lambda name: -max(map(abs, series[name][1])))[:7]
    figure = w.plots.curves(
        {name: series[name] for name in largest},
        title="Sensitivity to the threshold of positivity",
        xlabel="percentile of the tile's marker",
        ylabel="Spearman's rho of the ratio",
        ylim=(-1, 1),
        zero=True,
    )
    caption = f"The {len(largest)} tests with the largest rho at any percentile."
    return "e5_sensitivity", caption, figure
