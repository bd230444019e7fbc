"""The fuzz targets of tests/fuzz, built with the sanitizers and run for a few seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A python that is called by its path has a PATH without its own environment's cmake.
SEARCH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    if sys.platform != "linux":
        pytest.skip("the native kernels are built on Linux only")
    cmake = shutil.which("cmake", path=SEARCH)
    if cmake is None or shutil.which("c++") is None:
        pytest.skip("cmake or a C++ compiler is not installed")
    build = tmp_path_factory.mktemp("fuzz")
    for arguments in (["-S", ROOT, "-B", build, "-DFASTEMBED_FUZZ=ON"], ["--build", build, "-j2"]):
        subprocess.run([cmake, *arguments], check=True, capture_output=True)
    return build


@pytest.mark.parametrize(
    "target,simd",
    [("fuzz_percentile", "avx512"), ("fuzz_crops", "avx512"), ("fuzz_crops", "portable")],
)
def test_random_images(build, target, simd):
    """Without AVX-512 the last two are one; fuzz_percentile runs both loops wherever it can."""
    run = subprocess.run(
        [build / target, "4"], capture_output=True, text=True,
        env={**os.environ, "FASTEMBED_SIMD": simd},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("images of each pixel type\n")
