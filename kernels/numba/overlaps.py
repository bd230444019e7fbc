"""Contract: fastembed/cellpose/metrics.py."""

import numpy as np
from numba import njit

_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)  # no pair: a label is below 2^32 - 1


@njit(nogil=True)
def count_pairs(first, second):
    """Pairs of labels at one pixel (first << 32 | second), and how many pixels each has."""
    keys = np.full(1024, _EMPTY, dtype=np.uint64)
    counts = np.zeros(1024, dtype=np.int64)
    used = 0
    length = first.size
    start = 0
    while start < length:
        # Neighbours in a row mostly have the same two labels: one look-up for the run.
        a, b = first[start], second[start]
        end = start + 1
        while end < length and first[end] == a and second[end] == b:
            end += 1
        key = np.uint64(a) << np.uint64(32) | np.uint64(b)
        slot = _slot(keys, key)
        if keys[slot] == _EMPTY:
            keys[slot] = key
            used += 1
        counts[slot] += end - start
        start = end
        if 2 * used > keys.size:
            keys, counts = _grow(keys, counts)
    full = keys != _EMPTY
    return keys[full], counts[full]


@njit(nogil=True)
def _slot(keys, key):
    # 2^64 / golden ratio spreads neighbouring labels over the table.
    mask = np.uint64(keys.size - 1)
    slot = (key * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32) & mask
    while keys[slot] != _EMPTY and keys[slot] != key:
        slot = slot + np.uint64(1) & mask
    return slot


@njit(nogil=True)
def _grow(keys, counts):
    larger = np.full(2 * keys.size, _EMPTY, dtype=np.uint64)
    moved = np.zeros(2 * keys.size, dtype=np.int64)
    for i in range(keys.size):
        if keys[i] != _EMPTY:
            slot = _slot(larger, keys[i])
            larger[slot] = keys[i]
            moved[slot] = counts[i]
    return larger, moved
