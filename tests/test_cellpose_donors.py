"""Donor statistics of the Cellpose study against pandas, SciPy, statsmodels and CPython's RNG."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

pytest.importorskip("cellpose", reason="cellpose is not installed")
pd = pytest.importorskip("pandas", reason="pandas is not installed")
scipy_stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed")
multitest = pytest.importorskip(
    "statsmodels.stats.multitest", reason="statsmodels is not installed"
)

from fastembed import cli  # noqa: E402 (needs SciPy)
from fastembed.cellpose import clinical, donors  # noqa: E402

MARKERS = ("gfap", "neun")
OUTCOMES = ("braaksc", "gpath", "flat", "rare")
QUICK = {"interval_draws": 200, "swaps": 499, "draws": 40, "sensitivity_draws": 20}
PERCENTILES = (60, 75, 90)


@pytest.fixture
def study(tmp_path):
    """Two models' tile counts and a clinical table: 12 donors, two of them on one side only."""
    rng = np.random.default_rng(5)
    ids = [f"{20100500 + 7 * i}" for i in range(12)]
    severity = dict(zip(ids, rng.permutation(12), strict=True))
    for model, noise in (("baseline", 8), ("finetuned", 2)):
        rows = []
        for marker in MARKERS:
            for donor in rng.permutation(ids[:11]):
                for tile in range(rng.integers(2, 7)):
                    total = int(rng.integers(0, 60))
                    share = np.clip((severity[donor] + rng.normal(0, noise)) / 14, 0.02, 0.98)
                    positive = sorted(rng.binomial(total, share, 3).tolist(), reverse=True)
                    rows.append(
                        {
                            "model": model, "tile_key": f"{marker}/{donor}/{tile}",
                            "donor": donor, "marker": marker, "n_total_cells": total,
                            "n_marker_positive": positive[1],
                            "area_px": 4096 if tile % 2 else 8192,
                            **{f"n_marker_positive_q{q}": n
                               for q, n in zip(PERCENTILES, positive, strict=True)},
                        }
                    )  # fmt: skip
        rows.append({**rows[0], "tile_key": "stray", "donor": "unknown"})
        rows.append({**rows[0], "tile_key": "other", "marker": "unknown"})
        pd.DataFrame(rows).to_csv(tmp_path / f"{model}.tsv", sep="\t", index=False)
    table = pd.DataFrame(
        {
            "projid": [f"{donor}.0" for donor in ids if donor != ids[3]],
            "braaksc": [severity[donor] // 2 for donor in ids if donor != ids[3]],
            "gpath": rng.normal(size=11).round(3),
            "flat": 1,
            "rare": [1.5, 2.5] + [None] * 9,
        }
    )
    table.loc[4, "braaksc"] = None
    table.to_csv(tmp_path / "clinical.csv", index=False)
    return tmp_path


def analysis_of(folder, **settings):
    models = {
        name: clinical.read_tile_counts(folder / f"{name}.tsv")
        for name in ("baseline", "finetuned")
    }
    table = clinical.read_clinical(folder / "clinical.csv", OUTCOMES)
    return donors.analyse(models, table, donors.Settings(**QUICK | settings))


def frames(folder):
    """Tiles of both models and the clinical table, by pandas."""
    tiles = pd.concat(
        pd.read_csv(folder / f"{name}.tsv", sep="\t", dtype={"donor": str})
        for name in ("baseline", "finetuned")
    )
    table = pd.read_csv(folder / "clinical.csv")
    table.index = table.projid.astype(float).astype(int).astype(str)
    return tiles, table


FORMULAS = {
    "ratio": ("n_marker_positive", "n_total_cells", 1),
    "pos_density_mpx": ("n_marker_positive", "area_px", 1e6),
    "total_density_mpx": ("n_total_cells", "area_px", 1e6),
}


def test_every_test_is_pandas_and_scipys(study):
    found = pd.DataFrame(analysis_of(study).tables["spearman"])
    assert len(found) == 2 * 2 * 3 * 4
    tiles, table = frames(study)
    for row in found.itertuples():
        of = tiles[(tiles.model == row.model) & (tiles.marker == row.marker)]
        sums = of.groupby("donor")[["n_marker_positive", "n_total_cells", "area_px"]].sum()
        above, below, scale = FORMULAS[row.metric]
        metric = sums[above] / sums[below] * scale
        pairs = pd.concat([metric, table[row.outcome]], axis=1, join="inner").dropna()
        assert row.n == len(pairs)
        if row.outcome == "flat":
            assert (row.rho, row.pval, row.fdr, row.reason) == ("", "", "", "flat is constant")
        elif row.outcome == "rare":
            assert (row.rho, row.reason) == ("", "fewer than 3 donors")
        else:
            rho, p = scipy_stats.spearmanr(*pairs.to_numpy().T)
            assert math.isclose(row.rho, rho, abs_tol=1e-12)
            assert math.isclose(row.pval, p, abs_tol=1e-12)
            assert row.rho_low <= row.rho_high and -1 <= row.rho_low
        assert row.n + row.n_without_outcome == 10  # donors on both sides


@pytest.mark.parametrize("family", [("model", "metric"), ("outcome",)])
def test_fdr_is_statsmodels_over_all_and_by_family(study, family):
    found = pd.DataFrame(analysis_of(study, family=family, interval_draws=20).tables["spearman"])
    tested = found[found.pval != ""].astype({"pval": float})
    np.testing.assert_allclose(
        tested.fdr.astype(float), multitest.multipletests(tested.pval, method="fdr_bh")[1],
        atol=1e-12,
    )  # fmt: skip
    for _, group in tested.groupby(list(family)):
        np.testing.assert_allclose(
            group.fdr_family.astype(float),
            multitest.multipletests(group.pval, method="fdr_bh")[1],
            atol=1e-12,
        )
    assert (tested.pass_fdr == (tested.fdr.astype(float) < 0.05)).all()


def bootstrap_loop(of, outcome, above, below, draws):
    """The study's tile bootstrap, one tile and one draw after the other."""
    rng, rhos, ps = random.Random(2024), [], []
    tiles = dict(list(of.groupby("donor", sort=False)))
    for _ in range(draws):
        pairs = []
        for donor, rows in tiles.items():
            if donor not in outcome.index:
                continue
            picks = [rng.randrange(len(rows)) for _ in range(math.ceil(0.8 * len(rows)))]
            bottom = sum(rows[below].iloc[i] for i in picks)
            if bottom and not math.isnan(outcome[donor]):
                pairs.append((sum(rows[above].iloc[i] for i in picks) / bottom, outcome[donor]))
        rho, p = scipy_stats.spearmanr(*zip(*pairs, strict=True))
        rhos.append(rho)
        ps.append(p)
    return np.array(rhos), np.array(ps)


@pytest.mark.parametrize("metric", FORMULAS)
def test_stability_is_the_studys_loop(study, metric):
    """To the last draw: the study's own generator, seeded anew for every test."""
    found = pd.DataFrame(analysis_of(study).tables["bootstrap"])
    tiles, table = frames(study)
    above, below, _ = FORMULAS[metric]
    for marker in MARKERS:
        of = tiles[(tiles.model == "finetuned") & (tiles.marker == marker)]
        rhos, ps = bootstrap_loop(of, table.braaksc, above, below, QUICK["draws"])
        row = found[
            (found.model == "finetuned") & (found.marker == marker)
            & (found.metric == metric) & (found.outcome == "braaksc")
        ].iloc[0]  # fmt: skip
        assert row.n_draws == len(rhos)
        for name, expected in (
            ("var_rho", rhos.var()),
            ("mean_rho", rhos.mean()),
            ("sign_consistency", max((rhos > 0).mean(), (rhos < 0).mean())),
            ("p_pass", (ps < 0.05).mean()),
            ("rho_q_low", np.quantile(rhos, 0.025)),
        ):
            assert math.isclose(row[name], expected, abs_tol=1e-12), name


def test_sensitivity_is_every_percentiles_ratio(study):
    analysis = analysis_of(study)
    found = pd.DataFrame(analysis.tables["sensitivity"])
    stability = pd.DataFrame(analysis.tables["sensitivity_bootstrap"])
    assert sorted(set(found.q), key=float) == ["60", "75", "90"]
    assert len(found) == len(stability) == 2 * 2 * 3 * 4
    tiles, table = frames(study)
    of = tiles[(tiles.model == "baseline") & (tiles.marker == "neun")]
    sums = of.groupby("donor").sum(numeric_only=True)
    for q in PERCENTILES:
        metric = (sums[f"n_marker_positive_q{q}"] / sums.n_total_cells).rename("metric")
        pairs = pd.concat([metric, table.gpath], axis=1, join="inner").dropna()
        row = found.query(f"model == 'baseline' and marker == 'neun' and q == '{q}'").set_index(
            "outcome"
        )
        rho = scipy_stats.spearmanr(*pairs.to_numpy().T).statistic
        assert math.isclose(row.rho["gpath"], rho, abs_tol=1e-12)
        rhos, _ = bootstrap_loop(of, table.gpath, f"n_marker_positive_q{q}", "n_total_cells", 20)
        variance = stability.query(
            f"model == 'baseline' and marker == 'neun' and q == '{q}' and outcome == 'gpath'"
        ).var_rho.iloc[0]
        assert math.isclose(variance, rhos.var(), abs_tol=1e-12)
    main = pd.DataFrame(analysis.tables["spearman"]).query("metric == 'ratio'")
    at_75 = found[found.q == "75"]
    assert main.rho.tolist() == at_75.rho.tolist()


def test_models_are_compared_on_ranks_of_common_donors(study):
    """Against SciPy's permutation test of ranks, all 2^D ways."""
    few = pd.read_csv(study / "baseline.tsv", sep="\t", dtype={"donor": str})
    kept = sorted(set(few.donor) - {"unknown"})[:8]
    few[few.donor.isin(kept)].to_csv(study / "baseline.tsv", sep="\t", index=False)
    analysis = analysis_of(study)
    found = pd.DataFrame(analysis.tables["comparison"])
    tiles, table = frames(study)
    for row in found[(found.outcome == "braaksc") & (found.metric == "ratio")].itertuples():
        of = tiles[tiles.marker == row.marker]
        sums = of.groupby(["model", "donor"])[["n_marker_positive", "n_total_cells"]].sum()
        ratio = (sums.n_marker_positive / sums.n_total_cells).unstack("model")
        pairs = ratio.join(table.braaksc, how="inner").dropna()
        ranks = {name: scipy_stats.rankdata(pairs[name]) for name in ("baseline", "finetuned")}

        def difference(a, b, outcome=pairs.braaksc):
            return (
                scipy_stats.spearmanr(a, outcome).statistic
                - scipy_stats.spearmanr(b, outcome).statistic
            )

        expected = scipy_stats.permutation_test(
            (ranks["finetuned"], ranks["baseline"]), difference, permutation_type="samples",
            n_resamples=10**5,
        )  # fmt: skip
        assert (row.n, row.swaps, row.exact) == (len(pairs), 2 ** len(pairs), 1)
        assert math.isclose(row.difference, expected.statistic, abs_tol=1e-12)
        assert math.isclose(row.p_paired, expected.pvalue, abs_tol=1e-12)


def test_every_tile_and_donor_is_accounted_for(study):
    summary = analysis_of(study).summary
    tiles, _ = frames(study)
    for name, dropped in summary["models"].items():
        of = tiles[tiles.model == name]
        assert dropped["n_tiles"] == len(of)
        assert dropped["n_tiles_used"] + sum(dropped["dropped_tiles"].values()) == len(of)
        assert dropped["dropped_tiles"]["donor unknown"] == 1
        assert dropped["dropped_tiles"]["marker unknown or not asked for"] == 1
        assert (
            dropped["dropped_tiles"]["donor not in the clinical table"]
            == ((of.donor == "20100521") & (of.marker != "unknown")).sum()
        )
    assert summary["donors_not_in_clinical"] == ["20100521"]
    assert summary["clinical_donors_missing_tiles"] == ["20100577"]
    assert summary["outcomes_missing_values"] == {"braaksc": 1, "gpath": 0, "flat": 0, "rare": 9}
    assert summary["tests_without_rho"] == {"flat is constant": 12, "fewer than 3 donors": 12}


def test_donors_without_objects_are_left_out_of_the_ratio_only(study):
    tiles = pd.read_csv(study / "baseline.tsv", sep="\t", dtype={"donor": str})
    counts = [name for name in tiles if name.startswith("n_")]
    tiles.loc[tiles.donor == "20100500", counts] = 0
    tiles.to_csv(study / "baseline.tsv", sep="\t", index=False)
    found = pd.DataFrame(analysis_of(study).tables["spearman"]).query(
        "model == 'baseline' and outcome == 'gpath'"
    )
    assert set(found.query("metric == 'ratio'").n_without_metric) == {1}
    assert set(found.query("metric == 'ratio'").n) == {9}
    assert set(found.query("metric == 'total_density_mpx'").n) == {10}


def test_the_command_leaves_the_studys_files_twice_alike(study, capsys):
    def run(folder):
        return cli.main(
            ["cellpose", "donors", "--output-dir", str(folder), "--clinical",
             str(study / "clinical.csv"), "--outcomes", ",".join(OUTCOMES),
             "--draws", "20", "--interval-draws", "50", "--swaps", "99",
             *(f"--counts={name}={study / name}.tsv" for name in ("finetuned", "baseline"))]
        )  # fmt: skip

    assert run(study / "a") == 0
    out = capsys.readouterr()
    assert "20100521" in out.err and "no row in the clinical table" in out.err
    assert run(study / "b") == 0
    here, again = study / "a" / "downstream", study / "b" / "downstream"
    files = sorted(path.name for path in here.iterdir())
    assert files == sorted([*donors.FILES.values(), donors.SUMMARY])
    for name in files:
        assert (here / name).read_bytes() == (again / name).read_bytes()
    spearman = pd.read_csv(here / "e5_spearman.tsv", sep="\t")
    assert list(spearman.columns[:9]) == [
        "model", "marker", "metric", "outcome", "n", "rho", "pval", "fdr", "pass_fdr",
    ]  # fmt: skip
    stability = pd.read_csv(here / "e5_bootstrap_stability.tsv", sep="\t")
    assert list(stability.columns[:7]) == [
        "model", "marker", "metric", "outcome", "var_rho", "sign_consistency", "p_pass",
    ]  # fmt: skip
    summary = json.loads((here / "e5_summary.json").read_text())
    assert summary["compared"] == ["baseline", "finetuned"]
    assert summary["n_corr_rows"] == len(spearman) == 48
    assert summary["tile_counts"]["finetuned"]["sha256"]


def test_the_studys_own_tables_have_one_percentile_and_no_sensitivity(study):
    for name in ("baseline", "finetuned"):
        tiles = pd.read_csv(study / f"{name}.tsv", sep="\t", dtype={"donor": str})
        plain = [column for column in tiles if "_q" not in column]
        tiles[plain].to_csv(study / f"{name}.tsv", sep="\t", index=False)
    analysis = analysis_of(study)
    assert analysis.tables["sensitivity"] == [] and len(analysis.tables["spearman"]) == 48


BAD_TABLES = {
    "two rows": (lambda t: pd.concat([t, t[:1]]), "more than one row of donor 20100500"),
    "text": (lambda t: t.assign(gpath="high"), "gpath must be numbers.*20100500 has 'high'"),
    "infinite": (lambda t: t.assign(gpath="inf"), "gpath must be numbers.*'inf'"),
    "unknown outcome": (lambda t: t.drop(columns="gpath"), "no column gpath; it has projid"),
    "nobody": (lambda t: t.assign(projid=range(11)), "no donor of the tiles has a row"),
    "no donors": (lambda t: t.assign(projid=""), "no donors in column projid"),
}


@pytest.mark.parametrize("change, message", BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_bad_clinical_table_is_refused_by_name(study, change, message):
    table = pd.read_csv(study / "clinical.csv")
    change(table).to_csv(study / "clinical.csv", index=False)
    with pytest.raises(ValueError, match=message):
        analysis_of(study)


BAD_TILES = {
    "no column": (lambda t: t.drop(columns="area_px"), "no column area_px"),
    "text": (lambda t: t.assign(n_total_cells="many"), "line 2: n_total_cells must be a count"),
    "negative": (lambda t: t.assign(n_total_cells=-1), "n_total_cells must be a count; got '-1'"),
    "fraction": (lambda t: t.assign(area_px=0.5), "area_px must be a count; got '0.5'"),
    "no area": (lambda t: t.assign(area_px=0), "line 2: area_px must be above 0"),
    "too many": (lambda t: t.assign(n_marker_positive=10**6), "more positive objects than"),
    "twice": (lambda t: pd.concat([t, t[:1]]), "a tile more than once: gfap/"),
    "empty": (lambda t: t[:0], "has no tiles"),
}


@pytest.mark.parametrize("change, message", BAD_TILES.values(), ids=BAD_TILES)
def test_bad_tile_counts_are_refused_by_line(study, change, message):
    tiles = pd.read_csv(study / "baseline.tsv", sep="\t", dtype=str)
    change(tiles).to_csv(study / "baseline.tsv", sep="\t", index=False)
    with pytest.raises(ValueError, match=message):
        analysis_of(study)


def test_lost_leading_zeros_are_pointed_out(study, tmp_path):
    tiles = pd.read_csv(study / "baseline.tsv", sep="\t", dtype=str)
    tiles["donor"] = tiles.donor.replace({"20100500": "00100500"})
    tiles.to_csv(study / "baseline.tsv", sep="\t", index=False)
    table = pd.read_csv(study / "clinical.csv")
    table["projid"] = table.projid.replace({20100500.0: 100500.0})
    table.to_csv(study / "clinical.csv", index=False)
    summary = analysis_of(study).summary
    assert summary["donors_in_clinical_but_for_leading_zeros"] == ["00100500"]


def test_settings_are_refused_by_name():
    with pytest.raises(ValueError, match=r"metrics must be some of ratio.*'area'"):
        donors.Settings(metrics=("area",))
    with pytest.raises(ValueError, match=r"alpha must be in 0..1; got 2"):
        donors.Settings(alpha=2)
