"""Spearman's rank correlation of columns, with its p-values.

Ranks are kept doubled and centred, 2 rank - (n + 1): integers whose sum is 0 even with ties. A
correlation is then a ratio of integers that float64 holds up to n = 300,000, so a perfect one
is exactly 1, and its bits do not depend on which columns are computed together.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from scipy import special
from scipy.stats import rankdata

# Pairs that `method="exact"` takes: 2^12 subsets by 1145 sums, 38 MB.
EXACT_LIMIT = 12

CONSTANT_X, CONSTANT_Y, FEW = "x is constant", "y is constant", "fewer than 3 pairs"


@dataclass(frozen=True)
class Spearman:
    """Rank correlations of pairs of columns; all arrays of one shape.

    Attributes:
        rho: float64; NaN where it is not defined.
        p: float64, two-sided; NaN where rho is.
        n: int64, pairs that count.
        dropped: int64, pairs of which a value is missing.
        reason: why rho is not defined, "" where it is.
    """

    rho: np.ndarray
    p: np.ndarray
    n: np.ndarray
    dropped: np.ndarray
    reason: np.ndarray


def spearman(x: np.ndarray, y: np.ndarray, *, method: str = "t") -> Spearman:
    """Spearman's rho of each column of `x` with each column of `y`.

    The correlation of ranks, ties sharing their average. A pair of which a value is NaN is left
    out of its own correlation only, and counted.

    Args:
        x: [N] or [N, P] numbers; NaN is missing.
        y: [N] or [N, Q].
        method: how p comes about. ``"t"``: Student's t with n - 2 degrees of freedom, as
            SciPy; ``"exact"``: the share of all n! orders, as likely as each other, with
            |rho| at least as large, ties and all; for at most `EXACT_LIMIT` pairs.

    Returns:
        `Spearman`, arrays of shape [], [P], [Q] or [P, Q], as `x` and `y` have columns.

    Raises:
        ValueError: other shapes, an infinite value, another method, more pairs than
            `EXACT_LIMIT` for ``"exact"``.

    Exactness: rho and p within 1e-12 of ``scipy.stats.spearmanr``; where |rho| is 1 the p of
        ``"t"`` is 0, where SciPy's depends on how its rho is rounded.
    """
    if method not in ("t", "exact"):
        raise ValueError(f'method must be "t" or "exact"; got {method!r}')
    columns_x, columns_y = _columns("x", x), _columns("y", y)
    if columns_x.shape[1] != columns_y.shape[1]:
        raise ValueError(
            f"x and y must have the same rows; got {columns_x.shape[1]} and {columns_y.shape[1]}"
        )
    shape = (len(columns_x), len(columns_y))
    rho, p = np.full(shape, np.nan), np.full(shape, np.nan)
    n = np.zeros(shape, dtype=np.int64)
    reason = np.full(shape, "", dtype="<U18")
    # Columns that miss the same rows are ranked and multiplied together.
    for missing_x, of_x in _patterns(columns_x):
        for missing_y, of_y in _patterns(columns_y):
            here = np.ix_(of_x, of_y)
            kept = ~(missing_x | missing_y)
            n[here] = count = int(kept.sum())
            if count < 3:
                reason[here] = FEW
                continue
            ranks_x = doubled_ranks(columns_x[of_x][:, kept])
            ranks_y = doubled_ranks(columns_y[of_y][:, kept])
            varies_x, varies_y = ranks_x.any(axis=1), ranks_y.any(axis=1)
            reason[here] = np.where(
                varies_x[:, None], np.where(varies_y, "", CONSTANT_Y), CONSTANT_X
            )
            rho[here] = correlation_of_ranks(ranks_x[:, None], ranks_y)
            if method == "t":
                p[here] = p_of_rho(rho[here], count)
            else:
                p[here] = _exact(ranks_x, ranks_y)
    ends = ((0,) if np.ndim(x) == 1 else (slice(None),)) + (
        (0,) if np.ndim(y) == 1 else (slice(None),)
    )
    dropped = columns_x.shape[1] - n
    return Spearman(*(np.asarray(part[ends]) for part in (rho, p, n, dropped, reason)))


def doubled_ranks(rows: np.ndarray) -> np.ndarray:
    """2 rank - (n + 1) along the last axis, ties sharing their average: whole numbers."""
    return 2 * rankdata(rows, axis=-1) - (rows.shape[-1] + 1)


def correlation_of_ranks(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of doubled ranks along the last axis; NaN where one of them is constant."""
    # a [P, 1, n] and b [Q, n] are P rows times Q rows, which a matrix product does in less time.
    if a.ndim == b.ndim + 1 == 3 and a.shape[1] == 1:
        products = a[:, 0] @ b.T
    else:
        products = (a * b).sum(axis=-1)
    squares = (a * a).sum(axis=-1) * (b * b).sum(axis=-1)
    rho = np.divide(
        products, np.sqrt(squares), out=np.full(products.shape, np.nan), where=squares > 0
    )
    return np.clip(rho, -1, 1)


