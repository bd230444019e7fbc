"""Intensities to 8 bits: percentile clip and z-score.

Both rules are one ramp per channel, five float32 numbers (shift, scale, lo, hi, span):

    z     = (x - shift) / scale
    level = round_half_even((clip(z, lo, hi) - lo) / span * 255)

with every step rounded to float32. The percentile rule has shift 0 and scale 1 (both
exact), lo and hi its two percentiles and span = hi - lo; the z-score rule has shift =
mean, scale = std, lo = -clamp_z, hi = clamp_z, span = 2 clamp_z. So every backend needs
one quantiser. A ramp with span <= 0 (a constant channel) is a step: 255 above lo, else 0. A
ramp of NaN marks a channel with a pixel that is not finite; all its levels are 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import dispatch
from .arrays import (
    Array,
    Batch,
    as_images,
    as_output,
    as_outputs,
    as_tensor,
    is_batch,
    like,
    per_channel,
    results,
    upload,
)


@dataclass(frozen=True)
class Percentile:
    """Clip each channel at two of its own percentiles, then scale to 0..255.

    `low` and `high` are percentages, 0 <= low < high <= 100.
    """

    low: float = 1.0
    high: float = 99.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 100:
            raise ValueError(
                f"low and high must satisfy 0 <= low < high <= 100; got {self.low} and {self.high}"
            )

    def measure(self, image: Batch, *, backend: str | None = None) -> torch.Tensor:
        """The ramps of an image [C, H, W]: float32 [C, 5]; of a list of images: [I, C, 5].

        Reads every pixel once. Raises, and on CUDA marks instead, as `percentile_bounds`.
        """
        bounds = percentile_bounds(image, self.low, self.high, backend=backend)
        return percentile_ramp(torch.as_tensor(bounds))


@dataclass(frozen=True)
class ZScore:
    """Scale each channel by a given mean and standard deviation, clipped at ±clamp_z.

    `mean` and `std` hold one number per channel; a std <= 1e-6 counts as 1.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    clamp_z: float = 3.0

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise ValueError(
                "mean and std must have the same length; "
                f"got {len(self.mean)} and {len(self.std)} values"
            )
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)):
            raise ValueError(f"mean and std must be finite; got {self.mean} and {self.std}")
        if not (math.isfinite(self.clamp_z) and self.clamp_z > 0):
            raise ValueError(f"clamp_z must be a positive number; got {self.clamp_z}")

    def measure(self, image: Batch, *, backend: str | None = None) -> torch.Tensor:
        """The ramps for an image [C, H, W]: float32 [C, 5]; for a list of images: [I, C, 5].

        Checks that pixels are finite. On CUDA a channel with one that is not gets a ramp of
        NaN instead of an error: see `check_finite`.
        """
        tensors = as_images(image)
        ramp = zscore_ramp(self.mean, self.std, self.clamp_z, len(tensors[0]))
        ramp = upload(ramp, tensors[0].device).expand(len(tensors), -1, -1)
        if tensors[0].dtype == torch.float32:
            finite = torch.stack([_is_finite(tensor) for tensor in tensors])
            ramp = torch.where(finite[..., None], ramp, torch.nan)
        ramp = ramp if is_batch(image) else ramp[0]
        if ramp.device.type == "cpu":
            check_finite(image, ramp)
        return ramp


Rule = Percentile | ZScore


def percentile_bounds(
    image: Batch,
    low: float = 1.0,
    high: float = 99.0,
    *,
    channels: slice | Sequence[int] | None = None,
    out: Array | None = None,
    backend: str | None = None,
) -> Array:
    """Two percentiles of each channel, linearly interpolated.

    Args:
        image: [C, H, W] uint8, uint16 or float32; or a list of images of one dtype and number
            of channels, each of its own size: one launch on CUDA.
        low, high: percentages, 0 <= low < high <= 100.
        channels: which channels; all by default.
        out: [C, 2] float32; [I, C, 2] for a list of I images.

    Returns:
        [C, 2] float32: (low, high) percentile of each chosen channel; [I, C, 2] for a list.

    Raises:
        ValueError: a percentage out of range, a non-finite pixel (its channel is named),
            a channel whose range does not fit into float32; an empty list. On CUDA such a
            channel has the bounds NaN instead, and the error comes from `check_finite`.
        TypeError: another dtype, or several.

    Exactness: bit-equal to ``np.percentile(channel.astype(np.float32), q)`` of NumPy 2.4,
        Python float q, on every backend. NumPy 2.0 to 2.3 place the rank in float32 and
        can differ in the last digits on channels of more than some thousand pixels.
        Where a percentile is zero its sign is not defined, as in NumPy's own sort.
    """
    rule = Percentile(low, high)
    tensors = as_images(image, channels)
    shape = (len(tensors), len(tensors[0]), 2)
    device = tensors[0].device
    bounds = as_output(out, shape if is_batch(image) else shape[1:], torch.float32, device)
    run = dispatch.resolve("quantize", "percentile_bounds", device, backend)
    run(tensors, _positions(tensors, rule), bounds.view(shape))
    if device.type == "cpu":
        check_finite(image, bounds, channels=channels)
    return like(bounds, image) if out is None else out


