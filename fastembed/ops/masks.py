"""Segments of an image into model input: each cut out, its background faded to grey.

The seed's formula has two cases per pixel, inside the mask and outside, and 256 levels per
channel. Inside it gives the level back (x / 255 * 255 truncates to x for all 256); outside
it is one table of 256 levels. So a crop is blended while it is loaded, nothing
of the image beyond the padded box is touched, and no pixel meets a float.

The resize of the uint8 modes is two passes, each a weighted sum per output row or column

    level = clip((sum(weight * pixel) + 2^(bits - 1)) >> bits, 0, 255)

with integer weights, and levels again between the passes. The modes differ in the filter, in
`bits` and in which pass comes first: see `FixedPoint`. A pass over an axis that keeps its
length has the one weight 2^bits, hence changes nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from .. import dispatch
from .arrays import (
    Array,
    Batch,
    as_output,
    as_tensor,
    as_tensors,
    beside,
    check,
    dtype_name,
    is_batch,
    like,
    namespace,
    per_channel,
    upload,
)
from .crops import kept_level_table


class FixedPoint(NamedTuple):
    """How a uint8 mode resizes.

    Attributes:
        cubic: Keys' cubic with a = -0.5, else a triangle; both widened when shrinking.
        narrow: weights have as many bits as keep each axis' largest below 2^15, at most 22;
            else 22.
        tall_first: where the height shrinks by more than twice what the width does, the
            vertical pass comes first; else always the horizontal one.
    """

    cubic: bool
    narrow: bool
    tall_first: bool


FIXED_POINT = {
    "pillow-bicubic": FixedPoint(cubic=True, narrow=False, tall_first=True),
    "pillow12-bicubic": FixedPoint(cubic=True, narrow=False, tall_first=False),
    "torch-uint8-bicubic": FixedPoint(cubic=True, narrow=True, tall_first=False),
    "torch-uint8-bilinear": FixedPoint(cubic=False, narrow=True, tall_first=False),
}
RESIZES = (*FIXED_POINT, "float-bilinear")


class SegmentTable(Protocol):
    """What `blend_crops` reads of `panoptic_segments`' result; any object with both will do."""

    ids: Array  # int32 [S]
    boxes: Array  # int32 [S, 4]: y0, x0, y1, x1, all inclusive


def blend_crops(
    image: Batch,
    ids: Batch,
    segments: SegmentTable | Sequence[SegmentTable],
    size: int = 224,
    bg_alpha: float = 0.3,
    pad_ratio: float = 0.1,
    *,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    dtype: torch.dtype = torch.float32,
    resize: str = "pillow-bicubic",
    out: Array | None = None,
    backend: str | None = None,
) -> Array:
    """One square of model input per segment, the segment on a background faded to grey.

    rgb = pixel / 255; blended = rgb * a + (1 - a) * 0.5 with a = 1 where ids is the
    segment's, else bg_alpha; level = int(blended * 255). The box grows by int(pad_ratio *
    extent) pixels per side, as far as the image goes. The crop is squashed to size x size;
    then (level / 255 - mean) / std.

    Args:
        image: [H, W, 3] uint8, RGB; or a list of images, each of its own size: one launch on
            CUDA.
        ids: [H, W] int32, the segment of each pixel; for a list a list of such.
        segments: its `ids` int32 [S] and `boxes` int32 [S, 4] of (y0, x0, y1, x1), both ends
            inclusive. A segment without a pixel in its box is all background. For a list a
            list of such, S may differ. In main memory or where the images are.
        size: side of the result, pixels.
        bg_alpha: what remains of the background, 0..1.
        pad_ratio: growth of the box per side, in extents, >= 0.
        mean, std: of the model's input, one number or three.
        dtype: float32, bfloat16 or float16; uint8 gives the levels: mean 0, std 1.
        resize: whose bits, one of
            ``pillow-bicubic`` (Pillow from 13.0 on), ``pillow12-bicubic`` (before 13.0),
            ``torch-uint8-bicubic``, ``torch-uint8-bilinear`` (torchvision's v2.Resize of a
            uint8 tensor on a CPU with AVX2) and
            ``float-bilinear`` (v2.Resize of level / 255 in float32, as the fast DINOv3
            processor of transformers).
        out: [S, 3, size, size] of `dtype`.

    Returns:
        [S, 3, size, size] of `dtype`; of a list the crops of the first image, then those of
        the second, and so on.

    Raises:
        ValueError: a shape, box, size, alpha or ratio out of range, an unknown mode, an empty
            list. Boxes that are on CUDA are not read back: a wrong one is a failed assertion
            there.
        TypeError: another dtype.

    Exactness: blending in float64 with bg_alpha rounded to float32, so bit-equal to that
        formula; ``pillow-bicubic`` bit-equal to ``Image.resize`` of Pillow 13.0, the torch
        modes to torchvision 0.29, normalised in float32 with one cast, on every backend.
        ``float-bilinear`` within 4e-6 / std of torchvision, whose weights are float32, before
        the cast.
    Source: ``build_vis_cache`` of the COCO panoptic script.
    """
    pixels = as_tensors("image", image)
    for tensor in pixels:
        if tensor.ndim != 3 or tensor.shape[2] != 3 or 0 in tensor.shape:
            raise ValueError(f"image must be [H, W, 3], not empty; got {list(tensor.shape)}")
        if tensor.dtype != torch.uint8:
            raise TypeError(f"image must be uint8; got {dtype_name(tensor.dtype)}")
    device, shapes = pixels[0].device, [tuple(tensor.shape[:2]) for tensor in pixels]
    names, tables = (ids, segments) if is_batch(image) else ([ids], [segments])
    if not len(names) == len(tables) == len(pixels):
        raise ValueError(
            f"ids and segments must be one per image, {len(pixels)}; "
            f"got {len(names)} and {len(tables)}"
        )
    labels = [
        _as_int32("ids", part, shape, device) for part, shape in zip(names, shapes, strict=True)
    ]
    crops = padded_crops(tables, shapes, pad_ratio)
    if size < 1:
        raise ValueError(f"size must be >= 1; got {size}")
    if resize not in RESIZES:
        raise ValueError(f"resize must be one of {', '.join(RESIZES)}; got {resize!r}")
    table = kept_level_table(mean, std, dtype, 3)
    result = as_output(out, (len(crops), 3, size, size), dtype, device)
    arguments = (
        [tensor.contiguous() for tensor in pixels],
        [label.contiguous() for label in labels],
        upload(crops, device),
        upload(fade_table(bg_alpha), device),
    )
    if resize in FIXED_POINT:
        run = dispatch.resolve("masks", "blend_crops", device, backend)
        run(*arguments, upload(table, device), *FIXED_POINT[resize], result)
    else:
        if dtype == torch.uint8:
            raise TypeError("float-bilinear gives no levels: dtype must be a float type; got uint8")
        run = dispatch.resolve("masks", "blend_crops_float", device, backend)
        ramp = torch.stack([per_channel("mean", mean, 3), per_channel("std", std, 3)])
        run(*arguments, upload(ramp, device), result)
    return like(result, image) if out is None else out


