"""Label images: area, sum, mean, extremes and box of every object, in one pass.

A label image gives every pixel the number of its object; 0 is background. The pass goes over
the image's runs of equal labels, so no object is looked for and no mask exists: the time does
not depend on the number of objects.

Backends gather the objects in the table of `ops.panoptic`, with three more columns for each of
C channels: int64 [1 + slots, 6 + 3 C], of which [0] is the header and a row of [1:] is

    id, y0, x0, y1, x1, area, then by channel: sum, minimum, maximum

The sum is int64, or of float32 pixels the bits of a float64. Minima and maxima are the pixels'
order keys: the value of an integer; of a float32 its bits as int32, those but the sign flipped
where it is negative. Keys compare as the pixels do, in integers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from .. import dispatch
from .arrays import (
    IMAGE_DTYPES,
    Array,
    Batch,
    as_tensors,
    dtype_name,
    is_batch,
    upload,
)
from .panoptic import gather_rows

LABEL_DTYPES = (torch.uint8, torch.uint16, torch.int32, torch.uint32, torch.int64)

# Room for 4096 objects, which a tile of 2048 x 2048 seldom has more of; 0.6 MB for one channel.
FIRST_SLOTS = 8192


class LabelStatistics(NamedTuple):
    """All objects of a label image, by ascending label.

    For an image [C, H, W] the last four are [S, C].

    Attributes:
        ids: [S] int64, the labels.
        boxes: [S, 4] int32 (y0, x0, y1, x1), both corners inside the object's box.
        areas: [S] int64, pixels.
        sums: [S] int64; float64 of a float32 image.
        means: [S] float64, sum / area.
        minima: [S] of the image's dtype.
        maxima: [S] of the image's dtype.
    """

    ids: Array
    boxes: Array
    areas: Array
    sums: Array
    means: Array
    minima: Array
    maxima: Array


def label_statistics(
    labels: Batch, image: Batch, *, backend: str | None = None
) -> LabelStatistics | list[LabelStatistics]:
    """Area, sum, mean, minimum, maximum and box of every labelled object of an image.

    The number of objects is known only when they are found: this op waits for a GPU.

    Objects whose mean lies above each of several percentiles of the whole image, in one call::

        found = label_statistics(labels, image)
        positive = found.means[:, None] > np.percentile(image, [60, 70, 75, 80, 90])

    Args:
        labels: [H, W] uint8, uint16, int32, uint32 or int64; 0 is background, numbers may be
            left out, an object need not be connected. Or a list of label images of one dtype,
            each of its own size: one launch on CUDA.
        image: [H, W], or [C, H, W] with statistics of every channel; uint8, uint16 or float32.
            A list for a list.

    Returns:
        `LabelStatistics`, arrays of the kind and on the device of `labels`; S is 0 where all is
        background. A list of them for a list.

    Raises:
        ValueError: a negative label; a shape that differs or has an empty axis; a pixel inside
            an object that is not finite, by channel and label; arrays on several devices.
        TypeError: another dtype, or several.

    Exactness: areas, boxes, extremes and the sums of integers are equal to those of
        ``image[labels == id]``, on every backend; a mean is that sum, divided once in float64.
        Sums of float32 are in float64, added in the order of the rows, to the bit of
        ``np.bincount(labels.ravel(), image.ravel())`` on CPU backends. On CUDA the order is
        left to chance: equal wherever float64 holds every partial sum, as of float32 images
        that hold integers, else within area * 2^-53 of the sum of magnitudes.
    Source: the per-object loop ``image[labels == id].mean()`` of fine-tuning studies.
    """
    label_tensors = _as_labels(labels)
    if is_batch(labels) != is_batch(image):
        raise TypeError("labels and image must both be lists, or neither")
    images = _as_images(image, label_tensors, is_batch(labels))
    device = label_tensors[0].device
    run = dispatch.resolve("labels", "label_statistics", device, backend)
    channels = len(images[0])
    pixels = max(tensor.numel() for tensor in label_tensors)
    found = gather_rows(
        lambda which, tables: run(
            [label_tensors[i] for i in which], [images[i] for i in which], tables
        ),
        len(images),
        device,
        slots=min(FIRST_SLOTS, 1 << pixels.bit_length() + 1),
        columns=6 + 3 * channels,
    )
    plain = (image[0] if is_batch(image) else image).ndim == 2
    every = []
    for i, rows in enumerate(found):
        of = f"[{i}]" if is_batch(labels) else ""
        one = _statistics(rows, images[0].dtype, channels, of)
        if plain:
            one = LabelStatistics(*one[:3], *(part[:, 0] for part in one[3:]))
        every.append(one)
    if isinstance(labels[0] if is_batch(labels) else labels, torch.Tensor):
        every = [
            LabelStatistics(
                *(upload(torch.from_numpy(np.ascontiguousarray(part)), device) for part in one)
            )
            for one in every
        ]
    return every if is_batch(labels) else every[0]


def _as_labels(labels: Batch) -> list[torch.Tensor]:
    tensors = as_tensors("labels", labels)
    for i, tensor in enumerate(tensors):
        name = f"labels[{i}]" if is_batch(labels) else "labels"
        if tensor.dtype not in LABEL_DTYPES:
            raise TypeError(
                f"{name} must be uint8, uint16, int32, uint32 or int64; "
                f"got {dtype_name(tensor.dtype)}"
            )
        if tensor.ndim != 2 or 0 in tensor.shape:
            raise ValueError(f"{name} must be [H, W], none of them 0; got {list(tensor.shape)}")
    return [tensor.contiguous() for tensor in tensors]


def _as_images(image: Batch, labels: Sequence[torch.Tensor], numbered: bool) -> list[torch.Tensor]:
    """Each image as [C, H, W], of its labels' size."""
    tensors = as_tensors("image", image)
    if len(tensors) != len(labels):
        raise ValueError(f"image must be one per label image, {len(labels)}; got {len(tensors)}")
    if tensors[0].dtype not in IMAGE_DTYPES:
        raise TypeError(
            f"image must be uint8, uint16 or float32; got {dtype_name(tensors[0].dtype)}"
        )
    if tensors[0].device != labels[0].device:
        raise ValueError(
            f"image must be on the device of labels, {labels[0].device}; got {tensors[0].device}"
        )
    for i, (tensor, label) in enumerate(zip(tensors, labels, strict=True)):
        name = f"image[{i}]" if numbered else "image"
        height, width = label.shape
        if tensor.ndim not in (2, 3) or tensor.shape[-2:] != label.shape or 0 in tensor.shape:
            raise ValueError(
                f"{name} must be [{height}, {width}] or [C, {height}, {width}], as its labels; "
                f"got {list(tensor.shape)}"
            )
        if tensor.shape[:-2] != tensors[0].shape[:-2]:
            raise ValueError(
                f"image must have one number of channels; image[0] is {list(tensors[0].shape)}, "
                f"{name} {list(tensor.shape)}"
            )
    return [tensor.contiguous().reshape(-1, *tensor.shape[-2:]) for tensor in tensors]


