"""A batch as a kernel sees it: a row of integers per image, the addresses of its tensors first.

A launch has one grid for all images, large enough for the largest; programs beyond an image's
own size return at once.
"""

from collections.abc import Iterable

import torch
import triton
import triton.language as tl

PIXELS = {torch.uint8: tl.uint8, torch.uint16: tl.uint16, torch.float32: tl.float32}


def describe(rows: Iterable[tuple[int, ...]], device: torch.device) -> torch.Tensor:
    """`rows` as int64 [I, n] on `device`."""
    return upload(torch.tensor(list(rows), dtype=torch.int64), device)


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Pinned, hence without waiting; torch keeps the pinned memory until it is copied."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@triton.jit
def pointer(word, dtype: tl.constexpr):
    """The address in a description, as a pointer to elements of `dtype`."""
    return tl.load(word).to(tl.pointer_type(dtype))
