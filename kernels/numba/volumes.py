"""Contract: fastembed/ops/volumes.py."""

import numpy as np
import torch
from numba import njit


def triplane_accumulate(
    planes: list[torch.Tensor], at: torch.Tensor, weight: torch.Tensor, out: torch.Tensor
) -> None:
    present = sum(plane.numel() > 0 for plane in planes)
    scale = np.float32(1) / np.float32(present)
    low, high = at.numpy()
    if out.dtype == torch.float16:  # Numba has none on a CPU: bits then
        target, store = out.view(torch.int16).numpy().view(np.uint16), _store_halves
    else:
        target, store = out.numpy(), _store
    empty = np.empty((0, 0, 0), dtype=np.float32)
    for c in range(len(out)):
        # One channel side by side, in float32 where it was not: small beside the block.
        grids = [
            plane[:, c].to(torch.float32).contiguous().numpy() if plane.numel() else empty
            for plane in planes
        ]
        _accumulate(*grids, low, high, weight.numpy(), scale, store, target[c])


@njit(nogil=True)
def _accumulate(xy, xz, yz, low, high, weight, scale, store, out):
    depth, height, width = out.shape
    y_xy, x_xy, z_xz, x_xz = 0, height, height + width, height + width + depth
    z_yz, y_yz = height + 2 * width + depth, height + 2 * width + 2 * depth
    # Upsampled along x only: what is left of xz are its rows, of yz, whose x are slices, all.
    along_x = np.zeros((max(1, xz.shape[1]), height, width), dtype=np.float32)
    for y in range(len(xz)):
        for row in range(low[z_xz], high[z_xz + depth - 1] + 1):
            _expand(xz[y, row], low[x_xz:], high[x_xz:], weight[x_xz:], scale, along_x[row, y])
    turned = np.zeros((max(1, yz.shape[1]), max(1, yz.shape[2]), width), dtype=np.float32)
    for x in range(len(yz)):
        for row in range(low[z_yz], high[z_yz + depth - 1] + 1):
            for column in range(yz.shape[2]):
                turned[row, column, x] = yz[x, row, column] * scale
    from_xy = np.zeros((max(1, xy.shape[1]), width), dtype=np.float32)
    from_yz = np.empty(turned.shape[1:], dtype=np.float32)
    total = np.empty(width, dtype=np.float32)
    for z in range(depth):
        if len(xy):
            for row in range(low[y_xy], high[y_xy + height - 1] + 1):
                _expand(xy[z, row], low[x_xy:], high[x_xy:], weight[x_xy:], scale, from_xy[row])
        start, end, t = turned[low[z_yz + z]], turned[high[z_yz + z]], weight[z_yz + z]
        for column in range(low[y_yz], high[y_yz + height - 1] + 1):
            for x in range(width):
                a = start[column, x]
                from_yz[column, x] = a + t * (end[column, x] - a)
        start, end, tz = along_x[low[z_xz + z]], along_x[high[z_xz + z]], weight[z_xz + z]
        for y in range(height):
            a0, a1, ta = from_xy[low[y]], from_xy[high[y]], weight[y]
            b0, b1 = start[y], end[y]
            c0, c1, tc = from_yz[low[y_yz + y]], from_yz[high[y_yz + y]], weight[y_yz + y]
            for x in range(width):
                a = a0[x] + ta * (a1[x] - a0[x])
                b = b0[x] + tz * (b1[x] - b0[x])
                c = c0[x] + tc * (c1[x] - c0[x])
                total[x] = (a + b) + c
            store(total, out[z, y])


@njit(nogil=True)
def _expand(tokens, low, high, weight, scale, out):
    for x in range(len(out)):
        start = tokens[low[x]] * scale
        out[x] = start + weight[x] * (tokens[high[x]] * scale - start)


@njit(nogil=True)
def _store(values, out):
    for x in range(len(out)):
        out[x] = values[x]


@njit(nogil=True)
def _store_halves(values, out):
    """The bits of float16, to nearest even; as in csrc/floats.h."""
    bits = values.view(np.uint32)
    half = np.float32(0.5)
    for x in range(len(out)):
        magnitude = bits[x] & np.uint32(0x7FFFFFFF)
        rounded = magnitude - np.uint32(112 << 23) + np.uint32(0xFFF) + ((magnitude >> 13) & 1)
        result = np.uint32(rounded) >> 13
        if magnitude < np.uint32(113 << 23):
            # At 0.5 one step of float32 is 2^-24, float16's smallest.
            shifted = np.float32(abs(values[x]) + half)
            result = shifted.view(np.uint32) - np.uint32(126 << 23)
        if magnitude >= np.uint32(143 << 23):
            result = np.uint32(0x7C00)
        if magnitude > np.uint32(0x7F800000):
            result = np.uint32(0x7E00)
        out[x] = np.uint16(result | ((bits[x] >> 16) & np.uint32(0x8000)))
