"""NumPy or torch in, the same kind out; the checks that several ops share."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch

Array = np.ndarray | torch.Tensor

IMAGE_DTYPES = (torch.uint8, torch.uint16, torch.float32)

# Ops never write into their inputs, so a read-only array (a memory map) is fine here.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def as_tensor(name: str, array: Array) -> torch.Tensor:
    """The array's memory as a tensor; copied only where torch cannot express its layout.

    Raises:
        TypeError: not a NumPy array or torch tensor, or of a dtype that torch lacks.
    """
    if isinstance(array, torch.Tensor):
        return array
    if not isinstance(array, np.ndarray):
        raise TypeError(
            f"{name} must be a NumPy array or a torch tensor; got {type(array).__name__}"
        )
    if not array.dtype.isnative or any(stride < 0 for stride in array.strides):
        array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise TypeError(f"{name} has dtype {array.dtype}, which torch lacks") from error


def like(result: torch.Tensor, model: Array) -> Array:
    """`result` as the kind of array that `model` is."""
    if isinstance(model, torch.Tensor):
        return result
    if result.dtype == torch.bfloat16:
        raise TypeError("NumPy has no bfloat16: pass torch tensors, or another dtype")
    return result.numpy()


def as_output(
    out: Array | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`out` checked against what the op will write, or a new tensor.

    Raises:
        ValueError: `out` has another shape, dtype, device or is not C-contiguous.
    """
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    tensor = as_tensor("out", out)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"out must have shape {shape}; got {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"out must have dtype {dtype}; got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"out must be on {device}; got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"out must be C-contiguous; got strides {tuple(tensor.stride())}")
    if isinstance(out, np.ndarray) and (not out.flags.writeable or out.dtype.byteorder == ">"):
        raise ValueError("out must be a writeable array in native byte order")
    return tensor


def as_image(image: Array, channels: slice | Sequence[int] | None = None) -> torch.Tensor:
    """`image` [C, H, W] as a C-contiguous tensor of the chosen channels.

    Raises:
        TypeError: the dtype is not uint8, uint16 or float32.
        ValueError: not three axes, an empty axis, or a channel that the image lacks.
    """
    tensor = as_tensor("image", image)
    if tensor.ndim != 3 or 0 in tensor.shape:
        raise ValueError(f"image must be [C, H, W], none of them 0; got {list(tensor.shape)}")
    if tensor.dtype not in IMAGE_DTYPES:
        raise TypeError(f"image must be uint8, uint16 or float32; got {dtype_name(tensor.dtype)}")
    if channels is not None:
        tensor = select(tensor, channels)
    return tensor.contiguous()


def select(image: torch.Tensor, channels: slice | Sequence[int]) -> torch.Tensor:
    """`image[channels]`; a view where the channels are consecutive."""
    if isinstance(channels, slice):
        channels = range(*channels.indices(len(image)))
    channels = [int(channel) for channel in channels]
    if not channels:
        raise ValueError("channels must name at least one channel; got none")
    for channel in channels:
        if not 0 <= channel < len(image):
            raise ValueError(f"channels must be in 0..{len(image) - 1}; got {channel}")
    if channels == list(range(channels[0], channels[0] + len(channels))):
        return image[channels[0] : channels[0] + len(channels)]
    return torch.stack([image[channel] for channel in channels])


def per_channel(name: str, values: float | Sequence[float] | Array, count: int) -> torch.Tensor:
    """`values` as float32 [count]; one number stands for every channel.

    Raises:
        ValueError: another number of values, or one that is not finite.
    """
    tensor = torch.as_tensor(values, dtype=torch.float32).cpu()
    if tensor.ndim == 0:
        tensor = tensor.expand(count)
    if tensor.shape != (count,):
        raise ValueError(
            f"{name} must be one number or {count}, one per channel; got {tensor.numel()}"
        )
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} must be finite; got {tensor.tolist()}")
    return tensor.contiguous()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
