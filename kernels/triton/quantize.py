"""Contract: fastembed/ops/quantize.py."""

import torch
import triton
import triton.language as tl

from .batch import PIXELS, describe, pointer, upload

_BINS = tl.constexpr(256)  # a byte of the keys per level: tl.histogram's cost grows with its bins
_TARGETS = tl.constexpr(4)  # low rank, the rank above it, high rank, the rank above it


def percentile_bounds(
    images: list[torch.Tensor], positions: torch.Tensor, out: torch.Tensor
) -> None:
    """Radix select, a byte of the pixels' keys per level. Nothing returns to the host."""
    count, channels, _ = out.shape
    pixels = [image[0].numel() for image in images]
    bits = 8 * images[0].element_size()
    block, blocks = 4096, 8
    device = out.device
    ranks = positions.long()
    batch = describe(
        (
            (image.data_ptr(), number, *rank)
            for image, number, rank in zip(images, pixels, ranks.tolist(), strict=True)
        ),
        device,
    )
    # From the nearer neighbour: negative from the one above. Rounded to float32 here, after
    # the subtraction in float64.
    ways = positions - ranks
    ways = upload(torch.where(ways < 0.5, ways, ways - 1).float(), device)
    counts = torch.zeros((bits // 8, count * channels, 4, 256), dtype=torch.int64, device=device)
    not_finite = torch.zeros(count * channels, dtype=torch.int32, device=device)
    rests = torch.empty((count * channels, 4), dtype=torch.int64, device=device)
    prefixes = torch.empty((count * channels, 4), dtype=torch.int64, device=device)
    with torch.cuda.device_of(out):
        for level in range(bits // 8):
            shift = bits - 8 * (level + 1)
            _count[(triton.cdiv(max(pixels), block * blocks), count * channels)](
                batch,
                prefixes,
                counts[level],
                not_finite,
                channels,
                PIXEL=PIXELS[images[0].dtype],
                BITS=bits,
                SHIFT=shift,
                BLOCK=block,
                BLOCKS=blocks,
            )
            _settle[(count * channels,)](
                batch,
                ways,
                counts[level],
                rests,
                prefixes,
                not_finite,
                out,
                channels,
                BITS=bits,
                SHIFT=shift,
                enable_fp_fusion=False,
            )


def quantize(images: list[torch.Tensor], ramp: torch.Tensor, out: list[torch.Tensor]) -> None:
    channels = len(images[0])
    pixels = [image[0].numel() for image in images]
    batch = describe(
        (
            (image.data_ptr(), levels.data_ptr(), number)
            for image, levels, number in zip(images, out, pixels, strict=True)
        ),
        ramp.device,
    )
    block = 1024
    with torch.cuda.device_of(ramp):
        _quantize[(triton.cdiv(max(pixels), block), channels, len(images))](
            batch, ramp, channels, PIXEL=PIXELS[images[0].dtype], BLOCK=block,
            enable_fp_fusion=False,
        )  # fmt: skip


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
def _quantize(batch, ramp, channels, PIXEL: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.program_id(1).to(tl.int64)
    own = batch + tl.program_id(2) * 3
    pixels = tl.load(own + 2)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if first >= pixels:
        return
    pixel = first + tl.arange(0, BLOCK)
    inside = pixel < pixels
    x = tl.load(pointer(own, PIXEL) + channel * pixels + pixel, mask=inside, other=0)
    levels = level(x, ramp + (tl.program_id(2) * channels + channel) * 5)
    target = pointer(own + 1, tl.uint8) + channel * pixels + pixel
    tl.store(target, levels.to(tl.uint8), mask=inside)


@triton.jit
def _key(x):
    """Pixels as uint32 of the same order."""
    if x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)
    else:
        return x.to(tl.uint32)


@triton.jit
def _value(key, BITS: tl.constexpr):
    """The pixel of a key, as float32."""
    key = key.to(tl.uint32)
    if BITS == 32:
        bits = tl.where(key >> 31 != 0, key ^ 0x80000000, key ^ 0xFFFFFFFF)
        return bits.to(tl.float32, bitcast=True)
    else:
        return key.to(tl.float32)


@triton.jit
def _count(
    batch,
    prefixes,
    counts,
    not_finite,
    channels,
    PIXEL: tl.constexpr,
    BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Counts the next byte of the pixels that agree with a target in all bytes before it."""
    channel = tl.program_id(1).to(tl.int64)  # of all the images'
    own = batch + channel // channels * 4
    pixels = tl.load(own + 1)
    start = tl.program_id(0).to(tl.int64) * BLOCK * BLOCKS
    if start >= pixels:
        return
    image = pointer(own, PIXEL) + channel % channels * pixels
    counts += channel * _TARGETS * _BINS
    prefixes += channel * _TARGETS
    FIRST: tl.constexpr = SHIFT + 8 == BITS
    # Before the first byte is settled all targets want the same counts.
    for target in tl.static_range(1 if FIRST else _TARGETS):
        new = True
        if not FIRST:
            prefix = tl.load(prefixes + target)
            for before in tl.static_range(target):
                new = new & (tl.load(prefixes + before) != prefix)
        if new:
            histogram = tl.zeros([_BINS], dtype=tl.int32)
            bad = tl.zeros([BLOCK], dtype=tl.int32)
            for i in range(BLOCKS):
                pixel = start + i * BLOCK + tl.arange(0, BLOCK)
                wanted = pixel < pixels
                x = tl.load(image + pixel, mask=wanted, other=0)
                key = _key(x)
                if not FIRST:
                    wanted &= (key >> (SHIFT + 8)).to(tl.int64) == prefix
                digit = ((key >> SHIFT) & 0xFF).to(tl.int32)
                histogram += tl.histogram(digit, _BINS, mask=wanted)
                if FIRST and BITS == 32:
                    magnitude = x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
                    bad |= (magnitude >= 0x7F800000).to(tl.int32)
            bins = counts + target * _BINS + tl.arange(0, _BINS)
            tl.atomic_add(bins, histogram.to(tl.int64), mask=histogram != 0, sem="relaxed")
            if FIRST and BITS == 32:
                if tl.max(bad, axis=0) != 0:
                    tl.store(not_finite + channel, 1)


@triton.jit
def _settle(
    batch,
    ways,
    counts,
    rests,
    prefixes,
    not_finite,
    out,
    channels,
    BITS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Finds the byte in which each target's rank falls; after the last one, the percentiles."""
    channel = tl.program_id(0).to(tl.int64)  # of all the images'
    image = channel // channels
    counts += channel * _TARGETS * _BINS
    target = tl.arange(0, _TARGETS)
    if SHIFT + 8 == BITS:
        rank = tl.load(batch + image * 4 + 2 + target // 2) + target % 2
        rank = tl.minimum(rank, tl.load(batch + image * 4 + 1) - 1)
        prefix = tl.zeros([_TARGETS], dtype=tl.int64)
        table = tl.zeros([_TARGETS], dtype=tl.int32)
    else:
        rank = tl.load(rests + channel * _TARGETS + target)
        prefix = tl.load(prefixes + channel * _TARGETS + target)
        others = tl.load(prefixes + channel * _TARGETS + target[None, :])
        # Targets of the same prefix share the counts of the first of them.
        same = prefix[:, None] == others
        table = tl.min(tl.where(same, target[None, :], _TARGETS), axis=1)
    byte = tl.arange(0, _BINS)[None, :]
    count = tl.load(counts + table[:, None] * _BINS + byte)
    through = tl.cumsum(count, axis=1)
    passed = through <= rank[:, None]
    prefix = prefix * _BINS + tl.sum(passed.to(tl.int64), axis=1)
    rank -= tl.sum(tl.where(passed, count, 0), axis=1)
    tl.store(rests + channel * _TARGETS + target, rank)
    tl.store(prefixes + channel * _TARGETS + target, prefix)
    if SHIFT == 0:
        for side in tl.static_range(2):
            below = _value(tl.sum(tl.where(target == 2 * side, prefix, 0), axis=0), BITS)
            above = _value(tl.sum(tl.where(target == 2 * side + 1, prefix, 0), axis=0), BITS)
            way = tl.load(ways + image * 2 + side)
            bound = tl.where(way < 0, above, below) + (above - below) * way
            bound = tl.where(tl.load(not_finite + channel) != 0, float("nan"), bound)
            tl.store(out + channel * 2 + side, bound)
