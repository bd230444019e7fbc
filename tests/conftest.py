"""Fixtures that several files use: backends that may be missing, and the real images."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Triton reads this at import: without a GPU its kernels run interpreted, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastembed import dispatch

REQUIRED = {name for name in os.environ.get("FASTEMBED_REQUIRE", "").split(",") if name}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def need_backend(backend: str, family: str, kernels: tuple[str, ...]) -> None:
    """Skips, with the reason, where a backend lacks a kernel; fails where it is required.

    A kernel that its room simply does not have (yet) is a skip also for a required backend:
    the automatic order covers it. One that is there and cannot run is not.
    """
    for kernel in kernels:
        function, reason = dispatch.find(family, kernel, DEVICE.type, backend)
        if function is None:
            if backend in REQUIRED and not reason.endswith(f"has no {kernel}"):
                pytest.fail(f"FASTEMBED_REQUIRE names {backend}, but {kernel}: {reason}")
            pytest.skip(f"{backend} {kernel}: {reason}")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images: FASTEMBED_DATA, or shared/data beside the checkout."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FASTEMBED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real images: {folder} is missing (set FASTEMBED_DATA)")
    return folder