def p_of_rho(rho: np.ndarray, n: int) -> np.ndarray:
    """Two-sided p of Student's t = rho sqrt((n - 2) / (1 - rho^2)), n - 2 degrees of freedom."""
    with np.errstate(divide="ignore"):  # |rho| = 1 is t = infinity, p = 0
        t = np.abs(rho) * np.sqrt((n - 2) / ((1 + rho) * (1 - rho)))
    return 2 * special.stdtr(n - 2, -t)


def _columns(name: str, values: np.ndarray) -> np.ndarray:
    """[N] or [N, P] as float64 [P, N]."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in (1, 2):
        raise ValueError(f"{name} must be [N] or [N, columns]; got {list(array.shape)}")
    if np.isinf(array).any():
        raise ValueError(
            f"{name} must be finite or NaN; {int(np.isinf(array).sum())} values are infinite"
        )
    return np.atleast_2d(array.T)


def _patterns(columns: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(which rows are missing, [indices of the columns that miss these]) of columns [P, N]."""
    patterns: dict[bytes, list[int]] = {}
    for i, missing in enumerate(np.isnan(columns)):
        patterns.setdefault(missing.tobytes(), []).append(i)
    return [
        (np.frombuffer(pattern, dtype=bool), np.array(which)) for pattern, which in patterns.items()
    ]


def _exact(ranks_x: np.ndarray, ranks_y: np.ndarray) -> np.ndarray:
    count = ranks_x.shape[1]
    if count > EXACT_LIMIT:
        raise ValueError(f'method "exact" takes at most {EXACT_LIMIT} pairs; got {count}: use "t"')
    p = np.full((len(ranks_x), len(ranks_y)), np.nan)
    for i, a in enumerate(ranks_x.astype(np.int64)):
        for j, b in enumerate(ranks_y.astype(np.int64)):
            if a.any() and b.any():
                at_least = _orders_at_least(tuple(sorted(a.tolist())), tuple(sorted(b.tolist())))
                p[i, j] = at_least[abs(int(a @ b))] / math.factorial(count)
    return p


@functools.lru_cache(maxsize=64)
def _orders_at_least(a: tuple[int, ...], b: tuple[int, ...]) -> np.ndarray:
    """[s]: in how many of the n! orders of `b` the products with `a` sum to s or more, or -s
    or less.

    Over the sets of elements of `b` that the first elements of `a` may have: counts[set, sum].
    """
    n = len(a)
    # Of sums on the way too, not only of all n products.
    largest = sum(x * y for x, y in zip(sorted(map(abs, a)), sorted(map(abs, b)), strict=True))
    counts = np.zeros((1 << n, 2 * largest + 1), dtype=np.int64)
    counts[0, largest] = 1
    for chosen in range((1 << n) - 1):
        row = counts[chosen]
        first, last = np.flatnonzero(row)[[0, -1]]
        for j in range(n):
            if not chosen >> j & 1:
                step = a[chosen.bit_count()] * b[j]
                counts[chosen | 1 << j, first + step : last + step + 1] += row[first : last + 1]
    every = counts[-1]
    either = every[largest:] + np.append(0, every[:largest][::-1])
    return either[::-1].cumsum()[::-1]
