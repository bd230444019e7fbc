"""Contract: fastembed/ops/crops.py."""

import numpy as np
import torch
from numba import njit

from .quantize import quantize_row

# A table lookup copies bits, so only the width of an element matters; NumPy lacks bfloat16.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def gather_crops(
    images: list[torch.Tensor],
    origins: torch.Tensor,
    planes: torch.Tensor,
    ramp: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor,
) -> None:
    bits = _BITS[table.element_size()]
    pixels = [image.numpy() for image in images]
    channels, rows, values = planes.numpy(), ramp.numpy(), table.view(bits).numpy()
    for (i, y, x), crop in zip(origins.tolist(), out.view(bits).numpy(), strict=True):
        _gather(pixels[i], y, x, channels, rows[i], values, crop)


def pool_crops(
    features: torch.Tensor, take_max: bool, l2_normalize: bool, out: torch.Tensor
) -> None:
    # Widening is exact; the vectors of a batch are small beside the model that made them.
    pooled = out if out.dtype == torch.float32 else torch.empty(out.shape, dtype=torch.float32)
    _pool(features.float().numpy(), take_max, l2_normalize, pooled.numpy())
    if pooled is not out:
        out.copy_(pooled)


@njit(nogil=True)
def _gather(image, y, x, planes, ramp, table, out):
    size = out.shape[2]
    levels = np.empty(size, dtype=np.uint8)
    for p in range(out.shape[0]):
        channel = planes[p]
        values = table[p]
        for row in range(size):
            quantize_row(image[channel, y + row, x : x + size], ramp[channel], levels)
            target = out[p, row]
            for column in range(size):
                target[column] = values[levels[column]]


@njit(nogil=True)
def _pool(features, take_max, l2_normalize, out):
    samples, crops, width = features.shape
    for s in range(samples):
        pooled = out[s]
        pooled[:] = features[s, 0]
        for n in range(1, crops):
            vector = features[s, n]
            if take_max:
                for d in range(width):
                    if vector[d] >= pooled[d] or vector[d] != vector[d]:
                        pooled[d] = vector[d]
            else:
                for d in range(width):
                    pooled[d] += vector[d]
        if not take_max:
            for d in range(width):
                pooled[d] /= np.float32(crops)
        if l2_normalize:
            square = 0.0
            for d in range(width):
                square += np.float64(pooled[d]) ** 2
            norm = max(np.sqrt(square), 1e-12)
            for d in range(width):
                pooled[d] = np.float32(pooled[d] / norm)
