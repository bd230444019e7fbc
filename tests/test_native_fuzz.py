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


@pytest.mark.skipif(sys.platform != "linux", reason="the native kernels are built on Linux only")
@pytest.mark.parametrize(
    "target,runs",
    [
        ("fuzz_percentile", ["avx512"]),  # itself runs both loops wherever it can
        ("fuzz_crops", ["avx512", "portable"]),
        ("fuzz_masks", ["avx512"]),  # all four
        ("fuzz_labels", ["avx512"]),  # the CPU kernel, and the text of the CUDA one
        ("fuzz_volumes", ["avx512"]),  # all three
    ],
)
def test_random_images(tmp_path, target, runs):
    cmake = shutil.which("cmake", path=SEARCH)
    if cmake is None or shutil.which("c++") is None:
        pytest.skip("cmake or a C++ compiler is not installed")
    configure = ["-S", ROOT, "-B", tmp_path, "-DFASTEMBED_FUZZ=ON"]
    for arguments in (configure, ["--build", tmp_path, "--target", target]):
        subprocess.run([cmake, *arguments], check=True, capture_output=True)
    for simd in runs:
        run = subprocess.run(
            [tmp_path / target, "4"], capture_output=True, text=True,
            env={**os.environ, "FASTEMBED_SIMD": simd},
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert int(run.stdout.split(" images")[0].split()[-1]) > 0
