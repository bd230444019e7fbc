"""Bootstrap of tiles within donors, and of donors: stability, and confidence intervals.

A statistic is a function of samples [..., D, K], K numbers of each of D donors, that gives
[..., *shape]: it takes one sample as well as a stack of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import special

from .correlation import correlation_of_ranks, doubled_ranks, spearman
from .resample import donor_sums, resample_donors, resample_tiles

Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Bootstrap:
    """A statistic under tile bootstrap; arrays of the statistic's shape.

    Draws in which the statistic is NaN are left out of everything but `draws`.

    Attributes:
        observed: of all tiles.
        draws: [B, ...] of each draw.
        valid: int64, draws that are not NaN.
        mean: over the draws.
        variance: of the draws, divided by their number: the population's.
        sign_consistency: share of the more frequent sign, max(positive, negative) / valid.
        low, high: percentile interval of the draws.
    """

    observed: np.ndarray
    draws: np.ndarray
    valid: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    sign_consistency: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class SpearmanBootstrap(Bootstrap):
    """`Bootstrap` of rho, [M metrics, Q outcomes].

    Attributes:
        p: of all tiles.
        n: int64, donors that count.
        reason: why there is no rho, "" where there is.
        significant: share of the valid draws with p < 0.05.
    """

    p: np.ndarray
    n: np.ndarray
    reason: np.ndarray
    significant: np.ndarray


@dataclass(frozen=True)
class Interval:
    """A statistic and its confidence interval; arrays of the statistic's shape.

    Attributes:
        observed: of the donors there are.
        low, high: NaN where fewer than two draws give a number.
        valid: int64, draws that gave a number.
        draws: [B, ...].
    """

    observed: np.ndarray
    low: np.ndarray
    high: np.ndarray
    valid: np.ndarray
    draws: np.ndarray


def bootstrap(
    donors: np.ndarray,
    values: np.ndarray,
    statistic: Statistic,
    *,
    donor_count: int | None = None,
    draws: int = 200,
    fraction: float = 0.8,
    seed: int = 0,
    generator: str = "splitmix64",
    confidence: float = 0.95,
) -> Bootstrap:
    """How far a statistic of donor sums depends on which of their tiles the donors have.

    Every draw makes each donor anew from ceil(fraction n) of its n tiles, drawn with
    replacement; donors stay. With a fraction below 1 that shows stability; it is not the
    sampling error of donors, which `confidence_interval` gives.

    Args:
        donors, values, donor_count, draws, fraction, seed, generator: as for `resample_tiles`.
        statistic: of donor sums [..., D, K].
        confidence: of the percentile interval.

    Raises:
        ValueError, TypeError: as `resample_tiles`; a confidence outside 0..1; a statistic that
            gives another number of draws.
    """
    tail = _tail(confidence)
    sums = donor_sums(donors, values, donor_count)
    drawn = _apply(
        statistic,
        resample_tiles(
            donors, values, donor_count=len(sums), draws=draws, fraction=fraction, seed=seed,
            generator=generator,
        ),
    )  # fmt: skip
    return Bootstrap(**_summary(np.asarray(statistic(sums), dtype=np.float64), drawn, tail))


def spearman_bootstrap(
    donors: np.ndarray,
    numerators: np.ndarray,
    denominators: np.ndarray,
    outcomes: np.ndarray,
    *,
    scale: float | np.ndarray = 1.0,
    draws: int = 200,
    fraction: float = 0.8,
    seeds: int | np.ndarray = 0,
    generator: str = "splitmix64",
    confidence: float = 0.95,
) -> SpearmanBootstrap:
    """Tile bootstrap of the rank correlation of donor ratios with outcomes, all pairs at once.

    A donor's ratio is the sum of its tiles' numerators over that of their denominators.

    Args:
        donors: [T] integers, rows of `outcomes`.
        numerators: [T] or [T, M] of M metrics.
        denominators: the same shape.
        outcomes: [D] or [D, Q]; NaN is missing. A donor whose denominators are 0, or that
            has no tiles, has no ratio and is left out as if it were missing too.
        scale: of the ratios, such as 1e6 for a density; one number or [M]. Ranks do not
            depend on it, except that its sign does.
        draws, fraction, generator: as for `resample_tiles`.
        seeds: one for all tests, which then share their draws, as when a study seeds anew for
            every test; or [M, Q], one per test.
        confidence: of the percentile interval.

    Returns:
        `SpearmanBootstrap`, arrays [M, Q].

    Raises:
        ValueError, TypeError: as `resample_tiles`; shapes that differ; seeds of another shape.
    """
    tail = _tail(confidence)
    numerators, denominators = (
        np.asarray(part, dtype=np.float64).reshape(len(part), -1)
        for part in (numerators, denominators)
    )
    if numerators.shape != denominators.shape:
        raise ValueError(
            f"numerators and denominators must have one shape; got {list(numerators.shape)} and "
            f"{list(denominators.shape)}"
        )
    outcomes = np.asarray(outcomes, dtype=np.float64)
    outcomes = outcomes.reshape(len(outcomes), -1)
    metrics = numerators.shape[1]
    shape = (metrics, outcomes.shape[1])
    seeds = np.asarray(seeds, dtype=object)
    if seeds.shape not in ((), shape):
        raise ValueError(f"seeds must be one number or {list(shape)}; got {list(seeds.shape)}")
    values = np.concatenate([numerators, denominators], axis=1)

    def ratios(sums: np.ndarray) -> np.ndarray:
        """[..., D, 2 M] to [..., D, M]."""
        above, below = sums[..., :metrics] * scale, sums[..., metrics:]
        return np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0)

    count = len(outcomes)
    observed = spearman(ratios(donor_sums(donors, values, count)), outcomes)
    rho, p = np.empty((2, draws, *shape))
    seeds = np.broadcast_to(seeds, shape)
    for seed in dict.fromkeys(seeds.flat):
        drawn = ratios(
            resample_tiles(
                donors, values, donor_count=count, draws=draws, fraction=fraction, seed=seed,
                generator=generator,
            )
        )  # fmt: skip
        here = seeds == seed
        for metric in np.flatnonzero(here.any(axis=1)):
            # Draws as columns: all of a metric's against all of its outcomes.
            columns = np.flatnonzero(here[metric])
            found = spearman(drawn[..., metric].T, outcomes[:, columns])
            rho[:, metric, columns], p[:, metric, columns] = found.rho, found.p
    summary = _summary(observed.rho, rho, tail)
    significant = _share((p < 0.05).sum(axis=0), summary["valid"])
    return SpearmanBootstrap(
        **summary, p=observed.p, n=observed.n, reason=observed.reason, significant=significant
    )


def confidence_interval(
    rows: np.ndarray,
    statistic: Statistic,
    *,
    method: str = "bca",
    draws: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Confidence interval of a statistic by bootstrap over donors.

    Donors are drawn with all that is theirs: `rows` holds sums over a donor's tiles or images,
    so that a statistic of sums (`mean_ap`, `pooled_f1`) sees whole donors come and go.

    Args:
        rows: [D, K] finite numbers of each donor.
        statistic: of [..., D, K].
        method: ``"percentile"``; or ``"bca"``, bias-corrected and accelerated, the
            acceleration by leaving out one donor after the other.
        draws, seed: as for `resample_donors`.
        confidence: in 0..1.

    Returns:
        `Interval`. Draws without a number, such as of one donor D times over, are left out and
        counted; where all draws are equal, so are low and high.

    Raises:
        ValueError: another shape, fewer than 3 donors, a value that is not finite, another
            method, confidence, draws or seed out of range.

    Exactness: of the same draws, within 1e-12 of ``scipy.stats.bootstrap``.
    Source: Efron, 1987.
    """
    tail = _tail(confidence)
    if method not in ("percentile", "bca"):
        raise ValueError(f'method must be "percentile" or "bca"; got {method!r}')
    rows = np.asarray(rows, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < 3:
        raise ValueError(f"rows must be [D, K] of 3 donors at least; got {list(rows.shape)}")
    if not np.isfinite(rows).all():
        donor, column = np.argwhere(~np.isfinite(rows))[0]
        raise ValueError(f"rows must be finite; donor {donor}, column {column} is not")
    drawn = _apply(statistic, resample_donors(rows, draws=draws, seed=seed))
    observed = np.asarray(statistic(rows), dtype=np.float64)
    ordered, valid = _sorted_draws(drawn)
    if method == "percentile":
        low, high = np.full(observed.shape, tail), np.full(observed.shape, 1 - tail)
    else:
        others = ~np.eye(len(rows), dtype=bool)
        jackknife = _apply(statistic, np.stack([rows[kept] for kept in others]))
        low, high = _bca_levels(observed, drawn, valid, jackknife, tail)
    return Interval(
        observed, _quantile(ordered, valid, low), _quantile(ordered, valid, high), valid, drawn
    )


def rank_correlation(samples: np.ndarray) -> np.ndarray:
    """Spearman's rho of the two columns of samples [..., D, 2]; NaN where one is constant."""
    return correlation_of_ranks(
        doubled_ranks(np.ascontiguousarray(samples[..., 0])),
        doubled_ranks(np.ascontiguousarray(samples[..., 1])),
    )


def mean_ap(samples: np.ndarray) -> np.ndarray:
    """Mean over images of samples [..., D, (sum of a donor's images' AP, number of images)]."""
    sums = samples.sum(axis=-2)
    return _share(sums[..., 0], sums[..., 1])


def pooled_f1(samples: np.ndarray) -> np.ndarray:
    """2 TP / (2 TP + FP + FN) of the pooled counts of samples [..., D, (TP, FP, FN)]."""
    true, false, missed = np.moveaxis(samples.sum(axis=-2), -1, 0)
    return _share(2 * true, 2 * true + false + missed)


def _tail(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in 0..1; got {confidence}")
    return (1 - confidence) / 2


def _apply(statistic: Statistic, samples: np.ndarray) -> np.ndarray:
    drawn = np.asarray(statistic(samples), dtype=np.float64)
    if drawn.shape[:1] != samples.shape[:1]:
        raise ValueError(
            f"statistic must give {len(samples)} results for {len(samples)} samples; "
            f"got an array {list(drawn.shape)}"
        )
    return drawn


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where the whole is 0."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)


def _summary(observed: np.ndarray, draws: np.ndarray, tail: float) -> dict[str, np.ndarray]:
    ordered, valid = _sorted_draws(draws)
    there = ~np.isnan(draws)
    mean = _share(np.where(there, draws, 0).sum(axis=0), valid)
    variance = _share((np.where(there, draws - mean, 0) ** 2).sum(axis=0), valid)
    signs = np.maximum((draws > 0).sum(axis=0), (draws < 0).sum(axis=0))
    return {
        "observed": observed,
        "draws": draws,
        "valid": valid,
        "mean": mean,
        "variance": variance,
        "sign_consistency": _share(signs, valid),
        "low": _quantile(ordered, valid, np.full(valid.shape, tail)),
        "high": _quantile(ordered, valid, np.full(valid.shape, 1 - tail)),
    }


def _sorted_draws(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Along the first axis, NaN last; and how many are not NaN."""
    return np.sort(draws, axis=0), (~np.isnan(draws)).sum(axis=0)


def _quantile(ordered: np.ndarray, valid: np.ndarray, level: np.ndarray) -> np.ndarray:
    """NumPy's "linear" quantile of the first `valid` of each column, at a level of its own."""
    at = np.where(np.isnan(level), 0, level) * np.maximum(valid - 1, 0)
    below = np.floor(at).astype(np.int64)
    above = np.minimum(below + 1, np.maximum(valid - 1, 0))
    low, high = (np.take_along_axis(ordered, index[None], axis=0)[0] for index in (below, above))
    return np.where((valid < 2) | np.isnan(level), np.nan, low + (high - low) * (at - below))


def _bca_levels(
    observed: np.ndarray,
    draws: np.ndarray,
    valid: np.ndarray,
    jackknife: np.ndarray,
    tail: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The levels of the draws at which the interval ends."""
    below = (draws < observed).sum(axis=0) + (draws <= observed).sum(axis=0)
    bias = special.ndtri(_share(below, 2 * valid))
    influence = jackknife.mean(axis=0) - jackknife
    spread = (influence**2).sum(axis=0)
    acceleration = np.where(spread == 0, 0, _share((influence**3).sum(axis=0), 6 * spread**1.5))

    def level(z: float) -> np.ndarray:
        # A bias without end, of an observed value that no draw reaches, has no level.
        with np.errstate(invalid="ignore"):
            return special.ndtr(bias + (bias + z) / (1 - acceleration * (bias + z)))

    return level(special.ndtri(tail)), level(special.ndtri(1 - tail))
