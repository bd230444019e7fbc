"""A regular grid in the world, and how an image is read onto it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .stores import Level

_SLACK = 1e-6  # of a voxel
_BRICK_VOXELS = 1 << 25


@dataclass(frozen=True)
class Grid:
    """Cubic voxels of `voxel` nm, [*shape] along z, y, x, that begin at `corner`, nm."""

    corner: tuple[float, float, float]
    voxel: float
    shape: tuple[int, int, int]


def read_nearest(level: Level, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """The label that each voxel's centre lies in, and where there is one.

    Returns:
        values [*grid.shape] of the level's dtype, 0 outside of the image, and inside
        [*grid.shape] bool. A centre on the border of two voxels belongs to the farther one.
    """
    picks, inside = [], []
    for axis in range(3):
        centres = grid.corner[axis] + (np.arange(grid.shape[axis]) + 0.5) * grid.voxel
        at = np.floor((centres - level.corner[axis]) / level.voxel[axis] + _SLACK).astype(np.int64)
        within = (at >= 0) & (at < level.shape[axis])
        picks.append(at[within])
        inside.append(within)
    values = np.zeros(grid.shape, level.dtype)
    if all(len(pick) for pick in picks):
        values[np.ix_(*inside)] = level.read([_as_slice(pick) for pick in picks])
    z, y, x = inside
    return values, z[:, None, None] & y[:, None] & x


def read_mean(level: Level, grid: Grid, out: np.ndarray | None = None) -> np.ndarray:
    """The image on the grid: [*grid.shape] of the level's dtype, into `out` where it is given.

    On each axis by itself: where the image's voxels are smaller than the grid's, the mean of
    what a grid voxel covers, by exact overlap; else linear between the centres of the image's
    voxels, the outermost value beyond them. Where voxels coincide both are the voxel itself.
    In float32, rounded half to even for integers. The grid must lie inside of the image.

    Memory: the result and a brick of about 2**25 voxels; each brick reads its chunks only.
    """
    taps = [_taps(level, grid, axis) for axis in range(3)]
    if out is None:
        out = np.empty(grid.shape, level.dtype)
    for brick in _bricks(taps, level):
        parts = [(tap[0][rows], tap[1][rows]) for tap, rows in zip(taps, brick, strict=True)]
        first = [int(index.min()) for index, _ in parts]
        rows = [slice(f, int(index.max()) + 1) for f, (index, _) in zip(first, parts, strict=True)]
        block = level.read(rows)
        for axis, (index, weight) in enumerate(parts):
            block = _apply(block, index - first[axis], weight, axis)
        if np.issubdtype(out.dtype, np.integer) and block.dtype != out.dtype:
            np.rint(block, out=block)
        out[brick] = block
    return out


def _taps(level: Level, grid: Grid, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Which source voxels make each grid voxel: indices and weights, both [length, taps]."""
    length, edge = grid.shape[axis], grid.voxel / level.voxel[axis]
    last = level.shape[axis] - 1
    start = (grid.corner[axis] - level.corner[axis]) / level.voxel[axis]
    if edge > 1 + _SLACK:
        begin = _snap(start + np.arange(length) * edge)
        end = _snap(start + (np.arange(length) + 1) * edge)
        count = int((np.ceil(end) - np.floor(begin)).max())
        index = np.floor(begin).astype(np.int64)[:, None] + np.arange(count)
        overlap = np.minimum(end[:, None], index + 1) - np.maximum(begin[:, None], index)
        weight = np.maximum(overlap, 0) / (end - begin)[:, None]
    else:
        centre = _snap(start + (np.arange(length) + 0.5) * edge - 0.5)
        index = np.floor(centre).astype(np.int64)[:, None] + np.arange(2)
        weight = 1 - np.abs(centre[:, None] - index)
    index = np.where(weight > 0, index, index[:, :1])  # a weight of 0 must not cost a chunk
    used = weight.any(axis=0)
    return np.clip(index[:, used], 0, last), weight[:, used].astype(np.float32)


def _bricks(taps: list[tuple[np.ndarray, np.ndarray]], level: Level) -> Iterator[tuple[slice, ...]]:
    """Parts of the grid whose sources are small, cut where most chunks lie one after another."""
    chunk = level.array.chunk_layout.read_chunk.shape
    span = [int(index.max() - index.min()) + 1 for index, _ in taps]
    length = [len(index) for index, _ in taps]
    cuts = [1, 1, 1]
    while math.prod(s / c for s, c in zip(span, cuts, strict=True)) > _BRICK_VOXELS:
        chunks = [s / k / n for s, k, n in zip(span, chunk, cuts, strict=True)]
        axis = max((a for a in range(3) if cuts[a] < length[a]), key=chunks.__getitem__, default=-1)
        if axis < 0:
            break
        cuts[axis] = min(2 * cuts[axis], length[axis])
    edges = [[n * i // c for i in range(c + 1)] for n, c in zip(length, cuts, strict=True)]
    rows = [[slice(*pair) for pair in itertools.pairwise(edge)] for edge in edges]
    return itertools.product(*rows)


def _apply(block: np.ndarray, index: np.ndarray, weight: np.ndarray, axis: int) -> np.ndarray:
    if index.shape[1] == 1:
        if np.array_equal(index[:, 0], np.arange(block.shape[axis])):
            return block
        return block.take(index[:, 0], axis)
    shape = [1, 1, 1]
    shape[axis] = len(index)
    total = None
    for number in range(index.shape[1]):
        part = block.take(index[:, number], axis).astype(np.float32, copy=False)
        part *= weight[:, number].reshape(shape)
        total = part if total is None else np.add(total, part, out=total)
    return total


def _as_slice(index: np.ndarray) -> slice | np.ndarray:
    if np.array_equal(index, np.arange(index[0], index[0] + len(index))):
        return slice(int(index[0]), int(index[0]) + len(index))
    return index


def _snap(position: np.ndarray) -> np.ndarray:
    """Whole numbers where float64 has almost one."""
    whole = np.rint(position)
    return np.where(np.abs(position - whole) < _SLACK, whole, position)
