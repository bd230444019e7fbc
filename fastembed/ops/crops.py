"""Crops out of an image into model input, and the vectors of crops into one.

`gather_crops` quantises only the pixels that it gathers: the quantised image exists
nowhere. After quantisation a pixel has 256 values, so division by 255, mean, std and the
cast are one table per output plane, exact by construction.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from .. import dispatch
from .arrays import (
    Array,
    Batch,
    as_images,
    as_output,
    as_tensor,
    beside,
    check,
    dtype_name,
    is_batch,
    like,
    namespace,
    per_channel,
    upload,
)
from .quantize import Percentile, Rule, ZScore, quantize_reference

CROP_MODES = ("random", "grid", "center")
POOL_MODES = ("avg", "max")
INPUT_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)


def crop_origins(
    shape: Sequence[int],
    n: int,
    size: int,
    seed: int = 0,
    key: str = "",
    mode: str = "random",
) -> np.ndarray:
    """Top-left corners of `n` square crops.

    Args:
        shape: (..., H, W) of the image, pixels.
        n: number of crops, >= 1; ``center`` has exactly one.
        size: side of a crop, 1..min(H, W).
        seed: any integer.
        key: the sample's key. Crop i depends on (seed, key, i) and on nothing else: not on
            order, shard, resume, n, nor on any library's random generator.
        mode: ``random`` (uniform over all positions, borders included), ``grid`` (evenly
            spread rows and columns, row by row) or ``center``.

    Returns:
        [n, 2] int32 of (y, x).

    Raises:
        ValueError: a crop that does not fit, n < 1, an unknown mode.

    Exactness: deterministic; BLAKE2b of (seed, i, key), scaled to the range by a multiply.
    """
    height, width = int(shape[-2]), int(shape[-1])
    if not 1 <= size <= min(height, width):
        raise ValueError(
            f"size must be in 1..{min(height, width)} for {height}x{width}; got {size}"
        )
    if n < 1 or (mode == "center" and n != 1):
        raise ValueError(f"n must be >= 1, and 1 for center crops; got {n} for {mode}")
    if mode == "random":
        return np.array(
            [_random_origin(height - size + 1, width - size + 1, seed, key, i) for i in range(n)],
            dtype=np.int32,
        )
    if mode == "grid":
        rows = max(1, math.isqrt(n))
        columns = math.ceil(n / rows)
        ys = _spread(height - size, rows)
        xs = _spread(width - size, columns)
        return np.array([(y, x) for y in ys for x in xs][:n], dtype=np.int32)
    if mode == "center":
        return np.array([((height - size) // 2, (width - size) // 2)], dtype=np.int32)
    raise ValueError(f"mode must be one of {', '.join(CROP_MODES)}; got {mode!r}")


def gather_crops(
    image: Batch,
    origins: Batch,
    size: int,
    *,
    quantize: Rule | torch.Tensor,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    dtype: torch.dtype = torch.float32,
    channels: Sequence[int] | None = None,
    out: Array | None = None,
    backend: str | None = None,
) -> Array:
    """Cut square crops, quantise their pixels to 8 bits and normalise them for a model.

    value = (level / 255 - mean) / std in float32, then cast; level as in `quantize`.

    Args:
        image: [C, H, W] uint8, uint16 or float32; or a list of images of one dtype and number
            of channels, each of its own size: one launch on CUDA.
        origins: [N, 2] integers, (y, x) of each crop's top-left pixel; for a list of images a
            list of such, N may differ.
        size: side of the crops, pixels.
        quantize: a rule, measured on the whole image here, or ramps [C, 5] that
            `Percentile.measure` or `ZScore.measure` gave; [I, C, 5] for a list.
        mean, std: on the 0..1 scale; one number, or one per output plane.
        dtype: float32, bfloat16, float16; or uint8 for the levels themselves, where mean
            must be 0 and std 1.
        channels: source channel of each output plane, repeats allowed; all by default.
        out: [N, P, size, size] of `dtype`.

    Returns:
        [N, P, size, size] of `dtype`, P = len(channels); of a list the crops of the first
        image, then those of the second, and so on.

    Raises:
        ValueError: a crop that leaves the image, a wrong number of means, std of 0, an empty
            list. Origins that are on CUDA are not read back: a wrong one is a failed assertion
            there. A non-finite pixel that a rule measures: as `percentile_bounds`.
        TypeError: another dtype, or several.

    Exactness: bit-equal to quantising the whole image, slicing, ``/ 255``, ``- mean``,
        ``/ std`` in float32 and one cast, on every backend.
    """
    tensors = as_images(image)
    count, device = len(tensors[0]), tensors[0].device
    rows = _origins(origins if is_batch(image) else [origins], tensors, size)
    planes = list(range(count)) if channels is None else [int(channel) for channel in channels]
    for plane in planes:
        if not 0 <= plane < count:
            raise ValueError(f"channels must be in 0..{count - 1}; got {plane}")
    shape = (len(tensors), count, 5)
    if isinstance(quantize, (Percentile, ZScore)):
        ramp = quantize.measure(image, backend=backend)
    else:
        ramp = as_tensor("quantize", quantize)
        wanted = shape if is_batch(image) else shape[1:]
        if ramp.shape != wanted or ramp.dtype != torch.float32:
            raise ValueError(
                f"quantize must be a rule or float32 ramps {list(wanted)}; "
                f"got {dtype_name(ramp.dtype)} {list(ramp.shape)}"
            )
    table = kept_level_table(mean, std, dtype, len(planes))
    result = as_output(out, (len(rows), len(planes), size, size), dtype, device)
    run = dispatch.resolve("crops", "gather_crops", device, backend)
    run(
        tensors,
        upload(rows, device),
        upload(_selection(tuple(planes)), device),
        upload(ramp, device).reshape(shape).contiguous(),
        upload(table, device),
        result,
    )
    return like(result, image) if out is None else out


def _origins(origins: Sequence[Array], images: list[torch.Tensor], size: int) -> torch.Tensor:
    """Where all the crops of a batch are: int32 [N, 3] of (image, y, x), where `origins` are."""
    if size < 1:
        raise ValueError(f"size must be >= 1; got {size}")
    if len(origins) != len(images):
        raise ValueError(f"origins must be one array per image, {len(images)}; got {len(origins)}")
    parts = [as_tensor("origins", part) for part in origins]
    for part in parts:
        if part.ndim != 2 or part.shape[1] != 2:
            raise ValueError(f"origins must be [N, 2]; got {list(part.shape)}")
    xp, corners = namespace(torch.cat(parts))
    owners = np.repeat(np.arange(len(images)), [len(part) for part in parts])
    sizes = np.array([image.shape[1:] for image in images])[owners]
    check(
        ((corners < 0) | (corners > beside(sizes - size, corners))).any(1),
        f"crops of {size}x{size} must lie in the image",
        lambda n: "crop {} of image {}, {}x{}, is at ({}, {})".format(
            n, owners[n], *sizes[n], *corners[n]
        ),
    )
    rows = xp.concatenate([beside(owners[:, None], corners), corners], axis=1)
    return torch.as_tensor(xp.asarray(rows, dtype=xp.int32))


def resize_crops(
    levels: torch.Tensor,
    size: int,
    *,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Enlarge crops of an image that is smaller than the model's input, and normalise them.

    Bilinear on level / 255, align_corners False, no antialias, as the CPJUMP1 script does.
    This is the rare path: it runs on torch only.

    Args:
        levels: [N, P, side, side] uint8.
        size: side of the result, pixels.
        mean, std, dtype: as for `gather_crops`.
        out: [N, P, size, size] of `dtype`.

    Returns:
        [N, P, size, size] of `dtype`.
    """
    count, planes = levels.shape[:2]
    values = levels.to(torch.float32) / _scalar(255, levels.device)
    values = functional.interpolate(values, size=(size, size), mode="bilinear", align_corners=False)
    mean = upload(per_channel("mean", mean, planes), levels.device)[:, None, None]
    std = upload(per_channel("std", std, planes), levels.device)[:, None, None]
    result = as_output(out, (count, planes, size, size), dtype, levels.device)
    return result.copy_((values - mean) / std)


