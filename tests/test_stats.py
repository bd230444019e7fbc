"""Donor statistics against SciPy, statsmodels, brute force and CPython's own generator."""

from __future__ import annotations

import itertools
import math
import random
import statistics as python_statistics
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

scipy_stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed")

from fastembed import stats  # noqa: E402 (needs SciPy)

CLOSE = {"rtol": 0, "atol": 1e-12}


def scipy_spearman(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """rho and p of the pairs without NaN; NaN where SciPy would warn instead."""
    kept = ~(np.isnan(x) | np.isnan(y))
    x, y = x[kept], y[kept]
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return math.nan, math.nan
    result = scipy_stats.spearmanr(x, y)
    return float(result.statistic), float(result.pvalue)


# Few distinct values, so ties abound; and any float.
numbers = st.one_of(
    st.integers(-3, 3).map(float),
    st.just(math.nan),
    st.floats(-1e300, 1e300, allow_nan=False, allow_subnormal=False),
)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    rows=st.integers(1, 30),
    columns=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_spearman_is_scipys(data, rows, columns):
    x, y = (data.draw(hnp.arrays(np.float64, (rows, c), elements=numbers)) for c in columns)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = stats.spearman(x, y)
    assert found.rho.shape == columns
    for i, j in itertools.product(*map(range, columns)):
        kept = ~(np.isnan(x[:, i]) | np.isnan(y[:, j]))
        rho, p = scipy_spearman(x[:, i], y[:, j])
        np.testing.assert_allclose(found.rho[i, j], rho, **CLOSE)
        if abs(found.rho[i, j]) == 1:
            assert found.p[i, j] == 0 and p < 1e-7  # SciPy's depends on its rho's last bit
        else:
            np.testing.assert_allclose(found.p[i, j], p, **CLOSE)
        assert (found.n[i, j], found.dropped[i, j]) == (kept.sum(), rows - kept.sum())
        constant = [len(np.unique(v[kept])) == 1 for v in (x[:, i], y[:, j])]
        expected = (
            "fewer than 3 pairs"
            if kept.sum() < 3
            else "x is constant"
            if constant[0]
            else "y is constant"
            if constant[1]
            else ""
        )
        assert found.reason[i, j] == expected
        assert bool(expected) == np.isnan(found.rho[i, j]) == np.isnan(found.p[i, j])
        alone = stats.spearman(x[:, i], y[:, j])  # the same bits in any company
        np.testing.assert_array_equal(alone.rho, found.rho[i, j])
        np.testing.assert_array_equal(alone.p, found.p[i, j])


@pytest.mark.parametrize("n", [3, 4, 69, 2000])
def test_a_perfect_correlation_is_exactly_one(n):
    x = np.random.default_rng(n).standard_normal(n)
    up, down = stats.spearman(x, np.exp(x)), stats.spearman(x, -(x**3))
    assert (up.rho, up.p, down.rho, down.p) == (1, 0, -1, 0)


def test_shapes_follow_the_columns():
    x, y = np.random.default_rng(0).standard_normal((2, 20, 3))
    full = stats.spearman(x, y)
    assert full.rho.shape == full.p.shape == full.reason.shape == (3, 3)
    assert stats.spearman(x[:, 1], y).rho.tolist() == full.rho[1].tolist()
    assert stats.spearman(x, y[:, 2]).p.tolist() == full.p[:, 2].tolist()
    assert stats.spearman(x[:, 0], y[:, 0]).rho.shape == ()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(3, 6))
def test_exact_p_is_that_of_all_orders(data, n):
    """Every order written out; ties make some of them alike, and the distribution lopsided."""
    x, y = (
        np.array(data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)), dtype=float)
        for _ in range(2)
    )
    found = stats.spearman(x, y, method="exact")
    if found.reason:
        assert np.isnan(found.p)
        return
    # n - 1 times the covariance of doubled ranks is a whole number.
    a, b = (np.rint(2 * scipy_stats.rankdata(v) - n - 1).astype(int) for v in (x, y))
    sums = [abs(int(a @ np.array(order))) for order in itertools.permutations(b)]
    assert found.p == sum(s >= abs(int(a @ b)) for s in sums) / len(sums)
    np.testing.assert_allclose(found.rho, stats.spearman(x, y).rho, **CLOSE)


