"""Tables and figures of a study from what its steps left on disk; what is missing is named.

Nothing is computed twice: a number here is a number of a file of the study, except the
confidence intervals and paired tests of segmentation metrics, which `intervals` makes of the
images' counts in ``metrics.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..npy import write_bytes_atomically
from .intervals import METRICS, compare_metrics, metric_intervals
from .page import Section, Table, render
from .tables import read_tsv, write_tsv

_NAMES = {"ap50": "AP50", "precision": "precision", "recall": "recall", "f1": "F1"}
_LOMO = "lomo_excl_"


def report(study: str | Path, output: str | Path | None = None) -> list[Section]:
    """Writes ``index.html``, ``tables/*.tsv`` and ``figures/*.png`` and ``.pdf``.

    Args:
        study: the folder that all steps share: predictions, reports, logs, checkpoints,
            downstream.
        output: ``<study>/report`` by default.

    Returns:
        The sections, with what each is missing.

    Raises:
        OSError: no such folder; a file cannot be read or written.
        ImportError: matplotlib is not there.
    """
    from ..plots import study as plots

    study = Path(study)
    if not study.is_dir():
        raise NotADirectoryError(f"study: {study} is not a folder")
    output = Path(output) if output is not None else study / "report"
    writer = _Writer(study, output, plots)
    sections = [
        writer.run("e0", "Data", "What was annotated, and how tiles and donors cover.", _data),
        writer.run(
            "e1", "E1 Segmentation", "Does fine-tuning segment better than the baseline?", _models
        ),
        writer.run(
            "e1-thresholds", "E1.5 Thresholds",
            "Which flow and cell probability thresholds suit each model? Chosen on val, applied "
            "to test once.", _thresholds,
        ),
        writer.run(
            "e2", "E2 Label efficiency", "How many annotated images are enough?", _budget
        ),
        writer.run(
            "e3", "E3 Gating",
            "Does dropping objects by intensity and area help? Chosen on val, applied to test "
            "once.", _gating,
        ),
        writer.run(
            "e4", "E4 Prompt density",
            "How sensitive are masks to the density of prompts? A proxy: fewer points stand for "
            "a higher flow threshold.", _prompts,
        ),
        writer.run(
            "e5", "E5 Donors",
            "Do donor ratios and densities follow clinical outcomes, and how stably?", _donors,
        ),
        writer.run(
            "e6", "E6 Leave one marker out",
            "How well does a model segment a marker that it was not trained on?", _lomo,
        ),
    ]  # fmt: skip
    page = render(
        f"Segmentation study: {study.resolve().name}",
        "Whiskers and low/high are 95 % confidence intervals by bootstrap over donors (BCa), "
        "unless a caption says otherwise.",
        sections,
        output / "figures",
    )
    write_bytes_atomically(output / "index.html", page.encode())
    return sections


class _Writer:
    """Where a section reads from and writes to."""

    def __init__(self, study: Path, output: Path, plots) -> None:
        self.study, self.output, self.plots = study, output, plots
        self.section: Section
        for name in ("figures", "tables"):
            (output / name).mkdir(parents=True, exist_ok=True)

    def run(self, name: str, title: str, question: str, build: Callable) -> Section:
        self.section = Section(name, title, question)
        try:
            build(self)
        except (ValueError, KeyError, TypeError) as error:  # of a file that is not what it says
            text = str(error) if isinstance(error, ValueError) else repr(error)
            self.section.missing.append(f"the rest cannot be shown: {text}")
        return self.section

    def find(self, pattern: str, made_by: str) -> list[Path]:
        """Files of the study; where there are none, that they are missing is noted."""
        found = sorted(path for path in self.study.glob(pattern) if path.is_file())
        if not found:
            self.section.missing.append(f"{pattern} (fastembed cellpose {made_by} makes it)")
        return found

    def tsv(self, pattern: str, made_by: str) -> list[dict[str, str]]:
        """Rows of all such files, one after the other."""
        return [row for path in self.find(pattern, made_by) for row in self._rows(path)]

    def _rows(self, path: Path) -> list[dict[str, str]]:
        rows = read_tsv(path)
        if not rows:
            self.section.missing.append(f"{path.relative_to(self.study)} has no rows")
        return rows

    def json(self, path: Path) -> dict:
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path.relative_to(self.study)} is damaged: {error}") from error

    def table(
        self,
        name: str,
        caption: str,
        rows: list[dict],
        columns: Sequence[str] = (),
        shown: list[dict] | None = None,
    ) -> None:
        """A TSV of all columns; the page has `columns` of them, or of `shown` instead."""
        if rows:
            write_tsv(self.output / "tables" / f"{name}.tsv", rows)
            self.section.tables.append(Table(name, caption, shown or rows, tuple(columns)))

    def figure(self, name: str, caption: str, figure) -> None:
        self.plots.save(figure, self.output / "figures" / name)
        self.section.figures.append((name, caption))


def _data(w: _Writer) -> None:
    for path in sorted(w.study.glob("**/prepare.json"))[:1]:
        found = w.json(path)
        rows = [
            {"marker": marker, **counts} for marker, counts in found.get("by_marker", {}).items()
        ]
        w.table("e0_images", "Annotated images by marker and split.", rows)
        w.section.notes.append(
            f"{found['masks']} masks; objects: "
            + ", ".join(f"{name} {count}" for name, count in found["objects"].items())
        )
    if not w.section.tables:
        w.section.missing.append("prepare.json (fastembed cellpose prepare makes it)")
    for path in w.find("reports/e5_coverage_audit.json", "audit --output")[:1]:
        found = w.json(path)
        markers = found.pop("marker_tile_counts", {})
        rows = [{"item": name, "value": _brief(value)} for name, value in found.items()] + [
            {"item": f"tiles of {marker}", "value": count} for marker, count in markers.items()
        ]
        w.table("e0_coverage", "Coverage of tiles and clinical donors.", rows)


