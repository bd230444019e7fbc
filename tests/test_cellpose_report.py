"""The study's page, and the confidence intervals of its metrics."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cellpose", reason="cellpose is not installed")
scipy_stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from fastembed import cli  # noqa: E402 (needs SciPy)
from fastembed.cellpose import clinical, donors, intervals, report  # noqa: E402

MARKERS = ("gfap", "iba1", "neun", "olig2")
OUTCOMES = ("braaksc", "ceradsc", "cogdx", "gpath")


def metrics_of(level: float, seed: int = 1, markers=MARKERS, donor_count: int = 6) -> dict:
    """The content of a metrics.json: 6 donors, an image per donor and marker."""
    rng = np.random.default_rng(seed)
    images = {}
    for marker, donor in itertools.product(markers, range(donor_count)):
        total = int(rng.integers(20, 60))
        tp = int(rng.binomial(total, np.clip(level + rng.normal(0, 0.08), 0.02, 0.98)))
        fp = int(rng.binomial(total, 1 - level))
        images[f"{marker}_2010{donor:04d}_tile"] = {
            "marker": marker, "tp": [tp, 0, 0], "fp": [fp, 0, 0], "fn": [total - tp, 0, 0],
            "ap": [tp / (total + fp), 0.0, 0.0],
        }  # fmt: skip
    groups = {"overall": list(images.values())}
    for marker in markers:
        groups[marker] = [image for image in images.values() if image["marker"] == marker]
    summaries = {}
    for name, of in groups.items():
        tp, fp, fn = (sum(image[key][0] for image in of) for key in ("tp", "fp", "fn"))
        summaries[name] = {
            "ap50": float(np.mean([image["ap"][0] for image in of])),
            "precision": tp / (tp + fp), "recall": tp / (tp + fn),
            "f1": 2 * tp / (2 * tp + fp + fn), "n_images": len(of),
        }  # fmt: skip
    return {**summaries, "per_image": images}


def write_tsv(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_donor_tables(folder: Path, donor_count: int, tiles: int) -> None:
    """e5 files of two models, the second of which follows the outcomes more closely."""
    rng = np.random.default_rng(7)
    ids = np.array([f"20{i:06d}" for i in range(donor_count)])
    severity = rng.normal(size=donor_count)
    models = {}
    for model, noise in (("baseline", 1.2), ("finetuned", 0.4)):
        donor = np.repeat(np.tile(ids, len(MARKERS)), tiles)
        marker = np.repeat(MARKERS, donor_count * tiles)
        slope = np.repeat([0.5, 0.3, -0.6, 0.0], donor_count * tiles)
        z = slope * np.repeat(np.tile(severity, len(MARKERS)), tiles)
        total = rng.integers(20, 90, len(donor))
        share = 1 / (1 + np.exp(-(z + rng.normal(0, noise, len(donor)))))
        by = {
            q: rng.binomial(total, share * (1.4 - q / 100)) for q in (60.0, 70.0, 75.0, 80.0, 90.0)
        }
        models[model] = clinical.TileCounts(
            donor, marker, total, np.full(len(donor), 1 << 20), by[75.0], by
        )
    weights = {"braaksc": 1.0, "ceradsc": 0.7, "cogdx": 0.3, "gpath": 0.8}
    values = np.stack([w * severity + rng.normal(size=donor_count) for w in weights.values()], 1)
    table = clinical.Clinical(tuple(ids), tuple(weights), values.round(1))
    quick = donors.Settings(draws=20, sensitivity_draws=10, interval_draws=100, swaps=99)
    donors.analyse(models, table, quick).save(folder)


def make_study(folder: Path, donor_count: int = 14, tiles: int = 4) -> Path:
    rng = np.random.default_rng(0)
    levels = {"cpsam": 0.35, "generic_cpsam": 0.84, "gfap_cpsam": 0.6, "marker_only_cpsam": 0.75}
    for i, (name, level) in enumerate(levels.items()):
        write_json(folder / "predictions" / name / "test" / "metrics.json", metrics_of(level))
        write_json(
            folder / "predictions" / f"{name}_thsel" / "test" / "metrics.json", metrics_of(level)
        )
        grid = [
            {"model_alias": name, "flow_threshold": flow, "cellprob_threshold": cell,
             "f1": round(level - (flow - 0.4) ** 2 - 0.03 * (cell + 1) + 0.01 * i, 4)}
            for flow in (0.2, 0.4, 0.6) for cell in (-1.0, -0.5, 0.0, 0.5, 1.0)
        ]  # fmt: skip
        write_tsv(folder / "reports" / f"e1_threshold_sweep_{name}_val.tsv", grid)
    write_tsv(
        folder / "reports" / "e1_threshold_selected_test.tsv",
        [{"model_alias": name, "flow_threshold": 0.4, "cellprob_threshold": -1.0,
          "val_f1": level, "test_f1": level + 0.01, "metrics_json": "x"}
         for name, level in levels.items()],
    )  # fmt: skip
    write_tsv(
        folder / "logs" / "budget_curve" / "records.tsv",
        [{"budget": b, "repeat": r, "train_n": min(4 * b, 72),
          **{f"overall_{m}": round(0.75 - 0.7 / b + rng.normal(0, 0.03), 4)
             for m in ("ap50", "precision", "recall", "f1")}}
         for b in (2, 5, 10, 20, 30) for r in range(5)],
    )  # fmt: skip
    gates = list(itertools.product((0.0, 0.02, 0.05), (1.0, 0.98, 0.95), (50, 60, 80)))
    write_tsv(
        folder / "reports" / "e3_gating_val_grid_generic_cpsam.tsv",
        [{"model": "generic_cpsam", "split": "val", "q_low": low, "q_high": high, "min_area": area,
          "gated_f1": round(0.837 - low - (1 - high) - area / 4000, 4)}
         for low, high, area in gates],
    )  # fmt: skip
    write_tsv(
        folder / "reports" / "e3_gating_test_final_generic_cpsam.tsv",
        [{"model": "generic_cpsam", "selected_by": "gated_f1", "q_low": 0.0, "q_high": 1.0,
          "min_area": 50, "val_gated_f1": 0.8245, "test_tsv": "x"}],
    )  # fmt: skip
    write_tsv(
        folder / "reports" / "e3_gating_generic_cpsam_test_q0_100_a50.tsv",
        [{"group": "overall", "raw_f1": 0.837, "gated_f1": 0.8376, "delta_f1": 0.0006}],
    )
    write_tsv(
        folder / "reports" / "microsam" / "e4_microsam_proxy_sweep_n10_seed2024.tsv",
        [{"method": "cpsam_proxy", "pps": pps, "flow_threshold": flow, "group": group,
          "ap50": 0.6 - flow / 4, "precision": 0.8 - flow / 3, "recall": 0.7 + flow / 5,
          "f1": 0.75 - flow / 9}
         for pps, flow in ((16, 0.6), (32, 0.4), (64, 0.2)) for group in ("overall", *MARKERS)],
    )  # fmt: skip
    for marker, level in zip(MARKERS, (0.53, 0.72, 0.25, 0.77), strict=True):
        held = metrics_of(level, markers=(marker,))
        name = f"lomo_excl_{marker}"
        write_json(folder / "predictions" / name / "test_heldout" / "metrics.json", held)
        write_tsv(
            folder / "reports" / f"e6_lomo_{marker}.tsv",
            [{"model_name": name, "heldout_marker": marker, **held["overall"]}],
        )  # fmt: skip
    write_json(
        folder / "prepare.json",
        {"masks": 120, "by_marker": {m: {"train": 18, "val": 6, "test": 6} for m in MARKERS},
         "objects": {"train": 3000, "val": 900, "test": 1000}},
    )  # fmt: skip
    write_json(
        folder / "reports" / "e5_coverage_audit.json",
        {"n_paired_tiles": 14758, "donors_not_in_clinical": ["11319359", "11345321"],
         "marker_tile_counts": {"gfap": 2947}},
    )  # fmt: skip
    make_donor_tables(folder / "downstream", donor_count, tiles)
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("study"))


class Page(HTMLParser):
    """Tags that are open, cells of tables, and everything that points elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.rows, self.sources, self.sections = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "section":
            self.sections.append(attributes["id"])
        if tag == "tr":
            self.rows.append([])
        self.sources += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def test_the_page_holds_everything_and_needs_nothing(study, tmp_path, capsys):
    assert cli.main(["cellpose", "report", "--output-dir", str(study), "--to", str(tmp_path)]) == 0
    out = capsys.readouterr()
    assert out.err == "" and out.out.count("complete") == 8
    page = Page((tmp_path / "index.html").read_text())
    assert page.open == []
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.sources)
    figures = sorted(path.stem for path in (tmp_path / "figures").glob("*.png"))
    assert figures == sorted(path.stem for path in (tmp_path / "figures").glob("*.pdf"))
    assert len(figures) == sum(source.startswith("data:") for source in page.sources) == 13
    for source in page.sources:
        if source.startswith("#"):
            assert source[1:] in page.sections
    # A number of a file is the number of the page and of the table.
    f1 = json.loads((study / "predictions/generic_cpsam/test/metrics.json").read_text())
    rows = [row for row in page.rows if row[:2] == ["generic_cpsam", "overall"]]
    assert any(f"{f1['overall']['f1']:.4f}" in row for row in rows)
    with (tmp_path / "tables" / "e1_models.tsv").open(newline="") as stream:
        table = {(r["model"], r["group"]): r for r in csv.DictReader(stream, delimiter="\t")}
    for (model, group), row in table.items():
        expected = json.loads((study / f"predictions/{model}/test/metrics.json").read_text())
        assert float(row["ap50"]) == expected[group]["ap50"]
        assert float(row["f1_low"]) <= float(row["f1"]) <= float(row["f1_high"])


