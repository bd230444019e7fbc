"""Contract: fastembed/ops/masks.py."""

import torch
import triton
import triton.language as tl

from .batch import describe, pointer
from .crops import narrow as cast

# A table lookup copies bits, so only the width of an element matters.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def blend_crops(
    images: list[torch.Tensor],
    ids: list[torch.Tensor],
    crops: torch.Tensor,
    background: torch.Tensor,
    table: torch.Tensor,
    cubic: bool,
    narrow: bool,
    tall_first: bool,
    out: torch.Tensor,
) -> None:
    bits = _BITS[out.element_size()]
    modes = {"CUBIC": cubic, "NARROW": narrow, "TALL_FIRST": tall_first, "FLOATS": False}
    _resize(images, ids, crops, background, table.view(bits), out.view(bits), modes)


def blend_crops_float(
    images: list[torch.Tensor],
    ids: list[torch.Tensor],
    crops: torch.Tensor,
    background: torch.Tensor,
    ramp: torch.Tensor,
    out: torch.Tensor,
) -> None:
    modes = {"CUBIC": False, "NARROW": False, "TALL_FIRST": False, "FLOATS": True}
    _resize(images, ids, crops, background, ramp, out, modes)


def _resize(
    images: list[torch.Tensor],
    ids: list[torch.Tensor],
    crops: torch.Tensor,
    background: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor,
    modes: dict[str, bool],
) -> None:
    """Integer weights and levels between the passes; or floats throughout, `table` the ramp."""
    count, _, size, _ = out.shape
    if count == 0:
        return
    # The crops' sizes are on the device: room for the largest that the images can hold.
    longest = max(side for image in images for side in image.shape[:2])
    taps = 2 * int((2 if modes["CUBIC"] else 1) * max(longest / size, 1.0) + 1) + 1
    device = out.device
    batch = describe(
        (
            (image.data_ptr(), names.data_ptr(), image.shape[1])
            for image, names in zip(images, ids, strict=True)
        ),
        device,
    )
    weight, value = (torch.float32,) * 2 if modes["FLOATS"] else (torch.int32, torch.uint8)
    weights = torch.empty((count, 2, taps, size), dtype=weight, device=device)
    spans = torch.empty((count, 2, 2, size), dtype=torch.int32, device=device)
    bits = torch.empty((count, 2), dtype=torch.int32, device=device)
    between = torch.empty((count, longest, 3, size), dtype=value, device=device)
    block = triton.next_power_of_2(min(size, 256))
    rows = 4
    passes = {
        "TALL_FIRST": modes["TALL_FIRST"], "FLOATS": modes["FLOATS"], "ROWS": rows, "BLOCK": block
    }  # fmt: skip
    with torch.cuda.device_of(out):
        _weigh[(count, 2)](
            crops, weights, spans, bits, taps, size,
            CUBIC=modes["CUBIC"], NARROW=modes["NARROW"], FLOATS=modes["FLOATS"], BLOCK=block,
            enable_fp_fusion=False,
        )  # fmt: skip
        _first_pass[(count, triton.cdiv(longest, rows))](
            batch, crops, background, weights, spans, bits, between, longest, taps, size, **passes,
        )  # fmt: skip
        _second_pass[(count, triton.cdiv(size, rows))](
            crops, weights, spans, bits, between, table, out, longest, taps, size, **passes,
        )  # fmt: skip


@triton.jit
def _raw_weight(j, center, step, CUBIC: tl.constexpr):
    x = tl.abs((j.to(tl.float64) - center + 0.5) * step)
    if CUBIC:
        near = (1.5 * x - 2.5) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * -0.5
        return tl.where(x < 1, near, tl.where(x < 2, far, 0.0))
    else:
        return tl.where(x < 1, 1 - x, 0.0)


@triton.jit
def _span(i, scale, support, length):
    """Centre, first pixel and one past the last of outputs `i`."""
    center = (i.to(tl.float64) + 0.5) * scale
    first = tl.maximum((center - support + 0.5).to(tl.int32), 0)
    last = tl.minimum((center + support + 0.5).to(tl.int32), length)
    return center, first, last


