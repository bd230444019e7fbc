"""What each op must give, in NumPy, Pillow and torchvision: nothing here calls the library."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

import numpy as np
import torch


def oracle_panoptic(rgb: np.ndarray) -> np.ndarray:
    """panopticapi's rgb2id: [H, W] int32."""
    rgb = rgb.astype(np.int32)
    return rgb[:, :, 0] + 256 * rgb[:, :, 1] + 256 * 256 * rgb[:, :, 2]


def oracle_segments(ids: np.ndarray, void: int | None = 0) -> np.ndarray:
    """A mask per id: [S, 6] int64 of (id, y0, x0, y1, x1, area)."""
    rows = []
    for segment in np.unique(ids):
        if segment != void:
            y, x = np.nonzero(ids == segment)
            rows.append((segment, y.min(), x.min(), y.max(), x.max(), len(y)))
    return np.array(rows, dtype=np.int64).reshape(-1, 6)


def oracle_labels(labels: np.ndarray, image: np.ndarray) -> np.ndarray:
    """A mask per object: [S, 6 + 4 C] float64 of id, y0, x0, y1, x1, area, then by channel of an
    image [C, H, W] sum, mean, minimum, maximum. Float pixels are added one after the other.
    """
    rows = []
    for label in np.unique(labels[labels != 0]):
        mask = labels == label
        y, x = np.nonzero(mask)
        row = [label, y.min(), x.min(), y.max(), x.max(), len(y)]
        for values in image[:, mask]:
            if values.dtype == np.float32:
                total = np.cumsum(values, dtype=np.float64)[-1]
            else:
                total = values.sum(dtype=np.int64)
            row += [total, total / len(y), values.min(), values.max()]
        rows.append(row)
    return np.array(rows, dtype=np.float64).reshape(-1, 6 + 4 * len(image))