def padded_crops(
    segments: Sequence[SegmentTable], shapes: Sequence[tuple[int, int]], pad_ratio: float
) -> torch.Tensor:
    """Where the segments of images of `shapes` (H, W) are cut out.

    Returns:
        int32 [S, 6] of (image, id, top, left, height, width), where the segments are.

    Raises:
        ValueError: a box that is empty or leaves the image, a negative ratio.
    """
    if not (math.isfinite(pad_ratio) and pad_ratio >= 0):
        raise ValueError(f"pad_ratio must be a number >= 0; got {pad_ratio}")
    parts = [_as_int32("segments.ids", table.ids, (None,)) for table in segments]
    boxes = [
        _as_int32("segments.boxes", table.boxes, (len(part), 4))
        for table, part in zip(segments, parts, strict=True)
    ]
    _, ids = namespace(torch.cat(parts))
    xp, boxes = namespace(torch.cat(boxes).long())
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    sizes = np.array(shapes)[owners]
    limit = beside(sizes, boxes)
    low, high = boxes[:, :2], boxes[:, 2:]
    check(
        ((low < 0) | (high < low) | (high >= limit)).any(1),
        "segments.boxes must be (y0, x0, y1, x1), inclusive, in the image",
        lambda s: "box {} of image {}, {}x{}, is {}".format(
            s, owners[s], *sizes[s], boxes[s].tolist()
        ),
    )
    # No padding reaches further than the image: a huge ratio must not overflow.
    pad = xp.minimum(pad_ratio * xp.asarray(high - low + 1, dtype=xp.float64), limit)
    pad = xp.asarray(pad, dtype=xp.int64)
    top_left = (low - pad).clip(0)
    extent = xp.minimum(high + pad + 1, limit) - top_left
    columns = [beside(owners[:, None], boxes), ids[:, None], top_left, extent]
    return torch.as_tensor(xp.asarray(xp.concatenate(columns, axis=1), dtype=xp.int32))


@functools.lru_cache(maxsize=64)
def fade_table(bg_alpha: float) -> torch.Tensor:
    """What each level becomes outside of the mask: uint8 [256]."""
    if not 0 <= bg_alpha <= 1:
        raise ValueError(f"bg_alpha must be in 0..1; got {bg_alpha}")
    alpha = float(np.float32(bg_alpha))
    rgb = np.arange(256) / 255
    return torch.from_numpy(((rgb * alpha + (1 - alpha) * 0.5) * 255).astype(np.uint8))


