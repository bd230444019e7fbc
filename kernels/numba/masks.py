"""Contract: fastembed/ops/masks.py."""

from collections.abc import Iterator

import numpy as np
import torch
from numba import njit

# A table lookup copies bits, so only the width of an element matters; NumPy lacks bfloat16.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def blend_crops(
    images: list[torch.Tensor],
    ids: list[torch.Tensor],
    crops: torch.Tensor,
    background: torch.Tensor,
    table: torch.Tensor,
    cubic: bool,
    narrow: bool,
    tall_first: bool,
    out: torch.Tensor,
) -> None:
    bits = _BITS[table.element_size()]
    windows = _windows(images, ids, crops, background)
    values, results = table.view(bits).numpy(), out.view(bits).numpy()
    size = out.shape[-1]
    for window, result in zip(windows, results, strict=True):
        height, width, _ = window.shape
        rows = _integers(*_weights(height, size, cubic), narrow)
        columns = _integers(*_weights(width, size, cubic), narrow)
        if tall_first and height > size and height - size > 2 * (width - size):
            levels = _across(_down(window, *rows), *columns)
        else:
            levels = _down(_across(window, *columns), *rows)
        _look_up(levels, values, result)


def blend_crops_float(
    images: list[torch.Tensor],
    ids: list[torch.Tensor],
    crops: torch.Tensor,
    background: torch.Tensor,
    ramp: torch.Tensor,
    out: torch.Tensor,
) -> None:
    size = out.shape[-1]
    values = np.empty(out.shape[1:], dtype=np.float32)
    windows = _windows(images, ids, crops, background)
    for window, result in zip(windows, out, strict=True):
        height, width, _ = window.shape
        rows, columns = _weights(height, size, False), _weights(width, size, False)
        _resize_floats(window, *rows, *columns, ramp.numpy(), values)
        result.copy_(torch.from_numpy(values))


def _windows(
    images: list[torch.Tensor],
    ids: list[torch.Tensor],
    crops: torch.Tensor,
    background: torch.Tensor,
) -> Iterator[np.ndarray]:
    """The crops, one after the other, each faded outside of its segment."""
    pixels, names = [image.numpy() for image in images], [part.numpy() for part in ids]
    for i, *crop in crops.tolist():
        yield _blend(pixels[i], names[i], background.numpy(), *crop)


@njit(nogil=True)
def _blend(image, ids, background, segment, top, left, height, width):
    window = np.empty((height, width, 3), dtype=np.uint8)
    for y in range(height):
        for x in range(width):
            inside = ids[top + y, left + x] == segment
            for c in range(3):
                level = image[top + y, left + x, c]
                window[y, x, c] = level if inside else background[level]
    return window


@njit(nogil=True, error_model="numpy")
def _weights(length, size, cubic):
    """First pixel of each output and the weights from there on, in Pillow's order of steps."""
    scale = length / size
    stretch = max(scale, 1.0)
    support = (2.0 if cubic else 1.0) * stretch
    first = np.empty(size, dtype=np.int64)
    weights = np.zeros((size, 2 * int(np.ceil(support)) + 1))
    for i in range(size):
        center = (i + 0.5) * scale
        start = max(int(center - support + 0.5), 0)
        count = min(int(center + support + 0.5), length) - start
        total = 0.0
        for k in range(count):
            x = abs((k + start - center + 0.5) * (1.0 / stretch))
            weight = 0.0
            if not cubic:
                weight = max(1.0 - x, 0.0)
            elif x < 1:
                weight = (1.5 * x - 2.5) * x * x + 1
            elif x < 2:
                weight = (((x - 5) * x + 8) * x - 4) * -0.5
            weights[i, k] = weight
            total += weight
        for k in range(count):
            weights[i, k] /= total
        first[i] = start
    return first, weights


@njit(nogil=True)
def _integers(first, weights, narrow):
    bits = 22
    if narrow:
        bits = 0
        largest = weights.max()
        while bits < 22 and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
            bits += 1
    rounded = np.empty(weights.shape, dtype=np.int32)
    for i in range(weights.shape[0]):
        for k in range(weights.shape[1]):
            weight = weights[i, k] * (1 << bits)
            rounded[i, k] = int(weight + 0.5) if weight >= 0 else int(weight - 0.5)
    return first, rounded, bits


@njit(nogil=True)
def _across(levels, first, weights, bits):
    height, width, _ = levels.shape
    size, taps = weights.shape
    result = np.empty((height, size, 3), dtype=np.uint8)
    half = np.int32(1 << bits >> 1)
    for y in range(height):
        for x in range(size):
            start = first[x]
            red = green = blue = half
            for k in range(min(taps, width - start)):
                weight = weights[x, k]
                red += weight * np.int32(levels[y, start + k, 0])
                green += weight * np.int32(levels[y, start + k, 1])
                blue += weight * np.int32(levels[y, start + k, 2])
            result[y, x, 0] = min(max(red >> bits, 0), 255)
            result[y, x, 1] = min(max(green >> bits, 0), 255)
            result[y, x, 2] = min(max(blue >> bits, 0), 255)
    return result


@njit(nogil=True)
def _down(levels, first, weights, bits):
    height, width, _ = levels.shape
    size, taps = weights.shape
    source = levels.reshape(height, width * 3)
    result = np.empty((size, width, 3), dtype=np.uint8)
    target = result.reshape(size, width * 3)
    sums = np.empty(width * 3, dtype=np.int32)
    for y in range(size):
        sums[:] = 1 << bits >> 1
        start = first[y]
        for k in range(min(taps, height - start)):
            weight = weights[y, k]
            row = source[start + k]
            for i in range(row.size):
                sums[i] += weight * np.int32(row[i])
        for i in range(sums.size):
            target[y, i] = min(max(sums[i] >> bits, 0), 255)
    return result


@njit(nogil=True)
def _look_up(levels, table, result):
    for c in range(3):
        for y in range(levels.shape[0]):
            for x in range(levels.shape[1]):
                result[c, y, x] = table[c, levels[y, x, c]]


@njit(nogil=True)
def _resize_floats(levels, row_first, row_weights, column_first, column_weights, ramp, result):
    height, width, _ = levels.shape
    size = result.shape[1]
    row = np.empty(width * 3, dtype=np.float32)
    flat = levels.reshape(height, width * 3)
    for y in range(size):
        row[:] = 0
        start = row_first[y]
        for k in range(min(row_weights.shape[1], height - start)):
            weight = np.float32(row_weights[y, k])
            for i in range(row.size):
                row[i] += weight * np.float32(flat[start + k, i])
        for x in range(size):
            start = column_first[x]
            for c in range(3):
                total = np.float32(0)
                for k in range(min(column_weights.shape[1], width - start)):
                    total += np.float32(column_weights[x, k]) * row[(start + k) * 3 + c]
                result[c, y, x] = (total / np.float32(255) - ramp[0, c]) / ramp[1, c]