def level_table(
    mean: float | Sequence[float], std: float | Sequence[float], dtype: torch.dtype, planes: int
) -> torch.Tensor:
    """What each of the 256 levels becomes in each plane: [P, 256] of `dtype`."""
    if dtype not in INPUT_DTYPES:
        names = ", ".join(dtype_name(allowed) for allowed in INPUT_DTYPES)
        raise TypeError(f"dtype must be one of {names}; got {dtype_name(dtype)}")
    mean = per_channel("mean", mean, planes)[:, None]
    std = per_channel("std", std, planes)[:, None]
    if (std == 0).any():
        raise ValueError(f"std must not be 0; got {std.flatten().tolist()}")
    levels = torch.arange(256, dtype=torch.float32)
    if dtype == torch.uint8:
        if mean.any() or (std != 1).any():
            raise ValueError("dtype uint8 gives the levels themselves: mean must be 0 and std 1")
        return levels.to(torch.uint8).expand(planes, 256).contiguous()
    return ((levels / 255 - mean) / std).to(dtype)


def kept_level_table(
    mean: float | Sequence[float] | Array, std: float | Sequence[float] | Array,
    dtype: torch.dtype, planes: int,
) -> torch.Tensor:  # fmt: skip
    """`level_table`, made once: for a small crop it would take as long as the kernel. Nobody may
    write into it."""
    return _kept_level_table(_hashable(mean), _hashable(std), dtype, planes)