@triton.jit
def _weigh(
    crops,
    weights,
    spans,
    bits,
    taps,
    size,
    CUBIC: tl.constexpr,
    NARROW: tl.constexpr,
    FLOATS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weights of one axis of one crop; their sums in order, as Pillow and torch take them."""
    axis = tl.program_id(0).to(tl.int64) * 2 + tl.program_id(1)
    length = tl.load(crops + tl.program_id(0) * 6 + 4 + tl.program_id(1))
    scale = length.to(tl.float64) / tl.cast(size, tl.float64)
    stretch = tl.where(scale < 1, tl.full([], 1, tl.float64), scale)
    step = tl.full([], 1, tl.float64) / stretch
    support = stretch * 2 if CUBIC else stretch
    most = tl.minimum(taps, length)
    precision = tl.full([], 22, tl.int32)
    if NARROW:
        largest = tl.zeros([BLOCK], tl.float64)
        for start in range(0, size, BLOCK):
            i = start + tl.arange(0, BLOCK)
            center, first, last = _span(i, scale, support, length)
            total = tl.zeros([BLOCK], tl.float64)
            peak = tl.zeros([BLOCK], tl.float64)
            for k in range(0, most):
                weight = _raw_weight(first + k, center, step, CUBIC)
                weight = tl.where(first + k < last, weight, 0.0)
                total += weight
                peak = tl.maximum(peak, weight)
            largest = tl.maximum(
                largest, tl.where(i < size, peak, 0.0) / tl.where(i < size, total, 1.0)
            )
        top = tl.max(largest, axis=0)
        precision = tl.full([], 0, tl.int32)
        for b in tl.static_range(22):
            # The largest weight grows with every bit: the bits that fit come first.
            precision += (top * (2 << b) + 0.5 < 32768).to(tl.int32)
    tl.store(bits + axis, precision)
    unit = (tl.full([], 1, tl.int32) << precision).to(tl.float64)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        center, first, last = _span(i, scale, support, length)
        tl.store(spans + axis * 2 * size + i, first, mask=i < size)
        tl.store(spans + (axis * 2 + 1) * size + i, last, mask=i < size)
        total = tl.zeros([BLOCK], tl.float64)
        for k in range(0, most):
            weight = _raw_weight(first + k, center, step, CUBIC)
            total += tl.where(first + k < last, weight, 0.0)
        total = tl.where(i < size, total, 1.0)
        for k in range(0, most):
            weight = _raw_weight(first + k, center, step, CUBIC) / total
            if FLOATS:
                final = weight.to(tl.float32)
            else:
                final = (weight * unit + tl.where(weight < 0, -0.5, 0.5)).to(tl.int32)
            final = tl.where(first + k < last, final, 0)
            tl.store(weights + (axis * taps + k) * size + i, final, mask=i < size)


@triton.jit
def _down_first(height, width, size, TALL_FIRST: tl.constexpr):
    return ((height > size) & (height - size > 2 * (width - size))) if TALL_FIRST else False


@triton.jit
def _zero(precision, FLOATS: tl.constexpr):
    """What a sum starts from: half a level where it will be cut to levels."""
    return 0.0 if FLOATS else (1 << precision) >> 1


@triton.jit
def _levels(sums, precision):
    sums = sums >> precision
    return tl.minimum(tl.maximum(sums, 0), 255)


@triton.jit
def _between(sums, precision, FLOATS: tl.constexpr):
    return sums if FLOATS else _levels(sums, precision).to(tl.uint8)


@triton.jit
def _final(sums, precision, table, c: tl.constexpr, dtype: tl.constexpr, FLOATS: tl.constexpr):
    """What the model gets for channel `c`: looked up, or by its mean and std."""
    if FLOATS:
        mean, std = tl.load(table + c), tl.load(table + 3 + c)
        return cast(tl.div_rn(tl.div_rn(sums, 255.0) - mean, std), dtype)
    else:
        return tl.load(table + 256 * c + _levels(sums, precision))


@triton.jit
def _first_pass(
    batch,
    crops,
    background,
    weights,
    spans,
    bits,
    between,
    longest,
    taps,
    size,
    TALL_FIRST: tl.constexpr,
    FLOATS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Along one axis; `j` are the pixels of the other one, `i` the outputs."""
    crop = tl.program_id(0).to(tl.int64)
    own = batch + tl.load(crops + crop * 6).to(tl.int64) * 3
    image, ids = pointer(own, tl.uint8), pointer(own + 1, tl.int32)
    pitch = tl.load(own + 2)
    segment = tl.load(crops + crop * 6 + 1)
    top = tl.load(crops + crop * 6 + 2)
    left = tl.load(crops + crop * 6 + 3)
    height, width = tl.load(crops + crop * 6 + 4), tl.load(crops + crop * 6 + 5)
    down = _down_first(height, width, size, TALL_FIRST)
    axis = crop * 2 + tl.where(down, 0, 1)
    i_step, j_step = tl.where(down, pitch, 1), tl.where(down, 1, pitch)
    length, others = tl.where(down, height, width), tl.where(down, width, height)
    precision = tl.load(bits + axis)
    kind: tl.constexpr = weights.dtype.element_ty
    j = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    most = tl.minimum(taps, length)
    if tl.program_id(1) * ROWS < others:
        for start in range(0, size, BLOCK):
            i = start + tl.arange(0, BLOCK)[None, :]
            first = tl.load(spans + axis * 2 * size + i, mask=i < size, other=0)
            last = tl.load(spans + (axis * 2 + 1) * size + i, mask=i < size, other=0)
            red = tl.zeros([ROWS, BLOCK], kind) + _zero(precision, FLOATS)
            green = red
            blue = red
            for k in range(0, most):
                inside = (j < others) & (first + k < last)
                weight = tl.load(weights + (axis * taps + k) * size + i, mask=i < size, other=0)
                pixel = top * pitch + left + (first + k) * i_step + j * j_step
                seen = tl.load(ids + pixel, mask=inside, other=0) == segment
                r = tl.load(image + pixel * 3, mask=inside, other=0)
                g = tl.load(image + pixel * 3 + 1, mask=inside, other=0)
                b = tl.load(image + pixel * 3 + 2, mask=inside, other=0)
                r = tl.where(seen, r, tl.load(background + r))
                g = tl.where(seen, g, tl.load(background + g))
                b = tl.where(seen, b, tl.load(background + b))
                red += weight * r.to(kind)
                green += weight * g.to(kind)
                blue += weight * b.to(kind)
            target = between + (crop * longest + j) * 3 * size + i
            inside = (j < others) & (i < size)
            tl.store(target, _between(red, precision, FLOATS), mask=inside)
            tl.store(target + size, _between(green, precision, FLOATS), mask=inside)
            tl.store(target + 2 * size, _between(blue, precision, FLOATS), mask=inside)


@triton.jit
def _second_pass(
    crops,
    weights,
    spans,
    bits,
    between,
    table,
    out,
    longest,
    taps,
    size,
    TALL_FIRST: tl.constexpr,
    FLOATS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Along the other axis; `j` are its outputs, `i` those of the first one."""
    crop = tl.program_id(0).to(tl.int64)
    height, width = tl.load(crops + crop * 6 + 4), tl.load(crops + crop * 6 + 5)
    down = _down_first(height, width, size, TALL_FIRST)
    axis = crop * 2 + tl.where(down, 1, 0)
    i_step, j_step = tl.where(down, size, 1), tl.where(down, 1, size)
    length = tl.where(down, width, height)
    precision = tl.load(bits + axis)
    kind: tl.constexpr = weights.dtype.element_ty
    j = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    first = tl.load(spans + axis * 2 * size + j, mask=j < size, other=0)
    last = tl.load(spans + (axis * 2 + 1) * size + j, mask=j < size, other=0)
    most = tl.minimum(taps, length)
    plane = tl.cast(size, tl.int64) * size
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)[None, :]
        red = tl.zeros([ROWS, BLOCK], kind) + _zero(precision, FLOATS)
        green = red
        blue = red
        for k in range(0, most):
            inside = (first + k < last) & (i < size)
            weight = tl.load(weights + (axis * taps + k) * size + j, mask=j < size, other=0)
            source = between + (crop * longest + first + k) * 3 * size + i
            red += weight * tl.load(source, mask=inside, other=0).to(kind)
            green += weight * tl.load(source + size, mask=inside, other=0).to(kind)
            blue += weight * tl.load(source + 2 * size, mask=inside, other=0).to(kind)
        inside = (j < size) & (i < size)
        target = out + crop * 3 * plane + j * j_step + i * i_step
        dtype: tl.constexpr = out.dtype.element_ty
        tl.store(target, _final(red, precision, table, 0, dtype, FLOATS), mask=inside)
        tl.store(target + plane, _final(green, precision, table, 1, dtype, FLOATS), mask=inside)
        tl.store(target + 2 * plane, _final(blue, precision, table, 2, dtype, FLOATS), mask=inside)
