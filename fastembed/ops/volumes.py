"""Features of a volume out of the token grids of its slices in three orientations.

What is written is one block of the volume, out of the tokens that the block hangs on; a caller
goes through a volume block by block. Neither an upsampled plane nor a float32 volume exists.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from .. import dispatch
from .arrays import Array, as_output, as_tensor, dtype_name, like, upload

# Of each plane the axes of the volume, z, y, x = 0, 1, 2, that its slices lie along and that the
# rows and the columns of a slice do.
PLANES = {"xy": (0, 1, 2), "xz": (1, 0, 2), "yz": (2, 0, 1)}
UPSAMPLE_MODES = ("bilinear", "nearest")
TOKEN_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
VOLUME_DTYPES = (torch.float16, torch.float32)


def triplane_accumulate(
    planes: Mapping[str, Array],
    shape: Sequence[int],
    *,
    block: Sequence[slice | range] | None = None,
    mode: str = "bilinear",
    dtype: torch.dtype = torch.float16,
    out: Array | None = None,
    backend: str | None = None,
) -> Array:
    """A block of a volume's features: the mean of its upsampled planes.

    Each slice's grid is resized to the slice, as ``torch.nn.functional.interpolate`` does; each
    voxel gets the mean over the given planes, in float32, and one cast.

    Args:
        planes: one to three of ``"xy"`` [D, C, h, w] (slices along z, rows along y, columns
            along x), ``"xz"`` [H, C, h, w] (slices along y, rows along z, columns along x) and
            ``"yz"`` [W, C, h, w] (slices along x, rows along z, columns along y): float32,
            float16 or bfloat16, all of one dtype; h and w may differ from plane to plane. Only
            the block's part is read, where it lies: slices and channels may have any stride. A
            grid that is not contiguous is copied, for the block.
        shape: (D, H, W) of the volume, voxels.
        block: what to compute of [C, D, H, W]: four slices or ranges of step 1, clipped to the
            volume as Python's slices are; everything by default.
        mode: ``bilinear`` (align_corners False, no antialias) or ``nearest``.
        dtype: float16 or float32.
        out: [c, z, y, x] of `dtype`, the block's size. Native code writes a large one past the
            caches where its rows are whole lines of 64 bytes, which torch's own memory is.

    Returns:
        [c, z, y, x] of `dtype`.

    Raises:
        ValueError: no plane or an unknown one, a plane of another number of slices or channels,
            an empty block, a step, an unknown mode.
        TypeError: another dtype, or several.

    Exactness: the same bits on every backend, and in every block that a voxel is part of.
        Positions are computed in float64, their fractions t rounded to float32 (nearest: at the
        tokens that torch takes, t = 0). Then all in float32, each operation rounded: tokens
        times float32(1 / planes); low + t * (high - low) along x, then z, then y, as far as a
        plane has the axis; (xy + xz) + yz, a missing one 0; the cast. Before the cast within
        1e-6 of torch in float64, relative to the magnitudes of the tokens around the voxel. A
        token that is not finite spoils the voxels that lie between it and others.
    """
    extent = _extent(shape)
    tensors = _planes(planes, extent)
    first = next(iter(tensors.values()))
    parts = _parts(block, (first.shape[1], *extent))
    if mode not in UPSAMPLE_MODES:
        raise ValueError(f"mode must be one of {', '.join(UPSAMPLE_MODES)}; got {mode!r}")
    if dtype not in VOLUME_DTYPES:
        raise TypeError(f"dtype must be float16 or float32; got {dtype_name(dtype)}")
    result = as_output(out, tuple(len(part) for part in parts), dtype, first.device)
    tokens = {name: tuple(tensor.shape[2:]) for name, tensor in tensors.items()}
    at, weight = _taps(tuple(tokens.items()), extent, parts[1:], mode)
    run = dispatch.resolve("volumes", "triplane_accumulate", first.device, backend)
    run(
        [_part(tensors[name], parts[1 + PLANES[name][0]], parts[0]) if name in tensors
         else first.new_empty((0, 0, 0, 0)) for name in PLANES],
        upload(at, first.device),
        upload(weight, first.device),
        result,
    )  # fmt: skip
    return like(result, next(iter(planes.values()))) if out is None else out


def _extent(shape: Sequence[int]) -> tuple[int, int, int]:
    extent = tuple(int(length) for length in shape)
    if len(extent) != 3 or min(extent) < 1:
        raise ValueError(f"shape must be (D, H, W), none of them 0; got {tuple(shape)}")
    return extent


def _planes(planes: Mapping[str, Array], extent: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """The planes as tensors, checked against the volume and against one another."""
    for name in planes:
        if name not in PLANES:
            raise ValueError(f"planes must be of {', '.join(PLANES)}; got {name!r}")
    if not planes:
        raise ValueError(f"planes must have at least one of {', '.join(PLANES)}; got none")
    tensors = {name: as_tensor(f"planes[{name!r}]", planes[name]) for name in planes}
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        axis = PLANES[name][0]
        if tensor.ndim != 4 or 0 in tensor.shape or len(tensor) != extent[axis]:
            raise ValueError(
                f"planes[{name!r}] must be [{extent[axis]}, C, h, w], a slice per voxel along "
                f"{'zyx'[axis]}, none of them 0; got {list(tensor.shape)}"
            )
        if tensor.dtype not in TOKEN_DTYPES:
            raise TypeError(
                f"planes[{name!r}] must be float32, float16 or bfloat16; "
                f"got {dtype_name(tensor.dtype)}"
            )
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"planes must be of one dtype; {first_name!r} is {dtype_name(first.dtype)}, "
                f"{name!r} is {dtype_name(tensor.dtype)}"
            )
        if tensor.shape[1] != first.shape[1]:
            raise ValueError(
                f"planes must have one number of channels; {first_name!r} has {first.shape[1]}, "
                f"{name!r} has {tensor.shape[1]}"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"planes must be on one device; {first_name!r} is on {first.device}, "
                f"{name!r} on {tensor.device}"
            )
    return tensors


def _parts(
    block: Sequence[slice | range] | None, lengths: tuple[int, int, int, int]
) -> tuple[range, range, range, range]:
    """The block as ranges of channels, z, y and x."""
    if block is None:
        return tuple(range(length) for length in lengths)
    if len(block) != 4:
        raise ValueError(f"block must be four slices: channels, z, y, x; got {len(block)}")
    parts = []
    for name, part, length in zip(("channels", "z", "y", "x"), block, lengths, strict=True):
        if isinstance(part, range):
            wanted = slice(part.start, part.stop, part.step)
            if part and min(part) < 0:
                raise ValueError(f"block's range of {name} must not be negative; got {part}")
        elif isinstance(part, slice):
            wanted = part
        else:
            raise TypeError(f"block must hold slices or ranges; its {name} are {part!r}")
        voxels = range(*wanted.indices(length))
        if not voxels or voxels.step != 1:
            raise ValueError(
                f"block's {name} must be at least one of 0..{length - 1}, in steps of 1; got {part}"
            )
        parts.append(voxels)
    return tuple(parts)


def _part(plane: torch.Tensor, slices: range, channels: range) -> torch.Tensor:
    """The block's part of a plane; its grids contiguous, slices and channels anywhere."""
    part = plane[slices.start : slices.stop, channels.start : channels.stop]
    return part if part[0, 0].is_contiguous() else part.contiguous()