def oracle_bounds(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Percentiles by a full sort and NumPy 2.4's "linear" rule, written out: [C, 2]."""
    bounds = np.empty((len(image), 2), dtype=np.float32)
    for channel, row in zip(image, bounds, strict=True):
        values = np.sort(channel.astype(np.float32), axis=None)
        for side, q in enumerate((low, high)):
            position = (values.size - 1) * (q / 100)
            k = min(int(np.floor(position)), values.size - 1)
            t = position - k
            a, b = values[k], values[min(k + 1, values.size - 1)]
            gap = b - a
            row[side] = a + gap * np.float32(t) if t < 0.5 else b - gap * np.float32(1 - t)
    return bounds


def oracle_ramp(image: np.ndarray, low: float = 1.0, high: float = 99.0) -> np.ndarray:
    """The ramps of the percentile rule: (shift, scale, lo, hi, span) per channel, [C, 5]."""
    lo, hi = oracle_bounds(image, low, high).T
    return np.stack([np.zeros_like(lo), np.ones_like(lo), lo, hi, hi - lo], axis=1)


def oracle_percentile_levels(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Clip, scale, round to even in float32; a constant channel is a step: [C, H, W] uint8."""
    levels = np.empty(image.shape, dtype=np.uint8)
    for c, (lo, hi) in enumerate(oracle_bounds(image, low, high)):
        x = image[c].astype(np.float32)
        if hi <= lo:
            levels[c] = np.where(x > lo, 255, 0)
        else:
            levels[c] = np.rint((np.clip(x, lo, hi) - lo) / (hi - lo) * np.float32(255))
    return levels


def oracle_zscore_levels(
    image: np.ndarray, mean: Iterable[float], std: Iterable[float], clamp_z: float
) -> np.ndarray:
    levels = np.empty(image.shape, dtype=np.uint8)
    clamp = np.float32(clamp_z)
    for c, (m, s) in enumerate(zip(mean, std, strict=True)):
        s = np.float32(1.0 if np.float32(s) <= np.float32(1e-6) else s)
        z = np.clip((image[c].astype(np.float32) - np.float32(m)) / s, -clamp, clamp)
        levels[c] = np.rint((z + clamp) / (np.float32(2) * clamp) * np.float32(255))
    return levels


def oracle_crops(
    levels: np.ndarray, origins: np.ndarray, size: int, mean: tuple, std: tuple, dtype: str
) -> np.ndarray:
    """Slice, / 255, - mean, / std in float32, one cast: [N, C, size, size]."""
    mean = np.asarray(mean, dtype=np.float32)[:, None, None]
    std = np.asarray(std, dtype=np.float32)[:, None, None]
    crops = np.stack([levels[:, y : y + size, x : x + size] for y, x in origins])
    values = (crops.astype(np.float32) / np.float32(255) - mean) / std
    return round_to_bfloat16(values) if dtype == "bfloat16" else values.astype(dtype)


def oracle_pool(features: np.ndarray, mode: str, l2_normalize: bool, dtype: str) -> np.ndarray:
    """Sum over axis 1 / N, or max, in float32; the norm in float64: [S, D]."""
    features = features.astype(np.float32)
    if mode == "avg":
        pooled = np.add.reduce(features, axis=1) / np.float32(features.shape[1])
    else:
        pooled = features.max(axis=1)
    if l2_normalize:
        norm = np.sqrt((pooled.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
        pooled = (pooled / np.maximum(norm, 1e-12)).astype(np.float32)
    return round_to_bfloat16(pooled) if dtype == "bfloat16" else pooled.astype(dtype)


def oracle_blended_crop(
    image: np.ndarray, mask: np.ndarray, box: Iterable[int], bg_alpha: float, pad_ratio: float
) -> np.ndarray:
    """The seed's way: the whole image blended in float64, then cut out: [h, w, 3] uint8."""
    height, width = mask.shape
    alpha = np.where(mask, 1.0, np.float64(np.float32(bg_alpha)))[..., None]
    blended = image.astype(np.float64) / 255 * alpha + (1 - alpha) * 0.5
    y0, x0, y1, x1 = (int(edge) for edge in box)
    pad_y, pad_x = int(pad_ratio * (y1 - y0 + 1)), int(pad_ratio * (x1 - x0 + 1))
    rows = slice(max(0, y0 - pad_y), min(height, y1 + 1 + pad_y))
    columns = slice(max(0, x0 - pad_x), min(width, x1 + 1 + pad_x))
    return (blended[rows, columns] * 255).astype(np.uint8)


def oracle_resize(crop: np.ndarray, size: int, mode: str) -> np.ndarray:
    """[h, w, 3] uint8 to [size, size, 3], by the library that `mode` names."""
    if mode.startswith("pillow"):
        from PIL import Image

        picture = Image.fromarray(crop)
        if mode == "pillow12-bicubic":  # horizontally first, whatever the installed one does
            picture = picture.resize((size, len(crop)), Image.Resampling.BICUBIC)
        return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
    from torchvision.transforms import v2

    tensor = torch.from_numpy(crop).permute(2, 0, 1)  # a batch of one, channels last
    if mode == "float-bilinear":
        tensor = tensor / 255
    interpolation = v2.InterpolationMode(mode.rpartition("-")[2])
    resized = v2.functional.resize(tensor, [size, size], interpolation, antialias=True)
    return resized.permute(1, 2, 0).numpy()


def oracle_blend_crops(
    image: np.ndarray,
    ids: np.ndarray,
    segments: SimpleNamespace,
    size: int = 224,
    bg_alpha: float = 0.3,
    pad_ratio: float = 0.1,
    mean: tuple = (0.5, 0.5, 0.5),
    std: tuple = (0.5, 0.5, 0.5),
    dtype: str = "float32",
    resize: str = "pillow-bicubic",
) -> np.ndarray:
    """Blend, cut, resize, / 255, - mean, / std in float32, one cast: [S, 3, size, size]."""
    crops = np.empty((len(segments.ids), 3, size, size), dtype=np.float32)
    for crop, name, box in zip(crops, segments.ids, segments.boxes, strict=True):
        blended = oracle_blended_crop(image, ids == name, box, bg_alpha, pad_ratio)
        value = oracle_resize(blended, size, resize)
        if value.dtype == np.uint8:
            value = value.astype(np.float32) / np.float32(255)
        value = (value - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
        crop[:] = value.transpose(2, 0, 1)
    return round_to_bfloat16(crops) if dtype == "bfloat16" else crops.astype(dtype)


def oracle_triplane(
    planes: dict[str, np.ndarray], shape: tuple[int, int, int], mode: str, dtype: str
) -> np.ndarray:
    """The mean of the upsampled planes [C, D, H, W], every float32 step as the op promises it."""
    depth, height, width = shape
    scale = np.float32(1 / len(planes))

    def along(values: np.ndarray, axis: int, length: int) -> np.ndarray:
        count = values.shape[axis]
        if mode == "nearest":
            step = np.float32(count) / np.float32(length)
            at = np.floor(np.arange(length, dtype=np.float32) * step).astype(int)
            return values.take(np.minimum(at, count - 1), axis)
        source = np.clip((np.arange(length) + 0.5) * count / length - 0.5, 0, count - 1)
        t = np.expand_dims((source % 1).astype(np.float32), tuple(range(1, values.ndim - axis)))
        low, high = (values.take(f(source).astype(int), axis) for f in (np.floor, np.ceil))
        return low + t * (high - low)

    parts = dict.fromkeys(("xy", "xz", "yz"), np.float32(0))
    for name, plane in planes.items():
        tokens = plane.astype(np.float32) * scale
        if name == "xy":  # [z, C, y, x]
            parts[name] = along(along(tokens, 3, width), 2, height).transpose(1, 0, 2, 3)
        elif name == "xz":  # [y, C, z, x]
            parts[name] = along(along(tokens, 3, width), 2, depth).transpose(1, 2, 0, 3)
        else:  # [x, C, z, y]
            parts[name] = along(along(tokens, 2, depth), 3, height).transpose(1, 2, 3, 0)
    return (parts["xy"] + parts["xz"] + parts["yz"]).astype(dtype)


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 rounded half to even to bfloat16, still as float32. For finite values."""
    bits = values.astype(np.float32).view(np.uint32)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)