def test_exact_p_is_scipys_permutation_test():
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((2, 7))
    result = scipy_stats.permutation_test(
        (x,), lambda v: scipy_stats.spearmanr(v, y).statistic, permutation_type="pairings",
        n_resamples=math.factorial(7), alternative="two-sided",
    )  # fmt: skip
    np.testing.assert_allclose(stats.spearman(x, y, method="exact").p, result.pvalue, **CLOSE)


def test_exact_p_of_a_perfect_order_up_to_the_limit():
    for n in range(3, stats.EXACT_LIMIT + 1):
        x = np.arange(n)
        assert stats.spearman(x, x, method="exact").p == 2 / math.factorial(n)
    with pytest.raises(ValueError, match='"exact" takes at most 12 pairs; got 13'):
        stats.spearman(np.arange(13), np.arange(13), method="exact")
    missing = np.append(np.arange(12.0), np.nan)
    assert stats.spearman(missing, np.arange(13), method="exact").n == 12


p_values = hnp.arrays(
    np.float64,
    st.integers(0, 40),
    elements=st.one_of(
        st.sampled_from([0.0, 0.01, 0.05, 1.0, math.nan]), st.floats(0, 1, allow_subnormal=False)
    ),
)


@settings(max_examples=150, deadline=None)
@given(p=p_values, data=st.data())
def test_fdr_is_statsmodels(p, data):
    multitest = pytest.importorskip(
        "statsmodels.stats.multitest", reason="statsmodels is not installed"
    )
    families = data.draw(hnp.arrays(np.int8, p.shape, elements=st.integers(0, 2)))
    for labels in (np.zeros_like(families), families):
        expected = np.full(p.shape, np.nan)
        for label in set(labels.tolist()):
            here = (labels == label) & ~np.isnan(p)
            if here.any():
                expected[here] = multitest.multipletests(p[here], method="fdr_bh")[1]
        found = stats.fdr_bh(p, families=labels)
        np.testing.assert_allclose(found, expected, **CLOSE)
        if not labels.any():
            np.testing.assert_array_equal(stats.fdr_bh(p), found)
    np.testing.assert_array_equal(stats.fdr_bh(p.reshape(1, -1))[0], stats.fdr_bh(p))


# The bootstrap ------------------------------------------------------------------------


def table(donors: int = 12, tiles: int = 150, seed: int = 0) -> SimpleNamespace:
    """Tiles of cells counted, donor 3 with none of either; two outcomes, one with gaps."""
    rng = np.random.default_rng(seed)
    donor = rng.integers(0, donors, tiles)
    donor = np.where(donor == 3, 4, donor)
    total = rng.integers(0, 30, tiles)
    outcomes = rng.integers(0, 6, (donors, 2)).astype(float)
    outcomes[[1, 7], 1] = np.nan
    return SimpleNamespace(
        donors=donor, positive=rng.binomial(total, 0.3), total=total, outcomes=outcomes,
        area=np.full(tiles, 512 * 512), count=donors,
    )  # fmt: skip