def percentile_quantize(
    image: Batch,
    low: float = 1.0,
    high: float = 99.0,
    *,
    channels: slice | Sequence[int] | None = None,
    out: Batch | None = None,
    backend: str | None = None,
) -> Batch:
    """Clip each channel at two of its percentiles and scale to 0..255.

    level = round_half_even((clip(x, lo, hi) - lo) / (hi - lo) * 255), in float32. A channel
    with hi <= lo gives 255 where x > lo and 0 elsewhere.

    Args:
        image: [C, H, W] uint8, uint16 or float32; or a list of images of one dtype and number
            of channels, each of its own size: one launch on CUDA.
        low, high: percentages, 0 <= low < high <= 100.
        channels: which channels; all by default.
        out: [C, H, W] uint8; a list of such for a list.

    Returns:
        [C, H, W] uint8; a list of such for a list.

    Raises:
        ValueError: a percentage out of range; a non-finite pixel, naming its channel; an empty
            list. On CUDA a channel with a non-finite pixel has level 0 everywhere instead, and
            the error comes from `check_finite`.
        TypeError: another dtype, or several.

    Exactness: bit-equal to that formula with `percentile_bounds`, on every backend.
    Source: the ``cellclip`` quantisation of the CPJUMP1 embedding script, with constant
        channels defined (there they depend on the platform).
    """
    tensors = as_images(image, channels)
    return _quantize(image, tensors, Percentile(low, high), out, backend)


def zscore_quantize(
    image: Batch,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    clamp_z: float = 3.0,
    *,
    channels: slice | Sequence[int] | None = None,
    out: Batch | None = None,
    backend: str | None = None,
) -> Batch:
    """Scale each channel by mean and std, clip at ±clamp_z, map to 0..255.

    z = (x - mean) / std; level = round_half_even((clip(z, ±clamp_z) + clamp_z) /
    (2 clamp_z) * 255), every step in float32.

    Args:
        image: [C, H, W] uint8, uint16 or float32; or a list of images of one dtype and number
            of channels, each of its own size: one launch on CUDA.
        mean, std: one number, or one per chosen channel; a std <= 1e-6 counts as 1.
        clamp_z: half width of the kept range, in standard deviations, > 0.
        channels: which channels; all by default.
        out: [C, H, W] uint8; a list of such for a list.

    Returns:
        [C, H, W] uint8; a list of such for a list.

    Raises:
        ValueError: a wrong number of means; a non-finite pixel, naming its channel; an empty
            list. On CUDA a channel with a non-finite pixel has level 0 everywhere instead, and
            the error comes from `check_finite`.
        TypeError: another dtype, or several.

    Exactness: bit-equal to that formula in NumPy float32, on every backend.
    Source: the ``global`` quantisation of the CPJUMP1 embedding script.
    """
    tensors = as_images(image, channels)
    count = len(tensors[0])
    rule = ZScore(
        tuple(per_channel("mean", mean, count).tolist()),
        tuple(per_channel("std", std, count).tolist()),
        clamp_z,
    )
    return _quantize(image, tensors, rule, out, backend)


