"""triplane_accumulate: torch as its oracle, blocks, layouts and refusals."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from conftest import DEVICE, need_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fastembed import dispatch, ops, testing
from fastembed.dispatch import BACKENDS

# Of each plane: the axis of [D, H, W] of its slices, those of a slice, and [S, C, a, b] to
# [C, D, H, W].
GEOMETRY = {
    "xy": (0, (1, 2), (1, 0, 2, 3)),
    "xz": (1, (0, 2), (1, 2, 0, 3)),
    "yz": (2, (0, 1), (1, 2, 3, 0)),
}
NAMES = tuple(GEOMETRY)


def by_torch(planes: dict, shape: tuple, mode: str, dtype=torch.float64) -> torch.Tensor:
    """The mean of torch's upsampled planes, [C, D, H, W]."""
    options = {"align_corners": False} if mode == "bilinear" else {}
    volumes = []
    for name, plane in planes.items():
        _, axes, order = GEOMETRY[name]
        size = [shape[axis] for axis in axes]
        upsampled = functional.interpolate(plane.to(dtype), size=size, mode=mode, **options)
        volumes.append(upsampled.permute(order))
    return torch.stack(volumes).mean(0)


def magnitude(planes: dict, shape: tuple) -> torch.Tensor:
    """Per voxel the mean of the largest tokens near it, which rounding errors are measured by."""
    largest = {
        name: functional.max_pool2d(plane.abs(), 3, stride=1, padding=1)
        for name, plane in planes.items()
    }
    return by_torch(largest, shape, "bilinear")


def make(shape, grids, channels=2, seed=0, names=NAMES, dtype=torch.float32) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn((shape[GEOMETRY[name][0]], channels, *grid), generator=generator).to(
            dtype
        )
        for name, grid in zip(names, grids, strict=True)
    }


def on_device(planes: dict) -> dict:
    return {name: plane.to(DEVICE) for name, plane in planes.items()}


# Odd sizes, more tokens than voxels, one token, one voxel, the spec's ratio, a width that no
# vector divides, rows that are many vectors.
SHAPES = [
    ((9, 10, 11), [(4, 3), (5, 7), (2, 2)]),
    ((3, 4, 5), [(9, 17), (8, 30), (1, 40)]),
    ((7, 1, 6), [(1, 1)] * 3),
    ((1, 1, 1), [(2, 3)] * 3),
    ((16, 32, 64), [(8, 16), (4, 16), (4, 8)]),
    ((2, 5, 131), [(3, 40), (2, 33), (1, 2)]),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("shape,grids", SHAPES, ids=[str(shape) for shape, _ in SHAPES])
def test_is_torch_to_the_last_bits(shape, grids, mode, backend):
    need_backend(backend, "volumes", ("triplane_accumulate",))
    planes = make(shape, grids)
    volume = ops.triplane_accumulate(
        on_device(planes), shape, mode=mode, dtype=torch.float32, backend=backend
    )
    error = abs(volume.cpu() - by_torch(planes, shape, mode))
    assert (error <= 1e-6 * magnitude(planes, shape)).all()
    # torch in float32 has errors of its own, in the positions.
    error = abs(volume.cpu() - by_torch(planes, shape, mode, torch.float32))
    assert (error <= 1e-5 * magnitude(planes, shape)).all()


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_the_oracle_is_torch(mode):
    for seed, (shape, grids) in enumerate(SHAPES):
        planes = make(shape, grids, seed=seed)
        arrays = {name: plane.numpy() for name, plane in planes.items()}
        error = abs(
            testing.oracle_triplane(arrays, shape, mode, "float32")
            - by_torch(planes, shape, mode).numpy()
        )
        assert (error <= 1e-6 * magnitude(planes, shape).numpy()).all()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 14, 31, 32, 37, 64, 100])
