"""blend_crops on every backend against Pillow and torchvision, then its edges and refusals."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DEVICE, need_backend
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastembed import dispatch, ops, testing
from fastembed.dispatch import BACKENDS, BackendUnavailable
from fastembed.ops.masks import FIXED_POINT, RESIZES, fade_table, padded_crops

pillow = pytest.importorskip("PIL", reason="Pillow, the oracle, is not installed")
pytest.importorskip("torchvision", reason="torchvision, the oracle, is not installed")

needs_pillow_13 = pytest.mark.skipif(
    int(pillow.__version__.split(".")[0]) < 13, reason="Pillow 13 changed the order of its passes"
)
pytestmark = needs_pillow_13
# What compiles ahead or at first use and then is quick; interpreted Triton is not.
QUICK = ("reference", "numba", "native")


def there(backends: tuple[str, ...], kernel: str = "blend_crops") -> list[str]:
    return [name for name in backends if dispatch.find("masks", kernel, DEVICE.type, name)[0]]


def on_device(*arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE) for array in arrays)


def levels(image, ids, segments, size, backend, **options) -> np.ndarray:
    """The resized levels themselves, [S, size, size, 3]."""
    crops = ops.blend_crops(
        *on_device(image, ids), segments, size, mean=0, std=1, dtype=torch.uint8,
        backend=backend, **options,
    )  # fmt: skip
    return crops.permute(0, 2, 3, 1).cpu().numpy()


def table(*rows: tuple[int, tuple[int, int, int, int]]) -> SimpleNamespace:
    """Segments of (id, (y0, x0, y1, x1))."""
    return SimpleNamespace(
        ids=np.array([name for name, _ in rows], dtype=np.int32),
        boxes=np.array([box for _, box in rows], dtype=np.int32).reshape(-1, 4),
    )


def whole(image: np.ndarray) -> tuple[np.ndarray, SimpleNamespace]:
    """A map and table that make all of `image` one segment."""
    height, width, _ = image.shape
    return np.zeros((height, width), np.int32), table((0, (0, 0, height - 1, width - 1)))


def noise(height: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    # Black and white overshoot at the filter's negative lobes: levels must be clipped.
    return np.where(rng.random((height, width, 1)) < 0.5, image, image // 128 * 255).astype("u1")


sides = st.one_of(st.integers(1, 12), st.integers(13, 300))


@settings(max_examples=200, deadline=None)
@given(height=sides, width=sides, size=st.integers(1, 70), mode=st.sampled_from([*FIXED_POINT]))
@example(height=1, width=1, size=64, mode="pillow-bicubic")
@example(height=1, width=300, size=16, mode="pillow-bicubic")
@example(height=300, width=1, size=16, mode="pillow-bicubic")
@example(height=33, width=33, size=33, mode="pillow-bicubic")
@example(height=33, width=200, size=33, mode="pillow-bicubic")
@example(height=200, width=33, size=33, mode="pillow-bicubic")
@example(height=299, width=300, size=1, mode="torch-uint8-bilinear")
def test_any_size_has_the_bits_of_the_mode_s_library(height, width, size, mode):
    image = noise(height, width, seed=height * 1000 + width)
    ids, segments = whole(image)
    expected = testing.oracle_resize(image, size, mode)
    for backend in there(QUICK):
        result = levels(image, ids, segments, size, backend, resize=mode)
        np.testing.assert_array_equal(result[0], expected, err_msg=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "height,width,size",
    [(1, 1, 5), (1, 40, 7), (40, 1, 7), (9, 7, 16), (16, 31, 16), (31, 16, 16), (90, 20, 8),
     (61, 67, 33), (130, 150, 17)],
)  # fmt: skip
@pytest.mark.parametrize("mode", FIXED_POINT)
def test_sizes_on_every_backend(mode, height, width, size, backend):
    need_backend(backend, "masks", ("blend_crops",))
    image = noise(height, width, seed=height)
    expected = testing.oracle_resize(image, size, mode)
    result = levels(image, *whole(image), size, backend, resize=mode)
    np.testing.assert_array_equal(result[0], expected)


@pytest.mark.parametrize("size", [3, 16, 24])
@pytest.mark.parametrize("spare", [-4, 1, 9])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_passes_swap_where_pillow_13_swaps_them(size, spare, beyond):
    """On the border of the rule: height - size against 2 (width - size)."""
    width = max(1, size + spare)
    height = max(1, size + 2 * (width - size) + beyond)
    image = noise(height, width, seed=7)
    expected = testing.oracle_resize(image, size, "pillow-bicubic")
    for backend in there(QUICK):
        result = levels(image, *whole(image), size, backend)
        np.testing.assert_array_equal(result[0], expected, err_msg=backend)


def test_the_order_of_passes_is_seen():
    """The two Pillow modes do differ on a tall crop, and only there."""
    tall, wide = noise(120, 20, seed=1), noise(20, 120, seed=1)
    for image, differ in ((tall, True), (wide, False)):
        new = testing.oracle_resize(image, 16, "pillow-bicubic")
        old = testing.oracle_resize(image, 16, "pillow12-bicubic")
        assert np.array_equal(new, old) is not differ


@settings(max_examples=80, deadline=None)
@given(
    height=st.integers(1, 60), width=st.integers(1, 60), count=st.integers(1, 6),
    seed=st.integers(0, 9), bg_alpha=st.sampled_from([0, 0.3, 0.5, 0.999, 1]),
    pad_ratio=st.sampled_from([0, 0.1, 0.34, 1.0, 50.0]),
)  # fmt: skip
def test_any_scene(height, width, count, seed, bg_alpha, pad_ratio):
    image, ids = testing.scene(height, width, min(count, height * width), seed)
    segments = testing.segments_of(ids)
    for backend in there(QUICK):
        result = levels(image, ids, segments, 14, backend, bg_alpha=bg_alpha, pad_ratio=pad_ratio)
        for crop, name, box in zip(result, segments.ids, segments.boxes, strict=True):
            blended = testing.oracle_blended_crop(image, ids == name, box, bg_alpha, pad_ratio)
            expected = testing.oracle_resize(blended, 14, "pillow-bicubic")
            np.testing.assert_array_equal(crop, expected, err_msg=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_segments_of_every_kind(backend):
    """At each border, one pixel, the whole image, an id that is not there, ids below zero."""
    need_backend(backend, "masks", ("blend_crops",))
    image = noise(40, 50, seed=3)
    ids = np.full((40, 50), -7, np.int32)
    ids[5:30, 8:21] = 2**24 - 1
    segments = table(
        (-7, (0, 0, 39, 49)), (2**24 - 1, (5, 8, 29, 20)), (123, (5, 8, 29, 20)),
        (-7, (0, 0, 0, 0)), (-7, (39, 49, 39, 49)), (-7, (0, 45, 39, 49)), (-7, (36, 0, 39, 49)),
    )  # fmt: skip
    result = levels(image, ids, segments, 12, backend)
    expected = testing.oracle_blend_crops(image, ids, segments, 12, mean=0, std=1)
    np.testing.assert_array_equal(
        result, np.rint(expected * 255).astype("u1").transpose(0, 2, 3, 1)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_normalised_output_is_written_whole(dtype, backend):
    need_backend(backend, "masks", ("blend_crops",))
    image, ids = testing.scene(37, 53, 3, seed=2)
    segments = testing.segments_of(ids)
    mean, std = testing.IMAGENET_MEAN[:3], testing.IMAGENET_STD[:3]
    out = torch.full((3, 3, 19, 19), 777.0, dtype=getattr(torch, dtype), device=DEVICE)
    result = ops.blend_crops(
        *on_device(image, ids), segments, 19, mean=mean, std=std, dtype=out.dtype, out=out,
        backend=backend,
    )  # fmt: skip
    assert result is out
    expected = testing.oracle_blend_crops(image, ids, segments, 19, mean=mean, std=std, dtype=dtype)
    np.testing.assert_array_equal(testing.as_numpy(out), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_segments_no_crops(backend):
    need_backend(backend, "masks", ("blend_crops",))
    image, ids = testing.scene(8, 9, 2, seed=0)
    assert levels(image, ids, table(), 5, backend).shape == (0, 5, 5, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "height,width,size", [(1, 1, 4), (60, 45, 16), (13, 90, 30), (480, 640, 32)]
)
def test_float_bilinear_is_torchvision_on_floats(height, width, size, backend):
    need_backend(backend, "masks", ("blend_crops_float",))
    if backend == "triton" and DEVICE.type == "cpu":  # interpreted: seconds per large image
        height, width, size = min(height, 48), min(width, 40), min(size, 12)
    image, ids = testing.scene(height, width, min(2, height * width), seed=1)
    segments = testing.segments_of(ids)
    options = {"mean": testing.IMAGENET_MEAN[:3], "std": testing.IMAGENET_STD[:3]}
    result = ops.blend_crops(
        *on_device(image, ids), segments, size, **options, resize="float-bilinear", backend=backend
    )
    expected = testing.oracle_blend_crops(
        image, ids, segments, size, **options, resize="float-bilinear"
    )
    np.testing.assert_allclose(result.cpu(), expected, rtol=0, atol=FLOAT_TOLERANCE / 0.224)


FLOAT_TOLERANCE = 4e-6  # of the 0..1 range; torch has its weights in float32


def test_a_mode_that_a_backend_lacks_is_refused():
    image, ids = testing.scene(8, 9, 2, seed=0)
    lacking = [b for b in BACKENDS if b not in there(BACKENDS, "blend_crops_float")]
    for backend in lacking:
        with pytest.raises(BackendUnavailable, match=f"blend_crops_float: backend '{backend}'"):
            ops.blend_crops(
                image, ids, testing.segments_of(ids), 4, resize="float-bilinear", backend=backend
            )


def test_views_are_read_as_they_are():
    image, ids = testing.scene(40, 60, 3, seed=5)
    image, ids = image[::-2, 3:50, ::-1], ids[::-2, 3:50]
    segments = testing.segments_of(ids)
    boxes = np.zeros((len(segments.ids), 8), np.int32)
    boxes[:, ::2] = segments.boxes
    strided = SimpleNamespace(ids=np.repeat(segments.ids, 2)[::2], boxes=boxes[:, ::2])
    planar = torch.from_numpy(image.transpose(2, 0, 1).copy()).permute(1, 2, 0)
    expected = testing.oracle_blend_crops(image, ids, segments, 20)
    for backend in there(QUICK):
        crops = ops.blend_crops(image, ids, strided, 20, backend=backend)
        np.testing.assert_array_equal(crops, expected)
        crops = ops.blend_crops(planar, torch.from_numpy(ids.copy()), strided, 20, backend=backend)
        np.testing.assert_array_equal(crops.numpy(), expected)


def test_inside_the_mask_nothing_changes():
    """Why the kernels have a table for the outside only."""
    np.testing.assert_array_equal(fade_table(1.0), np.arange(256))
    pixel = np.arange(256)
    np.testing.assert_array_equal((pixel / 255 * 1.0 * 255).astype(np.uint8), pixel)
    assert fade_table(0.0).tolist() == [127] * 256
    assert fade_table(0.3)[[0, 255]].tolist() == [89, 165]


def test_padding_is_cut_at_the_image():
    segments = table((1, (10, 20, 19, 39)), (2, (0, 0, 9, 9)), (3, (99, 199, 99, 199)))
    crops = padded_crops([segments], [(100, 200)], 0.1)
    assert crops.tolist() == [[0, 1, 9, 18, 12, 24], [0, 2, 0, 0, 11, 11], [0, 3, 99, 199, 1, 1]]
    assert padded_crops([segments], [(100, 200)], 1e300).tolist()[1:] == [
        [0, 2, 0, 0, 100, 200], [0, 3, 0, 0, 100, 200],
    ]  # fmt: skip


def test_refusals_name_the_rule_and_the_value():
    image, ids = testing.scene(8, 9, 2, seed=0)
    good = table((1, (0, 0, 3, 3)))

    def call(image=image, ids=ids, segments=good, size=4, **options):
        return lambda: ops.blend_crops(image, ids, segments, size, **options)

    def boxed(*box):
        return call(segments=table((1, (0, 0, 1, 1)), (2, box)))

    wide = SimpleNamespace(ids=good.ids.astype(np.int64), boxes=good.boxes)
    uneven = SimpleNamespace(ids=good.ids, boxes=np.zeros((2, 4), np.int32))
    cases = [
        (TypeError, "image must be uint8; got float32", call(image.astype(np.float32))),
        (ValueError, r"\[H, W, 3\].*got \[8, 9\]", call(image[..., 0])),
        (ValueError, r"\[H, W, 3\].*got \[8, 9, 2\]", call(image[..., :2])),
        (ValueError, r"not empty; got \[0, 9, 3\]", call(image[:0])),
        (TypeError, "ids must be int32; got int64", call(ids=ids.astype(np.int64))),
        (ValueError, r"ids must be \[8, 9\]; got \[9, 8\]", call(ids=ids.T)),
        (TypeError, "segments.ids must be int32; got int64", call(segments=wide)),
        (ValueError, r"segments.boxes must be \[1, 4\]; got \[2, 4\]", call(segments=uneven)),
        (ValueError, r"box 1 of image 0, 8x9, is \[0, 0, 8, 3\]", boxed(0, 0, 8, 3)),
        (ValueError, r"box 1 of image 0, 8x9, is \[0, 0, 3, 9\]", boxed(0, 0, 3, 9)),
        (ValueError, r"box 1 .* is \[-1, 0, 3, 3\]", boxed(-1, 0, 3, 3)),
        (ValueError, r"inclusive.*box 1 .* is \[3, 0, 2, 3\]", boxed(3, 0, 2, 3)),
        (ValueError, "size must be >= 1; got 0", call(size=0)),
        (ValueError, r"bg_alpha must be in 0\.\.1; got 1\.5", call(bg_alpha=1.5)),
        (ValueError, r"bg_alpha must be in 0\.\.1; got nan", call(bg_alpha=float("nan"))),
        (ValueError, "pad_ratio must be a number >= 0; got -0.1", call(pad_ratio=-0.1)),
        (ValueError, "pad_ratio must be a number >= 0; got inf", call(pad_ratio=float("inf"))),
        (ValueError, "resize must be one of pillow-bicubic.*got 'area'", call(resize="area")),
        (ValueError, "std must not be 0", call(std=0)),
        (ValueError, "mean must be one number or 3.*got 2", call(mean=[0, 1])),
        (TypeError, "NumPy has no bfloat16", call(dtype=torch.bfloat16)),
        (
            TypeError,
            "float-bilinear gives no levels",
            call(resize="float-bilinear", dtype=torch.uint8, mean=0, std=1),
        ),
        (ValueError, "out must have shape", call(out=np.zeros((1, 3, 4, 5), np.float32))),
    ]
    for kind, message, attempt in cases:
        with pytest.raises(kind, match=message):
            attempt()


def test_every_mode_says_whose_bits_it_has():
    assert set(RESIZES) - set(FIXED_POINT) == {"float-bilinear"}
    for mode in RESIZES:
        assert f"``{mode}``" in ops.blend_crops.__doc__


def test_real_photograph(real_data):
    from PIL import Image

    folder = real_data / "coco_panoptic"
    photographs = sorted((folder / "val2017").glob("*.jpg"))
    assert photographs
    for photograph in photographs:
        image = np.asarray(Image.open(photograph).convert("RGB"))
        colours = np.asarray(
            Image.open(folder / "panoptic_val2017" / f"{photograph.stem}.png").convert("RGB")
        ).astype(np.int32)
        ids = colours @ np.array([1, 256, 65536], dtype=np.int32)
        segments = testing.segments_of(ids)
        assert len(segments.ids) > 3
        for mode in ("pillow-bicubic", "torch-uint8-bilinear"):
            expected = testing.oracle_blend_crops(image, ids, segments, resize=mode)
            for backend in there(QUICK):
                crops = ops.blend_crops(
                    *on_device(image, ids), segments, resize=mode, backend=backend
                )
                np.testing.assert_array_equal(crops.cpu(), expected, err_msg=backend)
