"""Label image to per-object statistics, beside the ways of scripts; then one image of real nuclei.

The tile is 2048x2048 with 2,000 cells, the size that microscopes write. A mask per object reads
the tile once for each: its time is that of some objects, times all of them.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fastembed import dispatch, ops, testing

SIDE, CELLS = 2048, 2000
MASKED = 100  # objects that the loop over masks is timed on
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=testing.INTENSITIES)
def tile(request) -> tuple[str, np.ndarray, np.ndarray]:
    labels = testing.label_map(SIDE, SIDE, seed=0, pitch=44)
    order = np.unique(labels[labels > 0])
    labels[labels > order[CELLS - 1]] = 0
    return request.param, labels, testing.microscopy(request.param, SIDE, SIDE, 0, channels=1)[0]


def masks(labels: np.ndarray, image: np.ndarray) -> list[tuple]:
    rows = []
    for label in np.unique(labels[labels > 0])[:MASKED]:
        mask = labels == label
        y, x = np.nonzero(mask)
        values = image[mask]
        rows.append((y.min(), x.min(), y.max(), x.max(), len(y), values.mean(), values.max()))
    return rows


def regionprops(labels: np.ndarray, image: np.ndarray) -> dict:
    from skimage.measure import regionprops_table

    wanted = ("label", "area", "bbox", "intensity_mean", "intensity_min", "intensity_max")
    return regionprops_table(labels, image, properties=wanted)


def regionprops_mean(labels: np.ndarray, image: np.ndarray) -> dict:
    from skimage.measure import regionprops_table

    return regionprops_table(labels, image, properties=("label", "area", "bbox", "intensity_mean"))


def ndimage_all(labels: np.ndarray, image: np.ndarray) -> list:
    from scipy import ndimage

    found = np.unique(labels[labels > 0])
    functions = ndimage.sum_labels, ndimage.mean, ndimage.minimum, ndimage.maximum
    return [function(image, labels, found) for function in functions] + [
        ndimage.find_objects(labels)
    ]


def ndimage_sums(labels: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Sums and nothing else, of labels that are known."""
    from scipy import ndimage

    return ndimage.sum_labels(image, labels, np.arange(1, labels.max() + 1))


CONTENDERS = {
    f"NumPy, a mask per object ({MASKED} of {CELLS})": masks,
    "scikit-image regionprops_table": regionprops,
    "scikit-image, no extremes": regionprops_mean,
    "scipy.ndimage, all of it": ndimage_all,
    "scipy.ndimage.sum_labels alone": ndimage_sums,
    **{
        backend: lambda labels, image, backend=backend: ops.label_statistics(
            labels, image, backend=backend
        )
        for backend in ("reference", "numba", "native")
    },
}


@pytest.mark.parametrize("contender", CONTENDERS)
def test_tile_to_statistics(row, tile, contender):
    dtype, labels, image = tile
    if contender in dispatch.BACKENDS:
        function, reason = dispatch.find("labels", "label_statistics", "cpu", contender)
        if function is None:
            pytest.skip(f"{contender} label_statistics: {reason}")
    elif contender.startswith("sci"):
        pytest.importorskip("scipy" if "scipy" in contender else "skimage")
    run = CONTENDERS[contender]
    result = run(labels, image)
    if contender in dispatch.BACKENDS:
        assert len(result.ids) == CELLS
        sums = np.bincount(labels.ravel(), image.ravel())
        np.testing.assert_array_equal(result.sums, sums[result.ids])
    benchmark = row(
        f"labels {SIDE}x{SIDE}, {CELLS} cells", contender, dtype=dtype, shape=f"{SIDE}x{SIDE}",
        nbytes=labels.nbytes + image.nbytes, images=MASKED / CELLS if run is masks else 1,
        baseline="regionprops_table" in contender,
        exactness="bits" if contender in dispatch.BACKENDS else "",
    )  # fmt: skip
    fast = contender in ("numba", "native")
    benchmark.pedantic(run, args=(labels, image), rounds=15 if fast else 3, warmup_rounds=1)


@pytest.mark.parametrize("contender", [*CONTENDERS][1:])
def test_real_nuclei(row, contender):
    tifffile = pytest.importorskip("tifffile")
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FASTEMBED_DATA", default)) / "nuclei"
    if not folder.is_dir():
        pytest.skip(f"no real images: {folder} is missing (set FASTEMBED_DATA)")
    image = tifffile.imread(folder / "img2d.tif")
    labels = tifffile.imread(folder / "mask2d.tif").astype(np.int32)
    if contender in dispatch.BACKENDS:
        function, reason = dispatch.find("labels", "label_statistics", "cpu", contender)
        if function is None:
            pytest.skip(f"{contender} label_statistics: {reason}")
    benchmark = row(
        f"labels of real nuclei, {labels.max()}", contender, dtype=image.dtype.name,
        shape="x".join(map(str, labels.shape)), nbytes=labels.nbytes + image.nbytes, images=1,
        baseline="regionprops_table" in contender,
    )  # fmt: skip
    benchmark.pedantic(CONTENDERS[contender], args=(labels, image), rounds=9, warmup_rounds=1)
