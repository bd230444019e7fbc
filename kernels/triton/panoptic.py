"""Contract: fastembed/ops/panoptic.py."""

import torch
import triton
import triton.language as tl

from .batch import describe, pointer

_FREE = tl.constexpr(-(2**63))  # the id of a row without segment
_FAR = tl.constexpr(2**31)


def decode_panoptic(images: list[torch.Tensor], out: list[torch.Tensor]) -> None:
    batch = describe(
        (
            (rgb.data_ptr(), ids.data_ptr(), ids.numel())
            for rgb, ids in zip(images, out, strict=True)
        ),
        out[0].device,
    )
    block = 1024
    pixels = max(ids.numel() for ids in out)
    with torch.cuda.device_of(out[0]):
        _decode[(triton.cdiv(pixels, block), len(out))](batch, BLOCK=block, enable_fp_fusion=False)


def panoptic_segments(maps: list[torch.Tensor], void_id: int, out: torch.Tensor) -> None:
    batch = describe(((pixels.data_ptr(), *pixels.shape[:2]) for pixels in maps), out.device)
    height, width = (max(pixels.shape[axis] for pixels in maps) for axis in (0, 1))
    slots = out.shape[1] - 1
    block = min(512, triton.next_power_of_2(width))
    with torch.cuda.device_of(out):
        _clear[(triton.cdiv(slots, 256), len(maps))](out, slots, BLOCK=256, enable_fp_fusion=False)
        _segments[(height, triton.cdiv(width, block), len(maps))](
            batch,
            out,
            slots,
            void_id,
            COLOURS=maps[0].ndim == 3,
            BLOCK=block,
            enable_fp_fusion=False,
        )


@triton.jit
def _id_of(rgb, pixel, inside):
    red = tl.load(rgb + 3 * pixel, mask=inside, other=0).to(tl.int32)
    green = tl.load(rgb + 3 * pixel + 1, mask=inside, other=0).to(tl.int32)
    blue = tl.load(rgb + 3 * pixel + 2, mask=inside, other=0).to(tl.int32)
    return red | green << 8 | blue << 16


@triton.jit
def _decode(batch, BLOCK: tl.constexpr):
    own = batch + tl.program_id(1) * 3
    pixels = tl.load(own + 2)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if first >= pixels:
        return
    pixel = first + tl.arange(0, BLOCK)
    inside = pixel < pixels
    ids = _id_of(pointer(own, tl.uint8), pixel, inside)
    tl.store(pointer(own + 1, tl.int32) + pixel, ids, mask=inside)


@triton.jit
def _clear(tables, slots, BLOCK: tl.constexpr):
    table = tables + tl.program_id(1).to(tl.int64) * 6 * (1 + slots)
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < slots
    row = table + 6 + 6 * slot
    tl.store(row, tl.full([BLOCK], _FREE, tl.int64), mask=inside)
    for column in tl.static_range(1, 6):
        value = _FAR if column < 3 else -1 if column < 5 else 0
        tl.store(row + column, tl.full([BLOCK], value, tl.int64), mask=inside)
    if tl.program_id(0) == 0:
        for column in tl.static_range(6):
            tl.store(table + column, tl.zeros([], tl.int64))


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def _segments(batch, tables, slots, void_id, COLOURS: tl.constexpr, BLOCK: tl.constexpr):
    """A stretch of one row; runs that leave it are added in parts."""
    own = batch + tl.program_id(2) * 3
    table = tables + tl.program_id(2).to(tl.int64) * 6 * (1 + slots)
    height, width = tl.load(own + 1), tl.load(own + 2)
    y = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * BLOCK
    if (y >= height) | (begin >= width):
        return
    pixels = pointer(own, tl.uint8 if COLOURS else tl.int32)
    x = begin + tl.arange(0, BLOCK)
    pixel = y * width + x
    inside = x < width
    on = inside & (x > begin)
    off = (x + 1 < width) & (x + 1 < begin + BLOCK)
    if COLOURS:
        ids = _id_of(pixels, pixel, inside)
        left = _id_of(pixels, pixel - 1, on)
        right = _id_of(pixels, pixel + 1, off)
    else:
        ids = tl.load(pixels + pixel, mask=inside, other=0)
        left = tl.load(pixels + pixel - 1, mask=on, other=0)
        right = tl.load(pixels + pixel + 1, mask=off, other=0)
    opens = (left != ids) | (x == begin)
    start = tl.associative_scan(tl.where(opens, x, 0), 0, _later).to(tl.int64)
    x = x.to(tl.int64)
    ids = ids.to(tl.int64)

    # The run's last pixel adds it to the table, as the native kernels do (csrc/panoptic.h).
    todo = inside & ((right != ids) | (off == 0)) & (ids != void_id)
    mixed = (ids * 0x9E3779B1) & 0xFFFFFFFF
    slot = (mixed * slots) >> 32
    while tl.max(todo.to(tl.int32), axis=0) > 0:
        row = table + 6 + 6 * slot
        # An atomic compare-and-swap has no mask: idle lanes get a word that never is _FREE.
        owner = tl.atomic_cas(
            tl.where(todo, row, table + 5), tl.full([BLOCK], _FREE, tl.int64), ids
        )
        claimed = todo & (owner == _FREE)
        tl.atomic_add(table + 0 * slot, tl.full([BLOCK], 1, tl.int64), mask=claimed)
        mine = claimed | (todo & (owner == ids))
        tl.atomic_min(row + 1, y + 0 * x, mask=mine)
        tl.atomic_min(row + 2, start, mask=mine)
        tl.atomic_max(row + 3, y + 0 * x, mask=mine)
        tl.atomic_max(row + 4, x, mask=mine)
        tl.atomic_add(row + 5, x - start + 1, mask=mine)
        # No room: nothing matters any more, and in a full table the search would have no end.
        fits = tl.load(table + 0 * slot, volatile=True) <= slots // 2
        todo = todo & (mine == 0) & fits
        slot = (slot + (mixed | 1)) & (slots - 1)