def _models(w: _Writer) -> None:
    paths = {
        path.parent.parent.name: path
        for path in w.find("predictions/*/test/metrics.json", "evaluate")
    }
    plain = {name: w.json(path) for name, path in paths.items() if not name.endswith("_thsel")}
    if not plain:
        return
    rows = [row for name, metrics in plain.items() for row in _metric_rows(w, name, metrics)]
    w.table(
        "e1_models", "Test split, overall and by marker.", rows,
        ("model", "group", "n_images", "n_donors", *_NAMES.values()),
        [{**row, **{_NAMES[m]: _with_interval(row, m) for m in METRICS}} for row in rows],
    )  # fmt: skip
    overall = {row["model"]: row for row in rows if row["group"] == "overall"}
    w.figure(
        "e1_models",
        "Test split. AP50: mean over images; precision, recall and F1: of pooled counts.",
        w.plots.bars(
            [_NAMES[metric] for metric in METRICS],
            {name: [row[metric] for metric in METRICS] for name, row in overall.items()},
            {name: [_ends(row, metric) for metric in METRICS] for name, row in overall.items()},
            title="Segmentation of the test split", ylabel="score",
        ),
    )  # fmt: skip
    markers = sorted({row["group"] for row in rows} - {"overall"})
    by_marker = {(row["model"], row["group"]): row for row in rows}
    if len(markers) > 1:
        w.figure(
            "e1_markers",
            "Test split, F1 by marker.",
            w.plots.bars(
                markers,
                {
                    name: [by_marker.get((name, m), {}).get("f1", np.nan) for m in markers]
                    for name in plain
                },
                {
                    name: [_ends(by_marker.get((name, m), {}), "f1") for m in markers]
                    for name in plain
                },
                title="F1 by marker", ylabel="F1",
            ),
        )  # fmt: skip
    baseline = next((name for name in ("baseline", "cpsam") if name in plain), None)
    if baseline is None:
        w.section.missing.append("predictions/cpsam or predictions/baseline, to compare with")
        return
    compared = []
    for name, metrics in plain.items():
        if name != baseline and "per_image" in metrics and "per_image" in plain[baseline]:
            for row in compare_metrics(plain[baseline], metrics):
                row["first"], row["second"] = round(row["first"], 6), round(row["second"], 6)
                compared.append({"model": name, "against": baseline, **_blank(row)})
    w.table(
        "e1_paired",
        f"Against {baseline}: paired permutation test, donors swapped as a whole. "
        "first is the baseline, second the model.",
        compared,
        ("model", "group", "metric", "n_donors", "first", "second", "difference", "p", "reason"),
    )


