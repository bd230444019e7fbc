"""The false discovery rate of Benjamini and Hochberg."""

from __future__ import annotations

import numpy as np


def fdr_bh(p: np.ndarray, families: np.ndarray | None = None) -> np.ndarray:
    """P-values adjusted so that rejecting those below q keeps the false discovery rate below q.

    q_(i) = min over j >= i of p_(j) m / j, at most 1; m is the number of p-values that are not
    NaN, of the same family where there are families.

    Args:
        p: p-values of any shape; NaN is a test that was not made: it does not count in m and
            stays NaN.
        families: a label for each p-value: every family is adjusted by itself.

    Returns:
        float64, of the shape of `p`.

    Raises:
        ValueError: a value outside 0..1, or families of another shape.

    Exactness: within 1e-12 of ``statsmodels.stats.multitest.multipletests(method="fdr_bh")``.
    Source: Benjamini and Hochberg, 1995.
    """
    p = np.asarray(p, dtype=np.float64)
    outside = (p < 0) | (p > 1)
    if outside.any():
        raise ValueError(f"p must be in 0..1; got {p[outside].flat[0]}")
    adjusted = np.full(p.shape, np.nan)
    if families is None:
        groups = [~np.isnan(p)]
    else:
        families = np.asarray(families)
        if families.shape != p.shape:
            raise ValueError(
                f"families must have p's shape, {list(p.shape)}; got {list(families.shape)}"
            )
        groups = [(families == label) & ~np.isnan(p) for label in np.unique(families)]
    for group in groups:
        values = p[group]
        order = values.argsort(kind="stable")[::-1]  # the largest first
        steps = values[order] * (len(values) / np.arange(len(values), 0, -1))
        values[order] = np.minimum(np.minimum.accumulate(steps), 1)
        adjusted[group] = values
    return adjusted
