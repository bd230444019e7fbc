"""Donors made anew from their own tiles, or a sample of donors from the donors: the random part.

Three definitions of the randomness, so that a figure can be repeated wherever it came from:

``"splitmix64"``
    Pick j of donor d in draw b is tile ((r >> 32) n_d) >> 32, where r is output j of SplitMix64
    seeded with s(s(s(seed) + b) + d) and s is its first output of a seed. It depends on these
    numbers alone: not on other donors, the number of draws or threads.
``"python-choices"``
    ``rng = random.Random(seed)``, then for every draw, for every donor in order,
    ``rng.choices(tiles, k=k)``: CPython's Mersenne Twister, floor(random() n).
``"python-choice"``
    The same with k times ``rng.choice(tiles)``, ``rng.randrange(n)`` or ``randint(0, n - 1)``,
    which are alike: the top bits of a word, drawn again while they are n or more.
"""

from __future__ import annotations

import random

import numpy as np

from .._numba import stats as kernels

GENERATORS = ("splitmix64", "python-choices", "python-choice")


def resample_tiles(
    donors: np.ndarray,
    values: np.ndarray,
    *,
    donor_count: int | None = None,
    draws: int = 200,
    fraction: float = 0.8,
    seed: int = 0,
    generator: str = "splitmix64",
) -> np.ndarray:
    """Sums per donor over ceil(fraction n) of its n tiles, drawn with replacement, many times.

    Args:
        donors: [T] integers, the donor of each tile, 0..D - 1.
        values: [T, K] finite numbers that are summed: numerators, denominators.
        donor_count: D; None is one more than the largest of `donors`. A donor without tiles
            has sums of 0.
        draws: B.
        fraction: of a donor's tiles, above 0.
        seed: 0..2^64 - 1; of the Python generators any integer.
        generator: one of `GENERATORS`, defined above. Donors go in ascending order, tiles of
            a donor in the order of the table.

    Returns:
        float64 [B, D, K].

    Raises:
        ValueError: another shape, a value that is not finite, a donor, fraction, number of
            draws or seed out of range, another generator. TypeError: donors or a seed that
            are no integers.
    """
    ordered, starts = _tiles_by_donor(donors, values, donor_count)
    check_count("draws", draws)
    if not (np.isfinite(fraction) and fraction > 0):
        raise ValueError(f"fraction must be a positive number; got {fraction}")
    if generator not in GENERATORS:
        raise ValueError(f"generator must be one of {', '.join(GENERATORS)}; got {generator!r}")
    # In float64, as math.ceil(fraction * n) is.
    picks = np.ceil(fraction * np.diff(starts)).astype(np.int64)
    out = np.empty((draws, len(picks), ordered.shape[1]))
    if generator == "splitmix64":
        kernels.sum_by_splitmix(ordered, starts, picks, as_seed(seed), out)
    else:
        _sum_by_twister(ordered, starts, picks, seed, generator, out)
    return out


def resample_donors(rows: np.ndarray, *, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """Samples of D donors, drawn from D donors with replacement.

    Place j of draw b takes donor ((r >> 32) D) >> 32, r as in ``"splitmix64"`` with d = 0.

    Args:
        rows: [D, K], what is known of each donor.
        draws: B.
        seed: 0..2^64 - 1.

    Returns:
        [B, D, K], of the dtype of `rows`.

    Raises:
        ValueError: another shape, no donors, draws or seed out of range. TypeError: a seed that
            is no integer.
    """
    rows = np.asarray(rows)
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"rows must be [D, K], none of them 0; got {list(rows.shape)}")
    check_count("draws", draws)
    picks = np.empty((draws, len(rows)), dtype=np.int64)
    kernels.pick_by_splitmix(as_seed(seed), picks)
    return rows[picks]


def donor_sums(
    donors: np.ndarray, values: np.ndarray, donor_count: int | None = None
) -> np.ndarray:
    """Sums of values [T, K] over each donor's tiles, in the table's order: float64 [D, K].

    Arguments and errors are those of `resample_tiles`.
    """
    ordered, starts = _tiles_by_donor(donors, values, donor_count)
    sums = np.zeros((len(starts) - 1, ordered.shape[1]))
    np.add.at(sums, np.repeat(np.arange(len(sums)), np.diff(starts)), ordered)
    return sums


def _tiles_by_donor(
    donors: np.ndarray, values: np.ndarray, donor_count: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Values [T, K] as float64 by ascending donor, and where each donor's begin, [D + 1]."""
    donors, values = np.asarray(donors), np.asarray(values, dtype=np.float64)
    if donors.ndim != 1 or values.ndim != 2 or len(donors) != len(values):
        raise ValueError(
            f"donors must be [T] and values [T, K]; got {list(donors.shape)} and "
            f"{list(values.shape)}"
        )
    if donors.dtype.kind not in "iu":
        raise TypeError(f"donors must be integers, indices of donors; got {donors.dtype}")
    if not np.isfinite(values).all():
        tile, column = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(f"values must be finite; tile {tile}, column {column} is not")
    count = int(donors.max(initial=-1)) + 1 if donor_count is None else donor_count
    if len(donors) and not 0 <= donors.min() <= donors.max() < count:
        raise ValueError(f"donors must be in 0..{count - 1}; got {donors.min()} and {donors.max()}")
    order = donors.argsort(kind="stable")
    return values[order], np.append(0, np.bincount(donors, minlength=count).cumsum())


def check_count(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name} must be 1 or more; got {count}")


def as_seed(seed: int) -> np.uint64:
    if not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed must be an integer; got {type(seed).__name__}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in 0..2^64 - 1; got {seed}")
    return np.uint64(seed)


def _sum_by_twister(
    ordered: np.ndarray,
    starts: np.ndarray,
    picks: np.ndarray,
    seed: int,
    generator: str,
    out: np.ndarray,
) -> None:
    if generator == "python-choices":
        add = kernels.sum_by_python_choices
    else:
        add = kernels.sum_by_python_choice
    *key, position = random.Random(int(seed)).getstate()[1]
    twister = np.random.MT19937()
    twister.state = {
        "bit_generator": "MT19937",
        "state": {"key": np.array(key, dtype=np.uint32), "pos": position},
    }
    # Words come in parts; a draw that they do not last for is made again with more of them.
    words, done = np.empty(0, dtype=np.uint64), 0
    while done < len(out):
        words = np.append(words, twister.random_raw(1 << 18))
        made, used = add(ordered, starts, picks, words, out[done:])
        words, done = words[used:], done + made