def _thresholds(w: _Writer) -> None:
    paths = w.find("reports/e1_threshold_sweep_*_val.tsv", "sweep")
    panels, marked, flows, cells = {}, {}, [], []
    grids = {}
    for path in paths:
        name = path.stem.removeprefix("e1_threshold_sweep_").removesuffix("_val")
        grids[name] = read_tsv(path)
        flows += [float(row["flow_threshold"]) for row in grids[name]]
        cells += [float(row["cellprob_threshold"]) for row in grids[name]]
    flows, cells = sorted(set(flows)), sorted(set(cells))
    chosen = {}
    if selected := w.tsv("reports/e1_threshold_selected_test.tsv", "sweep"):
        chosen = {row["model_alias"]: row for row in selected}
        columns = [name for name in selected[0] if name != "metrics_json"]
        w.table("e1_thresholds", "Chosen on val, and what they give on test.", selected, columns)
    for name, rows in grids.items():
        panel = np.full((len(flows), len(cells)), np.nan)
        for row in rows:
            at = (
                flows.index(float(row["flow_threshold"])),
                cells.index(float(row["cellprob_threshold"])),
            )
            panel[at] = float(row["f1"])
        panels[name] = panel
        if name in chosen:
            marked[name] = [
                (
                    flows.index(float(chosen[name]["flow_threshold"])),
                    cells.index(float(chosen[name]["cellprob_threshold"])),
                )
            ]
    if panels:
        w.figure(
            "e1_thresholds",
            "F1 on val at every pair of thresholds; the chosen pair is framed.",
            w.plots.heatmaps(
                panels, [f"{t:g}" for t in flows], [f"{t:g}" for t in cells],
                title="Validation F1", xlabel="cell probability threshold",
                ylabel="flow threshold", marked=marked,
            ),
        )  # fmt: skip


def _budget(w: _Writer) -> None:
    found = {path.parent.name: read_tsv(path) for path in w.find("logs/*/records.tsv", "budget")}
    series, points, summary = {}, {}, []
    for name, rows in found.items():
        for metric in ("ap50", "f1"):
            label = _NAMES[metric] + (f" {name}" if len(found) > 1 else "")
            budgets = sorted({int(row["budget"]) for row in rows})
            of = {
                b: [float(r[f"overall_{metric}"]) for r in rows if int(r["budget"]) == b]
                for b in budgets
            }
            series[label] = (budgets, [np.mean(of[b]) for b in budgets])
            points[label] = (
                [b for b in budgets for _ in of[b]],
                [value for b in budgets for value in of[b]],
            )
        for budget in budgets:
            runs = [row for row in rows if int(row["budget"]) == budget]
            used = sorted({row.get("train_n", "") for row in runs})
            line = {"experiment": name, "budget": budget, "runs": len(runs),
                    "images trained on": " to ".join(used[:: max(len(used) - 1, 1)])}  # fmt: skip
            for metric in METRICS:
                values = [float(row[f"overall_{metric}"]) for row in runs]
                line |= {f"{metric} mean": float(np.mean(values)), f"{metric} min": min(values),
                         f"{metric} max": max(values)}  # fmt: skip
            summary.append(line)
    if series:
        w.figure(
            "e2_budget",
            "Every run a pale point, their mean a line. The budget is images per marker; the "
            "table says how many there really were.",
            w.plots.curves(
                series, points, title="Label efficiency", xlabel="budget (images per marker)",
                ylabel="score", ylim=(0, 1), log=True,
            ),
        )  # fmt: skip
        columns = [name for name in summary[0] if not name.startswith(("precision", "recall"))]
        w.table("e2_budget", "By budget, over its runs.", summary, columns)


def _gating(w: _Writer) -> None:
    paths = w.find("reports/e3_gating_val_grid_*.tsv", "gate")
    final = {row["model"]: row for row in w.tsv("reports/e3_gating_test_final_*.tsv", "gate")}
    panels, marked, rows, columns = {}, {}, [], []
    for path in paths:
        grid = read_tsv(path)
        name = path.stem.removeprefix("e3_gating_val_grid_")
        quantiles = list(dict.fromkeys((float(r["q_low"]), float(r["q_high"])) for r in grid))
        areas = sorted({int(float(r["min_area"])) for r in grid})
        rows, columns = (
            [f"{area} px" for area in areas],
            [f"{low:g} to {high:g}" for low, high in quantiles],
        )
        panel = np.full((len(areas), len(quantiles)), np.nan)
        for row in grid:
            at = (
                areas.index(int(float(row["min_area"]))),
                quantiles.index((float(row["q_low"]), float(row["q_high"]))),
            )
            panel[at] = float(row["gated_f1"])
            if name in final and all(
                float(final[name][key]) == float(row[key])
                for key in ("q_low", "q_high", "min_area")
            ):
                marked[name] = [at]
        w.figure(
            f"e3_gating_{name}",
            f"{name}: F1 on val after gating; the chosen gate is framed.",
            w.plots.heatmaps(
                {name: panel}, rows, columns, title="Validation F1 after gating",
                xlabel="marker quantiles kept", ylabel="smallest area", marked=marked,
            ),
        )  # fmt: skip
        tests = [
            {"model": name, **row}
            for table in sorted(w.study.glob(f"reports/e3_gating_{name}_test_*.tsv"))
            for row in read_tsv(table)
        ]
        w.table(f"e3_gating_{name}", f"{name} on test, raw and gated.", tests)
    w.table(
        "e3_gating_chosen", "Chosen gates.", list(final.values()),
        [name for name in next(iter(final.values()), {}) if name != "test_tsv"],
    )  # fmt: skip