def test_the_same_study_gives_the_same_bytes(study, tmp_path):
    """Of the sections that are quick to draw."""
    small = tmp_path / "study"
    shutil.copytree(study / "logs", small / "logs")
    shutil.copytree(study / "reports" / "microsam", small / "reports" / "microsam")
    for name in ("a", "b"):
        report.report(small, tmp_path / name)
    files = [path for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) == 2 * 2 + 2 + 1
    for path in files:
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_what_is_missing_is_named(tmp_path, capsys):
    write_json(tmp_path / "predictions/generic_cpsam/test/metrics.json", metrics_of(0.8))
    assert cli.main(["cellpose", "report", "--output-dir", str(tmp_path)]) == 0
    out = capsys.readouterr()
    assert re.search(r"E1 Segmentation +in part", out.out)
    assert len(re.findall(r" missing$", out.out, re.MULTILINE)) == 7
    for name in (
        "prepare.json", "e1_threshold_sweep_*_val.tsv", "records.tsv", "e3_gating_val",
        "e4_microsam", "e5_spearman.tsv", "e6_lomo_*.tsv", "predictions/cpsam",
    ):  # fmt: skip
        assert name in out.err
    text = (tmp_path / "report" / "index.html").read_text()
    assert "Missing: reports/e6_lomo_*.tsv (fastembed cellpose lomo makes it)" in text


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path):
    write_json(tmp_path / "predictions/cpsam/test/metrics.json", metrics_of(0.8))
    (tmp_path / "logs/x").mkdir(parents=True)
    (tmp_path / "logs/x/records.tsv").write_text("budget\trepeat\n2\t0\n")
    path = tmp_path / "predictions/other/test/metrics.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"overall": ')
    sections = {section.name: section for section in report.report(tmp_path)}
    assert "predictions/other/test/metrics.json is damaged" in " ".join(sections["e1"].missing)
    assert "overall_ap50" in " ".join(sections["e2"].missing)
    with pytest.raises(NotADirectoryError, match=r"study: .*nowhere is not a folder"):
        report.report(tmp_path / "nowhere")


