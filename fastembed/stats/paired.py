"""Are two models different on the same donors or images: a permutation test of pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .resample import as_seed, check_count

# Values of a statistic closer than this, relatively, are equal: the order of a sum rounds them.
_EQUAL = 1e-13
_CHUNK = 1 << 22  # numbers per batch of swapped samples, 32 MB


@dataclass(frozen=True)
class PairedTest:
    """Attributes:
    difference: statistic(a) - statistic(b).
    p: two-sided.
    exact: whether all swaps were made, or a random part of them.
    swaps: how many.
    """

    difference: float
    p: float
    exact: bool
    swaps: int


def paired_test(
    a: np.ndarray,
    b: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    draws: int = 9999,
    seed: int = 0,
) -> PairedTest:
    """Permutation test of a difference between two models on the same donors, or images.

    If the models were alike, each pair might as well have come the other way round. P is the
    share of the 2^D ways to swap pairs whose difference is at least as large, either sign;
    for the mean of one number per donor that is the sign-flip test of the differences.

    Args:
        a: [D] or [D, K], what the first model reached on each donor.
        b: the same shape, of the second model.
        statistic: of [..., D, K] that gives [...], such as `mean_ap` or `pooled_f1`; None is
            the mean of [D].
        draws: ways to swap; all of them where there are no more than that, else as many at
            random, and p = (1 + at least as large) / (1 + draws).
        seed: 0..2^64 - 1, for the random ones; pair j of draw b is swapped by the top bit of
            number j of NumPy's PCG64 of that seed, row after row.

    Returns:
        `PairedTest`.

    Raises:
        ValueError: shapes that differ, no pairs, a value that is not finite, a statistic that
            is not a finite number, draws or seed out of range.

    Exactness: p equal to ``scipy.stats.permutation_test(permutation_type="samples")`` where
        all ways are taken.
    """
    a, b = (np.asarray(part, dtype=np.float64) for part in (a, b))
    if a.shape != b.shape or a.ndim not in (1, 2) or len(a) == 0:
        raise ValueError(
            "a and b must be [D] or [D, K], alike, of a pair at least; "
            f"got {list(a.shape)} and {list(b.shape)}"
        )
    for name, part in (("a", a), ("b", b)):
        if not np.isfinite(part).all():
            raise ValueError(
                f"{name} must be finite; pair {np.argwhere(~np.isfinite(part))[0][0]} is not"
            )
    if statistic is None:
        if a.ndim != 1:
            raise ValueError(f"a and b must be [D] without a statistic; got {list(a.shape)}")
        statistic = _mean
    check_count("draws", draws)
    a, b = (part.reshape(len(part), -1) for part in (a, b))
    pairs = len(a)
    exact = pairs < 63 and 2**pairs <= draws
    swaps = 2**pairs if exact else draws
    difference = float(statistic(a) - statistic(b))
    if not np.isfinite(difference):
        raise ValueError(
            f"statistic must be finite of a and of b; their difference is {difference}"
        )
    random = np.random.Generator(np.random.PCG64(int(as_seed(seed))))
    limit = abs(difference) * (1 - _EQUAL)
    step = max(1, _CHUNK // a.size)
    extreme = 0
    for first in range(0, swaps, step):
        count = min(step, swaps - first)
        if exact:
            ways = np.arange(first, first + count)[:, None] >> np.arange(pairs) & 1
        else:
            ways = random.integers(0, 2**64, (count, pairs), dtype=np.uint64) >> np.uint64(63)
        swapped = ways.astype(bool)[..., None]
        differences = statistic(np.where(swapped, b, a)) - statistic(np.where(swapped, a, b))
        if not np.isfinite(differences).all():
            raise ValueError("statistic must be finite of every way to swap pairs of a and b")
        extreme += int((np.abs(differences) >= limit).sum())
    p = extreme / swaps if exact else (1 + extreme) / (1 + swaps)
    return PairedTest(difference, p, exact, swaps)


def _mean(samples: np.ndarray) -> np.ndarray:
    return samples[..., 0].mean(axis=-1)
