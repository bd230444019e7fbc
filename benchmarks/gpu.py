"""Everything that needs a GPU, in one command: build, test uninterpreted, measure, one CSV.

python benchmarks/gpu.py [NAME.csv]

Builds the native kernels for this device, runs the tests of ops and runtimes on CUDA with native
and Triton required and nothing interpreted, then times every op on every backend beside the
device's own copy bandwidth, and every model and runtime beside its upstream library and the
device's matmul rate. The CSV goes to benchmarks/results/, to be committed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def main(arguments: list[str]) -> int:
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: torch finds no CUDA device here", file=sys.stderr)
        return 1
    device = torch.cuda.get_device_name().lower().replace(" ", "-")
    name = arguments[0] if arguments else f"{device}.csv"
    environment = {
        **os.environ,
        "FASTEMBED_NATIVE": "1",
        "FASTEMBED_REQUIRE": "native,triton",
        "FASTEMBED_BENCH_CSV": name,
    }
    environment.pop("TRITON_INTERPRET", None)
    install = ["pip", "install", "--no-build-isolation", "--no-deps", "--editable", "."]
    tests = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if _is_of_gpu(path)]
    steps = [
        install,
        ["pytest", *tests],
        [
            "pytest",
            "benchmarks/test_ops.py",
            "benchmarks/test_engines.py",
            "--benchmark-enable",
            "--benchmark-columns=median",
        ],
    ]
    for step in steps:
        print("$ python -m " + " ".join(step), flush=True)
        status = subprocess.run(
            [sys.executable, "-m", *step], cwd=ROOT, env=environment, check=False
        ).returncode
        if status:
            return status
    return 0


def _is_of_gpu(path: Path) -> bool:
    """Whether a test file uses the GPU: kernels take their device from conftest."""
    text = path.read_text()
    return "DEVICE" in text or "native" in path.name or "runtimes" in path.name


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
