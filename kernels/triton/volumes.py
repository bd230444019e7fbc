"""Contract: fastembed/ops/volumes.py."""

import torch
import triton
import triton.language as tl

TILE = 32


def triplane_accumulate(
    planes: list[torch.Tensor], at: torch.Tensor, weight: torch.Tensor, out: torch.Tensor
) -> None:
    channels, depth, height, width = out.shape
    present = [plane.numel() > 0 for plane in planes]
    sizes = [size for plane in planes for size in (*plane.stride()[:2], plane.shape[3])]
    scale = torch.tensor(1 / sum(present), dtype=torch.float32).item()
    tiles = triton.cdiv(height, TILE) * triton.cdiv(width, TILE)
    with torch.cuda.device_of(out):
        _accumulate[(channels * depth, tiles)](
            *planes, *sizes, at, weight, out, scale, depth, height, width,
            XY=present[0], XZ=present[1], YZ=present[2], SIDE=TILE, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def _lerp(low, high, weight):
    return low + weight * (high - low)


@triton.jit
def _tokens(grid, row, column, inside, scale):
    return tl.load(grid + row + column, mask=inside, other=0).to(tl.float32) * scale


@triton.jit
def _upsampled(
    grid, columns, at, weight, row, column, voxels, inside, scale, COLUMNS_FIRST: tl.constexpr
):
    """A plane at (row, column), places in the tables; along the columns first or the rows."""
    low, high = tl.load(at + row) * columns, tl.load(at + voxels + row) * columns
    left, right = tl.load(at + column), tl.load(at + voxels + column)
    down, across = tl.load(weight + row), tl.load(weight + column)
    a = _tokens(grid, low, left, inside, scale)
    b = _tokens(grid, low, right, inside, scale)
    c = _tokens(grid, high, left, inside, scale)
    d = _tokens(grid, high, right, inside, scale)
    if COLUMNS_FIRST:
        return _lerp(_lerp(a, b, across), _lerp(c, d, across), down)
    else:
        return _lerp(_lerp(a, c, down), _lerp(b, d, down), across)


@triton.jit
def _accumulate(
    xy,
    xz,
    yz,
    xy_slice,
    xy_channel,
    xy_columns,
    xz_slice,
    xz_channel,
    xz_columns,
    yz_slice,
    yz_channel,
    yz_columns,
    at,
    weight,
    out,
    scale,
    depth,
    height,
    width,
    XY: tl.constexpr,
    XZ: tl.constexpr,
    YZ: tl.constexpr,
    SIDE: tl.constexpr,
):
    plane = tl.program_id(0).to(tl.int64)
    c, z = plane // depth, plane % depth
    across = tl.cdiv(width, SIDE)
    y0, x0 = tl.program_id(1) // across * SIDE, tl.program_id(1) % across * SIDE
    # Beyond the border the last voxel once more: every read of the tables is inside of them.
    ys, xs = y0 + tl.arange(0, SIDE), x0 + tl.arange(0, SIDE)
    y = tl.minimum(ys, height - 1).to(tl.int64)
    x = tl.minimum(xs, width - 1).to(tl.int64)
    inside = (ys < height)[:, None] & (xs < width)[None, :]
    voxels = 2 * (depth + height + width)
    of_xy = tl.zeros([SIDE, SIDE], tl.float32)
    of_xz = of_xy
    of_yz = of_xy
    if XY:
        grid = xy + c * xy_channel + z * xy_slice
        of_xy = _upsampled(
            grid, xy_columns, at, weight, y[:, None], height + x[None, :], voxels, inside, scale,
            COLUMNS_FIRST=True,
        )  # fmt: skip
    if XZ:
        grid = xz + c * xz_channel + y[:, None] * xz_slice
        start = height + width
        of_xz = _upsampled(
            grid, xz_columns, at, weight, start + z, start + depth + x[None, :], voxels, inside,
            scale, COLUMNS_FIRST=True,
        )  # fmt: skip
    if YZ:
        # Its slices are x: read with y innermost, then turned.
        grid = yz + c * yz_channel + x[:, None] * yz_slice
        start = height + 2 * width + depth
        turned = _upsampled(
            grid, yz_columns, at, weight, start + z, start + depth + y[None, :], voxels,
            (xs < width)[:, None] & (ys < height)[None, :], scale, COLUMNS_FIRST=False,
        )  # fmt: skip
        of_yz = tl.trans(turned)
    total = (of_xy + of_xz) + of_yz
    target = out + (plane * height + y[:, None]) * width + x[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)
