"""The donor study's bootstrap, beside the loop over scipy.stats.spearmanr that scripts have.

Its size: two models, five markers, 14,758 tiles and 71 donors; three metrics and eight outcomes
make 240 tests of 200 draws. The loop is timed on a few draws of one test of each marker, its
rate is to be compared: images per second are draws here, or columns.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

scipy_stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed")

from fastembed import stats  # noqa: E402 (needs SciPy)

DONORS, DRAWS, MODELS, METRICS, OUTCOMES = 71, 200, 2, 3, 8
MARKERS = {"gfap": 2947, "iba1": 3064, "neun": 2837, "olig2": 2978, "pecam": 2932}
TESTS = MODELS * len(MARKERS) * METRICS * OUTCOMES
LOOPED = 4  # draws that the loop is timed on
pytestmark = pytest.mark.usefixtures("one_thread")


def table(tiles: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Donor of each tile; numerators and denominators of ratio and the two densities."""
    rng = np.random.default_rng(seed)
    donors = np.sort(rng.integers(0, DONORS, tiles))
    total = rng.poisson(40, tiles)
    positive = rng.binomial(total, 0.2 + 0.2 * rng.random(DONORS)[donors])
    area = np.full(tiles, 1024 * 1024)
    return donors, np.stack([positive, total, positive], 1), np.stack([total, area, area], 1)


def outcomes() -> np.ndarray:
    """Scores of few steps, of 69 of the donors."""
    rng = np.random.default_rng(99)
    values = rng.integers(0, 7, (DONORS, OUTCOMES)).astype(float)
    values[:, 4:] = rng.random((DONORS, OUTCOMES - 4))
    values[-2:] = np.nan
    return values


def study(tables, seeds, generator):
    return [
        stats.spearman_bootstrap(*part, outcomes(), draws=DRAWS, seeds=seeds, generator=generator)
        for part in tables
    ]


def loop(tables, draws: int = LOOPED) -> list[np.ndarray]:
    """The first outcome and metric of each table, as a script has it."""
    every = []
    for donors, above, below in tables:
        tiles_of = [np.flatnonzero(donors == donor).tolist() for donor in range(DONORS)]
        top, bottom = above[:, 0].tolist(), below[:, 0].tolist()
        outcome = outcomes()[:, 0]
        kept = ~np.isnan(outcome)
        rng = random.Random(2024)
        rhos = []
        for _ in range(draws):
            ratios = []
            for tiles in tiles_of:
                picked = rng.choices(tiles, k=-(-4 * len(tiles) // 5))  # ceil(0.8 n)
                ratios.append(sum(top[i] for i in picked) / sum(bottom[i] for i in picked))
            rhos.append(scipy_stats.spearmanr(np.array(ratios)[kept], outcome[kept]).statistic)
        every.append(np.array(rhos))
    return every


SIZES = {
    "tiles of a test's marker": [table(n, i) for i, n in enumerate([*MARKERS.values()] * MODELS)],
    "all 14,758 tiles in every test": [
        table(sum(MARKERS.values()), i) for i in range(MODELS * len(MARKERS))
    ],
}
OWN_SEEDS = np.arange(METRICS * OUTCOMES).reshape(METRICS, OUTCOMES)
CONTENDERS = {
    "SciPy loop, one test of each table": (loop, LOOPED / DRAWS / METRICS / OUTCOMES),
    "draws shared, random.Random(2024)": (lambda t: study(t, 2024, "python-choices"), 1),
    "draws shared, splitmix64": (lambda t: study(t, 2024, "splitmix64"), 1),
    "a seed per test, splitmix64": (lambda t: study(t, OWN_SEEDS, "splitmix64"), 1),
}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("size", SIZES)
def test_bootstrap(row, size, contender):
    run, part = CONTENDERS[contender]
    result = run(SIZES[size])
    if "2024" in contender:  # the loop's own figures
        for found, rhos in zip(result, loop(SIZES[size], 2), strict=True):
            np.testing.assert_allclose(found.draws[:2, 0, 0], rhos, rtol=0, atol=1e-12)
    note = f"{TESTS} tests x {DRAWS} draws"
    benchmark = row(
        f"bootstrap, {size}", contender, shape=note if part == 1 else f"1/{1 / part:.0f} of {note}",
        images=round(TESTS * DRAWS * part),
    )  # fmt: skip
    benchmark.pedantic(run, args=(SIZES[size],), rounds=3, warmup_rounds=0)


@pytest.mark.parametrize("contender", ["scipy.stats.spearmanr by pairs", "fastembed"])
def test_spearman_of_many_columns(row, contender):
    """Every dimension of an embedding with every outcome."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((DONORS, 768)), outcomes()
    kept = ~np.isnan(y[:, 0])

    def loop():
        return [[scipy_stats.spearmanr(a[kept], b[kept]) for b in y.T] for a in x.T[:32]]

    run = loop if contender.startswith("scipy") else lambda: stats.spearman(x, y)
    run()
    columns = 32 if run is loop else 768
    benchmark = row(
        "spearman, 768 x 8 columns", contender, shape=f"{columns} columns", images=columns,
    )  # fmt: skip
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