def splitmix(state: int) -> int:
    """Output and step of SplitMix64 as published, in Python's integers."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


def written_out(t: SimpleNamespace, values: np.ndarray, draws: int, fraction: float, pick):
    """Donor sums of each draw, tile by tile: pick(draw, donor, tiles, k) is the random part."""
    sums = np.zeros((draws, t.count, values.shape[1]))
    for draw in range(draws):
        for donor in range(t.count):
            tiles = [i for i, owner in enumerate(t.donors) if owner == donor]
            for tile in pick(draw, donor, tiles, math.ceil(fraction * len(tiles))):
                sums[draw, donor] += values[tile]
    return sums


def picker(generator: str, seed: int):
    rng = random.Random(seed)

    def by_splitmix(draw, donor, tiles, k):
        state = splitmix(splitmix((splitmix(seed) + draw) % 2**64) + donor)
        steps = [(state + j * 0x9E3779B97F4A7C15) % 2**64 for j in range(k)]
        return [tiles[(splitmix(step) >> 32) * len(tiles) >> 32] for step in steps]

    return {
        "splitmix64": by_splitmix,
        "python-choices": lambda draw, donor, tiles, k: rng.choices(tiles, k=k) if tiles else [],
        "python-choice": lambda draw, donor, tiles, k: [rng.choice(tiles) for _ in range(k)],
        "randrange": lambda draw, donor, tiles, k: [
            tiles[rng.randrange(len(tiles))] for _ in range(k)
        ],
    }[generator]


@pytest.mark.parametrize("fraction", [0.8, 1.0, 0.05, 1.5])
@pytest.mark.parametrize("seed", [0, 2024, 2**64 - 1])
@pytest.mark.parametrize("generator", [*stats.GENERATORS, "randrange"])
def test_resampled_sums_are_those_of_the_generator_written_out(generator, seed, fraction):
    t = table()
    values = np.stack([t.positive, t.total, t.area], axis=1)
    expected = written_out(t, values, 5, fraction, picker(generator, seed))
    found = stats.resample_tiles(
        t.donors, values, donor_count=t.count, draws=5, fraction=fraction, seed=seed,
        generator="python-choice" if generator == "randrange" else generator,
    )  # fmt: skip
    np.testing.assert_array_equal(found, expected)
    assert not found[:, 3].any() and found[:, 4].any()


@pytest.mark.parametrize("generator", ["python-choices", "python-choice"])
def test_more_words_than_the_twister_gives_at_once(generator):
    """2^18 of them: the 273rd draw begins in one part and ends in the next."""
    t = table(donors=9, tiles=600)
    values = t.total[:, None]
    expected = written_out(t, values, 300, 0.8, picker(generator, 2024))
    found = stats.resample_tiles(
        t.donors, values, donor_count=t.count, draws=300, seed=2024, generator=generator
    )
    np.testing.assert_array_equal(found, expected)


def test_picks_are_a_draws_and_a_donors_own():
    """More draws, other donors, another order of donors in the table: the same picks."""
    t = table()
    values = t.total[:, None]
    every = stats.resample_tiles(t.donors, values, draws=20, seed=7)
    np.testing.assert_array_equal(
        stats.resample_tiles(t.donors, values, draws=4, seed=7), every[:4]
    )
    kept = t.donors != 5
    fewer = stats.resample_tiles(
        t.donors[kept], values[kept], donor_count=t.count, draws=20, seed=7
    )
    np.testing.assert_array_equal(np.delete(fewer, 5, axis=1), np.delete(every, 5, axis=1))
    order = np.argsort(-t.donors, kind="stable")
    np.testing.assert_array_equal(
        stats.resample_tiles(t.donors[order], values[order], draws=20, seed=7), every
    )
    assert (stats.resample_tiles(t.donors, values, draws=20, seed=8) != every).any()


def test_splitmix_is_the_published_one():
    """First outputs for seed 1234567, as many implementations print them."""
    state, outputs = 1234567, []
    for _ in range(3):
        outputs.append(splitmix(state))
        state = (state + 0x9E3779B97F4A7C15) % 2**64
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_picks_are_even():
    tiles = 7
    sums = stats.resample_tiles(
        np.zeros(tiles, int), np.eye(tiles), draws=4000, fraction=1.0, seed=1
    )
    expected = 4000.0
    assert (abs(sums.sum(axis=0)[0] - expected) < 5 * math.sqrt(expected)).all()
    rows = stats.resample_donors(np.eye(tiles), draws=4000, seed=1)
    assert (abs(rows.sum(axis=(0, 1)) - expected) < 5 * math.sqrt(expected)).all()


def test_the_study_repeated():
    """The loop as a script has it: Random(2024) anew for every test, one SciPy call per draw."""
    t = table(donors=20, tiles=400)
    metrics = {"ratio": (t.positive, t.total, 1.0), "density": (t.total, t.area, 1e6)}
    found = stats.spearman_bootstrap(
        t.donors,
        np.stack([above for above, _, _ in metrics.values()], axis=1),
        np.stack([below for _, below, _ in metrics.values()], axis=1),
        t.outcomes,
        scale=[scale for _, _, scale in metrics.values()],
        draws=30, fraction=0.8, seeds=2024, generator="python-choices",
    )  # fmt: skip
    assert found.draws.shape == (30, 2, 2)
    for m, (above, below, scale) in enumerate(metrics.values()):
        values = np.stack([above, below], axis=1)
        for q in range(2):
            sums = written_out(t, values, 30, 0.8, picker("python-choices", 2024))
            with np.errstate(invalid="ignore"):
                ratios = sums[..., 0] / sums[..., 1] * scale
            rhos, ps = np.array([scipy_spearman(r, t.outcomes[:, q]) for r in ratios]).T
            np.testing.assert_allclose(found.draws[:, m, q], rhos, **CLOSE)
            np.testing.assert_allclose(found.mean[m, q], np.mean(rhos), **CLOSE)
            np.testing.assert_allclose(
                found.variance[m, q], python_statistics.pvariance(rhos.tolist()), **CLOSE
            )
            assert found.significant[m, q] == np.mean(ps < 0.05)
            assert found.sign_consistency[m, q] == max((rhos > 0).sum(), (rhos < 0).sum()) / 30
            np.testing.assert_allclose(
                [found.low[m, q], found.high[m, q]], np.quantile(rhos, [0.025, 0.975]), **CLOSE
            )
            assert found.n[m, q] == 19 - 2 * q and found.valid[m, q] == 30
    whole = np.stack([np.bincount(t.donors, v, t.count) for v in (t.positive, t.total)])
    kept = whole[1] > 0
    rho, p = scipy_spearman(whole[0][kept] / whole[1][kept], t.outcomes[kept, 0])
    np.testing.assert_allclose([found.observed[0, 0], found.p[0, 0]], [rho, p], **CLOSE)


def test_seeds_of_each_test():
    t = table()
    arguments = t.donors, t.positive, t.total, t.outcomes
    shared = [
        stats.spearman_bootstrap(*arguments, draws=9, seeds=seed).draws[:, 0] for seed in (11, 12)
    ]
    each = stats.spearman_bootstrap(*arguments, draws=9, seeds=[[12, 11]]).draws[:, 0]
    np.testing.assert_array_equal(each, np.stack([shared[1][:, 0], shared[0][:, 1]], axis=1))
    assert (shared[0] != shared[1]).any()


def test_any_statistic_of_donor_sums():
    t = table()
    values = np.stack([t.positive, t.total], axis=1)
    found = stats.bootstrap(
        t.donors, values, lambda sums: sums[..., 0].sum(-1) / sums[..., 1].sum(-1),
        donor_count=t.count, draws=40, seed=3,
    )  # fmt: skip
    drawn = stats.resample_tiles(t.donors, values, draws=40, seed=3).sum(axis=1)
    np.testing.assert_array_equal(found.draws, drawn[:, 0] / drawn[:, 1])
    assert found.observed == t.positive.sum() / t.total.sum()
    assert found.low < found.mean < found.high and found.sign_consistency == 1


def test_draws_without_a_number_are_left_out_and_counted():
    """Two of the tiles have no cells: where only these are drawn the ratio is 0 / 0."""
    donors, total = np.array([0, 0, 1, 1]), np.array([0, 5, 0, 4])

    def first_ratio(sums):
        above, below = sums[..., 0, 0], sums[..., 0, 1]
        return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)

    found = stats.bootstrap(
        donors, np.stack([total, total], axis=1), first_ratio, draws=100, fraction=0.5
    )
    assert 20 < found.valid < 80 and found.valid == (~np.isnan(found.draws)).sum()
    assert (found.mean, found.variance, found.sign_consistency) == (1, 0, 1)
    assert (found.low, found.high) == (1, 1)
    none = stats.spearman_bootstrap(donors, total, total, np.array([1.0, 2.0]), draws=5)
    assert none.valid == 0 and none.reason == "fewer than 3 pairs"
    for part in (none.mean, none.variance, none.low, none.sign_consistency, none.significant):
        assert np.isnan(part).all()


# Intervals and paired tests -----------------------------------------------------------

COUNTS = np.random.default_rng(8).integers(1, 40, (15, 3)).astype(float)
CORRELATED = np.random.default_rng(9).multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 24)


def scipy_interval(rows, scalar, drawn, method, confidence):
    """SciPy's interval of the draws that are ours: it takes the distribution of an earlier run."""
    return scipy_stats.bootstrap(
        (np.arange(len(rows)),), lambda i: scalar(rows[i]), n_resamples=0, vectorized=False,
        method=method, confidence_level=confidence,
        bootstrap_result=SimpleNamespace(bootstrap_distribution=drawn),
    ).confidence_interval  # fmt: skip