def test_names_are_escaped(tmp_path):
    write_json(tmp_path / "predictions/<b>&x/test/metrics.json", metrics_of(0.8))
    report.report(tmp_path)
    text = (tmp_path / "report" / "index.html").read_text()
    assert "&lt;b&gt;&amp;x" in text and "<b>" not in text


def rows_of(metrics: dict, group: str) -> np.ndarray:
    """[D, 5] of each donor: AP50, images, TP, FP, FN."""
    rows: dict[str, np.ndarray] = {}
    for stem, image in metrics["per_image"].items():
        if group in ("overall", image["marker"]):
            donor = stem.split("_")[1]
            row = [image["ap"][0], 1, *(image[key][0] for key in ("tp", "fp", "fn"))]
            rows[donor] = rows.get(donor, 0) + np.array(row, dtype=float)
    return np.stack(list(rows.values()))


ORACLES = {
    "ap50": lambda ap, n, tp, fp, fn: ap.sum(-1) / n.sum(-1),
    "precision": lambda ap, n, tp, fp, fn: tp.sum(-1) / (tp.sum(-1) + fp.sum(-1)),
    "recall": lambda ap, n, tp, fp, fn: tp.sum(-1) / (tp.sum(-1) + fn.sum(-1)),
    "f1": lambda ap, n, tp, fp, fn: 2 * tp.sum(-1) / (2 * tp + fp + fn).sum(-1),
}