def test_nearest_takes_the_token_that_torch_takes(count):
    """One plane of numbered tokens: any other rounding of the position would be seen."""
    for length in (*range(1, 80), 127, 128, 129, 250, 1000):
        tokens = torch.arange(count, dtype=torch.float32).reshape(1, 1, 1, count)
        volume = ops.triplane_accumulate(
            {"xy": tokens}, (1, 1, length), mode="nearest", dtype=torch.float32,
            backend="reference",
        )  # fmt: skip
        expected = functional.interpolate(tokens, size=(1, length), mode="nearest")
        assert torch.equal(volume.flatten(), expected.flatten()), length


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("names", [("xy",), ("xz",), ("yz",), ("yz", "xy"), ("xz", "yz")])
def test_missing_planes_are_not_counted(names, backend):
    need_backend(backend, "volumes", ("triplane_accumulate",))
    shape = (6, 5, 9)
    planes = make(shape, [(3, 4), (2, 5)][: len(names)], names=names)
    volume = ops.triplane_accumulate(on_device(planes), shape, dtype=torch.float32, backend=backend)
    error = abs(volume.cpu() - by_torch(planes, shape, "bilinear"))
    assert (error <= 1e-6 * magnitude(planes, shape)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_block_has_the_bits_of_the_whole(backend):
    need_backend(backend, "volumes", ("triplane_accumulate",))
    interpreted = backend == "triton" and DEVICE.type == "cpu"
    most = 6 if interpreted else 24

    @settings(max_examples=5 if interpreted else 60, deadline=None)
    @given(data=st.data())
    def check(data):
        side = st.integers(1, most)
        shape = tuple(data.draw(side) for _ in range(3))
        names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
        grids = [(data.draw(side), data.draw(side)) for _ in names]
        channels = data.draw(st.integers(1, 3))
        mode = data.draw(st.sampled_from(ops.volumes.UPSAMPLE_MODES))
        dtype = data.draw(st.sampled_from(ops.volumes.VOLUME_DTYPES))
        tokens = data.draw(st.sampled_from(ops.volumes.TOKEN_DTYPES))
        planes = make(shape, grids, channels, sum(shape), names, tokens)
        expected = testing.oracle_triplane(
            {name: plane.float().numpy() for name, plane in planes.items()}, shape, mode,
            str(dtype).removeprefix("torch."),
        )  # fmt: skip
        block = []
        for length in (channels, *shape):
            start = data.draw(st.integers(0, length - 1))
            block.append(slice(start, data.draw(st.integers(start + 1, length + 2))))
        part = ops.triplane_accumulate(
            on_device(planes), shape, block=block, mode=mode, dtype=dtype, backend=backend
        )
        np.testing.assert_array_equal(part.cpu(), expected[tuple(block)])

    check()


def test_chunks_make_up_the_volume():
    """As a caller streams it, into memory that is used again; ranges are as good as slices."""
    shape, channels = (20, 17, 33), 5
    planes = make(shape, [(8, 8), (6, 8), (6, 8)], channels)
    whole = ops.triplane_accumulate(planes, shape)
    chunk = np.full(2 * 8 * 8 * 16, 7, dtype=np.float16)
    seen = np.zeros((channels, *shape), dtype=np.float16)
    arrays = {name: plane.numpy() for name, plane in planes.items()}
    for c in range(0, channels, 2):
        for z in range(0, shape[0], 8):
            for y in range(0, shape[1], 8):
                for x in range(0, shape[2], 16):
                    block = (slice(c, c + 2), range(z, z + 8), slice(y, y + 8), range(x, x + 16))
                    box = tuple(slice(part.start, part.stop) for part in block)
                    size = seen[box].shape
                    out = chunk[: np.prod(size)].reshape(size)
                    assert ops.triplane_accumulate(arrays, shape, block=block, out=out) is out
                    seen[box] = out
    np.testing.assert_array_equal(seen, whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16, torch.float16])
def test_planes_lie_anywhere(tokens, backend):
    """Channels outermost, slices of a larger buffer, grids that are not contiguous."""
    need_backend(backend, "volumes", ("triplane_accumulate",))
    shape, block = (5, 6, 7), (slice(1, 3), slice(2, 5), slice(0, 4), slice(3, 7))
    planes = make(shape, [(3, 4), (2, 4), (2, 3)], channels=4, dtype=tokens)
    planes = on_device(planes)
    expected = ops.triplane_accumulate(planes, shape, block=block, backend=backend)
    channels_first = {
        name: plane.transpose(0, 1).contiguous().transpose(0, 1) for name, plane in planes.items()
    }
    spread = {name: torch.stack([plane] * 2, 2)[:, :, 1] for name, plane in planes.items()}
    columns_first = {name: plane.mT.contiguous().mT for name, plane in planes.items()}
    for other in (channels_first, spread, columns_first):
        assert any(not plane.is_contiguous() for plane in other.values())
        part = ops.triplane_accumulate(other, shape, block=block, backend=backend)
        assert torch.equal(part, expected)


@functools.lru_cache(maxsize=1)
def large(width: int, dtype: torch.dtype) -> tuple[dict, torch.Tensor]:
    shape = (70, 140, width)
    planes = make(shape, [(40, 32), (33, 32), (33, 40)], channels=4)
    return planes, ops.triplane_accumulate(planes, shape, dtype=dtype, backend="reference")