@functools.lru_cache(maxsize=256)
def _taps(
    tokens: tuple[tuple[str, tuple[int, int]], ...],
    extent: tuple[int, int, int],
    parts: tuple[range, range, range],
    mode: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which two tokens each voxel of the block lies between, and how far from the first.

    int32 [2, N] and float32 [N], N over y and x of xy, z and x of xz, z and y of yz; zeros for a
    plane that is missing. Nobody may write into them.
    """
    of_plane = dict(tokens)
    between, weights = [], []
    for name, (_, *axes) in PLANES.items():
        for axis, count in zip(axes, of_plane.get(name, (1, 1)), strict=True):
            at, weight = _between(count, extent[axis], mode)
            part = slice(parts[axis].start, parts[axis].stop)
            between.append(at[:, part])
            weights.append(weight[part])
    return torch.from_numpy(np.concatenate(between, axis=1)), torch.from_numpy(
        np.concatenate(weights)
    )


def _between(count: int, length: int, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Of `length` voxels over `count` tokens: both neighbours, int32 [2, length], and weights."""
    if mode == "nearest":
        # torch's rule, in its float32: in float64 some voxels would get another token.
        scale = np.float32(count) / np.float32(length)
        low = np.floor(np.arange(length, dtype=np.float32) * scale).astype(np.int64)
        low = np.minimum(low, count - 1)
        return np.stack([low, low]).astype(np.int32), np.zeros(length, dtype=np.float32)
    source = ((np.arange(length) + 0.5) * count / length - 0.5).clip(0, count - 1)
    low = np.floor(source).astype(np.int64)
    weight = (source - low).astype(np.float32)
    # Where the weight is 0 the neighbour does not count, not even one that is not finite.
    high = np.where(weight > 0, low + 1, low)
    return np.stack([low, high]).astype(np.int32), weight


def triplane_accumulate_reference(
    planes: list[torch.Tensor], at: torch.Tensor, weight: torch.Tensor, out: torch.Tensor
) -> None:
    _, depth, height, width = out.shape
    lengths = [height, width, depth, width, depth, height]
    low, high = at.long()
    taps = list(zip(low.split(lengths), high.split(lengths), weight.split(lengths), strict=True))
    present = sum(plane.numel() > 0 for plane in planes)
    scale = torch.tensor(1 / present, dtype=torch.float32, device=out.device)
    # Slices and rows of a plane become which axes of [z, y, x] once they are upsampled.
    orders = [(0, 1, 2), (1, 0, 2), (1, 2, 0)]
    for c, volume in enumerate(out):
        total = torch.zeros((), device=out.device)
        values = []
        for plane, rows, columns, order in zip(planes, taps[::2], taps[1::2], orders, strict=True):
            if plane.numel() == 0:
                values.append(total)
                continue
            grids = plane[:, c].to(torch.float32) * scale
            # x before z before y: only in yz the columns are not x.
            axes = [(2, columns), (1, rows)] if order != (1, 2, 0) else [(1, rows), (2, columns)]
            for axis, tap in axes:
                grids = _interpolated(grids, axis, *tap)
            values.append(grids.permute(order))
        xy, xz, yz = values
        volume.copy_((xy + xz) + yz)


def _interpolated(
    grids: torch.Tensor, axis: int, low: torch.Tensor, high: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    start, end = grids.index_select(axis, low), grids.index_select(axis, high)
    return start + (weight if axis == 2 else weight[:, None]) * (end - start)
