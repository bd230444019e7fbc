"""Sections of the report about segmentation: data, E1 to E4, E6."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..intervals import METRICS, compare_metrics, metric_intervals
from ..tables import read_tsv
from .writer import Writer

_NAMES = {"ap50": "AP50", "precision": "precision", "recall": "recall", "f1": "F1"}
_LOMO = "lomo_excl_"


def data(w: Writer) -> None:
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


def models(w: Writer) -> None:
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
                compared.append({"model": name, "against": baseline, **_blank(row)})
    w.table(
        "e1_paired",
        f"Against {baseline}: paired permutation test, donors swapped as a whole. "
        "first is the baseline, second the model.",
        compared,
        ("model", "group", "metric", "n_donors", "first", "second", "difference", "p", "reason"),
    )


def thresholds(w: Writer) -> None:
    selected = w.tsv("reports/e1_threshold_selected_test.tsv", "sweep")
    chosen = {row["model_alias"]: row for row in selected}
    columns = [name for name in next(iter(selected), {}) if name != "metrics_json"]
    w.table("e1_thresholds", "Chosen on val, and what they give on test.", selected, columns)
    grids = {
        path.stem.removeprefix("e1_threshold_sweep_").removesuffix("_val"): read_tsv(path)
        for path in w.find("reports/e1_threshold_sweep_*_val.tsv", "sweep")
    }
    flows, cells = (
        sorted({float(row[key]) for rows in grids.values() for row in rows})
        for key in ("flow_threshold", "cellprob_threshold")
    )

    def place(row: dict) -> tuple[int, int]:
        return (
            flows.index(float(row["flow_threshold"])),
            cells.index(float(row["cellprob_threshold"])),
        )

    if grids:
        w.figure(
            "e1_thresholds",
            "F1 on val at every pair of thresholds; the chosen pair is framed.",
            w.plots.heatmaps(
                {
                    name: _panel((len(flows), len(cells)), place, rows, "f1")
                    for name, rows in grids.items()
                },
                [f"{t:g}" for t in flows], [f"{t:g}" for t in cells],
                title="Validation F1", xlabel="cell probability threshold",
                ylabel="flow threshold",
                marked={name: [place(chosen[name])] for name in grids if name in chosen},
            ),
        )  # fmt: skip


def budget(w: Writer) -> None:
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


def gating(w: Writer) -> None:
    final = {row["model"]: row for row in w.tsv("reports/e3_gating_test_final_*.tsv", "gate")}
    for path in w.find("reports/e3_gating_val_grid_*.tsv", "gate"):
        grid = read_tsv(path)
        name = path.stem.removeprefix("e3_gating_val_grid_")
        quantiles = list(dict.fromkeys((float(r["q_low"]), float(r["q_high"])) for r in grid))
        areas = sorted({float(row["min_area"]) for row in grid})

        def place(row: dict, areas=areas, quantiles=quantiles) -> tuple[int, int]:
            quantile = float(row["q_low"]), float(row["q_high"])
            return areas.index(float(row["min_area"])), quantiles.index(quantile)

        w.figure(
            f"e3_gating_{name}",
            f"{name}: F1 on val after gating; the chosen gate is framed.",
            w.plots.heatmaps(
                {name: _panel((len(areas), len(quantiles)), place, grid, "gated_f1")},
                [f"{area:g} px" for area in areas],
                [f"{low:g} to {high:g}" for low, high in quantiles],
                title="Validation F1 after gating", xlabel="marker quantiles kept",
                ylabel="smallest area",
                marked={name: [place(final[name])]} if name in final else None,
            ),
        )  # fmt: skip
        tests = [
            {"model": name, **row}
            for table in sorted(w.study.glob(f"reports/e3_gating_{name}_test_*.tsv"))
            for row in read_tsv(table)
        ]
        w.table(f"e3_gating_{name}", f"{name} on test, raw and gated.", tests)
    columns = [name for name in next(iter(final.values()), {}) if name != "test_tsv"]
    w.table("e3_gating_chosen", "Chosen gates.", list(final.values()), columns)


def _panel(shape: tuple[int, int], place: Callable, rows: Sequence[dict], value: str) -> np.ndarray:
    panel = np.full(shape, np.nan)
    for row in rows:
        panel[place(row)] = float(row[value])
    return panel


def prompts(w: Writer) -> None:
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


def lomo(w: Writer) -> None:
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


def _metric_rows(w: Writer, name: str, metrics: dict) -> Iterator[dict]:
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
    if not value:
        return "none"
    rest = f" and {len(value) - 10} more" if len(value) > 10 else ""
    return ", ".join(map(str, value[:10])) + rest
