"""Panoptic maps: ids and segments on every backend, against a mask per id."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEVICE, need_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastembed import dispatch, ops
from fastembed.dispatch import BACKENDS
from fastembed.ops import panoptic
from fastembed.testing import (
    colours_of,
    oracle_panoptic,
    oracle_segments,
    panoptic_map,
    segment_rows,
)

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 2**24 - 1
CPU_BACKENDS = ("reference", "numba", "native")


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    need_backend(request.param, "panoptic", ("decode_panoptic", "panoptic_segments"))
    return request.param


def on_device(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)


id_maps = hnp.arrays(
    dtype=np.int32,
    shape=st.tuples(st.integers(1, 12), st.integers(1, 80)),
    elements=st.one_of(st.sampled_from([0, 1, 255, 256, 65536, LARGEST]), st.integers(0, LARGEST)),
)


@settings(max_examples=200, deadline=None)
@given(ids=id_maps, void=st.sampled_from([0, None, 255, LARGEST]), step=st.sampled_from([1, 2, -1]))
def test_any_map(ids, void, step):
    ids = ids[:, ::step]  # not contiguous
    colours = colours_of(ids)[:, ::-1][:, ::-1]
    expected = oracle_segments(ids, void)
    for backend in CPU_BACKENDS:
        if dispatch.find("panoptic", "panoptic_segments", "cpu", backend)[0] is None:
            continue  # test_case_equals_its_oracle skips it, visibly
        np.testing.assert_array_equal(ops.decode_panoptic(colours, backend=backend), ids)
        for pixels in (ids, colours):
            found = ops.panoptic_segments(pixels, void=void, backend=backend)
            np.testing.assert_array_equal(segment_rows(found), expected)


@pytest.mark.parametrize("colours", [False, True])
@pytest.mark.parametrize("width", [1, 2, 21, 22, 23, 42, 43, 64, 65, 513])
def test_every_width(width, colours, backend):
    """Rows shorter and longer than the blocks that kernels look at, down to one pixel."""
    rng = np.random.default_rng(width)
    ids = np.repeat(rng.integers(0, 9, (3, width)), 5, axis=1)[:, 2 : 2 + width].astype(np.int32)
    ids[2] += rng.integers(0, 2, width, dtype=np.int32) * 65536
    found = ops.panoptic_segments(on_device(colours_of(ids) if colours else ids), backend=backend)
    np.testing.assert_array_equal(segment_rows(found), oracle_segments(ids))
    decoded = ops.decode_panoptic(on_device(colours_of(ids)), backend=backend)
    np.testing.assert_array_equal(decoded.cpu(), ids)


def test_one_pixel_and_nothing_but_void(backend):
    for value in (0, 7):
        pixel = on_device(np.full((1, 1), value, dtype=np.int32))
        every = ops.panoptic_segments(pixel, void=None, backend=backend)
        assert [part.tolist() for part in every] == [[value], [[0, 0, 0, 0]], [1]]
        segments = ops.panoptic_segments(pixel, backend=backend)
        assert len(segments.ids) == (1 if value else 0)
        assert segments.boxes.shape == (len(segments.ids), 4)
        assert (segments.ids.dtype, segments.boxes.dtype) == (torch.int32, torch.int32)
        assert segments.areas.dtype == torch.int64


@pytest.mark.parametrize("distinct", [128, 129, 1024, 1025, 5000])
def test_more_ids_than_the_first_table_holds(distinct, backend):
    assert panoptic.FIRST_SLOTS // 2 == 128
    rng = np.random.default_rng(distinct)
    ids = rng.permutation(LARGEST)[:distinct].astype(np.int32) + 1
    found = ops.panoptic_segments(on_device(ids[None]), backend=backend)
    order = np.argsort(ids)
    np.testing.assert_array_equal(found.ids.cpu(), ids[order])
    box = np.column_stack([0 * order, order, 0 * order, order])
    np.testing.assert_array_equal(found.boxes.cpu(), box)
    np.testing.assert_array_equal(found.areas.cpu(), np.ones(distinct))


@pytest.mark.parametrize("cpu_backend", CPU_BACKENDS)
def test_every_pixel_its_own_id(cpu_backend):
    need_backend(cpu_backend, "panoptic", ("panoptic_segments",), "cpu")
    height, width = 300, 400
    ids = np.random.default_rng(0).permutation(LARGEST)[: height * width].astype(np.int32) + 1
    order = np.argsort(ids)
    box = np.column_stack([order // width, order % width] * 2)
    ids = ids.reshape(height, width)
    for pixels in (ids, colours_of(ids)):
        found = ops.panoptic_segments(pixels, backend=cpu_backend)
        np.testing.assert_array_equal(found.ids, ids.ravel()[order])
        np.testing.assert_array_equal(found.boxes, box)
        assert (found.areas == 1).all() and len(found.areas) == ids.size


@pytest.mark.parametrize("spacing", [2**8, 2**12, 2**16, 0x144CBC89])
def test_ids_that_are_alike_do_not_crowd_one_slot(spacing, backend):
    """Multiples of powers of two, and of the hash's inverse: neighbours in the table."""
    ids = (np.arange(1, 101, dtype=np.int64) * spacing).astype(np.int32)  # wraps: any int32 is fine
    found = ops.panoptic_segments(on_device(np.stack([ids, ids[::-1]])), void=None, backend=backend)
    expected = oracle_segments(np.stack([ids, ids[::-1]]), None)
    np.testing.assert_array_equal(segment_rows(found), expected)


