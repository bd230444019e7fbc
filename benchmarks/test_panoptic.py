"""A panoptic PNG to the id, box and area of each segment, beside the ways of scripts.

The file is COCO's example where the real images are (FASTEMBED_DATA, or shared/data beside
the checkout), else a synthetic map of the same size.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastembed import dispatch, ops, png, testing

HEIGHT, WIDTH = 427, 640
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def file() -> tuple[str, bytes]:
    """(what it is, the PNG file's bytes)."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FASTEMBED_DATA", default))
    path = folder / "coco_panoptic" / "panoptic_val2017" / "000000142238.png"
    if path.is_file():
        return "COCO 142238", path.read_bytes()
    stream = io.BytesIO()
    rgb = testing.colours_of(testing.panoptic_map(HEIGHT, WIDTH, seed=0))
    Image.fromarray(rgb).save(stream, "PNG")
    return "synthetic", stream.getvalue()


def opencv_any(data: bytes) -> np.ndarray:
    import cv2

    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    ids = testing.oracle_panoptic(bgr[:, :, ::-1])
    rows = []
    for segment, area in zip(*np.unique(ids, return_counts=True), strict=True):
        if segment != 0:
            mask = ids == segment
            y, x = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            rows.append((segment, y[0], x[0], y[-1], x[-1], area))
    return np.array(rows)


def pillow_masks(data: bytes) -> np.ndarray:
    return testing.oracle_segments(
        testing.oracle_panoptic(np.asarray(Image.open(io.BytesIO(data))))
    )


def pillow_inverse(data: bytes) -> np.ndarray:
    """Without a mask per segment: extents gathered through np.unique's inverse."""
    ids = testing.oracle_panoptic(np.asarray(Image.open(io.BytesIO(data))))
    found, inverse, areas = np.unique(ids, return_inverse=True, return_counts=True)
    inverse = inverse.ravel()
    places = np.divmod(np.arange(ids.size), ids.shape[1])
    low = np.full((2, len(found)), max(ids.shape))
    high = np.zeros_like(low)
    for place, first, last in zip(places, low, high, strict=True):
        np.minimum.at(first, inverse, place)
        np.maximum.at(last, inverse, place)
    return np.column_stack([found, *low, *high, areas])[found != 0]


CONTENDERS = {
    "OpenCV, rgb2id, any() per mask": opencv_any,
    "Pillow, rgb2id, nonzero() per mask": pillow_masks,
    "Pillow, rgb2id, np.unique inverse": pillow_inverse,
    "numba": lambda data: ops.panoptic_png_segments(data, backend="numba")[0],
    "native": lambda data: ops.panoptic_png_segments(data, backend="native")[0],
    "native, zlib": lambda data: ops.panoptic_png_segments(data, backend="native")[0],
    "native, with ids": lambda data: ops.panoptic_png_segments(
        data, with_ids=True, backend="native"
    )[0],
}


@pytest.mark.parametrize("contender", CONTENDERS)
def test_png_to_segments(row, file, contender, monkeypatch):
    name, data = file
    backend = contender.partition(",")[0]
    if backend in dispatch.BACKENDS:
        function, reason = dispatch.find("panoptic", "scanline_segments", "cpu", backend)
        if function is None:
            pytest.skip(f"{backend} scanline_segments: {reason}")
    elif backend == "OpenCV":
        pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    if contender.endswith("zlib"):
        monkeypatch.setattr(png, "inflater", lambda: ("zlib", png._zlib_decompress))
    run = CONTENDERS[contender]
    result = run(data)
    if isinstance(result, ops.Segments):
        result = testing.segment_rows(result)
    np.testing.assert_array_equal(result, pillow_masks(data))
    benchmark = row(
        "panoptic PNG -> segments, boxes, areas", contender, dtype="uint8",
        shape=f"{name} {HEIGHT}x{WIDTH}", nbytes=HEIGHT * WIDTH * 3, images=1,
        baseline=contender.startswith("OpenCV"), exactness="bits",
    )  # fmt: skip
    benchmark.pedantic(run, args=(data,), rounds=101, warmup_rounds=3)


@pytest.mark.parametrize("contender", ["NumPy, nonzero() per mask", "reference", "numba", "native"])
def test_map_to_segments(row, contender):
    """The map already decoded, all of its pixels in main memory."""
    rgb = testing.colours_of(testing.panoptic_map(HEIGHT, WIDTH, seed=0))
    expected = testing.oracle_segments(testing.oracle_panoptic(rgb))
    if contender.startswith("NumPy"):

        def run():
            ids = testing.oracle_panoptic(rgb)
            return testing.oracle_segments(ids)

        result = run()
    else:
        function, reason = dispatch.find("panoptic", "panoptic_segments", "cpu", contender)
        if function is None:
            pytest.skip(f"{contender} panoptic_segments: {reason}")

        def run():
            return ops.panoptic_segments(rgb, backend=contender)

        result = testing.segment_rows(run())
    np.testing.assert_array_equal(result, expected)
    benchmark = row(
        "panoptic map -> segments, boxes, areas", contender, dtype="uint8",
        shape=f"{HEIGHT}x{WIDTH}x3", nbytes=rgb.nbytes, images=1,
        baseline=contender.startswith("NumPy"), exactness="bits",
    )  # fmt: skip
    benchmark.pedantic(run, rounds=51, warmup_rounds=3)