@pytest.mark.parametrize("confidence", [0.95, 0.8])
@pytest.mark.parametrize("method", ["bca", "percentile"])
@pytest.mark.parametrize(
    "rows,statistic,scalar",
    [
        (
            COUNTS, stats.pooled_f1,
            lambda r: 2 * r[:, 0].sum() / (2 * r[:, 0].sum() + r[:, 1:].sum()),
        ),
        (COUNTS[:, :2], stats.mean_ap, lambda r: r[:, 0].sum() / r[:, 1].sum()),
        (
            CORRELATED, stats.rank_correlation,
            lambda r: scipy_stats.spearmanr(r[:, 0], r[:, 1]).statistic,
        ),
    ],
    ids=["f1", "ap", "rho"],
)  # fmt: skip
def test_intervals_are_scipys(rows, statistic, scalar, method, confidence):
    found = stats.confidence_interval(
        rows, statistic, method=method, draws=500, seed=4, confidence=confidence
    )
    sample = stats.resample_donors(rows, draws=500, seed=4)
    np.testing.assert_allclose(found.draws, [scalar(one) for one in sample], **CLOSE)
    np.testing.assert_allclose(found.observed, scalar(rows), **CLOSE)
    expected = scipy_interval(rows, scalar, found.draws, method, confidence)
    np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high], **CLOSE)
    assert found.low < found.observed < found.high and found.valid == 500