@pytest.mark.parametrize("width", [128, 131])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("backend", ["numba", "native"])
def test_blocks_of_several_tiles(backend, dtype, width):
    """Larger than a tile of the native loops, and than what they leave in the caches."""
    need_backend(backend, "volumes", ("triplane_accumulate",), "cpu")
    planes, expected = large(width, dtype)
    shape = expected.shape[1:]
    for start in (0, 8):  # aligned to a line of the cache, and not
        memory = torch.full((expected.numel() + 8,), 7, dtype=dtype)
        out = memory[start : start + expected.numel()].view(expected.shape)
        ops.triplane_accumulate(planes, shape, dtype=dtype, out=out, backend=backend)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_is_rounded_once(backend):
    """Halfway between two float16, beyond the largest, and where they are subnormal."""
    need_backend(backend, "volumes", ("triplane_accumulate",))
    values = [
        1 + 2**-11, 1 + 3 * 2**-11, 65519.0, 65520.0, -1e30, 2**-25, 3 * 2**-25, -(2**-24), 1e-30,
    ]  # fmt: skip
    tokens = torch.tensor(values, device=DEVICE).reshape(1, 1, 1, -1)
    volume = ops.triplane_accumulate({"xy": tokens}, (1, 1, len(values)), backend=backend)
    assert torch.equal(volume.flatten().cpu(), torch.tensor(values).half())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_that_is_not_finite_stays_where_it_is(backend):
    need_backend(backend, "volumes", ("triplane_accumulate",))
    shape = (4, 6, 8)
    planes = make(shape, [(3, 4), (2, 4), (2, 3)], channels=2)
    planes["xy"][1, 0, 2, 0] = torch.nan
    for mode in ops.volumes.UPSAMPLE_MODES:
        volume = ops.triplane_accumulate(on_device(planes), shape, mode=mode, backend=backend)
        expected = by_torch(planes, shape, mode).isnan()
        assert expected.any() and torch.equal(volume.isnan().cpu(), expected)


def test_results_are_of_the_kind_that_came_in():
    shape = (2, 3, 4)
    planes = make(shape, [(2, 2)] * 3)
    arrays = {name: plane.numpy() for name, plane in planes.items()}
    volume = ops.triplane_accumulate(arrays, shape)
    assert isinstance(volume, np.ndarray) and volume.dtype == np.float16
    np.testing.assert_array_equal(volume, ops.triplane_accumulate(planes, shape))


def test_no_plane_is_read_back(monkeypatch):
    """On `meta` nothing has data: whatever reads one back raises."""
    launched = []
    monkeypatch.setattr(dispatch, "resolve", lambda family, op, *_: lambda *a: launched.append(op))
    planes = {name: plane.to("meta") for name, plane in make((2, 3, 4), [(2, 2)] * 3).items()}
    ops.triplane_accumulate(planes, (2, 3, 4), block=[slice(0, 1)] * 4)
    assert launched == ["triplane_accumulate"]


def test_refusals_name_the_rule_and_the_value():
    shape = (2, 3, 4)
    planes = make(shape, [(2, 2)] * 3)
    xy = planes["xy"]

    def call(planes=planes, shape=shape, **options):
        return lambda: ops.triplane_accumulate(planes, shape, **options)

    everything = slice(None)
    cases = [
        (ValueError, "planes must be of xy, xz, yz; got 'zy'", call({"zy": xy})),
        (ValueError, "at least one of xy, xz, yz; got none", call({})),
        (TypeError, r"planes\['xy'\] must be a NumPy array.*got list", call({"xy": [1]})),
        (ValueError, r"\[2, C, h, w\], a slice per voxel along z.*got \[3, 2",
         call({"xy": planes["xz"]})),
        (ValueError, r"\[3, C, h, w\], a slice per voxel along y.*got \[2, 2", call({"xz": xy})),
        (ValueError, r"got \[2, 2, 2\]", call({"xy": xy[:, 0]})),
        (ValueError, "none of them 0", call({"xy": xy[:, :0]})),
        (TypeError, "float32, float16 or bfloat16; got float64", call({"xy": xy.double()})),
        (TypeError, "of one dtype; 'xy' is float32, 'xz' is float16",
         call({"xy": xy, "xz": planes["xz"].half()})),
        (ValueError, "number of channels; 'xy' has 2, 'yz' has 1",
         call({"xy": xy, "yz": planes["yz"][:, :1]})),
        (ValueError, r"shape must be \(D, H, W\).*got \(2, 3\)", call(shape=(2, 3))),
        (ValueError, "none of them 0", call(shape=(0, 3, 4))),
        (ValueError, "mode must be one of bilinear, nearest; got 'cubic'", call(mode="cubic")),
        (TypeError, "dtype must be float16 or float32; got bfloat16", call(dtype=torch.bfloat16)),
        (ValueError, "four slices: channels, z, y, x; got 3", call(block=[everything] * 3)),
        (TypeError, "slices or ranges; its z are 1",
         call(block=[everything, 1, everything, everything])),
        (ValueError, r"block's y must be at least one of 0..2.*got slice\(3, 9",
         call(block=[everything, everything, slice(3, 9), everything])),
        (ValueError, "in steps of 1; got range.0, 4, 2",
         call(block=[everything, everything, everything, range(0, 4, 2)])),
        (ValueError, "range of x must not be negative",
         call(block=[everything, everything, everything, range(-2, 0)])),
        (ValueError, "out must have shape", call(out=np.zeros((2, 3, 4), np.float16))),
        (ValueError, "out must have dtype", call(out=np.zeros((2, 2, 3, 4), np.float32))),
    ]  # fmt: skip
    for kind, message, run in cases:
        with pytest.raises(kind, match=message):
            run()
