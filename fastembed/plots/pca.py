"""Principal components of more rows than fit in memory, and rows as colours."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

# Below this share of the first component's variance a component is the rounding of the others.
_NOISE = 1e-12


@dataclass(frozen=True)
class Components:
    """The K directions in which rows differ most, the first one most of all.

    Attributes:
        mean: float64 [C].
        directions: float64 [K, C], orthonormal. Their sign, which mathematics leaves open, is
            the one that makes the entry of the largest magnitude positive (of equals the first).
        shares: float64 [K], of the variance of all rows.
    """

    mean: np.ndarray
    directions: np.ndarray
    shares: np.ndarray

    def project(self, rows: np.ndarray) -> np.ndarray:
        """Rows [N, C] along the directions: float64 [N, K]."""
        return (rows.astype(np.float64) - self.mean) @ self.directions.T


def principal_components(parts: Iterable[np.ndarray], count: int = 3) -> Components:
    """The principal components of all rows of `parts`, [N, C] each and N may differ.

    Holds one part at a time and a covariance [C, C].

    Raises:
        ValueError: fewer than two rows, or fewer than `count` columns.

    Exactness: eigenvectors of the covariance in float64, which is gathered about the running
        mean, part by part (Chan, Golub and LeVeque 1979): no approximation, no sampling.
    """
    total, mean, scatter = 0, 0.0, 0.0
    for part in parts:
        if len(part) == 0:
            continue
        rows = part.astype(np.float64)
        part_mean = rows.mean(axis=0)
        rows -= part_mean
        step = part_mean - mean
        rise = len(rows) / (total + len(rows))
        scatter = scatter + rows.T @ rows + np.outer(step, step) * (total * rise)
        mean = mean + step * rise
        total += len(rows)
    if total < 2:
        raise ValueError(f"principal components need at least two rows; got {total}")
    if len(scatter) < count:
        raise ValueError(f"{count} components need as many columns; got {len(scatter)}")
    variances, vectors = np.linalg.eigh(scatter)  # ascending
    directions = vectors[:, : -count - 1 : -1].T
    largest = np.abs(directions).argmax(axis=1)
    directions = directions * np.sign(directions[np.arange(count), largest])[:, None]
    shares = variances[: -count - 1 : -1].clip(0) / max(np.trace(scatter), np.finfo(float).tiny)
    shares[shares <= _NOISE * shares[0]] = 0
    return Components(mean, directions, shares)


def as_colours(
    values: np.ndarray, shares: np.ndarray, scale: np.ndarray | None = None
) -> np.ndarray:
    """Projections as RGB: float64 [N, 3] to uint8 [N, 3], each component by itself.

    The 1st percentile becomes 0 and the 99th 255, so a few outliers cannot take the contrast
    from all others. A component without variance is 128 throughout.

    Args:
        scale: the values whose percentiles count, [M, 3]; by default `values`.
    """
    low, high = np.percentile(values if scale is None else scale, (1, 99), axis=0)
    flat = (high <= low) | (shares == 0)
    part = (values - low) / np.where(flat, 1, high - low)
    return np.where(flat, 128, np.rint(part.clip(0, 1) * 255)).astype(np.uint8)


def otsu_threshold(values: np.ndarray) -> float:
    """The threshold that parts `values` [N] into the two classes furthest apart.

    Source: Otsu 1979; on the sorted values themselves, not on a histogram.
    """
    ordered = np.sort(values)
    count = np.arange(1, len(ordered))
    below = np.cumsum(ordered)[:-1]
    above = ordered.sum() - below
    rest = len(ordered) - count
    between = count * rest * (below / count - above / rest) ** 2
    split = int(between.argmax())
    return float(ordered[split : split + 2].mean())