def _prompts(w: _Writer) -> None:
    rows = w.tsv("reports/microsam/e4_microsam_proxy_sweep_*.tsv", "sensitivity")
    overall = [row for row in rows if row["group"] == "overall"]
    if not overall:
        return
    overall.sort(key=lambda row: float(row["pps"]))
    at = [float(row["pps"]) for row in overall]
    w.figure(
        "e4_prompts",
        "Scores against points per side.",
        w.plots.curves(
            {_NAMES[m]: (at, [float(row[m]) for row in overall]) for m in METRICS},
            title="Prompt density (proxy)", xlabel="points per side", ylabel="score",
            ylim=(0, 1), log=True,
        ),
    )  # fmt: skip
    w.table("e4_prompts", "Overall and by marker.", rows)


def _donors(w: _Writer) -> None:
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


def _rho_map(w: _Writer, metric: str, rows: list[dict]) -> tuple[str, str, object]:
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


def _strongest(w: _Writer, rows: list[dict], count: int = 15) -> tuple[str, str, object]:
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


def _stability(w: _Writer, rows: list[dict]) -> tuple[str, str, object] | None:
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


def _sensitivity(w: _Writer, rows: list[dict]) -> tuple[str, str, object]:
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
        title="Sensitivity to the threshold of positivity", xlabel="percentile of the tile's marker",
        ylabel="Spearman's rho of the ratio", ylim=(-1, 1), zero=True,
    )  # fmt: skip
    caption = f"The {len(largest)} tests with the largest rho at any percentile."
    return "e5_sensitivity", caption, figure


def _lomo(w: _Writer) -> None:
    rows = w.tsv("reports/e6_lomo_*.tsv", "lomo")
    if not rows:
        return
    columns = [name for name in rows[0] if name != "metrics_json"]
    w.table("e6_lomo", "Trained without a marker, tested on it alone.", rows, columns)
    markers = [row["heldout_marker"] for row in rows]
    series = {"left out": [float(row["f1"]) for row in rows]}
    intervals = {}
    ends = []
    for marker in markers:
        path = w.study / "predictions" / f"{_LOMO}{marker}" / "test_heldout" / "metrics.json"
        metrics = w.json(path) if path.exists() else {}
        has = "per_image" in metrics
        ends.append(metric_intervals(metrics)["overall"]["f1"] if has else (None, None))
    intervals["left out"] = ends
    generic = w.study / "predictions" / "generic_cpsam" / "test" / "metrics.json"
    if generic.exists():
        metrics = w.json(generic)
        series["generic_cpsam"] = [metrics.get(m, {}).get("f1", np.nan) for m in markers]
        if "per_image" in metrics:
            found = metric_intervals(metrics)
            intervals["generic_cpsam"] = [found.get(m, {}).get("f1", (None, None)) for m in markers]
    else:
        w.section.missing.append("predictions/generic_cpsam/test/metrics.json, to compare with")
    w.figure(
        "e6_lomo",
        "F1 on test images of the marker that training left out.",
        w.plots.bars(markers, series, intervals, title="Leave one marker out", ylabel="F1"),
    )


def _metric_rows(w: _Writer, name: str, metrics: dict) -> Iterator[dict]:
    """Overall and each marker, with intervals where the images are known."""
    intervals = {}
    if "per_image" in metrics:
        intervals = metric_intervals(metrics)
    else:
        w.section.missing.append(f"per_image of {name}: no confidence intervals without it")
    for group, row in metrics.items():
        if not isinstance(row, dict) or "ap50" not in row:
            continue
        found = {"model": name, "group": group, "n_images": row.get("n_images", "")}
        found["n_donors"] = intervals.get(group, {}).get("n_donors", "")
        for metric in METRICS:
            low, high = intervals.get(group, {}).get(metric, (None, None))
            found |= _blank({metric: row[metric], f"{metric}_low": low, f"{metric}_high": high})
        yield found


def _with_interval(row: dict, metric: str) -> str:
    low, high = _ends(row, metric)
    interval = "" if low is None or high is None else f" ({low:.3f}–{high:.3f})"
    return f"{row[metric]:.3f}{interval}"


def _ends(row: dict, metric: str) -> tuple[float | None, float | None]:
    return tuple(
        None if row.get(f"{metric}_{end}", "") == "" else row[f"{metric}_{end}"]
        for end in ("low", "high")
    )


def _blank(row: dict) -> dict:
    """None is an empty field of a table."""
    return {name: "" if value is None else value for name, value in row.items()}


def _brief(value: object) -> object:
    if not isinstance(value, list):
        return value
    rest = f" and {len(value) - 10} more" if len(value) > 10 else ""
    return ", ".join(map(str, value[:10])) + rest