def test_negative_ids_and_the_extremes(backend):
    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    ids = np.array([[low, -1, -1], [high, 0, low]], dtype=np.int32)
    for void in (0, None, -1, low, high):
        found = ops.panoptic_segments(on_device(ids), void=void, backend=backend)
        np.testing.assert_array_equal(segment_rows(found), oracle_segments(ids, void))


def test_outputs_are_written_whole(backend):
    rgb = colours_of(panoptic_map(33, 65, seed=4))
    for sentinel in (-1, 7):
        out = torch.full((33, 65), sentinel, dtype=torch.int32, device=DEVICE)
        assert ops.decode_panoptic(on_device(rgb), out=out, backend=backend) is out
        np.testing.assert_array_equal(out.cpu(), oracle_panoptic(rgb))


@pytest.mark.parametrize("sentinel", [-1, 0, 1, 2**62])
def test_a_table_may_hold_anything_before(sentinel, backend):
    ids = panoptic_map(20, 40, seed=1)
    run = dispatch.resolve("panoptic", "panoptic_segments", DEVICE, backend)
    tables = torch.full((1, 1 + 64, 6), sentinel, dtype=torch.int64, device=DEVICE)
    run([on_device(ids)], 0, tables)
    table = tables[0].cpu().numpy()
    header, rows = table[0], table[1:]
    rows = rows[rows[:, 5] > 0]
    np.testing.assert_array_equal(rows[rows[:, 0].argsort()], oracle_segments(ids))
    assert header[0] == len(rows)


def test_results_are_of_the_kind_that_came_in():
    rgb = colours_of(panoptic_map(20, 30, seed=0))
    assert all(isinstance(part, np.ndarray) for part in ops.panoptic_segments(rgb))
    assert all(isinstance(part, torch.Tensor) for part in ops.panoptic_segments(on_device(rgb)))
    assert isinstance(ops.decode_panoptic(rgb), np.ndarray)
    rgb.flags.writeable = False
    np.testing.assert_array_equal(ops.decode_panoptic(rgb), oracle_panoptic(rgb))


def test_refusals():
    rgb = np.zeros((4, 5, 3), dtype=np.uint8)
    cases = [
        (
            ValueError,
            r"rgb must be \[H, W, 3\].*\[4, 5\]",
            lambda: ops.decode_panoptic(rgb[..., 0]),
        ),
        (ValueError, r"got \[4, 5, 2\]", lambda: ops.decode_panoptic(rgb[..., :2])),
        (ValueError, r"got \[0, 5, 3\]", lambda: ops.decode_panoptic(rgb[:0])),
        (TypeError, "rgb must be uint8; got int32", lambda: ops.decode_panoptic(rgb.astype("i4"))),
        (
            ValueError,
            "out must have dtype torch.int32; got torch.int64",
            lambda: ops.decode_panoptic(rgb, out=np.zeros((4, 5), np.int64)),
        ),
        (ValueError, r"got int32 \[4, 5, 3\]", lambda: ops.panoptic_segments(rgb.astype("i4"))),
        (ValueError, r"got uint8 \[4, 5\]", lambda: ops.panoptic_segments(rgb[..., 0])),
        (
            ValueError,
            r"no axis 0; got uint8 \[4, 0, 3\]",
            lambda: ops.panoptic_segments(rgb[:, :0]),
        ),
        (TypeError, "got int64", lambda: ops.panoptic_segments(np.zeros((4, 5), np.int64))),
        (TypeError, r"pixels\[0\] must be a NumPy array", lambda: ops.panoptic_segments([[1]])),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


def test_the_kernels_stay_inside_their_memory(tmp_path):
    """csrc/panoptic.cpp on noise, under AddressSanitizer and UndefinedBehaviorSanitizer."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "sanitize"
    sources = [ROOT / "tests/sanitize_panoptic.cpp", ROOT / "csrc/panoptic.cpp"]
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    build = subprocess.run(
        [compiler, *flags, "-I", ROOT / "csrc", *sources, "-o", program],
        capture_output=True, text=True,
    )  # fmt: skip
    if build.returncode != 0 and "san" in build.stderr and "error:" not in build.stderr:
        pytest.skip(f"the sanitizers' libraries are not installed: {build.stderr[-200:]}")
    assert build.returncode == 0, build.stderr
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) > 100_000
