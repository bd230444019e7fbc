"""Contract: fastembed/ops/labels.py."""

from collections.abc import Callable

import numpy as np
import torch
from numba import njit

# Columns of the table; each channel's three follow.
_ID, _Y0, _X0, _Y1, _X1, _AREA, _CHANNELS = range(7)


def label_statistics(
    labels: list[torch.Tensor], images: list[torch.Tensor], out: torch.Tensor
) -> None:
    for label, image, table in zip(labels, images, out.numpy(), strict=True):
        if image.dtype == torch.float32:
            _float_statistics(label.numpy(), image.numpy(), table, table.view(np.float64))
        else:
            _integer_statistics(label.numpy(), image.numpy(), table, table)


@njit(nogil=True)
def _add_integers(pixels, row, sums, column):
    total = np.int64(0)
    low = high = pixels[0]
    for value in pixels:
        total += np.int64(value)
        low = min(low, value)
        high = max(high, value)
    sums[column] += total
    row[column + 1] = min(row[column + 1], np.int64(low))
    row[column + 2] = max(row[column + 2], np.int64(high))


@njit(nogil=True)
def _add_floats(pixels, row, sums, column):
    total = sums[column]  # pixel after pixel, across the object's runs: the order is promised
    low = high = pixels[0]
    for value in pixels:
        total += np.float64(value)
        low = min(low, value)
        high = max(high, value)
    sums[column] = total
    row[column + 1] = min(row[column + 1], _key(low))
    row[column + 2] = max(row[column + 2], _key(high))


@njit(nogil=True)
def _key(value):
    bits = np.float32(value).view(np.int32)
    return np.int64(bits ^ 0x7FFFFFFF if bits < 0 else bits)


@njit(nogil=True)
def _row_of(label, y, x0, x1, table):
    """The row of a run's object, which a new one takes; 0 where there is no room for it."""
    slots = table.shape[0] - 1
    # 2^64 / golden ratio spreads labels that are alike. The step makes labels that meet in one
    # slot part again; it is odd, so it comes by every slot.
    mixed = (label * np.int64(-0x61C8864680B583EB)) >> 32 & 0xFFFFFFFF
    slot = mixed * slots >> 32
    while True:
        row = table[1 + slot]
        if row[_AREA] == 0:
            break
        if row[_ID] == label:
            row[_X0] = min(row[_X0], x0)
            row[_Y1] = y
            row[_X1] = max(row[_X1], x1)
            row[_AREA] += x1 - x0 + 1
            return 1 + slot
        slot = (slot + (mixed | 1)) & (slots - 1)
    table[0, 0] += 1
    if table[0, 0] > slots // 2:
        return 0
    row[_ID] = label
    row[_Y0] = y
    row[_X0] = x0
    row[_Y1] = y
    row[_X1] = x1
    row[_AREA] = x1 - x0 + 1
    row[_CHANNELS + 1 :: 3] = np.iinfo(np.int64).max
    row[_CHANNELS + 2 :: 3] = np.iinfo(np.int64).min
    return 1 + slot


def _kernel(add: Callable) -> Callable:
    @njit(nogil=True)
    def statistics(labels, image, table, sums):
        table[:] = 0
        height, width = labels.shape
        for y in range(height):
            line = labels[y]
            start = 0
            for x in range(width):
                if x + 1 < width and line[x + 1] == line[x]:
                    continue
                if line[x] != 0:
                    at = _row_of(np.int64(line[x]), y, start, x, table)
                    if at == 0:
                        return
                    for c in range(image.shape[0]):
                        column = _CHANNELS + 3 * c
                        add(image[c, y, start : x + 1], table[at], sums[at], column)
                start = x + 1

    return statistics


_integer_statistics = _kernel(_add_integers)
_float_statistics = _kernel(_add_floats)
