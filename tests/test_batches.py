"""Lists of images: the bits of single images, and nothing that waits for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DEVICE, need_backend
from torch.utils._python_dispatch import TorchDispatchMode

from fastembed import dispatch, ops, testing
from fastembed.dispatch import BACKENDS
from fastembed.ops.crops import resize_crops

# No two alike; the widest is not the highest. The first has no crops and no segments.
SHAPES = [(9, 7), (4, 8), (31, 12), (12, 33)]
INTERPRETED = range(2)  # seconds per image
MEAN, STD = (900.0, 500.0), (300.0, 700.0)


def planes(dtype: str, i: int) -> dict:
    """Two channels, three crops of every image but the first, which has none."""
    height, width = SHAPES[i]
    image = testing.microscopy(dtype, height, width, seed=i, channels=2)
    origins = ops.crop_origins((height, width), 3, 3, seed=i)[: 3 if i else 0]
    return {
        "image": torch.from_numpy(image),
        "origins": torch.from_numpy(origins),
        "ramp": torch.from_numpy(testing.oracle_ramp(image)),
    }


def photograph(dtype: str, i: int) -> dict:
    """An image, its map and its segments; of the first image none."""
    height, width = SHAPES[i]
    image, ids = testing.scene(height, width, 1 + i, seed=i)
    segments = testing.segments_of(ids)
    if i == 0:
        segments = SimpleNamespace(ids=segments.ids[:0], boxes=segments.boxes[:0])
    segments = SimpleNamespace(
        ids=torch.from_numpy(segments.ids), boxes=torch.from_numpy(segments.boxes)
    )
    return {"image": torch.from_numpy(image), "ids": torch.from_numpy(ids), "segments": segments}


def panoptic(dtype: str, i: int) -> dict:
    """Ids, or their colours; of one map more than the first table holds."""
    height, width = SHAPES[i]
    ids = testing.panoptic_map(height, width, seed=i)
    if i == 2:
        ids = np.arange(1, height * width + 1, dtype=np.int32).reshape(height, width)
    return {"image": torch.from_numpy(testing.colours_of(ids) if dtype == "uint8" else ids)}


def labelled(dtype: str, i: int) -> dict:
    """Two channels of whole numbers, whose float64 sums have one value in any order."""
    height, width = SHAPES[i]
    image = testing.microscopy(dtype, height, width, seed=i, channels=2).round()
    labels = testing.label_map(height, width, seed=i, pitch=4)
    return {"image": torch.from_numpy(image), "labels": torch.from_numpy(labels)}


def blend(resize: str) -> Callable[[dict, str | None], torch.Tensor]:
    return lambda a, backend: ops.blend_crops(
        a["image"], a["ids"], a["segments"], 7, resize=resize, backend=backend
    )


# name: family, kernels, arguments of image i, call, how the results of single images are joined
OPS = {
    "percentile_bounds": (
        "quantize", ("percentile_bounds",), planes,
        lambda a, backend: ops.percentile_bounds(a["image"], 5, 90, backend=backend), torch.stack,
    ),
    "percentile_quantize": (
        "quantize", ("percentile_bounds", "quantize"), planes,
        lambda a, backend: ops.percentile_quantize(a["image"], backend=backend), list,
    ),
    "zscore_quantize": (
        "quantize", ("quantize",), planes,
        lambda a, backend: ops.zscore_quantize(a["image"], MEAN, STD, backend=backend), list,
    ),
    "gather_crops": (
        "crops", ("gather_crops",), planes,
        lambda a, backend: ops.gather_crops(
            a["image"], a["origins"], 3, quantize=a["ramp"], mean=0.5, std=0.25,
            dtype=torch.bfloat16, channels=[1, 0, 1], backend=backend,
        ),
        torch.cat,
    ),
    "blend_crops": ("masks", ("blend_crops",), photograph, blend("pillow-bicubic"), torch.cat),
    "blend_crops_float": (
        "masks", ("blend_crops_float",), photograph, blend("float-bilinear"), torch.cat,
    ),
    "decode_panoptic": (
        "panoptic", ("decode_panoptic",), panoptic,
        lambda a, backend: ops.decode_panoptic(a["image"], backend=backend), list,
    ),
    "panoptic_segments": (
        "panoptic", ("panoptic_segments",), panoptic,
        lambda a, backend: ops.panoptic_segments(a["image"], backend=backend), list,
    ),
    "label_statistics": (
        "labels", ("label_statistics",), labelled,
        lambda a, backend: ops.label_statistics(a["labels"], a["image"], backend=backend), list,
    ),
}  # fmt: skip
DTYPES = dict.fromkeys(("quantize", "crops", "labels"), testing.INTENSITIES)
# How many there are is known when they are found: these wait, and say so.
WAITING = ("panoptic_segments", "label_statistics")
CASES = [
    (name, dtype)
    for name, (family, *_) in OPS.items()
    for dtype in (
        ("uint8", "int32") if name == "panoptic_segments" else DTYPES.get(family, ["uint8"])
    )
]


def move(value: object, device: torch.device | str) -> object:
    if isinstance(value, SimpleNamespace):
        return SimpleNamespace(**{k: move(v, device) for k, v in vars(value).items()})
    return value.to(device)


def arguments_of(name: str, dtype: str, images: range, device=DEVICE) -> tuple[list[dict], dict]:
    """Of each image, and of all of them as a batch."""
    make = OPS[name][2]
    singles = [{k: move(v, device) for k, v in make(dtype, i).items()} for i in images]
    batch = {k: [single[k] for single in singles] for k in singles[0]}
    if "ramp" in batch:
        batch["ramp"] = torch.stack(batch["ramp"])
    return singles, batch


def assert_equal(result: object, expected: object) -> None:
    if isinstance(expected, (list, tuple)):
        assert len(result) == len(expected)
        for one, other in zip(result, expected, strict=True):
            assert_equal(one, other)
    else:
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
        assert torch.equal(result, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name,dtype", CASES)
def test_a_batch_has_the_bits_of_its_images(name, dtype, backend):
    family, kernels, _, run, join = OPS[name]
    need_backend(backend, family, kernels)
    interpreted = backend == "triton" and DEVICE.type == "cpu"
    images = INTERPRETED if interpreted else range(len(SHAPES))
    singles, batch = arguments_of(name, dtype, images)
    expected = [run(single, backend) for single in singles]
    assert_equal(run(batch, backend), join(expected))
    _, one = arguments_of(name, dtype, images[-1:])
    assert_equal(run(one, backend), join(expected[-1:]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_crops_of_images_in_any_order(backend):
    """What the kernels take: the public ops order crops by image, the kernels need not."""
    need_backend(backend, "crops", ("gather_crops",))
    images = [planes("uint16", i)["image"].to(DEVICE) for i in range(3)]
    rows = torch.tensor([[2, 5, 1], [0, 0, 0], [2, 1, 7], [1, 1, 5], [1, 0, 0]], dtype=torch.int32)
    ramp = torch.stack([planes("uint16", i)["ramp"] for i in range(3)])
    out = torch.zeros((5, 2, 3, 3), dtype=torch.uint8)
    table = torch.arange(256, dtype=torch.uint8).expand(2, 256).contiguous()
    arguments = rows, torch.tensor([0, 1], dtype=torch.int32), ramp, table, out
    rows, channels, ramp, table, out = (tensor.to(DEVICE) for tensor in arguments)
    run = dispatch.resolve("crops", "gather_crops", DEVICE, backend)
    run(images, rows, channels, ramp, table, out)
    for crop, (i, y, x) in zip(out.cpu().numpy(), rows.tolist(), strict=True):
        levels = testing.oracle_percentile_levels(images[i].cpu().numpy(), 1, 99)
        np.testing.assert_array_equal(crop, levels[:, y : y + 3, x : x + 3])


def test_lists_come_back_as_they_were_given():
    images = [planes("uint16", i)["image"].numpy() for i in range(3)]
    levels = ops.percentile_quantize(tuple(images))
    assert isinstance(levels, list) and all(isinstance(one, np.ndarray) for one in levels)
    out = [np.zeros_like(one) for one in levels]
    assert ops.percentile_quantize(images, out=out) is out
    for one, other in zip(out, levels, strict=True):
        np.testing.assert_array_equal(one, other)
    bounds = ops.percentile_bounds(images, channels=[1])
    assert isinstance(bounds, np.ndarray) and bounds.shape == (3, 1, 2)
    crops = ops.gather_crops(images, np.zeros((3, 2, 2), int), 3, quantize=ops.Percentile())
    assert isinstance(crops, np.ndarray) and crops.shape == (6, 2, 3, 3)
    assert all(
        isinstance(part, np.ndarray)
        for segments in ops.panoptic_segments([np.zeros((2, 3), np.int32)] * 2, void=None)
        for part in segments
    )


def test_refusals_name_the_rule_and_the_image():
    image = np.zeros((2, 8, 8), np.float32)
    rgb, ids = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.int32)
    origins, rule = np.zeros((1, 2), np.int32), ops.Percentile()
    spoilt = image.copy()
    spoilt[1, 2, 3] = np.nan
    segments = SimpleNamespace(ids=np.array([0], np.int32), boxes=np.zeros((1, 4), np.int32))
    cases = [
        (ValueError, "image must hold at least one array", lambda: ops.percentile_bounds([])),
        (
            ValueError, "image must hold at least one array",
            lambda: ops.gather_crops([], [], 4, quantize=rule),
        ),
        (ValueError, "image must hold at least one array", lambda: ops.blend_crops([], [], [])),
        (ValueError, "rgb must hold at least one array", lambda: ops.decode_panoptic([])),
        (ValueError, "pixels must hold at least one array", lambda: ops.panoptic_segments(())),
        (
            TypeError, r"one dtype; image\[0\] is float32, image\[1\] is uint16",
            lambda: ops.percentile_quantize([image, image.astype(np.uint16)]),
        ),
        (
            TypeError, r"one dtype; pixels\[0\] is uint8, pixels\[1\] is int32",
            lambda: ops.panoptic_segments([rgb, ids]),
        ),
        (
            ValueError, r"number of channels; image\[0\] has 2, image\[1\] 1",
            lambda: ops.zscore_quantize([image, image[:1]], 0, 1),
        ),
        (
            ValueError, r"image\[1\] must be \[C, H, W\]",
            lambda: ops.percentile_bounds([image, image[0]]),
        ),
        (
            ValueError, r"image\[2\] must be finite; channel 1 has 1",
            lambda: ops.percentile_bounds([image, image, spoilt]),
        ),
        (
            ValueError, r"image\[1\] must be finite; channel 1 has 1",
            lambda: ops.zscore_quantize([image, spoilt], 0, 1),
        ),
        (
            ValueError, "out must hold 2 arrays, one per image; got 1",
            lambda: ops.zscore_quantize([image, image], 0, 1, out=image.astype(np.uint8)),
        ),
        (
            ValueError, "origins must be one array per image, 2; got 1",
            lambda: ops.gather_crops([image, image], [origins], 4, quantize=rule),
        ),
        (
            ValueError, r"crop 1 of image 1, 8x8, is at \(5, 0\)",
            lambda: ops.gather_crops([image] * 2, [origins, origins + [5, 0]], 4, quantize=rule),
        ),
        (
            ValueError, r"ramps \[2, 2, 5\]; got float32 \[2, 5\]",
            lambda: ops.gather_crops(
                [image] * 2, [origins] * 2, 4, quantize=np.zeros((2, 5), np.float32)
            ),
        ),
        (
            ValueError, "ids and segments must be one per image, 2; got 1 and 2",
            lambda: ops.blend_crops([rgb, rgb], [ids], [segments] * 2),
        ),
        (
            ValueError, r"ids must be \[4, 8\]; got \[8, 8\]",
            lambda: ops.blend_crops([rgb, rgb[:4]], [ids, ids], [segments] * 2),
        ),
    ]  # fmt: skip
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


# Nothing waits for a GPU --------------------------------------------------------------
#
# Tensors on `meta` have no data: whatever reads one back raises. That stands in for a GPU
# where there is none; what torch itself calls a synchronisation is looked for where there is.


class Uploads(TorchDispatchMode):
    """Refuses copies from main memory that would wait."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function is torch.ops.aten._to_copy.default and arguments[0].device.type == "cpu":
            device = options.get("device")
            assert device is None or device.type == "cpu" or options.get("non_blocking"), options
        return function(*arguments, **options)


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The ops that were asked for; their kernels do nothing."""
    names: list[str] = []

    def resolve(family, op, device, backend=None):
        names.append(op)
        return lambda *arguments: None

    monkeypatch.setattr(dispatch, "resolve", resolve)
    return names


@pytest.mark.parametrize("host", [(), ("origins", "segments", "ramp")])
@pytest.mark.parametrize("name", [name for name in OPS if name not in WAITING])
def test_no_op_reads_the_device_back(name, host, launched):
    _, kernels, _, run, _ = OPS[name]
    dtype = "float32" if OPS[name][2] is planes else "uint8"
    singles, batch = arguments_of(name, dtype, range(len(SHAPES)), "meta")
    at_home = arguments_of(name, dtype, range(len(SHAPES)), "cpu")
    for place, arguments in zip((singles[0], batch), (at_home[0][0], at_home[1]), strict=True):
        arguments = {k: arguments[k] if k in host else place[k] for k in place}
        with Uploads():
            run(arguments, None)
    assert launched == list(kernels) * 2


def test_what_else_the_gpu_path_calls_reads_nothing_back(launched):
    _, batch = arguments_of("gather_crops", "float32", range(3), "meta")
    with Uploads():
        for rule in (ops.Percentile(), ops.ZScore(MEAN, STD)):
            assert rule.measure(batch["image"]).shape == (3, 2, 5)
            ops.gather_crops(batch["image"], batch["origins"], 3, quantize=rule)
        resize_crops(torch.zeros((1, 2, 4, 4), dtype=torch.uint8, device="meta"), 8, mean=0.5)
        ops.pool_crops(torch.zeros((2, 3, 4), device="meta"), l2_normalize=True)


def test_the_ops_that_say_that_they_wait_do(launched):
    pixels = torch.zeros((4, 5), dtype=torch.int32, device="meta")
    with pytest.raises(NotImplementedError, match="no data"):
        ops.panoptic_segments(pixels)
    with pytest.raises(NotImplementedError, match="no data"):
        ops.label_statistics(pixels, pixels.to(torch.uint8))
    image = torch.zeros((1, 4, 5), device="meta")
    with pytest.raises(RuntimeError):
        ops.check_finite(image, ops.percentile_bounds(image))


@pytest.mark.parametrize("backend", ["triton", "native"])
@pytest.mark.parametrize("name", [name for name in OPS if name not in WAITING])
def test_torch_sees_no_synchronisation(name, backend):
    if DEVICE.type != "cuda":
        pytest.skip("torch's synchronisation check needs a CUDA device")
    family, kernels, _, run, _ = OPS[name]
    need_backend(backend, family, kernels)
    dtype = "float32" if OPS[name][2] is planes else "uint8"
    singles, batch = arguments_of(name, dtype, range(len(SHAPES)))
    for arguments in (singles[0], batch):
        run(arguments, backend)  # compiles, and fills the allocators' caches
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(arguments, backend)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_pixels_mark_their_channel(backend, monkeypatch):
    """As on CUDA: no op raises, the bounds and ramps of the channel are NaN, its levels 0."""
    need_backend(backend, "quantize", ("percentile_bounds", "quantize"))
    images = [planes("float32", i)["image"].to(DEVICE) for i in range(2)]
    images[1][1, 3, 3] = torch.inf
    check_finite = ops.check_finite
    monkeypatch.setattr("fastembed.ops.quantize.check_finite", lambda *a, **k: None)
    bounds = ops.percentile_bounds(images, backend=backend)
    assert bounds.isnan().any(-1).tolist() == [[False, False], [False, True]]
    rules = ops.Percentile(), ops.ZScore(MEAN, STD)
    for measured in (bounds, *(rule.measure(images) for rule in rules)):
        with pytest.raises(ValueError, match=r"image\[1\] must be finite; channel 1 has 1 non"):
            check_finite(images, measured)
        check_finite(images[0], measured[0])
    for levels in (
        ops.percentile_quantize(images, backend=backend),
        ops.zscore_quantize(images, MEAN, STD, backend=backend),
    ):
        assert levels[1][0].any() and not levels[1][1].any()


def test_check_finite_reads_the_image_only_where_it_must():
    image = torch.full((1, 2, 2), torch.nan)
    ops.check_finite(image, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="channel 0 has 4 non-finite"):
        ops.check_finite(image)
    ops.check_finite(torch.cat([image, torch.zeros((1, 2, 2))]), channels=[1])
    ops.check_finite(np.zeros((1, 2, 2), np.uint8))
    with pytest.raises(ValueError, match="more than float32 can subtract"):
        ops.check_finite(torch.zeros((1, 2, 2)), torch.tensor([[torch.inf, 0.0]]))
