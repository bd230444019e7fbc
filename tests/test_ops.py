"""Every op on every backend against its NumPy oracle, then its edges and its refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import DEVICE, need_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastembed import dispatch, ops, testing
from fastembed.dispatch import BACKENDS, BackendUnavailable
from fastembed.ops import quantize
from fastembed.ops.crops import level_table, resize_crops

CASES = {f"{case.op}-{dtype}": (case, dtype) for case in testing.CASES for dtype in case.dtypes}
SHAPES = [(1, 1), (7, 5), (65, 33), (240, 251)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("height,width", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_case_equals_its_oracle(name, height, width, backend):
    case, dtype = CASES[name]
    need_backend(backend, case.family, case.kernels)
    if backend == "triton" and DEVICE.type == "cpu":  # interpreted: seconds per large image
        height, width = min(height, 40), min(width, 37)
    arguments = case.make(dtype, height, width, seed=height)
    expected = case.oracle(arguments)
    result = testing.as_numpy(case.run(testing.on_device(arguments, DEVICE), backend))
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    if case.tolerance == 0:
        np.testing.assert_array_equal(result, expected)
    else:
        # One unit of the output format: two sides of a rounding are both right.
        unit = torch.finfo(getattr(torch, dtype)).eps
        np.testing.assert_allclose(result, expected, rtol=max(case.tolerance, unit), atol=1e-7)


@pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.4.0", reason="NumPy 2.4 changed np.percentile"
)
@pytest.mark.parametrize("pixels", [1, 2, 3, 100, 101, 4097, 1080 * 1080])
@pytest.mark.parametrize("low,high", [(1.0, 99.0), (0.0, 100.0), (0.1, 99.9), (50.0, 50.5)])
def test_the_oracle_is_np_percentile(pixels, low, high):
    image = testing.microscopy("float32", 1, pixels, seed=pixels, channels=1)
    expected = [np.percentile(image[0], low), np.percentile(image[0], high)]
    np.testing.assert_array_equal(testing.oracle_bounds(image, low, high)[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.INTENSITIES)
@pytest.mark.parametrize(
    "kind", ["constant", "two-valued", "mostly-zero", "sorted", "saturated", "one-outlier"]
)
def test_percentiles_of_awkward_images(kind, dtype, backend):
    need_backend(backend, "quantize", ("percentile_bounds", "quantize"))
    rng = np.random.default_rng(3)
    image = testing.microscopy(dtype, 211, 199, seed=1, channels=2)
    top = image.max()
    if kind == "constant":
        image[:] = 17
    elif kind == "two-valued":
        image[:] = np.where(rng.random(image.shape) < 0.5, 3, 9)
    elif kind == "mostly-zero":
        image[rng.random(image.shape) < 0.95] = 0
    elif kind == "sorted":
        image = np.sort(image.reshape(2, -1)).reshape(image.shape)
    elif kind == "saturated":
        image = np.minimum(image, np.median(image)).astype(image.dtype)
    elif kind == "one-outlier":
        image[:] = 5
        image[:, 100, 100] = top
    bounds = ops.percentile_bounds(torch.from_numpy(image).to(DEVICE), backend=backend)
    np.testing.assert_array_equal(bounds.cpu(), testing.oracle_bounds(image, 1, 99))
    levels = ops.percentile_quantize(torch.from_numpy(image).to(DEVICE), backend=backend)
    np.testing.assert_array_equal(levels.cpu(), testing.oracle_percentile_levels(image, 1, 99))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.INTENSITIES)
def test_percentiles_anywhere(dtype, backend):
    """Tails that meet or cross, the ends themselves, and every place between ties."""
    need_backend(backend, "quantize", ("percentile_bounds",))
    image = testing.microscopy(dtype, 61, 67, seed=8, channels=3)
    image[1] = np.minimum(image[1], np.percentile(image[1], 30))
    image[2] = np.maximum(image[2], np.percentile(image[2], 70))
    tensor = torch.from_numpy(image).to(DEVICE)
    for low, high in [(0, 100), (49, 51), (50, 50.01), (0, 0.01), (99.99, 100), (25, 75), (80, 90)]:
        out = torch.full((3, 2), 12345.0, device=DEVICE)
        assert ops.percentile_bounds(tensor, low, high, out=out, backend=backend) is out
        np.testing.assert_array_equal(out.cpu(), testing.oracle_bounds(image, low, high))


@pytest.mark.parametrize("backend", BACKENDS)
def test_percentiles_of_extreme_floats(backend):
    """Zeros of both signs, denormals, either sign up to the largest, nothing but the lowest."""
    need_backend(backend, "quantize", ("percentile_bounds",))
    rng = np.random.default_rng(0)
    image = np.empty((5, 40, 50), dtype=np.float32)
    image[0] = rng.choice(np.array([0.0, -0.0], dtype=np.float32), image[0].shape)
    image[1] = rng.integers(-9, 9, image[1].shape) * np.float32(1e-45)
    image[2] = rng.standard_normal(image[2].shape)
    image[3] = rng.choice(np.array([-1.7e38, 1.7e38, 1e-38, 0], dtype=np.float32), image[3].shape)
    image[4] = rng.uniform(-3e38, -1e38, image[4].shape)
    tensor = torch.from_numpy(image).to(DEVICE)
    for low, high in [(1, 99), (0, 100), (45, 55)]:
        bounds = ops.percentile_bounds(tensor, low, high, backend=backend)
        np.testing.assert_array_equal(bounds.cpu(), testing.oracle_bounds(image, low, high))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.INTENSITIES)
@pytest.mark.parametrize("pixels", [1, 2, 3])
def test_percentiles_of_few_pixels(pixels, dtype, backend):
    need_backend(backend, "quantize", ("percentile_bounds",))
    image = testing.microscopy(dtype, 1, pixels, seed=pixels, channels=7)
    for low, high in [(0, 100), (1, 99), (30, 60)]:
        bounds = ops.percentile_bounds(
            torch.from_numpy(image).to(DEVICE), low, high, backend=backend
        )
        np.testing.assert_array_equal(bounds.cpu(), testing.oracle_bounds(image, low, high))


@pytest.mark.parametrize("dtype", testing.INTENSITIES)
@pytest.mark.parametrize("backend,sample", [("numba", 8192), ("native", 2048)])
def test_exactness_does_not_hang_on_the_sample(backend, sample, dtype):
    """Every pixel that the sample sees is extreme: the full select must take over."""
    need_backend(backend, "quantize", ("percentile_bounds",))
    image = testing.microscopy(dtype, 1, 300_001, seed=5, channels=1)
    stride = max(1, image.size // sample) | 1
    for value in (-1e8, 1e8) if dtype == "float32" else (0, np.iinfo(dtype).max):
        image[0, 0, ::stride] = value
        for low, high in [(0.5, 40.0), (1.0, 99.0)]:
            bounds = ops.percentile_bounds(
                torch.from_numpy(image).to(DEVICE), low, high, backend=backend
            )
            np.testing.assert_array_equal(bounds.cpu(), testing.oracle_bounds(image, low, high))


SMALL = st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20))
images = hnp.arrays(
    dtype=st.sampled_from([np.uint8, np.uint16, np.float32]),
    shape=SMALL,
    elements=st.integers(0, 255),
)
# Of any two of these the distance is finite: ops refuse an image where it is not.
float_images = hnp.arrays(np.float32, SMALL, elements=st.floats(-(2.0**126), 2.0**126, width=32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_image_any_percentiles(backend):
    need_backend(backend, "quantize", ("percentile_bounds", "quantize"))
    interpreted = backend == "triton" and DEVICE.type == "cpu"

    @settings(max_examples=15 if interpreted else 200, deadline=None)
    @given(
        image=images | float_images,
        low=st.floats(0, 99),
        width=st.floats(0.5, 100),
        step=st.sampled_from([1, 2]),
    )
    def check(image, low, width, step):
        image = image[:, ::step, ::-1]  # non-contiguous, negative stride
        high = min(low + width, 100.0)
        given_image = image if DEVICE.type == "cpu" else torch.from_numpy(image.copy()).to(DEVICE)
        bounds = ops.percentile_bounds(given_image, low, high, backend=backend)
        np.testing.assert_array_equal(
            testing.as_numpy(bounds), testing.oracle_bounds(image, low, high)
        )
        levels = ops.percentile_quantize(given_image, low, high, backend=backend)
        np.testing.assert_array_equal(
            testing.as_numpy(levels), testing.oracle_percentile_levels(image, low, high)
        )

    check()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), image=images, dtype=st.sampled_from(["float32", "bfloat16", "float16"]))
def test_any_gather(data, image, dtype):
    _, height, width = image.shape
    size = data.draw(st.integers(1, min(height, width)))
    mode = data.draw(st.sampled_from(["random", "grid"]))
    origins = ops.crop_origins(image.shape, data.draw(st.integers(1, 6)), size, 1, "k", mode)
    count = len(image)
    mean, std = (0.5,) * count, (0.25,) * count
    expected = testing.oracle_crops(
        testing.oracle_percentile_levels(image, 1, 99), origins, size, mean, std, dtype
    )
    for backend in ("reference", "numba"):
        crops = ops.gather_crops(
            torch.from_numpy(image), torch.from_numpy(origins), size,
            quantize=ops.Percentile(), mean=mean, std=std, dtype=getattr(torch, dtype),
            backend=backend,
        )  # fmt: skip
        np.testing.assert_array_equal(testing.as_numpy(crops), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gather_repeats_planes_and_gives_levels(backend):
    need_backend(backend, "crops", ("gather_crops",))
    image = testing.microscopy("uint16", 40, 50, seed=2)
    ramp = torch.from_numpy(testing.oracle_ramp(image)).to(DEVICE)
    origins = np.array([[0, 0], [8, 18]], dtype=np.int32)
    planes = [4, 4, 0]
    crops = ops.gather_crops(
        torch.from_numpy(image).to(DEVICE), torch.from_numpy(origins).to(DEVICE), 32,
        quantize=ramp, dtype=torch.uint8, channels=planes, backend=backend,
    )  # fmt: skip
    levels = testing.oracle_percentile_levels(image, 1, 99)
    for n, (y, x) in enumerate(origins):
        np.testing.assert_array_equal(crops[n].cpu(), levels[planes, y : y + 32, x : x + 32])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_pool_carries_nan_and_writes_everything(mode, backend):
    need_backend(backend, "crops", ("pool_crops",))
    features = np.random.default_rng(0).standard_normal((3, 5, 67)).astype(np.float32)
    features[1, 2, 30] = np.nan
    out = torch.full((3, 67), 12345.0, device=DEVICE)
    result = ops.pool_crops(torch.from_numpy(features).to(DEVICE), mode, out=out, backend=backend)
    assert result is out
    np.testing.assert_array_equal(out.cpu(), testing.oracle_pool(features, mode, False, "float32"))
    assert np.isnan(out.cpu().numpy()).sum() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_pool_of_zeros_keeps_the_later_sign(backend):
    need_backend(backend, "crops", ("pool_crops",))
    features = torch.tensor([[[0.0, -0.0], [-0.0, 0.0]]], device=DEVICE)
    pooled = ops.pool_crops(features, "max", backend=backend)
    assert torch.signbit(pooled).tolist() == [[True, False]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_beyond_float32_do_not_overflow(backend):
    need_backend(backend, "crops", ("pool_crops",))
    features = torch.full((1, 1, 4), 3e38, device=DEVICE)
    pooled = ops.pool_crops(features, l2_normalize=True, backend=backend)
    assert pooled.tolist() == [[0.5] * 4]
    zeros = torch.zeros((1, 2, 4), device=DEVICE)
    assert ops.pool_crops(zeros, l2_normalize=True, backend=backend).tolist() == [[0.0] * 4]


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_are_written_whole(backend):
    need_backend(backend, "quantize", ("quantize",))
    image = testing.microscopy("float32", 33, 65, seed=4)
    for sentinel in (7, 201):
        out = torch.full(image.shape, sentinel, dtype=torch.uint8, device=DEVICE)
        ops.zscore_quantize(
            torch.from_numpy(image).to(DEVICE), testing.MEAN, testing.STD, out=out, backend=backend
        )
        expected = testing.oracle_zscore_levels(image, testing.MEAN, testing.STD, 3.0)
        np.testing.assert_array_equal(out.cpu(), expected)


def test_results_are_of_the_kind_that_came_in():
    image = testing.microscopy("uint16", 16, 16, seed=0)
    assert isinstance(ops.percentile_quantize(image), np.ndarray)
    assert isinstance(ops.percentile_quantize(torch.from_numpy(image)), torch.Tensor)
    out = np.zeros(image.shape, dtype=np.uint8)
    assert ops.percentile_quantize(image, out=out) is out
    assert out.any()
    readonly = image.copy()
    readonly.flags.writeable = False
    np.testing.assert_array_equal(ops.percentile_quantize(readonly), out)


def test_channels_are_chosen():
    image = testing.microscopy("uint16", 16, 16, seed=0)
    every = testing.oracle_percentile_levels(image, 1, 99)
    np.testing.assert_array_equal(ops.percentile_quantize(image, channels=slice(1, 3)), every[1:3])
    np.testing.assert_array_equal(ops.percentile_quantize(image, channels=[4, 0]), every[[4, 0]])
    with pytest.raises(ValueError, match=r"channels must be in 0\.\.4; got 5"):
        ops.percentile_quantize(image, channels=[5])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 12345, -1])
def test_a_non_finite_pixel_names_its_channel(bad, where, backend):
    need_backend(backend, "quantize", ("percentile_bounds",))
    image = testing.microscopy("float32", 130, 130, seed=0)
    image[3].reshape(-1)[where] = bad
    message = "image must be finite; channel 3 has 1 non-finite pixels"
    bounds = torch.full((5, 2), 12345.0, device=DEVICE)
    tensor = torch.from_numpy(image).to(DEVICE)
    with pytest.raises(ValueError, match=message):
        ops.percentile_bounds(tensor, out=bounds, backend=backend)
        ops.check_finite(tensor, bounds)  # on CUDA, where no op waits to see it
    # The other channels' are computed; the contract between op and backend is NaN for this one.
    expected = testing.oracle_bounds(np.delete(image, 3, axis=0), 1, 99)
    np.testing.assert_array_equal(np.delete(bounds.cpu().numpy(), 3, axis=0), expected)
    assert bounds[3].isnan().all()
    with pytest.raises(ValueError, match=message):
        ops.zscore_quantize(tensor, testing.MEAN, testing.STD)
        ops.check_finite(tensor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_channel_without_a_finite_pixel_is_named(bad, backend):
    need_backend(backend, "quantize", ("percentile_bounds",))
    image = testing.microscopy("float32", 50, 40, seed=0)
    image[3] = bad
    tensor = torch.from_numpy(image).to(DEVICE)
    with pytest.raises(ValueError, match="channel 3 has 2000"):
        ops.check_finite(tensor, ops.percentile_bounds(tensor, backend=backend))


def test_refusals_name_the_rule_and_the_value():
    image = np.zeros((2, 8, 8), dtype=np.float32)
    cases = [
        (TypeError, "got float64", lambda: ops.percentile_quantize(image.astype(np.float64))),
        (TypeError, "got int32", lambda: ops.percentile_quantize(image.astype(np.int32))),
        (TypeError, "got int", lambda: ops.percentile_quantize([1, 2])),
        (ValueError, r"\[C, H, W\].*got \[8, 8\]", lambda: ops.percentile_quantize(image[0])),
        (ValueError, "none of them 0", lambda: ops.percentile_quantize(image[:, :0])),
        (ValueError, "low < high.*99.0 and 1.0", lambda: ops.percentile_quantize(image, 99.0, 1.0)),
        (ValueError, "2, one per channel; got 3", lambda: ops.zscore_quantize(image, [1] * 3, 1)),
        (ValueError, "clamp_z.*got 0", lambda: ops.zscore_quantize(image, 0, 1, 0)),
        (ValueError, "mean must be finite", lambda: ops.zscore_quantize(image, np.nan, 1)),
        (ValueError, "size must be in 1..8", lambda: ops.crop_origins(image.shape, 1, 9)),
        (ValueError, "mode must be", lambda: ops.crop_origins(image.shape, 1, 4, mode="corner")),
        (ValueError, "center", lambda: ops.crop_origins(image.shape, 2, 4, mode="center")),
        (
            ValueError,
            r"crops of 4x4 must lie in the image; crop 0 of image 0, 8x8, is at \(0, 5\)",
            lambda: ops.gather_crops(image, np.array([[0, 5]]), 4, quantize=ops.Percentile()),
        ),
        (
            TypeError,
            "NumPy has no bfloat16",
            lambda: ops.gather_crops(
                image, np.array([[0, 0]]), 4, quantize=ops.Percentile(), dtype=torch.bfloat16
            ),
        ),
        (ValueError, "std must not be 0", lambda: level_table(0, 0, torch.float32, 3)),
        (ValueError, "uint8 gives the levels", lambda: level_table(0.5, 1, torch.uint8, 3)),
        (ValueError, r"got \[2, 0, 3\]", lambda: ops.pool_crops(np.zeros((2, 0, 3), np.float32))),
        (ValueError, "mode must be one of avg", lambda: ops.pool_crops(image, "sum")),
        (TypeError, "got float64", lambda: ops.pool_crops(image.astype(np.float64))),
        (
            ValueError,
            "out must have shape",
            lambda: ops.pool_crops(image, out=np.zeros((2, 9), np.float32)),
        ),
        (ValueError, "backend must be one of", lambda: ops.pool_crops(image, backend="cython")),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


def test_crop_origins_depend_on_nothing_but_seed_key_and_index():
    shape = (300, 500)
    first = ops.crop_origins(shape, 8, 224, seed=1, key="a b|7")
    np.testing.assert_array_equal(first[:3], ops.crop_origins(shape, 3, 224, seed=1, key="a b|7"))
    assert not np.array_equal(first, ops.crop_origins(shape, 8, 224, seed=2, key="a b|7"))
    assert not np.array_equal(first, ops.crop_origins(shape, 8, 224, seed=1, key="a b|8"))
    # Pinned: these figures are part of the settings' meaning and may never change.
    assert ops.crop_origins((1080, 1080), 2, 224, seed=0, key="x|1").tolist() == PINNED_ORIGINS


PINNED_ORIGINS = [[339, 134], [711, 833]]


def test_random_origins_reach_both_borders_evenly():
    origins = ops.crop_origins((10, 13), 6000, 8, seed=0, key="k")
    for axis, positions in ((0, 3), (1, 6)):
        counts = np.bincount(origins[:, axis], minlength=positions)
        assert len(counts) == positions
        expected = 6000 / positions
        assert (abs(counts - expected) < 5 * np.sqrt(expected)).all()


def test_grid_and_center():
    assert ops.crop_origins((10, 20), 4, 4, mode="grid").tolist() == [
        [0, 0], [0, 16], [6, 0], [6, 16],
    ]  # fmt: skip
    assert len(ops.crop_origins((10, 20), 5, 4, mode="grid")) == 5
    assert ops.crop_origins((10, 20), 1, 4, mode="center").tolist() == [[3, 8]]
    assert ops.crop_origins((4, 4), 3, 4, mode="grid").tolist() == [[0, 0]] * 3


def test_small_images_are_enlarged_bilinearly():
    """Half-pixel centres, no antialias: the formula written out for one row."""
    levels = torch.tensor([0, 100, 200, 255], dtype=torch.uint8).expand(1, 1, 4, 4).contiguous()
    result = resize_crops(levels, 8, mean=0.5, std=0.5)
    source = np.clip((np.arange(8) + 0.5) / 2 - 0.5, 0, 3)
    row = np.interp(source, np.arange(4), np.array([0, 100, 200, 255]) / 255)
    np.testing.assert_allclose(result[0, 0, 0], (row - 0.5) / 0.5, atol=1e-6)


def test_an_explicit_backend_never_falls_back(monkeypatch):
    image = np.zeros((1, 4, 4), dtype=np.float32)
    monkeypatch.setattr(dispatch, "find", lambda *a: (None, "the reason"))
    with pytest.raises(BackendUnavailable, match="'numba' is not available: the reason"):
        ops.percentile_bounds(image, backend="numba")
    monkeypatch.setenv("FASTEMBED_BACKEND", "triton")
    with pytest.raises(BackendUnavailable, match="'triton' is not available"):
        ops.percentile_bounds(image)


def test_real_images(real_data):
    tifffile = pytest.importorskip("tifffile")
    fields = sorted((real_data / "cell_painting").glob("IXMtest_*.tif"))
    image = np.stack([tifffile.imread(path) for path in fields])
    assert image.shape == (5, 520, 696) and image.dtype == np.uint16
    for dtype in (np.uint16, np.float32):
        tensor = image.astype(dtype)
        for backend in ("reference", "numba"):
            np.testing.assert_array_equal(
                ops.percentile_quantize(tensor, backend=backend),
                testing.oracle_percentile_levels(image, 1, 99),
            )
        if DEVICE.type == "cpu" and not dispatch.load_native():
            np.testing.assert_array_equal(
                ops.percentile_quantize(tensor, backend="native"),
                testing.oracle_percentile_levels(image, 1, 99),
            )


def test_zscore_std_of_zero_counts_as_one():
    ramp = quantize.zscore_ramp([1.0, 2.0], [0.0, 1e-6], 3.0, 2)
    assert ramp[:, 1].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_of_more_than_2_to_the_31_pixels(backend):
    """Offsets beyond 32 bits; the zeros are never written, so they take no memory."""
    need_backend(backend, "crops", ("gather_crops",))
    side = 46_400
    image = np.zeros((1, side, side), dtype=np.uint8)
    image[0, -2:, -3:] = [[1, 2, 3], [4, 5, 6]]
    assert image.size > 2**31
    crops = ops.gather_crops(
        torch.from_numpy(image).to(DEVICE), torch.tensor([[side - 4, side - 4], [0, 0]]), 4,
        quantize=torch.tensor([[0.0, 1.0, 0.0, 255.0, 255.0]]), dtype=torch.uint8,
        backend=backend,
    )  # fmt: skip
    assert crops[0, 0, 2:, 1:].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert crops.sum() == 21
    if DEVICE.type == "cpu" and backend in ("numba", "native"):
        need_backend(backend, "quantize", ("percentile_bounds",))
        bounds = ops.percentile_bounds(image, 0.0, 100.0, backend=backend)
        assert bounds.tolist() == [[0.0, 6.0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("l2_normalize", [False, True])
def test_pool_of_more_dimensions_than_a_block(backend, l2_normalize):
    need_backend(backend, "crops", ("pool_crops",))
    features = np.random.default_rng(1).standard_normal((2, 3, 2500)).astype(np.float32)
    pooled = ops.pool_crops(
        torch.from_numpy(features).to(DEVICE), l2_normalize=l2_normalize, backend=backend
    )
    expected = testing.oracle_pool(features, "avg", l2_normalize, "float32")
    np.testing.assert_allclose(pooled.cpu(), expected, rtol=1e-6 if l2_normalize else 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gather_of_crops_wider_than_a_block(backend):
    need_backend(backend, "crops", ("gather_crops",))
    image = testing.microscopy("uint16", 301, 1100, seed=6, channels=1)
    origins = np.array([[1, 700]], dtype=np.int32)
    crops = ops.gather_crops(
        torch.from_numpy(image).to(DEVICE), torch.from_numpy(origins), 300,
        quantize=torch.from_numpy(testing.oracle_ramp(image)), dtype=torch.uint8, backend=backend,
    )  # fmt: skip
    levels = testing.oracle_percentile_levels(image, 1, 99)
    np.testing.assert_array_equal(crops[0].cpu(), levels[:, 1:301, 700:1000])
