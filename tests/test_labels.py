"""Statistics of labelled objects: a mask per object, scipy.ndimage and scikit-image agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import DEVICE, need_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastembed import dispatch, ops, testing
from fastembed.dispatch import BACKENDS
from fastembed.ops import labels as labels_op

CPU_BACKENDS = ("reference", "numba", "native")
LABEL_DTYPES = ("uint8", "uint16", "int32", "uint32", "int64")


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    need_backend(request.param, "labels", ("label_statistics",))
    return request.param


def on_device(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)


def rows_of(labels: np.ndarray, image: np.ndarray, backend: str | None = None) -> np.ndarray:
    return testing.label_rows(
        ops.label_statistics(on_device(labels), on_device(image), backend=backend)
    )


@st.composite
def labelled(draw):
    """Any labels their dtype has, any pixels; not contiguous."""
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 70)))
    dtype = np.dtype(draw(st.sampled_from(LABEL_DTYPES)))
    top = np.iinfo(dtype).max
    values = st.one_of(st.sampled_from([0, 1, 2, top]), st.integers(0, top))
    labels = draw(hnp.arrays(dtype, shape, elements=values))
    kind = np.dtype(draw(st.sampled_from(testing.INTENSITIES)))
    pixels = (
        st.floats(width=32, allow_nan=False, allow_infinity=False) if kind == np.float32 else None
    )
    channels = draw(st.integers(1, 3))
    image = draw(hnp.arrays(kind, (channels, *shape), elements=pixels))
    step = draw(st.sampled_from([1, 2, -1]))
    return labels[:, ::step], image[:, :, ::step]


@settings(max_examples=100, deadline=None)
@given(example=labelled())
def test_any_labels(example):
    labels, image = example
    expected = testing.oracle_labels(labels, image)
    for backend in CPU_BACKENDS:
        if dispatch.find("labels", "label_statistics", "cpu", backend)[0] is None:
            continue  # test_case_equals_its_oracle skips it, visibly
        found = ops.label_statistics(labels, image, backend=backend)
        np.testing.assert_array_equal(testing.label_rows(found), expected)
        np.testing.assert_array_equal(found.ids, np.unique(labels[labels != 0]).astype(np.int64))
        one = ops.label_statistics(labels, image[-1], backend=backend)
        for part, whole in zip(one[3:], found[3:], strict=True):
            np.testing.assert_array_equal(part, whole[:, -1])


@pytest.mark.parametrize("label_dtype", LABEL_DTYPES)
@pytest.mark.parametrize("dtype", testing.INTENSITIES)
@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130])
def test_every_width_and_dtype(width, dtype, label_dtype, backend):
    """Rows shorter and longer than the blocks that kernels look at, runs across their seams."""
    rng = np.random.default_rng(width)
    labels = np.repeat(rng.integers(0, 5, (3, width)), 7, axis=1)[:, 3 : 3 + width]
    image = testing.microscopy(dtype, 3, width, seed=width, channels=2).round()
    image *= image.dtype.type(1) - 2 * (dtype == "float32") * (image % 2 > 0).astype(image.dtype)
    np.testing.assert_array_equal(
        rows_of(labels.astype(label_dtype), image, backend), testing.oracle_labels(labels, image)
    )


def test_dtypes_and_shapes_of_the_result(backend):
    labels, image = np.array([[0, 7], [7, 3]]), np.array([[1, 2], [3, 65535]], dtype=np.uint16)
    found = ops.label_statistics(on_device(labels), on_device(image), backend=backend)
    assert [part.tolist() for part in found] == [
        [3, 7], [[1, 1, 1, 1], [0, 0, 1, 1]], [1, 2], [65535, 5], [65535, 2.5], [65535, 2],
        [65535, 3],
    ]  # fmt: skip
    int32, int64, float64 = torch.int32, torch.int64, torch.float64
    dtypes = [int64, int32, int64, int64, float64, torch.uint16, torch.uint16]
    assert [part.dtype for part in found] == dtypes
    assert all(part.device.type == DEVICE.type for part in found)
    planes = on_device(np.stack([image, image, image]).astype(np.float32))
    found = ops.label_statistics(on_device(labels), planes, backend=backend)
    assert [part.dtype for part in found[3:]] == [float64, float64, torch.float32, torch.float32]
    assert [tuple(part.shape) for part in found[3:]] == [(2, 3)] * 4
    empty = ops.label_statistics(on_device(0 * labels), planes, backend=backend)
    assert [tuple(part.shape) for part in empty] == [(0,), (0, 4), (0,)] + [(0, 3)] * 4
    arrays = ops.label_statistics(labels, image)
    assert all(isinstance(part, np.ndarray) for part in arrays)


@pytest.mark.parametrize("cpu_backend", CPU_BACKENDS)
def test_more_objects_than_16_bits_number(cpu_backend):
    """70,000 of them: uint16 labels would wrap; the first tables are too small."""
    need_backend(cpu_backend, "labels", ("label_statistics",), "cpu")
    rng = np.random.default_rng(0)
    labels = rng.permutation(70_000).astype(np.int32).reshape(280, 250) + 1
    labels = np.repeat(labels, 2, axis=1)
    image = rng.integers(0, 65536, labels.shape).astype(np.uint16)
    found = ops.label_statistics(labels, image, backend=cpu_backend)
    np.testing.assert_array_equal(found.ids, np.arange(1, 70_001))
    assert (found.areas == 2).all()
    sums = np.bincount(labels.ravel(), image.ravel())[1:]
    np.testing.assert_array_equal(found.sums, sums)
    np.testing.assert_array_equal(found.means, sums / 2)


@pytest.mark.parametrize("distinct", [64, 65, 4096, 4097])
def test_more_objects_than_the_first_table_holds(distinct, backend):
    if backend == "triton" and DEVICE.type == "cpu" and distinct > 100:
        pytest.skip("interpreted Triton takes minutes")
    assert labels_op.FIRST_SLOTS // 2 == 4096
    labels = np.random.default_rng(1).permutation(distinct)[None].astype(np.int32) + 1
    image = (labels % 251).astype(np.uint8)
    found = ops.label_statistics(on_device(labels), on_device(image), backend=backend)
    np.testing.assert_array_equal(found.ids.cpu(), np.arange(1, distinct + 1))
    np.testing.assert_array_equal(found.means.cpu(), np.arange(1, distinct + 1) % 251)


@pytest.mark.parametrize("spacing", [2**8, 2**16, 2**32, 2**32 + 1, 2**56])
def test_labels_that_are_alike_do_not_crowd_one_slot(spacing, backend):
    labels = np.arange(1, 101) * spacing
    labels = np.stack([labels, labels[::-1]])
    image = np.arange(200, dtype=np.uint8).reshape(2, 100)
    found = ops.label_statistics(on_device(labels), on_device(image), backend=backend)
    np.testing.assert_array_equal(found.ids.cpu(), labels[0])
    np.testing.assert_array_equal(found.sums.cpu(), image[0].astype(int) + image[1, ::-1])


@pytest.mark.parametrize("sentinel", [-1, 0, 1, 2**62])
def test_a_table_may_hold_anything_before(sentinel, backend):
    labels = testing.label_map(20, 40, seed=1)
    image = testing.microscopy("uint16", 20, 40, seed=1, channels=2)
    run = dispatch.resolve("labels", "label_statistics", DEVICE, backend)
    tables = torch.full((1, 1 + 64, 12), sentinel, dtype=torch.int64, device=DEVICE)
    run([on_device(labels)], [on_device(image)], tables)
    table = tables[0].cpu().numpy()
    rows = table[1:][table[1:, 5] > 0]
    rows = rows[rows[:, 0].argsort()]
    expected = testing.oracle_labels(labels, image)
    np.testing.assert_array_equal(rows, np.delete(expected, [7, 11], axis=1))  # but the means
    assert table[0, 0] == len(rows)


def test_extreme_floats(backend):
    """Either sign, zeros, denormals, the largest; sums of numbers that cancel."""
    big = np.finfo(np.float32).max
    image = np.array(
        [[big, big, -big, 1e-45, -1e-45], [-0.0, 0.0, -3.5, 2.5, -2.5]], dtype=np.float32
    )
    labels = np.array([[1, 1, 1, 2, 2], [3, 3, 4, 5, 5]], dtype=np.uint8)
    found = ops.label_statistics(on_device(labels), on_device(image), backend=backend)
    expected = testing.oracle_labels(labels, image[None])
    np.testing.assert_array_equal(testing.label_rows(found), expected)


def test_positive_objects_for_every_percentile(backend):
    """The rule of the study, as its loop has it: object mean strictly above a percentile."""
    labels = testing.label_map(60, 50, seed=2)
    marker = testing.microscopy("uint16", 60, 50, seed=2, channels=1)[0] // 64
    labels[labels == labels.max()] = 0
    percentiles = [60, 70, 75, 80, 90]
    # A mean that is the percentile itself is not above it.
    labels[0, 0] = 10**6
    marker[0, 0] = np.percentile(marker, 75, method="lower")
    thresholds = np.percentile(marker, percentiles)
    expected = [
        [marker[labels == label].mean() > threshold for threshold in thresholds]
        for label in np.unique(labels[labels > 0])
    ]
    found = ops.label_statistics(on_device(labels), on_device(marker), backend=backend)
    np.testing.assert_array_equal(found.means.cpu().numpy()[:, None] > thresholds, expected)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_real_nuclei(real_data, dtype, backend):
    tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed")
    ndimage = pytest.importorskip("scipy.ndimage", reason="SciPy is not installed")
    measure = pytest.importorskip("skimage.measure", reason="scikit-image is not installed")
    image = tifffile.imread(real_data / "nuclei" / "img2d.tif").astype(dtype)
    labels = tifffile.imread(real_data / "nuclei" / "mask2d.tif")
    if backend == "triton" and DEVICE.type == "cpu":  # interpreted: seconds per large image
        image, labels = image[200:300, 200:300], labels[200:300, 200:300]
    found = ops.label_statistics(on_device(labels), on_device(image), backend=backend)
    found = type(found)(*(part.cpu().numpy() for part in found))
    assert len(found.ids) > 5
    np.testing.assert_array_equal(
        testing.label_rows(found), testing.oracle_labels(labels, image[None])
    )
    for part, function in (
        (found.sums, ndimage.sum_labels), (found.minima, ndimage.minimum),
        (found.maxima, ndimage.maximum), (found.means, ndimage.mean),
    ):  # fmt: skip
        np.testing.assert_array_equal(part, function(image, labels, found.ids))
    table = measure.regionprops_table(
        labels, image, properties=("label", "area", "bbox", "intensity_mean")
    )
    np.testing.assert_array_equal(found.ids, table["label"])
    np.testing.assert_array_equal(found.areas, table["area"])
    boxes = np.stack([table[f"bbox-{i}"] for i in range(4)], axis=1) - [0, 0, 1, 1]
    np.testing.assert_array_equal(found.boxes, boxes)
    np.testing.assert_allclose(
        found.means, table["intensity_mean"], rtol=1e-6 if dtype == "float32" else 1e-15
    )


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_pixel_that_is_not_finite(bad, backend):
    labels = np.array([[0, 5, 5, 9], [5, 5, 0, 9]], dtype=np.int32)
    image = np.ones((2, 2, 4), dtype=np.float32)
    image[1, :, 0:3:2] = [[bad, 1], [1, bad]]  # background is not looked at
    assert ops.label_statistics(
        on_device(labels), on_device(image), backend=backend
    ).means.tolist() == [[1, 1], [1, 1]]
    image[1, 0, 3] = bad
    message = "image must be finite inside objects; channel 1 has non-finite pixels in label 9"
    with pytest.raises(ValueError, match=message):
        ops.label_statistics(on_device(labels), on_device(image), backend=backend)


def test_negative_labels(backend):
    labels = np.array([[0, 5, -2, -2], [5, -7, 0, 9]], dtype=np.int32)
    image = np.zeros((2, 4), dtype=np.uint8)
    with pytest.raises(ValueError, match="labels must not be negative; got -7 in 1 pixels"):
        ops.label_statistics(on_device(labels), on_device(image), backend=backend)


def test_refusals():
    labels, image = np.ones((4, 5), np.int32), np.ones((4, 5), np.uint16)
    call = ops.label_statistics
    cases = [
        (TypeError, "labels must be uint8.*got float64", lambda: call(labels * 1.0, image)),
        (TypeError, "labels must be uint8.*got bool", lambda: call(labels > 0, image)),
        (TypeError, "labels must be uint8.*got int16", lambda: call(labels.astype("i2"), image)),
        (TypeError, "image must be uint8.*got float64", lambda: call(labels, image * 1.0)),
        (TypeError, "image must be uint8.*got int64", lambda: call(labels, labels.astype("i8"))),
        (ValueError, r"be \[H, W\], .*got \[1, 4, 5\]", lambda: call(labels[None], image)),
        (ValueError, r"none of them 0; got \[0, 5\]", lambda: call(labels[:0], image[:0])),
        (
            ValueError, r"image must be \[4, 5\] or \[C, 4, 5\].*got \[5, 4\]",
            lambda: call(labels, image.T),
        ),
        (ValueError, r"got \[0, 4, 5\]", lambda: call(labels, np.ones((0, 4, 5), np.uint8))),
        (ValueError, r"got \[4, 5, 3\]", lambda: call(labels, np.ones((4, 5, 3), np.uint8))),
        (TypeError, "both be lists, or neither", lambda: call([labels], image)),
        (
            ValueError, "one per label image, 2; got 1",
            lambda: call([labels, labels], [image]),
        ),
        (
            ValueError, r"image\[1\] must be \[3, 5\]",
            lambda: call([labels, labels[:3]], [image, image]),
        ),
        (
            ValueError, r"one number of channels; image\[0\] is \[4, 5\], image\[1\] \[1, 4, 5\]",
            lambda: call([labels, labels], [image, image[None]]),
        ),
        (
            ValueError, r"labels\[1\] must not be negative; got -1 in 20 pixels",
            lambda: call([labels, -labels], [image, image]),
        ),
    ]  # fmt: skip
    for kind, message, refused in cases:
        with pytest.raises(kind, match=message):
            refused()
