"""The native library as a file: what it needs, where it loads, what it registers.

That its ops compute the right bits is tested with those of the other backends, in test_ops.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastembed
from fastembed import dispatch

LIBRARY = Path(fastembed.__file__).with_name("_native.so")
ROOT = Path(__file__).resolve().parents[1]
# What each op writes.
OPS = {
    "percentile_bounds": ["out"],
    "quantize": ["out"],
    "gather_crops": ["out"],
    "pool_crops": ["out"],
    "blend_crops": ["out"],
    "decode_panoptic": ["out"],
    "panoptic_segments": ["out"],
    "label_statistics": ["out"],
    "scanline_segments": ["ids", "out"],
    "triplane_accumulate": ["out"],
}
CPU_ONLY = {"scanline_segments"}  # PNG files are read where they are decompressed


@pytest.fixture(autouse=True)
def library() -> Path:
    if not LIBRARY.exists():
        required = "native" in os.environ.get("FASTEMBED_REQUIRE", "").split(",")
        (pytest.fail if required else pytest.skip)(f"native: {dispatch.load_native()}")
    assert dispatch.load_native() == ""
    return LIBRARY


def has_cuda_code() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("fastembed::quantize", "CUDA")


def test_needs_no_libpython_and_no_cuda(library):
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    text = subprocess.run(
        ["readelf", "-d", library], check=True, capture_output=True, text=True
    ).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*?)\.so", text))
    system = {"libc", "libm", "libstdc++", "libgcc_s", "libdl", "libpthread", "librt"}
    assert "libtorch_cpu" in needed
    assert needed - system - {"libtorch", "libtorch_cpu"} <= {"ld-linux-x86-64", "ld-linux-aarch64"}
    # A search path would be one of the machine that built it.
    assert "RPATH" not in text and "RUNPATH" not in text


def test_names_no_folder_of_the_build(library):
    assert str(ROOT).encode() not in library.read_bytes()


@pytest.mark.parametrize("op", OPS)
def test_op_is_registered_for_the_cpu(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastembed::{op}", "CPU")
    schema = getattr(torch.ops.fastembed, op).default._schema
    assert [argument.name for argument in schema.arguments if argument.alias_info] == OPS[op]
    assert schema.returns == []


@pytest.mark.parametrize("op", sorted(OPS.keys() - CPU_ONLY))
def test_op_is_registered_for_cuda_where_nvcc_built_it(op):
    if not has_cuda_code():
        pytest.skip("built without CUDA code: no nvcc at build time, or FASTEMBED_CUDA=0")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastembed::{op}", "CUDA")
    if not torch.cuda.is_available():
        function, reason = dispatch.find(dispatch_family(op), op, "cuda", "native")
        assert function is None and reason == "built, but there is no CUDA device"


def cuobjdump() -> str | None:
    """The toolkit's own, or the one inside Triton."""
    triton = importlib.util.find_spec("triton")
    inside = Path(triton.origin).parent / "backends/nvidia/bin" if triton else Path()
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(inside))


def test_cuda_code_is_for_every_architecture_and_those_to_come(library):
    if not has_cuda_code():
        pytest.skip("built without CUDA code: no nvcc at build time, or FASTEMBED_CUDA=0")
    tool = cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump (CUDA toolkit or Triton) is not installed")
    listing = subprocess.run(
        [tool, "-lelf", "-lptx", library], check=True, capture_output=True, text=True
    ).stdout
    machine_code = set(re.findall(r"sm_(\d+)\.cubin", listing))
    portable_code = set(re.findall(r"sm_(\d+)\.ptx", listing))
    assert {"80", "90"} <= machine_code
    assert portable_code == {max(machine_code, key=int)}


def test_cuda_code_keeps_everything_in_registers(library):
    if not has_cuda_code():
        pytest.skip("built without CUDA code: no nvcc at build time, or FASTEMBED_CUDA=0")
    tool = cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump (CUDA toolkit or Triton) is not installed")
    listing = subprocess.run(
        [tool, "-res-usage", library], check=True, capture_output=True, text=True
    ).stdout
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", listing)
    assert len(kernels) > 90  # of all architectures
    # What a thread spills lies on its stack, in memory.
    assert [name for name, _, stack, local in kernels if int(stack) or int(local)] == []


