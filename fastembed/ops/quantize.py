"""Intensities to 8 bits: percentile clip and z-score.

Both rules are one ramp per channel, five float32 numbers (shift, scale, lo, hi, span):

    z     = (x - shift) / scale
    level = round_half_even((clip(z, lo, hi) - lo) / span * 255)

with every step rounded to float32. The percentile rule has shift 0 and scale 1 (both
exact), lo and hi its two percentiles and span = hi - lo; the z-score rule has shift =
mean, scale = std, lo = -clamp_z, hi = clamp_z, span = 2 clamp_z. So every backend needs
one quantiser. A ramp with span <= 0 (a constant channel) is a step: 255 above lo, else 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import dispatch
from .arrays import Array, as_image, as_output, like, per_channel


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

    def measure(self, image: Array, *, backend: str | None = None) -> torch.Tensor:
        """The ramps of `image` [C, H, W]: float32 [C, 5]. Reads every pixel once."""
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

    def measure(self, image: Array, *, backend: str | None = None) -> torch.Tensor:
        """The ramps for `image` [C, H, W]: float32 [C, 5]. Checks that pixels are finite."""
        tensor = as_image(image)
        _check_finite(tensor)
        return zscore_ramp(self.mean, self.std, self.clamp_z, len(tensor)).to(tensor.device)


Rule = Percentile | ZScore


def percentile_bounds(
    image: Array,
    low: float = 1.0,
    high: float = 99.0,
    *,
    channels: slice | Sequence[int] | None = None,
    out: Array | None = None,
    backend: str | None = None,
) -> Array:
    """Two percentiles of each channel, linearly interpolated.

    Args:
        image: [C, H, W] uint8, uint16 or float32.
        low, high: percentages, 0 <= low < high <= 100.
        channels: which channels; all by default.
        out: [C, 2] float32.

    Returns:
        [C, 2] float32: (low, high) percentile of each chosen channel.

    Raises:
        ValueError: a percentage out of range, a non-finite pixel (its channel is named),
            a channel whose range does not fit into float32.
        TypeError: another dtype.

    Exactness: bit-equal to ``np.percentile(channel.astype(np.float32), q)`` of NumPy 2.4,
        Python float q, on every backend. NumPy 2.0 to 2.3 place the rank in float32 and
        can differ in the last digits on channels of more than some thousand pixels.
        Where a percentile is zero its sign is not defined, as in NumPy's own sort.
    """
    rule = Percentile(low, high)
    tensor = as_image(image, channels)
    bounds = as_output(out, (len(tensor), 2), torch.float32, tensor.device)
    pixels = tensor[0].numel()
    run = dispatch.resolve("quantize", "percentile_bounds", tensor.device, backend)
    run(tensor, *_rank(pixels, rule.low), *_rank(pixels, rule.high), bounds)
    # Every backend writes NaN for a channel with a non-finite pixel.
    if not torch.isfinite(bounds).all():
        _check_finite(tensor)
        raise ValueError("image spans more than float32 can subtract")
    return like(bounds, image) if out is None else out


def percentile_quantize(
    image: Array,
    low: float = 1.0,
    high: float = 99.0,
    *,
    channels: slice | Sequence[int] | None = None,
    out: Array | None = None,
    backend: str | None = None,
) -> Array:
    """Clip each channel at two of its percentiles and scale to 0..255.

    level = round_half_even((clip(x, lo, hi) - lo) / (hi - lo) * 255), in float32. A channel
    with hi <= lo gives 255 where x > lo and 0 elsewhere.

    Args:
        image: [C, H, W] uint8, uint16 or float32.
        low, high: percentages, 0 <= low < high <= 100.
        channels: which channels; all by default.
        out: [C, H, W] uint8.

    Returns:
        [C, H, W] uint8.

    Raises:
        ValueError: a percentage out of range; a non-finite pixel, naming its channel.
        TypeError: another dtype.

    Exactness: bit-equal to that formula with `percentile_bounds`, on every backend.
    Source: the ``cellclip`` quantisation of the CPJUMP1 embedding script, with constant
        channels defined (there they depend on the platform).
    """
    tensor = as_image(image, channels)
    levels = as_output(out, tuple(tensor.shape), torch.uint8, tensor.device)
    _quantize(tensor, Percentile(low, high).measure(tensor, backend=backend), levels, backend)
    return like(levels, image) if out is None else out


def zscore_quantize(
    image: Array,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    clamp_z: float = 3.0,
    *,
    channels: slice | Sequence[int] | None = None,
    out: Array | None = None,
    backend: str | None = None,
) -> Array:
    """Scale each channel by mean and std, clip at ±clamp_z, map to 0..255.

    z = (x - mean) / std; level = round_half_even((clip(z, ±clamp_z) + clamp_z) /
    (2 clamp_z) * 255), every step in float32.

    Args:
        image: [C, H, W] uint8, uint16 or float32.
        mean, std: one number, or one per chosen channel; a std <= 1e-6 counts as 1.
        clamp_z: half width of the kept range, in standard deviations, > 0.
        channels: which channels; all by default.
        out: [C, H, W] uint8.

    Returns:
        [C, H, W] uint8.

    Raises:
        ValueError: a wrong number of means; a non-finite pixel, naming its channel.
        TypeError: another dtype.

    Exactness: bit-equal to that formula in NumPy float32, on every backend.
    Source: the ``global`` quantisation of the CPJUMP1 embedding script.
    """
    tensor = as_image(image, channels)
    count = len(tensor)
    rule = ZScore(
        tuple(per_channel("mean", mean, count).tolist()),
        tuple(per_channel("std", std, count).tolist()),
        clamp_z,
    )
    levels = as_output(out, tuple(tensor.shape), torch.uint8, tensor.device)
    _quantize(tensor, rule.measure(tensor), levels, backend)
    return like(levels, image) if out is None else out


def percentile_ramp(bounds: torch.Tensor) -> torch.Tensor:
    """Percentiles [C, 2] as ramps [C, 5]."""
    lo, hi = bounds.unbind(1)
    return torch.stack([torch.zeros_like(lo), torch.ones_like(lo), lo, hi, hi - lo], dim=1)


def zscore_ramp(
    mean: float | Sequence[float], std: float | Sequence[float], clamp_z: float, count: int
) -> torch.Tensor:
    """Means and standard deviations of `count` channels as ramps [count, 5]."""
    mean = per_channel("mean", mean, count)
    std = per_channel("std", std, count)
    std = torch.where(std <= 1e-6, 1.0, std)
    clamp = torch.full((count,), clamp_z, dtype=torch.float32)
    return torch.stack([mean, std, -clamp, clamp, 2 * clamp], dim=1)


def _quantize(
    image: torch.Tensor, ramp: torch.Tensor, levels: torch.Tensor, backend: str | None
) -> None:
    dispatch.resolve("quantize", "quantize", image.device, backend)(image, ramp, levels)


def _check_finite(image: torch.Tensor) -> None:
    """Raises ValueError that names the first channel of [C, H, W] with a NaN or infinity."""
    if image.dtype != torch.float32:
        return
    for index, channel in enumerate(image):
        # Minimum and maximum carry NaN, so one pass without a temporary tells.
        if not torch.isfinite(torch.stack(torch.aminmax(channel))).all():
            count = int((~torch.isfinite(channel)).sum())
            raise ValueError(f"image must be finite; channel {index} has {count} non-finite pixels")


def _rank(count: int, percentage: float) -> tuple[int, float]:
    """Rank below a percentile among `count` sorted values, and the way to the next one.

    NumPy's method "linear": position (count - 1) q in float64. At the last rank the
    neighbour is the value itself, so the fraction does not matter.
    """
    position = (count - 1) * (percentage / 100)
    rank = min(math.floor(position), count - 1)
    return rank, position - rank


def percentile_bounds_reference(
    image: torch.Tensor,
    low_rank: int,
    low_fraction: float,
    high_rank: int,
    high_fraction: float,
    out: torch.Tensor,
) -> None:
    for channel, bounds in zip(image, out, strict=True):
        values = channel.flatten().to(torch.float32)
        if not torch.isfinite(values).all():
            bounds.fill_(torch.nan)
            continue
        values = values.sort().values
        for side, (rank, fraction) in enumerate(
            [(low_rank, low_fraction), (high_rank, high_fraction)]
        ):
            below = values[rank]
            above = values[min(rank + 1, len(values) - 1)]
            # Interpolate from the nearer end, as NumPy does: it never overshoots.
            if fraction < 0.5:
                bounds[side] = below + (above - below) * fraction
            else:
                bounds[side] = above - (above - below) * (1 - fraction)


def quantize_reference(image: torch.Tensor, ramp: torch.Tensor, out: torch.Tensor) -> None:
    for channel, row, levels in zip(image, ramp, out, strict=True):
        shift, scale, lo, hi, span = row
        z = (channel.to(torch.float32) - shift) / scale
        if span <= 0:
            levels.copy_((z > lo) * 255)
        else:
            levels.copy_(((z.clamp(lo, hi) - lo) / span * 255).round())