def test_an_interval_of_what_does_not_vary_is_a_point():
    found = stats.confidence_interval(np.ones((5, 2)), stats.mean_ap)
    assert (found.low, found.high) == (1, 1)


def test_samples_without_a_number_are_left_out_of_an_interval():
    """One donor four times over has no rank correlation: 4 of 4^4 samples, and some with ties."""
    rows = np.array([[1, 2], [2, 1], [3, 3], [4, 5]])
    for method in ("percentile", "bca"):
        found = stats.confidence_interval(rows, stats.rank_correlation, method=method, draws=500)
        assert 450 < found.valid == (~np.isnan(found.draws)).sum() < 500
        assert -1 <= found.low < found.high <= 1


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("pairs", [2, 3, 6, 11])
def test_the_paired_test_is_scipys(pairs, ties):
    rng = np.random.default_rng(pairs)
    a, b = rng.random((2, pairs)) + [[0.2], [0]]
    if ties:
        a, b = np.round(a, 1), np.round(b, 1)
    expected = scipy_stats.permutation_test(
        (a, b), lambda u, v, axis: (u - v).mean(axis=axis), permutation_type="samples",
        n_resamples=5000, alternative="two-sided",
    )  # fmt: skip
    found = stats.paired_test(a, b)
    assert found.exact and found.swaps == 2**pairs
    np.testing.assert_allclose(
        [found.difference, found.p], [expected.statistic, expected.pvalue], **CLOSE
    )


def test_the_paired_test_of_pooled_counts():
    """F1 of all donors' counts: swaps are of donors, the statistic of their sums."""
    a, b = COUNTS[:7], COUNTS[7:14]

    def difference(swapped):
        one, other = np.where(swapped, b, a), np.where(swapped, a, b)
        f1 = [2 * s[0] / (2 * s[0] + s[1] + s[2]) for s in (one.sum(axis=0), other.sum(axis=0))]
        return f1[0] - f1[1]

    every = [
        abs(difference(np.array(swapped)[:, None]))
        for swapped in itertools.product([False, True], repeat=7)
    ]
    found = stats.paired_test(a, b, stats.pooled_f1)
    np.testing.assert_allclose(found.difference, every[0] * np.sign(found.difference), **CLOSE)
    assert found.p == np.mean([one >= every[0] - 1e-12 for one in every])


def test_many_pairs_are_swapped_at_random_and_by_seed():
    rng = np.random.default_rng(0)
    a = rng.random(40)
    b = a + rng.normal(0.03, 0.1, 40)
    found = stats.paired_test(a, b, draws=20_000, seed=1)
    assert not found.exact and found.swaps == 20_000
    assert found == stats.paired_test(a, b, draws=20_000, seed=1)
    assert found != stats.paired_test(a, b, draws=20_000, seed=2)
    expected = scipy_stats.permutation_test(
        (a, b), lambda u, v, axis: (u - v).mean(axis=axis), permutation_type="samples",
        n_resamples=20_000, vectorized=True, rng=np.random.default_rng(3),
    ).pvalue  # fmt: skip
    assert abs(found.p - expected) < 5 * math.sqrt(2 * expected * (1 - expected) / 20_000)
    far = stats.paired_test(a, a + 1 + np.arange(40), draws=99)
    assert far.p == 0.01  # never 0: the observed order is one of those there are
    assert stats.paired_test(a, a).p == stats.paired_test(a[:1], b[:1]).p == 1


