"""Images that look like the real ones, seeded."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np


def microscopy(dtype: str, height: int, width: int, seed: int, channels: int = 5) -> np.ndarray:
    """Log-normal background with bright spots, [C, H, W]: the histogram of a stained plate."""
    rng = np.random.default_rng(seed)
    image = rng.lognormal(6.0, 0.7, (channels, height, width))
    image *= 1 + 4 * (rng.random(image.shape) > 0.98)
    if dtype == "uint8":
        image = image / 40
    top = 1e9 if dtype == "float32" else np.iinfo(dtype).max
    return np.minimum(image, top).astype(dtype)


def panoptic_map(height: int, width: int, seed: int, segments: int = 24) -> np.ndarray:
    """Discs over stripes over void, [H, W] int32: ids below 2^24, runs as long as COCO's."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((height, width), dtype=np.int32)
    colours = rng.integers(1, 2**24, segments)
    colours[-1] = 2**24 - 1
    y, x = np.ogrid[:height, :width]
    for i, colour in enumerate(colours):
        if i % 3 == 0:
            top = rng.integers(0, height)
            ids[top : top + 1 + height // 6] = colour
        else:
            radius = max(1, min(height, width) * rng.uniform(0.02, 0.25))
            at = rng.integers(0, height), rng.integers(0, width)
            ids[(y - at[0]) ** 2 + (x - at[1]) ** 2 <= radius**2] = colour
    return ids


def label_map(height: int, width: int, seed: int, pitch: int = 16) -> np.ndarray:
    """Cells, [H, W] int32: a disc per field of a grid, or none; labels in no order, with gaps."""
    rng = np.random.default_rng(seed)
    rows, columns = (height + pitch - 1) // pitch, (width + pitch - 1) // pitch
    labels = rng.permutation(2 * rows * columns)[: rows * columns].reshape(rows, columns)
    at = rng.uniform(0.3, 0.7, (2, rows, columns)) * pitch
    radius = rng.uniform(0.1, 0.5, (rows, columns)) * pitch
    y, x = np.mgrid[:height, :width]
    field = y // pitch, x // pitch
    distance = (y % pitch - at[0][field]) ** 2 + (x % pitch - at[1][field]) ** 2
    return np.where(distance <= radius[field] ** 2, labels[field], 0).astype(np.int32)


def colours_of(ids: np.ndarray) -> np.ndarray:
    """The panoptic map [H, W, 3] uint8 of ids 0..2^24 - 1: panopticapi's id2rgb."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)


def scene(height: int, width: int, segments: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A photograph's stand-in and its panoptic map: [H, W, 3] uint8 and [H, W] int32.

    Every pixel belongs to the nearest of some points; colour follows the segment, on a
    gradient, with noise: flat areas, edges and texture.
    """
    rng = np.random.default_rng(seed)
    points = rng.random((segments, 2)) * (height, width)
    rows, columns = np.mgrid[:height, :width]
    distance = [(rows - y) ** 2 + (columns - x) ** 2 for y, x in points]
    nearest = np.argmin(distance, axis=0)
    colours = rng.integers(0, 256, (segments, 3))
    image = colours[nearest] + (60 * rows / height)[..., None] + rng.normal(0, 12, (1, width, 3))
    ids = rng.choice(1 << 24, segments, replace=False).astype(np.int32)
    return np.clip(image, 0, 255).astype(np.uint8), ids[nearest]


def segments_of(ids: np.ndarray) -> SimpleNamespace:
    """Ids, ascending, and inclusive boxes of the segments of a panoptic map [H, W]."""
    names = np.unique(ids)
    boxes = []
    for name in names:
        y, x = np.nonzero(ids == name)
        boxes.append((y.min(), x.min(), y.max(), x.max()))
    return SimpleNamespace(ids=names, boxes=np.array(boxes, dtype=np.int32))
