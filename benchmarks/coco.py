"""Data sets in COCO's panoptic format: of generated photos, or of one real photo in variations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fastembed import ops, testing

SPLIT = "val2017"
CATEGORIES = [{"id": i + 1, "name": f"class {i}", "isthing": int(i < 80)} for i in range(133)]
SIZES = ((480, 640), (427, 640), (640, 480), (375, 500), (612, 612))  # H, W; COCO's commonest

Photo = tuple[np.ndarray, np.ndarray]  # RGB [H, W, 3] uint8 and ids [H, W] int32


def generated(count: int, seed: int = 0) -> Iterator[Photo]:
    """Photos in the sizes of COCO's, of about 11 segments and 120 KB as a JPEG."""
    rng = np.random.default_rng(seed)
    canvases = [_canvas(900, 16, seed * 1000 + i) for i in range(min(count, 32))]
    for i in range(count):
        height, width = SIZES[i % len(SIZES)]
        image, ids = canvases[rng.integers(len(canvases))]
        y, x = rng.integers(900 - height), rng.integers(900 - width)
        window = np.s_[y : y + height, x : x + width]
        yield image[window], ids[window]


def varied(image: np.ndarray, ids: np.ndarray, count: int, seed: int = 0) -> Iterator[Photo]:
    """One photo, each time with other borders cut off (a tenth at most), every second mirrored."""
    rng = np.random.default_rng(seed)
    height, width = ids.shape
    for i in range(count):
        top, bottom = rng.integers(height // 20, size=2)
        left, right = rng.integers(width // 20, size=2)
        window = np.s_[top : height - bottom, left : width - right]
        step = np.s_[:, :: 1 if i % 2 else -1]
        yield image[window][step], ids[window][step]


def write(folder: Path, photos: Iterable[Photo], **jpeg) -> int:
    """The files of a data set that `CocoPanoptic(folder, SPLIT)` reads; returns its segments.

    `jpeg` are options of Pillow's encoder.
    """
    jpeg = jpeg or {"quality": 90}
    maps = folder / "annotations" / f"panoptic_{SPLIT}"
    for path in (folder / SPLIT, maps):
        path.mkdir(parents=True)
    images, annotations = [], []
    for number, (image, ids) in enumerate(photos, 1):
        name = f"{number:012d}"
        Image.fromarray(image).save(folder / SPLIT / f"{name}.jpg", **jpeg)
        png = Image.fromarray(testing.colours_of(ids))
        png.save(maps / f"{name}.png", compress_level=3)
        found = ops.panoptic_segments(np.ascontiguousarray(ids))
        images.append({"id": number, "file_name": f"{name}.jpg"})
        segments = [
            {"id": segment, "category_id": segment % 133 + 1, "iscrowd": 0, "area": area}
            for segment, area in zip(found.ids.tolist(), found.areas.tolist(), strict=True)
        ]
        annotations.append(
            {"image_id": number, "file_name": f"{name}.png", "segments_info": segments}
        )
    listing = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "annotations" / f"panoptic_{SPLIT}.json").write_text(json.dumps(listing))
    return sum(len(row["segments_info"]) for row in annotations)


def _canvas(side: int, segments: int, seed: int) -> Photo:
    """A scene with texture at every scale, as photos have it."""
    image, ids = testing.scene(side, side, segments, seed)
    rng = np.random.default_rng(seed)
    texture = np.zeros((side, side), dtype=np.float32)
    for cells in (8, 32, 128, 512):
        noise = Image.fromarray(rng.normal(0, 17, (cells, cells)).astype(np.float32))
        texture += np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC))
    return np.clip(image + texture[..., None], 0, 255).astype(np.uint8), ids