def _statistics(rows: np.ndarray, dtype: torch.dtype, channels: int, of: str) -> LabelStatistics:
    """The table's rows, ids ascending, in the image's own terms; statistics are [S, channels]."""
    ids, areas = rows[:, 0].copy(), rows[:, 5].copy()
    if len(ids) and ids[0] < 0:
        raise ValueError(f"labels{of} must not be negative; got {ids[0]} in {areas[0]} pixels")
    sums, minima, maxima = (
        np.ascontiguousarray(part) for part in rows[:, 6:].reshape(-1, channels, 3).T
    )
    sums, minima, maxima = sums.T, minima.T, maxima.T
    if dtype == torch.float32:
        sums = np.ascontiguousarray(sums).view(np.float64)
        # float64 has room for any sum of float32: it is not finite where a pixel was not.
        spoilt = np.argwhere(~np.isfinite(sums))
        if len(spoilt):
            row, channel = spoilt[0]
            raise ValueError(
                f"image{of} must be finite inside objects; "
                f"channel {channel} has non-finite pixels in label {ids[row]}"
            )
        minima, maxima = _floats(minima), _floats(maxima)
    else:
        numpy_dtype = np.dtype(dtype_name(dtype))
        sums, minima, maxima = sums.copy(), minima.astype(numpy_dtype), maxima.astype(numpy_dtype)
    means = sums / areas[:, None].astype(np.float64)
    return LabelStatistics(ids, rows[:, 1:5].astype(np.int32), areas, sums, means, minima, maxima)


def _floats(keys: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(keys).astype(np.int32)
    return np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(np.float32)


def label_statistics_reference(
    labels: list[torch.Tensor], images: list[torch.Tensor], out: torch.Tensor
) -> None:
    for label, image, table in zip(labels, images, out, strict=True):
        ids, which, areas = torch.unique(
            label.to(torch.int64), return_inverse=True, return_counts=True
        )
        which, count = which.flatten(), len(ids)
        place = torch.arange(label.numel(), device=label.device)
        y0, y1 = _extremes(place // label.shape[1], which, count)
        x0, x1 = _extremes(place % label.shape[1], which, count)
        columns = [ids, y0, x0, y1, x1, areas]
        for plane in image:
            # In the order of the rows on a CPU. float64 holds every sum of 16-bit integers.
            sums = torch.bincount(which, plane.flatten().to(torch.float64), count)
            if plane.dtype == torch.float32:
                bits = plane.view(torch.int32)
                keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
                columns += [sums.view(torch.int64), *_extremes(keys, which, count)]
            else:
                columns += [sums.to(torch.int64), *_extremes(plane, which, count)]
        rows = torch.stack(columns, dim=1)[ids != 0]
        table.zero_()
        table[0, 0] = len(rows)
        if len(rows) <= (len(table) - 1) // 2:
            table[1 : 1 + len(rows)] = rows


def _extremes(values: torch.Tensor, which: torch.Tensor, count: int) -> list[torch.Tensor]:
    values, zeros = values.flatten().to(torch.int64), which.new_zeros(count)
    return [
        zeros.scatter_reduce(0, which, values, reduce, include_self=False)
        for reduce in ("amin", "amax")
    ]
