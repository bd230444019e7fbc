"""Contract: fastembed/ops/crops.py."""

import torch
import triton
import triton.language as tl

from .batch import PIXELS, describe, pointer
from .quantize import level

# A table lookup copies bits, so only the width of an element matters.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def gather_crops(
    images: list[torch.Tensor],
    origins: torch.Tensor,
    planes: torch.Tensor,
    ramp: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor,
) -> None:
    crops, count, size, _ = out.shape
    if out.numel() == 0:
        return
    batch = describe(((image.data_ptr(), *image.shape[1:]) for image in images), out.device)
    bits = _BITS[out.element_size()]
    rows, columns = 4, triton.next_power_of_2(min(size, 256))
    with torch.cuda.device_of(out):
        _gather[(crops * count, triton.cdiv(size, rows))](
            batch,
            origins,
            planes,
            ramp,
            table.view(bits),
            out.view(bits),
            len(images[0]),
            count,
            size,
            PIXEL=PIXELS[images[0].dtype],
            ROWS=rows,
            COLUMNS=columns,
            enable_fp_fusion=False,
        )


def pool_crops(
    features: torch.Tensor, take_max: bool, l2_normalize: bool, out: torch.Tensor
) -> None:
    samples, crops, dim = features.shape
    if out.numel() == 0:
        return
    block = min(1024, triton.next_power_of_2(dim))
    with torch.cuda.device_of(out):
        # A norm needs the whole vector: one program per sample then.
        _pool[(samples, 1 if l2_normalize else triton.cdiv(dim, block))](
            features,
            out,
            crops,
            dim,
            TAKE_MAX=take_max,
            L2_NORMALIZE=l2_normalize,
            BLOCK=block,
            enable_fp_fusion=False,
        )


@triton.jit
def _gather(
    batch,
    origins,
    planes,
    ramp,
    table,
    out,
    channels,
    count,
    size,
    PIXEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)  # (crop, plane)
    crop = block // count
    plane = block % count
    channel = tl.load(planes + plane).to(tl.int64)
    image = tl.load(origins + crop * 3).to(tl.int64)
    top = tl.load(origins + crop * 3 + 1)
    left = tl.load(origins + crop * 3 + 2)
    height, width = tl.load(batch + image * 3 + 1), tl.load(batch + image * 3 + 2)
    ramp += (image * channels + channel) * 5
    y = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    source = pointer(batch + image * 3, PIXEL) + (channel * height + top + y) * width + left
    target = out + (block * size + y) * size
    for start in range(0, size, COLUMNS):
        x = start + tl.arange(0, COLUMNS)[None, :]
        inside = (y < size) & (x < size)
        levels = level(tl.load(source + x, mask=inside, other=0), ramp)
        values = tl.load(table + plane * 256 + levels, mask=inside, other=0)
        tl.store(target + x, values, mask=inside)


@triton.jit
def _pooled(features, crops, dim, d, TAKE_MAX: tl.constexpr):
    """Crops of one sample pooled, crop after crop, at dimensions `d`."""
    inside = d < dim
    pooled = tl.load(features + d, mask=inside, other=0).to(tl.float32)
    for n in range(1, crops):
        x = tl.load(features + tl.cast(n, tl.int64) * dim + d, mask=inside, other=0).to(tl.float32)
        if TAKE_MAX:
            pooled = tl.where((x >= pooled) | (x != x), x, pooled)  # NaN carries through
        else:
            pooled += x
    if not TAKE_MAX:
        # `/` is an approximation on float32; div_rn rounds as IEEE 754 says.
        pooled = tl.div_rn(pooled, tl.cast(crops, tl.float32))
    return pooled


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """float32 to `dtype`, to nearest even; Triton's interpreter truncates to bfloat16."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value != value, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def _pool(
    features,
    out,
    crops,
    dim,
    TAKE_MAX: tl.constexpr,
    L2_NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    features += sample * crops * dim
    out += sample * dim
    if L2_NORMALIZE:
        squares = tl.zeros([BLOCK], dtype=tl.float64)
        for start in range(0, dim, BLOCK):
            d = start + tl.arange(0, BLOCK)
            value = _pooled(features, crops, dim, d, TAKE_MAX).to(tl.float64)
            squares += tl.where(d < dim, value * value, 0.0)
        norm = tl.sqrt(tl.sum(squares, axis=0))
        norm = tl.where(norm < 1e-12, 1e-12, norm)  # NaN stays NaN
    for start in range(tl.program_id(1) * BLOCK, dim, tl.num_programs(1) * BLOCK):
        d = start + tl.arange(0, BLOCK)
        value = _pooled(features, crops, dim, d, TAKE_MAX)
        if L2_NORMALIZE:
            value = (value.to(tl.float64) / norm).to(tl.float32)
        tl.store(out + d, narrow(value, out.dtype.element_ty), mask=d < dim)
