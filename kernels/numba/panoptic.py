"""Contract: fastembed/ops/panoptic.py."""

import numpy as np
import torch
from numba import njit

# Columns of the segment table.
_ID, _Y0, _X0, _Y1, _X1, _AREA = range(6)


def decode_panoptic(images: list[torch.Tensor], out: list[torch.Tensor]) -> None:
    for rgb, ids in zip(images, out, strict=True):
        _decode(rgb.numpy().reshape(-1), ids.numpy().reshape(-1))


def panoptic_segments(maps: list[torch.Tensor], void_id: int, out: torch.Tensor) -> None:
    for pixels, table in zip(maps, out, strict=True):
        segments = _rgb_segments if pixels.ndim == 3 else _id_segments
        segments(pixels.numpy(), void_id, table.numpy())


def scanline_segments(
    lines: torch.Tensor, void_id: int, ids: torch.Tensor, out: torch.Tensor
) -> None:
    _line_segments(lines.numpy(), void_id, ids.numpy(), out.numpy())


@njit(nogil=True)
def _decode(rgb, ids):
    for x in range(ids.size):
        i = 3 * x
        ids[x] = np.int32(rgb[i]) | np.int32(rgb[i + 1]) << 8 | np.int32(rgb[i + 2]) << 16


@njit(nogil=True)
def _id_segments(pixels, void_id, table):
    table[:] = 0
    for y in range(pixels.shape[0]):
        if not _add_row(pixels[y], y, void_id, table):
            return


@njit(nogil=True)
def _rgb_segments(pixels, void_id, table):
    table[:] = 0
    ids = np.empty(pixels.shape[1], dtype=np.int32)
    for y in range(pixels.shape[0]):
        _decode(pixels[y].reshape(-1), ids)
        if not _add_row(ids, y, void_id, table):
            return


@njit(nogil=True)
def _line_segments(lines, void_id, ids, table):
    table[:] = 0
    height = lines.shape[0]
    width = lines.shape[1] - 1
    row = np.zeros(3 + width, dtype=np.uint8)  # three zeros left of it
    above = np.zeros(3 + width, dtype=np.uint8)
    decoded = np.empty(width // 3, dtype=np.int32)
    for y in range(height):
        _unfilter(lines[y], above, row)
        if ids.shape[0]:
            decoded = ids[y]
        _decode(row[3:], decoded)
        if not _add_row(decoded, y, void_id, table):
            return
        row, above = above, row


@njit(nogil=True)
def _unfilter(line, above, row):
    kind = line[0]
    residuals = line[1:]
    if kind == 1:
        for i in range(residuals.size):
            row[i + 3] = residuals[i] + row[i]
    elif kind == 2:
        for i in range(residuals.size):
            row[i + 3] = residuals[i] + above[i + 3]
    elif kind == 3:
        for i in range(residuals.size):
            row[i + 3] = residuals[i] + (np.int32(row[i]) + np.int32(above[i + 3]) >> 1)
    elif kind == 4:
        for i in range(residuals.size):
            a = np.int32(row[i])
            b = np.int32(above[i + 3])
            c = np.int32(above[i])
            pa = abs(b - c)
            pb = abs(a - c)
            pc = abs(a + b - 2 * c)
            predicted = a if pa <= pb and pa <= pc else b if pb <= pc else c
            row[i + 3] = residuals[i] + predicted
    else:
        row[3:] = residuals


@njit(nogil=True)
def _add_row(ids, y, void_id, table):
    """Adds the runs of one row to the table; False where an id finds no room in it."""
    width = ids.size
    start = 0
    for x in range(width):
        if x + 1 < width and ids[x + 1] == ids[x]:
            continue
        if ids[x] != void_id and not _add_run(ids[x], y, start, x, table):
            return False
        start = x + 1
    return True


@njit(nogil=True)
def _add_run(segment, y, x0, x1, table):
    slots = table.shape[0] - 1
    # 2^32 / golden ratio spreads ids that are alike. The step makes ids that meet in one slot
    # part again; it is odd, so it comes by every slot.
    mixed = np.int64(segment) * 0x9E3779B1 & 0xFFFFFFFF
    slot = mixed * slots >> 32
    while True:
        row = table[1 + slot]
        if row[_AREA] == 0:
            break
        if row[_ID] == segment:
            row[_X0] = min(row[_X0], x0)
            row[_Y1] = y
            row[_X1] = max(row[_X1], x1)
            row[_AREA] += x1 - x0 + 1
            return True
        slot = (slot + (mixed | 1)) & (slots - 1)
    table[0, 0] += 1
    if table[0, 0] > slots // 2:
        return False
    row[_ID] = segment
    row[_Y0] = y
    row[_X0] = x0
    row[_Y1] = y
    row[_X1] = x1
    row[_AREA] = x1 - x0 + 1
    return True
