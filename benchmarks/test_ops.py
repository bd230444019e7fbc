"""Every op of the case table on every backend, each gated by its oracle.

The automatic backend order (fastembed/dispatch.py) is read off this benchmark's CSV.
"""

from __future__ import annotations

import pytest
import torch

from fastembed import dispatch, testing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [(case, dtype) for case in testing.CASES for dtype in case.dtypes]
pytestmark = pytest.mark.usefixtures("one_thread")


def shape_of(arguments: dict) -> str:
    """The shape of the array that an op reads, its first argument."""
    return "x".join(map(str, next(iter(arguments.values())).shape))


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
@pytest.mark.parametrize("case,dtype", CASES, ids=[f"{c.op}-{d}" for c, d in CASES])
def test_op(row, case, dtype, backend):
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("interpreted Triton has no speed")
    for kernel in case.kernels:
        function, reason = dispatch.find(case.family, kernel, DEVICE, backend)
        if function is None:
            pytest.skip(f"{backend} {kernel}: {reason}")
    arguments = case.make(dtype, 1080, 1080, seed=0)
    on_device = testing.on_device(arguments, DEVICE)

    def run():
        result = case.run(on_device, backend)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    result = testing.as_numpy(run())
    expected = case.oracle(arguments)
    tolerance = max(case.tolerance, torch.finfo(getattr(torch, dtype)).eps if case.tolerance else 0)
    assert (abs(result.astype("f8") - expected) <= tolerance * abs(expected.astype("f8"))).all()
    benchmark = row(
        f"op {case.op}", backend, dtype=dtype, shape=shape_of(arguments),
        nbytes=case.bytes_moved(arguments), baseline=backend == "reference",
        exactness="bits" if not case.tolerance else f"{case.tolerance:g} relative",
    )  # fmt: skip
    benchmark.pedantic(run, rounds=9, warmup_rounds=1)
