"""Blocks of a volume's features out of token grids: torch, our backends, and a plain write.

A chunk as the volumes are stored by, and all of a volume for some of its channels; on one thread,
out of three planes of 128 slices of 32 x 32 tokens of 1024 channels, into memory that is there.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fastembed import dispatch, ops

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE, TOKENS, CHANNELS = 128, 32, 1024
SHAPE = (SIDE,) * 3
BLOCKS = {
    "chunk 256x64x64x64 of a volume": (slice(256, 512), *[slice(64, 128)] * 3),
    "64 channels of a volume": (slice(64, 128), *[slice(0, SIDE)] * 3),
}


@pytest.fixture(scope="module")
def planes() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (SIDE, CHANNELS, TOKENS, TOKENS)  # 0.5 GB
    return {name: torch.randn(size, generator=generator) for name in ("xy", "xz", "yz")}


def by_torch(planes: dict, block: tuple) -> torch.Tensor:
    """As one would write it. Of the chunk it upsamples four times what is kept: interpolate has no
    notion of a part of its output; of the other block it computes nothing in vain."""
    channels, z, y, x = block
    options = {"mode": "bilinear", "align_corners": False}
    xy, xz, yz = (
        functional.interpolate(plane[slices, channels], (SIDE, SIDE), **options)
        for plane, slices in zip(planes.values(), (z, y, x), strict=True)
    )
    total = xy[..., y, x].permute(1, 0, 2, 3) + xz[..., z, x].permute(1, 2, 0, 3)
    return ((total + yz[..., z, y].permute(1, 2, 3, 0)) / 3).half()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("contender", ["torch", "plain write", *dispatch.BACKENDS])
def test_block(row, planes, name, contender):
    if contender == "triton":
        pytest.skip("interpreted Triton has no speed")
    if contender in dispatch.BACKENDS:
        function, reason = dispatch.find("volumes", "triplane_accumulate", "cpu", contender)
        if function is None:
            pytest.skip(f"{contender} triplane_accumulate: {reason}")
    block = BLOCKS[name]
    out = torch.zeros([part.stop - part.start for part in block], dtype=torch.float16)
    if contender == "torch":
        run, rounds = lambda: by_torch(planes, block), 3
    elif contender == "plain write":
        run, rounds = lambda: out.fill_(1.5), 15
    else:
        rounds = 3 if contender == "reference" else 15

        def run():
            ops.triplane_accumulate(planes, SHAPE, block=block, out=out, backend=contender)

        run()
        corner = tuple(slice(part.start, part.start + 4) for part in block)  # torch is slow
        expected = by_torch(planes, corner)
        torch.testing.assert_close(out[:4, :4, :4, :4], expected, rtol=2**-10, atol=1e-6)
    benchmark = row(
        name, contender, dtype="float16", shape="x".join(map(str, out.shape)), nbytes=out.nbytes,
        baseline=contender == "torch", exactness="bits" if contender in dispatch.BACKENDS else "",
    )  # fmt: skip
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=1)
