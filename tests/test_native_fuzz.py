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
def test_percentiles_of_random_images(tmp_path):
    cmake = shutil.which("cmake", path=SEARCH)
    if cmake is None or shutil.which("c++") is None:
        pytest.skip("cmake or a C++ compiler is not installed")
    for arguments in (["-S", ROOT, "-B", tmp_path, "-DFASTEMBED_FUZZ=ON"], ["--build", tmp_path]):
        subprocess.run([cmake, *arguments], check=True, capture_output=True)
    run = subprocess.run([tmp_path / "fuzz_percentile", "5"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("images of each pixel type\n")