def test_refusals():
    x, donors = np.arange(6.0), np.array([0, 0, 1, 1, 2, 2])
    values, rows = np.ones((6, 2)), np.ones((4, 2))
    spoilt = values.copy()
    spoilt[4, 1] = np.inf

    def tiles(**changes):
        return stats.resample_tiles(**{"donors": donors, "values": values, "draws": 3} | changes)

    cases = [
        (ValueError, "same rows; got 6 and 5", lambda: stats.spearman(x, x[:5])),
        (ValueError, r"x must be.*got \[1, 1, 6\]", lambda: stats.spearman(x[None, None], x)),
        (ValueError, "1 values are infinite", lambda: stats.spearman(spoilt[:, 1], x)),
        (ValueError, "method must be.*'z'", lambda: stats.spearman(x, x, method="z")),
        (ValueError, r"p must be in 0..1; got 1.5", lambda: stats.fdr_bh([0.1, 1.5])),
        (ValueError, r"p's shape, \[2\]; got \[3\]", lambda: stats.fdr_bh([0.1, 1], [1, 2, 3])),
        (ValueError, r"got \[6\] and \[5, 2\]", lambda: tiles(values=values[:5])),
        (TypeError, "donors must be integers.*float64", lambda: tiles(donors=x)),
        (ValueError, "tile 4, column 1 is not", lambda: tiles(values=spoilt)),
        (ValueError, r"donors must be in 0\.\.1; got 0 and 2", lambda: tiles(donor_count=2)),
        (ValueError, r"got -1 and 1", lambda: tiles(donors=donors - 1)),
        (ValueError, "draws must be 1 or more; got 0", lambda: tiles(draws=0)),
        (ValueError, "fraction must be a positive number; got 0", lambda: tiles(fraction=0)),
        (ValueError, "fraction must be a positive number; got nan", lambda: tiles(fraction=np.nan)),
        (ValueError, "generator must be one of splitmix64", lambda: tiles(generator="mt")),
        (ValueError, "seed must be in 0..2.64 - 1; got -1", lambda: tiles(seed=-1)),
        (TypeError, "seed must be an integer; got float", lambda: tiles(seed=1.0)),
        (
            ValueError, "must give 3 results for 3 samples",
            lambda: stats.bootstrap(donors, values, lambda s: s.sum(), draws=3),
        ),
        (
            ValueError, r"seeds must be one number or \[1, 1\]; got \[2\]",
            lambda: stats.spearman_bootstrap(donors, x, x, x[:3], seeds=[1, 2]),
        ),
        (
            ValueError, r"numerators and denominators must have one shape",
            lambda: stats.spearman_bootstrap(donors, values, x, x[:3]),
        ),
        (
            ValueError, "confidence must be in 0..1; got 95",
            lambda: stats.confidence_interval(rows, stats.mean_ap, confidence=95),
        ),
        (
            ValueError, r"3 donors at least; got \[2, 2\]",
            lambda: stats.confidence_interval(rows[:2], stats.mean_ap),
        ),
        (
            ValueError, "method must be.*'normal'",
            lambda: stats.confidence_interval(rows, stats.mean_ap, method="normal"),
        ),
        (
            ValueError, "donor 4, column 1 is not",
            lambda: stats.confidence_interval(spoilt, stats.mean_ap),
        ),
        (ValueError, r"alike.*got \[6\] and \[5\]", lambda: stats.paired_test(x, x[:5])),
        (ValueError, "b must be finite; pair 4 is not", lambda: stats.paired_test(values, spoilt)),
        (ValueError, "without a statistic; got", lambda: stats.paired_test(values, values)),
    ]  # fmt: skip
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


def test_importing_the_library_does_not_import_scipy():
    code = "import sys, fastembed.ops; sys.exit('fastembed.stats' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
