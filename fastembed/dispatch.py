"""Which backend runs an op, and why another one cannot.

A backend is found by name: op ``pool_crops`` of family ``crops`` is

========== =========================================================
reference  ``fastembed.ops.crops.pool_crops_reference``
numba      ``fastembed._numba.crops.pool_crops``   (kernels/numba/crops.py)
triton     ``fastembed._triton.crops.pool_crops``  (kernels/triton/crops.py)
native     ``torch.ops.fastembed.pool_crops``      (csrc/crops.cpp, csrc/crops.cu)
========== =========================================================

There is no registry: a function of that name in that file is the backend.
Automatic choice walks ``ORDER`` and takes the first backend that is there. An
explicit choice (``backend=`` or the environment variable ``FASTEMBED_BACKEND``)
is never replaced by another: it runs or raises `BackendUnavailable` with the reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch

BACKENDS = ("reference", "numba", "triton", "native")

# Fastest first; benchmarks/results/ holds the figures that this order was read off.
ORDER = {
    "cpu": ("native", "numba", "reference"),
    "cuda": ("native", "triton", "reference"),
}

# Every op, by family; `python -m fastembed.info` prints this table.
FAMILIES = {
    "quantize": ("percentile_bounds", "quantize"),
    "crops": ("gather_crops", "pool_crops"),
    "masks": ("blend_crops", "blend_crops_float"),
    "panoptic": ("decode_panoptic", "panoptic_segments", "scanline_segments"),
    "labels": ("label_statistics",),
    "volumes": ("triplane_accumulate",),
}


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run this op here."""


def resolve(family: str, op: str, device: torch.device, backend: str | None = None) -> Callable:
    """The function that runs `op` on `device`.

    Args:
        family: stem of the op's file in every room, such as ``"crops"``.
        op: name of the op, such as ``"pool_crops"``.
        device: where the tensors are.
        backend: one of `BACKENDS`; None asks ``FASTEMBED_BACKEND``, then `ORDER`.

    Raises:
        ValueError: `backend` is not a backend's name.
        BackendUnavailable: `backend` was named and cannot run.
    """
    wanted = backend or os.environ.get("FASTEMBED_BACKEND") or None
    if wanted is not None:
        if wanted not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {wanted!r}")
        function, reason = find(family, op, device.type, wanted)
        if function is None:
            raise BackendUnavailable(f"{op}: backend {wanted!r} is not available: {reason}")
        return function
    return _automatic(family, op, device.type)


@functools.cache
def _automatic(family: str, op: str, device_type: str) -> Callable:
    for name in ORDER.get(device_type, ("reference",)):
        function, _ = find(family, op, device_type, name)
        if function is not None:
            return function
    raise BackendUnavailable(f"{op}: no backend runs on device type {device_type!r}")


@functools.cache
def find(family: str, op: str, device_type: str, backend: str) -> tuple[Callable | None, str]:
    """(function, "") or (None, why not)."""
    return _FINDERS[backend](family, op, device_type)


def _find_reference(family: str, op: str, device_type: str) -> tuple[Callable | None, str]:
    module = importlib.import_module(f"fastembed.ops.{family}")
    return getattr(module, f"{op}_reference"), ""


def _find_numba(family: str, op: str, device_type: str) -> tuple[Callable | None, str]:
    if device_type != "cpu":
        return None, f"numba kernels run on CPU tensors, not on {device_type}"
    return _find_in_room("_numba", family, op)


def _find_triton(family: str, op: str, device_type: str) -> tuple[Callable | None, str]:
    # Read at every import of triton: the variable must be set before that.
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return None, "triton runs on CPU tensors only with TRITON_INTERPRET=1 set before import"
    if device_type == "cuda" and not torch.cuda.is_available():
        return None, "no CUDA device"
    return _find_in_room("_triton", family, op)


def _find_in_room(room: str, family: str, op: str) -> tuple[Callable | None, str]:
    name = f"fastembed.{room}.{family}"
    try:
        if importlib.util.find_spec(name) is None:
            return None, f"kernels/{room[1:]}/{family}.py does not exist"
        module = importlib.import_module(name)
    except ImportError as error:
        return None, f"cannot import {name}: {error}"
    function = getattr(module, op, None)
    if function is None:
        return None, f"kernels/{room[1:]}/{family}.py has no {op}"
    return function, ""


def _find_native(family: str, op: str, device_type: str) -> tuple[Callable | None, str]:
    reason = load_native()
    if reason:
        return None, reason
    if not hasattr(torch.ops.fastembed, op):
        return None, f"csrc/{family}.cpp has no {op}"
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if key is None:
        return None, f"native kernels run on cpu and cuda, not on {device_type}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastembed::{op}", key):
        return None, f"the native library was built without {key} code for {op}"
    if key == "CUDA" and not torch.cuda.is_available():
        return None, "built, but there is no CUDA device"
    return getattr(torch.ops.fastembed, op).default, ""


@functools.cache
def load_native() -> str:
    """Loads the native library once; returns "" or the reason why it is not there."""
    library = Path(__file__).with_name("_native.so")
    if not library.exists():
        return "not built (no C++ compiler, cmake or torch at install time, or FASTEMBED_NATIVE=0)"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"built, but cannot be loaded: {error}"
    return ""


_FINDERS = {
    "reference": _find_reference,
    "numba": _find_numba,
    "triton": _find_triton,
    "native": _find_native,
}
