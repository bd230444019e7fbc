"""Contract: fastembed/ops/quantize.py."""

import torch
import triton
import triton.language as tl


def quantize(image: torch.Tensor, ramp: torch.Tensor, out: torch.Tensor) -> None:
    channels, pixels = len(image), image[0].numel()
    block = 1024
    with torch.cuda.device_of(out):
        _quantize[(triton.cdiv(pixels, block), channels)](
            image, ramp, out, pixels, BLOCK=block, enable_fp_fusion=False
        )


@triton.jit
def level(x, ramp):
    """Levels (int32) of intensities by the ramp (five floats) at `ramp`.

    Launch with enable_fp_fusion=False: a fused multiply-add would skip a rounding step.
    """
    shift, scale = tl.load(ramp), tl.load(ramp + 1)
    lo, hi, span = tl.load(ramp + 2), tl.load(ramp + 3), tl.load(ramp + 4)
    # `/` is an approximation on float32; div_rn rounds as IEEE 754 says.
    z = tl.div_rn(x.to(tl.float32) - shift, scale)
    if span <= 0:
        levels = tl.where(z > lo, 255, 0)
    else:
        clipped = tl.where(z > lo, z, lo)  # NaN becomes lo
        clipped = tl.where(clipped < hi, clipped, hi)
        # Adding 1.5 * 2^23 rounds half to even and leaves the integer in the lowest bits.
        rounded = tl.div_rn(clipped - lo, span) * 255.0 + 12582912.0
        levels = rounded.to(tl.int32, bitcast=True) & 255
    return levels


@triton.jit
def _quantize(image, ramp, out, pixels, BLOCK: tl.constexpr):
    channel = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    x = tl.load(image + channel * pixels + pixel, mask=inside, other=0)
    levels = level(x, ramp + channel * 5)
    tl.store(out + channel * pixels + pixel, levels.to(tl.uint8), mask=inside)