def check_finite(
    image: Batch,
    measured: Array | None = None,
    *,
    channels: slice | Sequence[int] | None = None,
) -> None:
    """Raises where an op met a pixel that is not finite; on CUDA this waits, and no op does.

    On the CPU the ops themselves raise this error. On CUDA they mark the channel, with bounds
    or ramps of NaN, and whoever launched them asks here once the stream has got that far.

    Args:
        image: the image or images that the op took.
        measured: what it gave: `percentile_bounds` of `image`, or the ramps that
            `Percentile.measure` or `ZScore.measure` gave. Where they are finite the image is
            not looked at; without them it always is.
        channels: those that the op took.

    Raises:
        ValueError: a non-finite pixel, naming its channel; a channel whose range does not fit
            into float32.
    """
    if measured is not None and torch.isfinite(as_tensor("measured", measured)).all():
        return
    for i, tensor in enumerate(as_images(image, channels)):
        if tensor.dtype != torch.float32:
            continue
        finite = _is_finite(tensor).tolist()
        if not all(finite):
            channel = finite.index(False)
            count = int((~torch.isfinite(tensor[channel])).sum())
            raise ValueError(
                f"{f'image[{i}]' if is_batch(image) else 'image'} must be finite; "
                f"channel {channel} has {count} non-finite pixels"
            )
    if measured is not None:
        raise ValueError("image spans more than float32 can subtract")


def percentile_ramp(bounds: torch.Tensor) -> torch.Tensor:
    """Percentiles [..., 2] as ramps [..., 5]."""
    lo, hi = bounds.unbind(-1)
    return torch.stack([torch.zeros_like(lo), torch.ones_like(lo), lo, hi, hi - lo], dim=-1)


def zscore_ramp(
    mean: float | Sequence[float], std: float | Sequence[float], clamp_z: float, count: int
) -> torch.Tensor:
    """Means and standard deviations of `count` channels as ramps [count, 5]."""
    mean = per_channel("mean", mean, count)
    std = per_channel("std", std, count)
    std = torch.where(std <= 1e-6, 1.0, std)
    clamp = torch.full((count,), clamp_z, dtype=torch.float32)
    return torch.stack([mean, std, -clamp, clamp, 2 * clamp], dim=1)


def _quantize(image: Batch, tensors: list[torch.Tensor], rule: Rule, out, backend) -> Batch:
    device = tensors[0].device
    levels = as_outputs(out, [tensor.shape for tensor in tensors], torch.uint8, device)
    ramp = rule.measure(tensors if is_batch(image) else tensors[0], backend=backend)
    run = dispatch.resolve("quantize", "quantize", device, backend)
    run(tensors, ramp.reshape(len(tensors), -1, 5).contiguous(), levels)
    return results(levels, image, out)


def _is_finite(image: torch.Tensor) -> torch.Tensor:
    """Of each channel of [C, H, W] float32 whether all its pixels are finite: bool [C]."""
    # Minimum and maximum carry NaN, and need no temporary of the image's size.
    pixels = image.flatten(1)
    return torch.isfinite(pixels.amin(1)) & torch.isfinite(pixels.amax(1))


def _positions(images: list[torch.Tensor], rule: Percentile) -> torch.Tensor:
    """Where the percentiles lie in each image's sorted channels: float64 [I, 2], on the CPU.

    NumPy's method "linear": (count - 1) q in float64, of which the whole part is the rank
    below and the rest the way to the next one.
    """
    counts = [image[0].numel() for image in images]
    return torch.tensor(
        [[(count - 1) * (q / 100) for q in (rule.low, rule.high)] for count in counts],
        dtype=torch.float64,
    )


def percentile_bounds_reference(
    images: list[torch.Tensor], positions: torch.Tensor, out: torch.Tensor
) -> None:
    for image, position, rows in zip(images, positions.tolist(), out, strict=True):
        for channel, bounds in zip(image, rows, strict=True):
            values = channel.flatten().to(torch.float32)
            if not torch.isfinite(values).all():
                bounds.fill_(torch.nan)
                continue
            values = values.sort().values
            for side in range(2):
                rank = math.floor(position[side])
                fraction = position[side] - rank
                below = values[rank]
                above = values[min(rank + 1, len(values) - 1)]
                # Interpolate from the nearer end, as NumPy does: it never overshoots.
                if fraction < 0.5:
                    bounds[side] = below + (above - below) * fraction
                else:
                    bounds[side] = above - (above - below) * (1 - fraction)


def quantize_reference(
    images: list[torch.Tensor], ramp: torch.Tensor, out: list[torch.Tensor]
) -> None:
    for image, rows, planes in zip(images, ramp, out, strict=True):
        for channel, row, levels in zip(image, rows, planes, strict=True):
            shift, scale, lo, hi, span = row
            z = (channel.to(torch.float32) - shift) / scale
            if span <= 0:
                levels.copy_((z > lo) * 255)
            else:
                levels.copy_(((z.clamp(lo, hi) - lo) / span * 255).round().nan_to_num())
