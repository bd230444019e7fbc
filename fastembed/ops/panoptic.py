"""Panoptic maps: ids out of colours, and where each id is.

A panoptic map stores the id of a pixel's segment as its colour, id = R + 256 G + 65536 B.
Ids, boxes and areas of all segments come from the map's runs of equal pixels, found in one
pass; no segment is looked for, and no mask exists.

Every backend gathers them in the same table, one per map: int64 [1 + slots, 6], slots a power
of two:

    [0]     (count, ...): distinct ids found. More than slots / 2: they did not fit, the rest
            of the table says nothing, and the backend may have stopped early
    [1:]    (id, y0, x0, y1, x1, area), one id per row, in any row; area 0 marks a free one

A backend that hashes uses the rows as its hash table, at most half full; the op asks again
with more slots when a map has more ids than that, and sorts what it gets.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from .. import dispatch
from ..png import FILTERS, read_scanlines
from .arrays import (
    Array,
    Batch,
    as_output,
    as_outputs,
    as_tensors,
    dtype_name,
    is_batch,
    results,
    upload,
)

# Room for 128 ids: COCO's images have 11 on average. Then eight times as many, and again.
FIRST_SLOTS = 256

_NO_VOID = 2**31  # no int32


class Segments(NamedTuple):
    """All segments of a map, by ascending id.

    Attributes:
        ids: [S] int32.
        boxes: [S, 4] int32 (y0, x0, y1, x1), both corners inside the segment's box.
        areas: [S] int64, pixels.
    """

    ids: Array
    boxes: Array
    areas: Array


def decode_panoptic(rgb: Batch, *, out: Batch | None = None, backend: str | None = None) -> Batch:
    """Segment ids of a panoptic map's colours.

    id = R + 256 G + 65536 B

    Args:
        rgb: [H, W, 3] uint8; or a list of maps, each of its own size: one launch on CUDA.
        out: [H, W] int32; a list of such for a list.

    Returns:
        [H, W] int32, 0..2^24 - 1; a list of such for a list.

    Raises:
        ValueError: another shape, or an empty axis, or list. TypeError: another dtype.

    Exactness: bit-equal to that formula in int32, on every backend.
    Source: ``rgb2id`` of panopticapi.
    """
    tensors = as_tensors("rgb", rgb)
    for tensor in tensors:
        if tensor.dtype != torch.uint8:
            raise TypeError(f"rgb must be uint8; got {dtype_name(tensor.dtype)}")
        if tensor.ndim != 3 or tensor.shape[2] != 3 or 0 in tensor.shape:
            raise ValueError(f"rgb must be [H, W, 3], none of them 0; got {list(tensor.shape)}")
    device = tensors[0].device
    ids = as_outputs(out, [tensor.shape[:2] for tensor in tensors], torch.int32, device)
    run = dispatch.resolve("panoptic", "decode_panoptic", device, backend)
    run([tensor.contiguous() for tensor in tensors], ids)
    return results(ids, rgb, out)


def panoptic_segments(
    pixels: Batch, *, void: int | None = 0, backend: str | None = None
) -> Segments | list[Segments]:
    """Id, box and area of every segment of a panoptic map.

    The number of segments is known only when they are found: this op waits for a GPU.

    Args:
        pixels: the map as colours, [H, W, 3] uint8, or as ids, [H, W] int32 of any sign; or a
            list of maps, alike in that, each of its own size: one launch on CUDA.
        void: the id that stands for no segment, and is left out; None leaves none out. In
            COCO's panoptic format it is 0: unlabelled pixels, never in ``segments_info``.

    Returns:
        `Segments`, arrays of the kind and on the device of `pixels`; S is 0 where all is void.
        A list of them for a list.

    Raises:
        ValueError: another shape, or an empty axis, or list. TypeError: another dtype, or
            several.

    Exactness: integers, equal to ``np.unique(ids, return_counts=True)`` and to the extents
        of each ``np.nonzero(ids == id)``, on every backend.
    """
    tensors = as_tensors("pixels", pixels)
    for tensor in tensors:
        shape = tuple(tensor.shape)
        if tensor.dtype not in (torch.uint8, torch.int32):
            raise TypeError(
                "pixels must be uint8 colours [H, W, 3] or int32 ids [H, W]; "
                f"got {dtype_name(tensor.dtype)}"
            )
        if 0 in shape or not (
            len(shape) == 3 and shape[2] == 3 if tensor.dtype == torch.uint8 else len(shape) == 2
        ):
            raise ValueError(
                "pixels must be colours [H, W, 3] or ids [H, W], no axis 0; "
                f"got {dtype_name(tensor.dtype)} {list(shape)}"
            )
    device = tensors[0].device
    maps = [tensor.contiguous() for tensor in tensors]
    run = dispatch.resolve("panoptic", "panoptic_segments", device, backend)
    void_id = _NO_VOID if void is None else int(void)
    found = gather_rows(
        lambda which, tables: run([maps[i] for i in which], void_id, tables), len(maps), device
    )
    segments = [_segments(rows) for rows in found]
    if isinstance(pixels[0] if is_batch(pixels) else pixels, torch.Tensor):
        segments = [
            Segments(*(upload(torch.from_numpy(part), device) for part in one)) for one in segments
        ]
    return segments if is_batch(pixels) else segments[0]


def panoptic_png_segments(
    png: bytes | bytearray | memoryview | str | os.PathLike,
    *,
    void: int | None = 0,
    with_ids: bool = False,
    out: Array | None = None,
    backend: str | None = None,
) -> tuple[Segments, Array | None]:
    """Id, box and area of every segment of a panoptic PNG, and its ids where wanted.

    The scanlines' filters are undone row by row as the runs are found: the decoded image
    exists nowhere.

    Args:
        png: the file's bytes, or its path; 8-bit RGB, not interlaced.
        void: as for `panoptic_segments`.
        with_ids: also decode the map of ids.
        out: [H, W] int32 in main memory, for the ids; implies `with_ids`.

    Returns:
        (`Segments` of NumPy arrays, [H, W] int32 ids or None).

    Raises:
        ValueError: not a PNG; truncated or corrupted; another kind of PNG.
        OSError: the path cannot be read.
        TypeError: neither bytes nor a path.

    Exactness: equal to `panoptic_segments` and `decode_panoptic` of the image as Pillow
        decodes it, on every backend.
    """
    lines = torch.from_numpy(read_scanlines(png))
    height, width = len(lines), lines.shape[1] // 3
    cpu = torch.device("cpu")
    if with_ids or out is not None:
        ids = as_output(out, (height, width), torch.int32, cpu)
    else:
        ids = torch.empty((0, width), dtype=torch.int32)
    run = dispatch.resolve("panoptic", "scanline_segments", cpu, backend)
    void_id = _NO_VOID if void is None else int(void)
    (rows,) = gather_rows(lambda _, tables: run(lines, void_id, ids, tables[0]), 1, cpu)
    segments = _segments(rows)
    if out is not None:
        return segments, out
    return segments, ids.numpy() if with_ids else None


def gather_rows(
    run: Callable[[list[int], torch.Tensor], None],
    count: int,
    device: torch.device,
    slots: int = FIRST_SLOTS,
    columns: int = 6,
) -> list[np.ndarray]:
    """The rows of each of `count` maps by ascending id, out of the tables that `run` fills.

    `run` is asked again for the maps that did not fit, at the latest with twice as many slots
    as a map has pixels. label_statistics has further columns behind the area.
    """
    found: dict[int, np.ndarray] = {}
    while missing := [i for i in range(count) if i not in found]:
        tables = torch.empty((len(missing), 1 + slots, columns), dtype=torch.int64, device=device)
        run(missing, tables)
        # 12 KiB per map at first. A GPU is waited for here, and only here.
        for i, rows in zip(missing, tables.cpu().numpy(), strict=True):
            if rows[0, 0] <= slots // 2:
                taken = rows[1:][rows[1:, 5] > 0]
                found[i] = taken[taken[:, 0].argsort()]
        slots *= 8
    return [found[i] for i in range(count)]


def _segments(rows: np.ndarray) -> Segments:
    return Segments(rows[:, 0].astype(np.int32), rows[:, 1:5].astype(np.int32), rows[:, 5].copy())


def decode_panoptic_reference(images: list[torch.Tensor], out: list[torch.Tensor]) -> None:
    for rgb, ids in zip(images, out, strict=True):
        red, green, blue = rgb.to(torch.int32).unbind(2)
        ids.copy_(red + 256 * green + 65536 * blue)


def panoptic_segments_reference(maps: list[torch.Tensor], void_id: int, out: torch.Tensor) -> None:
    for pixels, table in zip(maps, out, strict=True):
        height, width = pixels.shape[:2]
        ids = torch.empty((height, width), dtype=torch.int32, device=pixels.device)
        if pixels.ndim == 3:
            decode_panoptic_reference([pixels], [ids])
        else:
            ids.copy_(pixels)
        values, segment, areas = torch.unique(ids, return_inverse=True, return_counts=True)
        segment = segment.flatten()
        place = torch.arange(ids.numel(), device=ids.device)
        values = values.to(torch.int64)
        rows = [values]
        for reduce in ("amin", "amax"):
            for coordinate in (place // width, place % width):
                extent = torch.zeros_like(areas)
                extent.scatter_reduce_(0, segment, coordinate, reduce, include_self=False)
                rows.append(extent)
        rows = torch.stack([*rows, areas], dim=1)[values != void_id]
        table.zero_()
        table[0, 0] = len(rows)
        if len(rows) <= (len(table) - 1) // 2:
            table[1 : 1 + len(rows)] = rows


def scanline_segments_reference(
    lines: torch.Tensor, void_id: int, ids: torch.Tensor, out: torch.Tensor
) -> None:
    height, width = len(lines), lines.shape[1] // 3
    rgb = torch.from_numpy(unfilter_reference(lines.numpy())).reshape(height, width, 3)
    if len(ids):
        decode_panoptic_reference([rgb], [ids])
    panoptic_segments_reference([rgb], void_id, out[None])


def unfilter_reference(lines: np.ndarray) -> np.ndarray:
    """Filtered scanlines [H, 1 + 3 W] to bytes [H, 3 W], as section 9 of the PNG standard."""
    width = lines.shape[1] - 1
    rows = []
    above = bytes(3 + width)  # three zeros left of the row
    for kind, *line in lines.tolist():
        row = bytearray(3)
        for i, residual in enumerate(line):
            a, b, c = row[i], above[3 + i], above[i]
            if FILTERS[kind] == "None":
                predicted = 0
            elif FILTERS[kind] == "Sub":
                predicted = a
            elif FILTERS[kind] == "Up":
                predicted = b
            elif FILTERS[kind] == "Average":
                predicted = (a + b) // 2
            else:
                # Of the three the closest to a + b - c; of equals the first.
                predicted = min((a, b, c), key=lambda value: abs(a + b - c - value))
            row.append((residual + predicted) % 256)
        rows.append(np.frombuffer(row, dtype=np.uint8)[3:])
        above = row
    return np.stack(rows)