@functools.lru_cache(maxsize=64)
def _kept_level_table(mean, std, dtype: torch.dtype, planes: int) -> torch.Tensor:
    return level_table(mean, std, dtype, planes)


def _hashable(values: float | Sequence[float] | Array) -> float | tuple[float, ...]:
    return values if isinstance(values, (int, float)) else tuple(float(value) for value in values)


@functools.lru_cache(maxsize=64)
def _selection(planes: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(planes, dtype=torch.int32)


def pool_crops(
    features: Array,
    mode: str = "avg",
    *,
    l2_normalize: bool = False,
    dtype: torch.dtype | None = None,
    out: Array | None = None,
    backend: str | None = None,
) -> Array:
    """One vector per sample out of its crops' vectors.

    Args:
        features: [S, N, D] float32, bfloat16 or float16, N >= 1.
        mode: ``avg`` or ``max``, over N.
        l2_normalize: divide by the Euclidean norm, at least 1e-12.
        dtype: of the result; that of `features` by default.
        out: [S, D] of `dtype`.

    Returns:
        [S, D] of `dtype`.

    Raises:
        ValueError: no crops, an unknown mode. TypeError: another dtype.

    Exactness: accumulation in float32, crop after crop, then one division and one cast:
        bit-equal to NumPy's sum over axis 1 / N, and to its max (NaN carries through), on
        every backend. With `l2_normalize` within 1e-6 relative of float64.
    """
    tensor = as_tensor("features", features)
    if tensor.ndim != 3 or tensor.shape[1] == 0:
        raise ValueError(f"features must be [S, N, D] with N >= 1; got {list(tensor.shape)}")
    if mode not in POOL_MODES:
        raise ValueError(f"mode must be one of {', '.join(POOL_MODES)}; got {mode!r}")
    for name, kind in (("features", tensor.dtype), ("dtype", dtype or tensor.dtype)):
        if kind not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{name} must be float32, bfloat16 or float16; got {dtype_name(kind)}")
    shape = (tensor.shape[0], tensor.shape[2])
    result = as_output(out, shape, dtype or tensor.dtype, tensor.device)
    run = dispatch.resolve("crops", "pool_crops", tensor.device, backend)
    run(tensor.contiguous(), mode == "max", l2_normalize, result)
    return like(result, features) if out is None else out


def gather_crops_reference(
    images: list[torch.Tensor],
    origins: torch.Tensor,
    planes: torch.Tensor,
    ramp: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor,
) -> None:
    size = out.shape[-1]
    for crop, (i, y, x) in zip(out, origins.tolist(), strict=True):
        window = images[i][:, y : y + size, x : x + size]
        levels = torch.empty(window.shape, dtype=torch.uint8, device=window.device)
        quantize_reference([window], ramp[i, None], [levels])
        for plane, channel in enumerate(planes.tolist()):
            crop[plane] = table[plane][levels[channel].long()]


def pool_crops_reference(
    features: torch.Tensor, take_max: bool, l2_normalize: bool, out: torch.Tensor
) -> None:
    crops = features.to(torch.float32).unbind(1)
    pooled = crops[0]
    for crop in crops[1:]:
        if take_max:  # of +0 and -0 the later one, on every backend
            pooled = torch.where((crop >= pooled) | crop.isnan(), crop, pooled)
        else:
            pooled = pooled + crop
    if not take_max:
        pooled = pooled / _scalar(len(crops), pooled.device)
    if l2_normalize:
        wide = pooled.to(torch.float64)
        pooled = (wide / wide.norm(dim=1, keepdim=True).clamp_min(1e-12)).to(torch.float32)
    out.copy_(pooled)


def _scalar(value: float, device: torch.device) -> torch.Tensor:
    """A float32 divisor; torch on CUDA divides by a Python number through its reciprocal."""
    return torch.full((), value, dtype=torch.float32, device=device)


def _random_origin(rows: int, columns: int, seed: int, key: str, index: int) -> tuple[int, int]:
    """Uniform over rows x columns positions; 64 bits each, so the bias is below 1e-12."""
    digest = hashlib.blake2b(f"{seed}|{index}|{key}".encode(), digest_size=16).digest()
    y = int.from_bytes(digest[:8], "little") * rows >> 64
    x = int.from_bytes(digest[8:], "little") * columns >> 64
    return y, x


def _spread(slack: int, count: int) -> list[int]:
    """`count` positions over 0..slack, both ends included; the middle for one."""
    if count == 1:
        return [slack // 2]
    return [slack * i // (count - 1) for i in range(count)]
