"""Contract: fastembed/stats/resample.py. Tiles are sorted by donor: starts[d] is d's first."""

import numpy as np
from numba import njit

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_1, _2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_27, _30, _31, _32 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)


@njit(nogil=True)
def splitmix(state):
    """The number that SplitMix64 gives after `state`."""
    z = state + _GOLDEN
    z = (z ^ (z >> _30)) * _1
    z = (z ^ (z >> _27)) * _2
    return z ^ (z >> _31)


@njit(nogil=True)
def sum_by_splitmix(values, starts, picks, seed, out):
    draws, donors, columns = out.shape
    for draw in range(draws):
        of_draw = splitmix(splitmix(seed) + np.uint64(draw))
        for donor in range(donors):
            state = splitmix(of_draw + np.uint64(donor))
            first = starts[donor]
            count = np.uint64(starts[donor + 1] - first)
            sums = out[draw, donor]
            sums[:] = 0
            for _ in range(picks[donor]):
                tile = np.int64((splitmix(state) >> _32) * count >> _32) + first
                state += _GOLDEN
                for column in range(columns):
                    sums[column] += values[tile, column]


@njit(nogil=True)
def pick_by_splitmix(seed, out):
    draws, count = out.shape
    for draw in range(draws):
        state = splitmix(splitmix(splitmix(seed) + np.uint64(draw)))
        for i in range(count):
            out[draw, i] = np.int64((splitmix(state) >> _32) * np.uint64(count) >> _32)
            state += _GOLDEN


# The next two make draws while the words of the twister last: (draws made, words used by them).


@njit(nogil=True)
def sum_by_python_choices(values, starts, picks, words, out):
    draws, donors, columns = out.shape
    used = 2 * picks.sum()
    made = min(draws, words.size // used) if used else draws
    at = 0
    for draw in range(made):
        for donor in range(donors):
            first = starts[donor]
            count = np.float64(starts[donor + 1] - first)
            sums = out[draw, donor]
            sums[:] = 0
            for _ in range(picks[donor]):
                high, low = words[at] >> 5, words[at + 1] >> 6
                at += 2
                fraction = (high * 67108864.0 + low) * (1.0 / 9007199254740992.0)
                tile = np.int64(fraction * count) + first
                for column in range(columns):
                    sums[column] += values[tile, column]
    return made, at


@njit(nogil=True)
def sum_by_python_choice(values, starts, picks, words, out):
    draws, donors, columns = out.shape
    at = 0
    for draw in range(draws):
        begin = at
        for donor in range(donors):
            first = starts[donor]
            count = starts[donor + 1] - first
            bits = 0
            while count >> bits:
                bits += 1
            sums = out[draw, donor]
            sums[:] = 0
            for _ in range(picks[donor]):
                tile = count
                while tile >= count:
                    if at == words.size:
                        return draw, begin
                    tile = np.int64(words[at]) >> (32 - bits)
                    at += 1
                for column in range(columns):
                    sums[column] += values[first + tile, column]
    return draws, at
