"""Contract: fastembed/ops/labels.py."""

import torch
import triton
import triton.language as tl

from .batch import PIXELS, describe, pointer

_LABELS = {
    torch.uint8: tl.uint8,
    torch.uint16: tl.uint16,
    torch.int32: tl.int32,
    torch.uint32: tl.uint32,
    torch.int64: tl.int64,
}
_FREE = tl.constexpr(0)  # the id of a row without object: the background's
_FAR = tl.constexpr(2**31)
_GOLDEN = tl.constexpr(-0x61C8864680B583EB)  # 2^64 / golden ratio, as int64


def label_statistics(
    labels: list[torch.Tensor], images: list[torch.Tensor], out: torch.Tensor
) -> None:
    batch = describe(
        (
            (label.data_ptr(), image.data_ptr(), *label.shape)
            for label, image in zip(labels, images, strict=True)
        ),
        out.device,
    )
    height, width = (max(label.shape[axis] for label in labels) for axis in (0, 1))
    slots, channels = out.shape[1] - 1, len(images[0])
    block = min(512, triton.next_power_of_2(width))
    with torch.cuda.device_of(out):
        _clear[(triton.cdiv(slots, 256), len(labels))](
            out, slots, channels, BLOCK=256, enable_fp_fusion=False
        )
        _statistics[(height, triton.cdiv(width, block), len(labels))](
            batch,
            out,
            slots,
            channels,
            LABEL=_LABELS[labels[0].dtype],
            PIXEL=PIXELS[images[0].dtype],
            BLOCK=block,
            enable_fp_fusion=False,
        )


@triton.jit
def _clear(tables, slots, channels, BLOCK: tl.constexpr):
    columns = 6 + 3 * channels
    table = tables + tl.program_id(1).to(tl.int64) * columns * (1 + slots)
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < slots
    row = table + columns * (1 + slot)
    for column in tl.static_range(6):
        value = _FAR if (column == 1) | (column == 2) else 0
        tl.store(row + column, tl.full([BLOCK], value, tl.int64), mask=inside)
    for column in range(6, columns, 3):
        tl.store(row + column, tl.zeros([BLOCK], tl.int64), mask=inside)
        tl.store(row + column + 1, tl.full([BLOCK], _FAR, tl.int64), mask=inside)
        tl.store(row + column + 2, tl.full([BLOCK], -_FAR, tl.int64), mask=inside)
    if tl.program_id(0) == 0:
        for column in range(columns):
            tl.store(table + column, tl.zeros([], tl.int64))


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def _joined(opens_a, sum_a, low_a, high_a, opens_b, sum_b, low_b, high_b):
    """A run's statistics so far; where b opens a run, what came before is another's."""
    return (
        opens_a | opens_b,
        tl.where(opens_b != 0, sum_b, sum_a + sum_b),
        tl.where(opens_b != 0, low_b, tl.minimum(low_a, low_b)),
        tl.where(opens_b != 0, high_b, tl.maximum(high_a, high_b)),
    )


@triton.jit
def _statistics(
    batch,
    tables,
    slots,
    channels,
    LABEL: tl.constexpr,
    PIXEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A stretch of one row; runs that leave it are added in parts."""
    own = batch + tl.program_id(2) * 4
    columns = 6 + 3 * channels
    table = tables + tl.program_id(2).to(tl.int64) * columns * (1 + slots)
    height, width = tl.load(own + 2), tl.load(own + 3)
    y = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * BLOCK
    if (y >= height) | (begin >= width):
        return
    labels = pointer(own, LABEL)
    x = begin + tl.arange(0, BLOCK)
    pixel = y * width + x
    inside = x < width
    on = inside & (x > begin)
    off = (x + 1 < width) & (x + 1 < begin + BLOCK)
    ids = tl.load(labels + pixel, mask=inside, other=0).to(tl.int64)
    left = tl.load(labels + pixel - 1, mask=on, other=0).to(tl.int64)
    right = tl.load(labels + pixel + 1, mask=off, other=0).to(tl.int64)
    opens = ((left != ids) | (x == begin)).to(tl.int32)
    start = tl.associative_scan(tl.where(opens != 0, x, 0), 0, _later).to(tl.int64)
    x = x.to(tl.int64)

    # The run's last pixel looks for its object's row, as the native kernels do (csrc/labels.h).
    closes = inside & ((right != ids) | (off == 0)) & (ids != 0)
    todo = closes
    mixed = ((ids * _GOLDEN) >> 32) & 0xFFFFFFFF
    slot = (mixed * slots) >> 32
    at = 0 * slot
    while tl.max(todo.to(tl.int32), axis=0) > 0:
        row = table + columns * (1 + slot)
        # An atomic compare-and-swap has no mask: idle lanes get a word that never is _FREE.
        owner = tl.atomic_cas(
            tl.where(todo, row, table + 1), tl.where(todo, 0 * ids + _FREE, 0 * ids - 1), ids
        )
        claimed = todo & (owner == _FREE)
        tl.atomic_add(table + 0 * slot, tl.full([BLOCK], 1, tl.int64), mask=claimed)
        mine = claimed | (todo & (owner == ids))
        tl.atomic_min(row + 1, y + 0 * x, mask=mine)
        tl.atomic_min(row + 2, start, mask=mine)
        tl.atomic_max(row + 3, y + 0 * x, mask=mine)
        tl.atomic_max(row + 4, x, mask=mine)
        tl.atomic_add(row + 5, x - start + 1, mask=mine)
        at = tl.where(mine, 1 + slot, at)
        # No room: nothing matters any more, and in a full table the search would have no end.
        fits = tl.load(table + 0 * slot, volatile=True) <= slots // 2
        todo = todo & (mine == 0) & fits
        slot = (slot + (mixed | 1)) & (slots - 1)

    closes = closes & (at > 0)
    image = pointer(own + 1, PIXEL)
    for c in range(channels):
        value = tl.load(image + c * height * width + pixel, mask=inside, other=0)
        if PIXEL == tl.float32:
            bits = value.to(tl.int32, bitcast=True)
            key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
            amount = value.to(tl.float64)
        else:
            key = value.to(tl.int64)
            amount = key
        _, total, low, high = tl.associative_scan((opens, amount, key, key), 0, _joined)
        cell = table + columns * at + 6 + 3 * c
        if PIXEL == tl.float32:
            sums = cell.to(tl.pointer_type(tl.float64), bitcast=True)
            tl.atomic_add(sums, total, mask=closes)
        else:
            tl.atomic_add(cell, total, mask=closes)
        tl.atomic_min(cell + 1, low, mask=closes)
        tl.atomic_max(cell + 2, high, mask=closes)