@pytest.mark.parametrize("name", ORACLES)
def test_intervals_are_near_scipys_of_whole_donors(name):
    metrics = metrics_of(0.6, donor_count=14)
    found = intervals.metric_intervals(metrics, draws=4000)
    for group in ("overall", "neun"):
        rows = rows_of(metrics, group)
        expected = scipy_stats.bootstrap(
            tuple(rows.T), ORACLES[name], paired=True, n_resamples=4000, axis=-1,
            rng=np.random.default_rng(1),
        ).confidence_interval  # fmt: skip
        low, high = found[group][name]
        value = ORACLES[name](*rows.T)
        assert low < value < high
        # Other draws of the same distribution: the ends agree to a few percent of the width.
        width = expected.high - expected.low
        assert abs(low - expected.low) < 0.12 * width
        assert abs(high - expected.high) < 0.12 * width
        assert found[group]["n_donors"] == 14


def test_models_are_compared_by_swapping_donors():
    first, second = metrics_of(0.5, donor_count=5), metrics_of(0.7, seed=2, donor_count=5)
    second["per_image"] = dict(zip(first["per_image"], second["per_image"].values(), strict=True))
    found = {(row["group"], row["metric"]): row for row in intervals.compare_metrics(first, second)}
    assert len(found) == 5 * 4
    a, b = rows_of(first, "overall"), rows_of(second, "overall")
    for name, formula in ORACLES.items():
        differences = []
        for swaps in itertools.product((False, True), repeat=5):
            swapped = np.array(swaps)[:, None]
            differences.append(
                formula(*np.where(swapped, a, b).T) - formula(*np.where(swapped, b, a).T)
            )
        observed = formula(*b.T) - formula(*a.T)
        row = found["overall", name]
        assert row["difference"] == pytest.approx(observed, abs=1e-12)
        assert row["p"] == np.mean(np.abs(differences) >= abs(observed) - 1e-12)
        assert (row["swaps"], row["exact"], row["n_donors"]) == (32, True, 5)


def test_few_donors_and_nothing_found_have_no_interval():
    metrics = metrics_of(0.6, donor_count=2)
    assert intervals.metric_intervals(metrics)["overall"]["f1"] == (None, None)
    empty = metrics_of(0.6, donor_count=5)
    for image in empty["per_image"].values():
        image.update(tp=[0, 0, 0], fp=[0, 0, 0], ap=[0.0, 0.0, 0.0])
    assert intervals.metric_intervals(empty)["overall"]["precision"] == (None, None)
    rows = intervals.compare_metrics(empty, empty)
    assert [row["first"] for row in rows if row["metric"] == "precision"] == [None] * 5
    reasons = {row["metric"]: row["reason"] for row in rows if row["group"] == "overall"}
    assert "nothing was predicted" in reasons["precision"] and reasons["recall"] == ""


def test_bad_metrics_are_refused_by_name():
    with pytest.raises(ValueError, match="metrics must have per_image"):
        intervals.metric_intervals({"overall": {}})
    first, second = metrics_of(0.5), metrics_of(0.5, donor_count=5)
    with pytest.raises(ValueError, match=r"must have the same images; only one has gfap_2010"):
        intervals.compare_metrics(first, second)
    with pytest.raises(ValueError, match=r"image .* has no donor"):
        intervals.metric_intervals(first, donors={})