def test_a_thread_runs_beside_a_kernel():
    """The GIL is free while a kernel runs: another Python thread goes on meanwhile."""
    code = """
import sys, threading, torch
from fastembed import dispatch
assert dispatch.load_native() == ""
sys.setswitchinterval(3600)  # who holds the GIL keeps it until it waits or gives it up
features, out = torch.ones(1, 10_000, 2_000), torch.empty(1, 2_000)

def first_to_finish():
    running, finished = threading.Event(), []
    def kernel():
        running.set()
        torch.ops.fastembed.pool_crops(features, False, False, out)
        finished.append("kernel")
    thread = threading.Thread(target=kernel)
    thread.start()
    running.wait()
    finished.append("python")
    thread.join()
    return finished[0]

# On a busy machine Python may be late; with the GIL held it never is first.
print("python" in (first_to_finish() for _ in range(20)))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert result.stdout.strip() == "True"


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def crops(origin=(0, 0), plane=0, size=4, image=0, **changed):
    """Arguments of gather_crops on an image [2, 8, 8] and one [2, 4, 4]."""
    arguments = {
        "images": [zeros(2, 8, 8, dtype=torch.uint8), zeros(2, 4, 4, dtype=torch.uint8)],
        "origins": torch.tensor([(image, *origin)], dtype=torch.int32),
        "planes": torch.tensor([plane], dtype=torch.int32),
        "ramp": zeros(2, 2, 5),
        "table": zeros(1, 256),
        "out": zeros(1, 1, size, size),
    }
    return tuple((arguments | changed).values())


def quantize(**changed):
    """Arguments of quantize on an image [2, 9]."""
    arguments = {
        "images": [zeros(2, 9)],
        "ramp": zeros(1, 2, 5),
        "out": [zeros(2, 9).byte()],
    }
    return tuple((arguments | changed).values())


def bounds(**changed):
    """Arguments of percentile_bounds on an image [2, 9]."""
    arguments = {
        "images": [zeros(2, 9)],
        "positions": torch.tensor([[0.5, 8.0]], dtype=torch.float64),
        "out": zeros(1, 2, 2),
    }
    return tuple((arguments | changed).values())


def positions(low, high):
    return torch.tensor([[low, high]], dtype=torch.float64)


def blend(crop=(7, 0, 0, 8, 9), image=0, **changed):
    """Arguments of blend_crops on an image [8, 9, 3] and one [2, 2, 3]."""
    arguments = {
        "images": [zeros(8, 9, 3, dtype=torch.uint8), zeros(2, 2, 3, dtype=torch.uint8)],
        "ids": [ids(8, 9), ids(2, 2)],
        "crops": torch.tensor([(image, *crop)], dtype=torch.int32),
        "background": zeros(256, dtype=torch.uint8),
        "table": zeros(3, 256),
        "cubic": True,
        "narrow": False,
        "tall_first": True,
        "out": zeros(1, 3, 4, 4),
    }
    return tuple((arguments | changed).values())


def labels(labels=None, image=None, out=None):
    """Arguments of label_statistics: labels [4, 5], an image of one channel, 8 slots."""
    return (
        [ids(4, 5) if labels is None else labels],
        [zeros(1, 4, 5) if image is None else image],
        zeros(1, 9, 9).long() if out is None else out,
    )


def table(slots=8):
    return tables(slots)[0]


def tables(slots=8, count=1):
    return zeros(count, 1 + slots, 6, dtype=torch.int64)


def ids(*shape):
    return zeros(*shape, dtype=torch.int32)


def triplane(low=0, high=0, **changed):
    """Arguments of triplane_accumulate: xy of a volume [3, 2, 4, 5] and nothing else."""
    arguments = {
        "planes": [zeros(2, 3, 2, 2), zeros(0, 0, 0, 0), zeros(0, 0, 0, 0)],
        "at": torch.tensor([[0] * 8 + [low] + [0] * 13, [0] * 8 + [high] + [0] * 13]).int(),
        "weight": zeros(22),
        "out": zeros(3, 2, 4, 5),
    }
    return tuple((arguments | changed).values())


def planes(xy, *others):
    return [xy, *others, *[zeros(0, 0, 0, 0)] * (2 - len(others))]


# What would read or write outside a tensor is refused by the library itself.
@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("pool_crops", (zeros(2, 3, 4), False, False, zeros(2, 3)), r"out \[S, D\]"),
        ("pool_crops", (zeros(2, 0, 4), False, False, zeros(2, 4)), "N >= 1"),
        ("pool_crops", (zeros(2, 3, 8)[:, :, ::2], False, False, zeros(2, 4)), "contiguous"),
        ("pool_crops", (zeros(2, 3, 4), False, False, zeros(4, 2).T), "contiguous"),
        ("pool_crops", (zeros(2, 3, 4).double(), False, False, zeros(2, 4)), "float32, bfloat16"),
        ("quantize", quantize(ramp=zeros(1, 2, 4)), r"ramp must be float32 \[1, 2, 5"),
        ("quantize", quantize(ramp=zeros(2, 2, 5)), r"ramp must be float32 \[1, 2, 5"),
        ("quantize", quantize(out=[zeros(2, 8).byte()]), "18 elements"),
        ("quantize", quantize(out=[]), "out must have a tensor per image"),
        ("quantize", quantize(images=[zeros(2, 9).int()]), "uint8, uint16"),
        ("percentile_bounds", bounds(positions=positions(9, 9)), "position 9 is not in 9 pixels"),
        ("percentile_bounds", bounds(positions=positions(0, -1)), "position -1 is not in 9 pixels"),
        ("percentile_bounds", bounds(positions=positions(0, 8).float()), "float64 .1, 2. on the"),
        ("percentile_bounds", bounds(images=[]), "a batch must have an image"),
        ("percentile_bounds", bounds(images=[zeros(2, 9), zeros(3, 9)]), "the same channels"),
        ("percentile_bounds", bounds(images=[zeros(2, 9), zeros(2, 9).byte()]), "and dtype"),
        ("percentile_bounds", bounds(out=zeros(1, 1, 2)), r"out must be float32 \[1, 2, 2\]"),
        ("percentile_bounds", bounds(out=zeros(1, 2, 2).double()), r"be float32 \[1, 2, 2\]"),
        ("percentile_bounds", bounds(images=[zeros(2, 0)]), "must have pixels"),
        ("percentile_bounds", bounds(images=[zeros(2, 9).double()]), "uint8, uint16 or float32"),
        ("gather_crops", crops(origin=(5, 0)), r"crop 0 at \(5, 0\) leaves the image"),
        ("gather_crops", crops(origin=(0, -1)), r"crop 0 at \(0, -1\) leaves the image"),
        ("gather_crops", crops(origin=(4, 4), image=1), r"\(4, 4\) leaves the image"),
        ("gather_crops", crops(image=2), "of image 2 is not of one of 2 images"),
        ("gather_crops", crops(image=-1), "of image -1 is not of one of 2 images"),
        ("gather_crops", crops(ramp=zeros(1, 2, 5)), r"ramp must be float32 \[2, 2, 5"),
        ("gather_crops", crops(plane=2), "plane 2 is not one of 2 channels"),
        ("gather_crops", crops(table=zeros(1, 255)), r"table must be \[1, 256\]"),
        ("gather_crops", crops(table=zeros(1, 256).half()), "out's dtype"),
        ("gather_crops", crops(origins=zeros(1, 3)), "origins must be int32"),
        ("decode_panoptic", ([zeros(4, 4, 3).byte()], [ids(4, 5)]), "3 elements for each"),
        ("decode_panoptic", ([zeros(4, 4, 3).byte()], [zeros(4, 4)]), "int32 elements of out"),
        ("decode_panoptic", ([zeros(4, 4, 3).byte()], [ids(4, 4)] * 2), "out a tensor for each"),
        ("panoptic_segments", ([zeros(4, 4, 4).byte()], 0, tables()), r"must be \[H, W, 3\]"),
        ("panoptic_segments", ([zeros(4, 4)], 0, tables()), r"or int32 \[H, W\]"),
        ("panoptic_segments", ([ids(4, 4), zeros(4, 4, 3).byte()], 0, tables(8, 2)), "one dtype"),
        ("panoptic_segments", ([ids(4, 4)] * 2, 0, tables()), "a table for each of 2 maps"),
        ("panoptic_segments", ([ids(4, 4)], 0, table()), "a table for each of 1 maps"),
        ("panoptic_segments", ([ids(4, 4)], 0, tables(7)), "power of two in 2..2.30, not 7"),
        ("panoptic_segments", ([ids(4, 4)], 0, tables(0)), "power of two in 2..2.30, not 0"),
        ("panoptic_segments", ([ids(4, 4)], 0, zeros(1, 9, 6)), "out must be int64"),
        (
            "panoptic_segments",
            ([ids(4, 4)], 0, tables()[..., :5].contiguous()),
            r"1 \+ slots, 6\]",
        ),
        ("panoptic_segments", ([ids(4, 8)[:, ::2]], 0, tables()), "contiguous"),
        ("label_statistics", labels(image=zeros(1, 4, 4)), r"be \[H, W\].*images \[C, H, W\]"),
        ("label_statistics", labels(image=zeros(2, 4, 5)), r"int64 \[1, 1 \+ slots, 12\]"),
        ("label_statistics", labels(out=zeros(1, 9, 9)), "out must be int64"),
        ("label_statistics", labels(out=zeros(2, 9, 9).long()), "out must be int64"),
        ("label_statistics", labels(out=zeros(1, 8, 9).long()), "power of two in 2..2.30, not 7"),
        ("label_statistics", labels(labels=zeros(4, 5)), "labels must be uint8, uint16"),
        ("label_statistics", labels(labels=ids(4, 10)[:, ::2]), "contiguous"),
        ("label_statistics", labels(image=zeros(1, 4, 5).double()), "images must be uint8"),
        ("label_statistics", ([], [], zeros(1, 9, 9).long()), "a batch must have an image"),
        ("scanline_segments", (zeros(4, 13).byte(), 0, ids(0, 4), tables()), "one table"),
        (
            "scanline_segments",
            (zeros(4, 12).byte(), 0, ids(0, 4), table()),
            r"lines must be uint8 \[H, 1 \+ 3 W\]",
        ),
        (
            "scanline_segments",
            (zeros(4, 13).byte(), 0, ids(3, 4), table()),
            r"ids must be int32 \[4, 4\]",
        ),
        ("triplane_accumulate", triplane(low=2, high=2), "between tokens 2 and 2 of 2"),
        ("triplane_accumulate", triplane(low=-1), "between tokens -1 and 0 of 2"),
        ("triplane_accumulate", triplane(low=1, high=0), "between tokens 1 and 0 of 2"),
        (
            "triplane_accumulate",
            triplane(at=torch.tensor([[0] * 22, [0] * 7 + [1] + [0] * 14]).int()),
            "voxel 4 lies before voxel 3",
        ),
        ("triplane_accumulate", triplane(at=ids(2, 21)), r"at must be int32 \[2, 22\]"),
        ("triplane_accumulate", triplane(weight=zeros(21)), r"weight must be float32 \[22\]"),
        ("triplane_accumulate", triplane(planes=planes(zeros(3, 3, 2, 2))), r"be \[2, 3, h, w\]"),
        ("triplane_accumulate", triplane(planes=planes(zeros(2, 2, 2, 2))), r"be \[2, 3, h, w\]"),
        ("triplane_accumulate", triplane(planes=planes(zeros(2, 3, 2, 4)[..., ::2])), "grids must"),
        ("triplane_accumulate", triplane(planes=planes(zeros(0, 3, 2, 2))), "at least one plane"),
        ("triplane_accumulate", triplane(planes=[zeros(2, 3, 2, 2)]), "must be xy, xz and yz"),
        (
            "triplane_accumulate",
            triplane(planes=planes(zeros(2, 3, 2, 2), zeros(4, 3, 2, 2).half())),
            "of one dtype",
        ),
        ("triplane_accumulate", triplane(out=zeros(3, 2, 4, 5).bfloat16()), "float32 or float16"),
        ("triplane_accumulate", triplane(out=zeros(3, 2, 5, 4).mT), "out must be contiguous"),
        ("blend_crops", blend(crop=(7, 1, 0, 8, 9)), r"crop 0 of 8x9 at \(1, 0\).*leaves"),
        ("blend_crops", blend(crop=(7, 0, -1, 8, 9)), r"at \(0, -1\).*leaves the image"),
        ("blend_crops", blend(crop=(7, 3, 3, 0, 1)), "is empty or leaves"),
        ("blend_crops", blend(crop=(7, 2**31 - 1, 0, 2**31 - 1, 1)), "leaves the image"),
        ("blend_crops", blend(image=1), r"crop 0 of 8x9 at \(0, 0\).*leaves the image"),
        ("blend_crops", blend(image=2), "of image 2 is not of one of 2 images"),
        ("blend_crops", blend(images=[zeros(8, 9, 4).byte()] * 2), r"uint8 \[H, W, 3\]"),
        ("blend_crops", blend(ids=[ids(9, 8)] * 2), r"ids must be int32 \[8, 9\]"),
        ("blend_crops", blend(ids=[ids(8, 9)]), "and ids for each"),
        ("blend_crops", blend(ids=[ids(8, 9).long()] * 2), "ids must be int32"),
        ("blend_crops", blend(crops=ids(1, 5)), r"crops must be int32 \[1, 6"),
        ("blend_crops", blend(background=zeros(255).byte()), r"background must be uint8 \[256\]"),
        ("blend_crops", blend(table=zeros(3, 256).half()), "of out's dtype"),
        ("blend_crops", blend(out=zeros(1, 3, 4, 5)), r"out must be \[S, 3, size, size\]"),
        ("blend_crops", blend(out=zeros(1, 3, 0, 0)), "size >= 1"),
    ],
)
def test_memory_is_checked(op, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.fastembed, op).default(*arguments)


def dispatch_family(op: str) -> str:
    return next(family for family, ops in dispatch.FAMILIES.items() if op in ops)