def blended_crops(
    image: np.ndarray,
    ids: np.ndarray,
    segments: SegmentTable,
    bg_alpha: float = 0.3,
    pad_ratio: float = 0.1,
) -> list[np.ndarray]:
    """What `blend_crops` resizes: the segments cut out and blended, [h, w, 3] uint8 each."""
    crops = padded_crops([segments], [image.shape[:2]], pad_ratio)
    pixels, labels = as_tensor("image", image), as_tensor("ids", ids)
    table = fade_table(bg_alpha)
    return [_blended(pixels, labels, table, *crop[1:]).numpy() for crop in crops.tolist()]


def _as_int32(
    name: str, array: Array, shape: tuple[int | None, ...], device: torch.device | None = None
) -> torch.Tensor:
    """`array` checked: int32 of `shape` (None is any length), on `device` if that is given."""
    tensor = as_tensor(name, array)
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} must be int32; got {dtype_name(tensor.dtype)}")
    if tensor.ndim != len(shape) or any(
        want not in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    ):
        wanted = ", ".join("S" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must be [{wanted}]; got {list(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}, as image is; got {tensor.device}")
    return tensor


def blend_crops_reference(
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
    size = out.shape[-1]
    for result, (i, segment, *window) in zip(out, crops.tolist(), strict=True):
        crop = _blended(images[i], ids[i], background, segment, *window)
        height, width = window[2:]
        rows = _integer_weights(height, size, cubic, narrow)
        columns = _integer_weights(width, size, cubic, narrow)
        if tall_first and height > size and height - size > 2 * (width - size):
            levels = _apply(columns, _apply(rows, crop, 0), 1)
        else:
            levels = _apply(rows, _apply(columns, crop, 1), 0)
        for plane in range(3):
            result[plane] = table[plane][levels[..., plane].long()]


def blend_crops_float_reference(
    images: list[torch.Tensor],
    ids: list[torch.Tensor],
    crops: torch.Tensor,
    background: torch.Tensor,
    ramp: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """`ramp` is (mean, std) of the three channels: float32 [2, 3]."""
    size = out.shape[-1]
    mean, std = ramp.double()[..., None, None]
    for result, (i, segment, *window) in zip(out, crops.tolist(), strict=True):
        crop = _blended(images[i], ids[i], background, segment, *window)
        height, width = window[2:]
        rows = torch.from_numpy(filter_weights(height, size, cubic=False)).to(crop.device)
        columns = torch.from_numpy(filter_weights(width, size, cubic=False)).to(crop.device)
        value = rows @ (crop.permute(2, 0, 1).double() / 255) @ columns.T
        # To float32 first: it is that which the other backends round to bfloat16 and float16.
        result.copy_(((value - mean) / std).float())


def _blended(
    image: torch.Tensor,
    ids: torch.Tensor,
    background: torch.Tensor,
    segment: int,
    top: int,
    left: int,
    height: int,
    width: int,
) -> torch.Tensor:
    """A crop of `image`, faded outside of the segment: uint8 [height, width, 3]."""
    window = slice(top, top + height), slice(left, left + width)
    crop = image[window]
    return torch.where((ids[window] == segment)[..., None], crop, background[crop.long()])


def filter_weights(length: int, size: int, cubic: bool) -> np.ndarray:
    """What each of `length` pixels weighs in each of `size`: float64 [size, length], rows of 1.

    Every step is in the order in which Pillow and torch take it: a weight that rounds to
    another integer would change levels.
    """
    scale = length / size
    stretch = max(scale, 1.0)  # enlarging interpolates, shrinking averages
    support = (2.0 if cubic else 1.0) * stretch
    center = (np.arange(size)[:, None] + 0.5) * scale
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    last = np.minimum((center + support + 0.5).astype(np.int64), length)
    pixel = np.arange(length)
    x = np.abs((pixel - center + 0.5) * (1.0 / stretch))
    if cubic:
        near = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * -0.5
        weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    else:
        weights = np.where(x < 1, 1 - x, 0.0)
    weights[(pixel < first) | (pixel >= last)] = 0
    # cumsum adds one weight after another; sum would add in pairs and round elsewhere.
    return weights / weights.cumsum(axis=1)[:, -1:]


def _integer_weights(length: int, size: int, cubic: bool, narrow: bool) -> tuple[np.ndarray, int]:
    """`filter_weights` times 2^bits, rounded half away from zero; and bits."""
    weights = filter_weights(length, size, cubic)
    bits = 22
    if narrow:
        largest = weights.max()
        bits = next((b for b in range(22) if int(0.5 + largest * 2 ** (b + 1)) >= 2**15), 22)
    return np.trunc(weights * 2**bits + np.copysign(0.5, weights)), bits


def _apply(weights: tuple[np.ndarray, int], levels: torch.Tensor, axis: int) -> torch.Tensor:
    """One pass over an axis of [H, W, 3]."""
    matrix, bits = weights
    # Integers below 2^53: exact as float64, in whatever order they are added.
    sums = torch.tensordot(
        torch.from_numpy(matrix).to(levels.device), levels.double(), dims=([1], [axis])
    )
    sums = sums.movedim(0, axis).long() + (1 << bits >> 1)
    return (sums >> bits).clamp(0, 255).to(torch.uint8)
