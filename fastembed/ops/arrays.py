"""NumPy or torch in, the same kind out; the checks that several ops share.

Most ops take one image, or a list or tuple of images: of one dtype and one number of channels,
each of its own size. One image is a batch of one to every kernel.

Nothing here, nor in any op unless it says so, waits for a GPU. So what would have to be read
back from there is not an error of the op: see `check` and `quantize.check_finite`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch

Array = np.ndarray | torch.Tensor
Batch = Array | Sequence[Array]

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


def is_batch(images: Batch) -> bool:
    return isinstance(images, (list, tuple))


def as_tensors(name: str, arrays: Batch) -> list[torch.Tensor]:
    """A batch, or one array as a batch of one.

    Raises:
        ValueError: no arrays, or on several devices.
        TypeError: of several dtypes, or no arrays at all.
    """
    if not is_batch(arrays):
        return [as_tensor(name, arrays)]
    if not arrays:
        raise ValueError(f"{name} must hold at least one array; got none")
    tensors = [as_tensor(f"{name}[{i}]", array) for i, array in enumerate(arrays)]
    first = tensors[0]
    for i, tensor in enumerate(tensors):
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{name} must be of one dtype; {name}[0] is {dtype_name(first.dtype)}, "
                f"{name}[{i}] is {dtype_name(tensor.dtype)}"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{name} must be on one device; {name}[0] is on {first.device}, "
                f"{name}[{i}] on {tensor.device}"
            )
    return tensors


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`; from main memory to a GPU without waiting for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        # From pageable memory the copy would wait. torch gives the pinned memory to nobody
        # else before the copy is done.
        tensor = tensor.pin_memory()
    # To main memory it has to wait: who reads there would not.
    return tensor.to(device, non_blocking=device.type != "cpu")


def namespace(tensor: torch.Tensor):
    """`tensor` in main memory as NumPy, else as it is, and the module that has its functions.

    The two have in common what small checks need; in main memory torch would take five times
    as long over them, and longer than a kernel over a small crop.
    """
    return (np, tensor.numpy()) if tensor.device.type == "cpu" else (torch, tensor)


def beside(host: np.ndarray, array: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """`host` where `array` is."""
    return host if isinstance(array, np.ndarray) else upload(torch.from_numpy(host), array.device)


def check(wrong: np.ndarray | torch.Tensor, rule: str, found: Callable[[int], str]) -> None:
    """Raises ValueError of the rule and of what `found` says of the first true row of `wrong`.

    Rows on a GPU are not read back: there a wrong one is a failed assertion, as it is where
    torch indexes, and whoever next waits for the GPU gets the error.
    """
    if isinstance(wrong, torch.Tensor):
        torch._assert_async(~wrong.any(), rule)
    elif wrong.any():
        raise ValueError(f"{rule}; {found(int(wrong.argmax()))}")


def like(result: torch.Tensor, model: Batch) -> Array:
    """`result` as the kind of array that `model`, or the first of its arrays, is."""
    model = model[0] if is_batch(model) else model
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


def as_outputs(
    out: Batch | None, shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """An output per image, as `as_output`; `out` is a list or, of one image, an array."""
    outs = [None] * len(shapes) if out is None else list(out) if is_batch(out) else [out]
    if len(outs) != len(shapes):
        raise ValueError(f"out must hold {len(shapes)} arrays, one per image; got {len(outs)}")
    return [
        as_output(one, tuple(shape), dtype, device) for one, shape in zip(outs, shapes, strict=True)
    ]


def results(tensors: list[torch.Tensor], models: Batch, out: Batch | None) -> Batch:
    """What an op with a result per image returns: `out`, or the like of its images."""
    if out is not None:
        return out
    if is_batch(models):
        return [like(tensor, model) for tensor, model in zip(tensors, models, strict=True)]
    return like(tensors[0], models)


def as_images(images: Batch, channels: slice | Sequence[int] | None = None) -> list[torch.Tensor]:
    """Each image [C, H, W] as a C-contiguous tensor of the chosen channels.

    Raises:
        TypeError: the dtype is not uint8, uint16 or float32, or not one for all.
        ValueError: no images, not three axes, an empty axis, a channel that an image lacks,
            another number of channels or another device than the first image has.
    """
    tensors = as_tensors("image", images)
    for i, tensor in enumerate(tensors):
        name = f"image[{i}]" if is_batch(images) else "image"
        if tensor.ndim != 3 or 0 in tensor.shape:
            raise ValueError(f"{name} must be [C, H, W], none of them 0; got {list(tensor.shape)}")
        if tensor.dtype not in IMAGE_DTYPES:
            raise TypeError(
                f"{name} must be uint8, uint16 or float32; got {dtype_name(tensor.dtype)}"
            )
        if len(tensor) != len(tensors[0]):
            raise ValueError(
                f"image must have one number of channels; image[0] has {len(tensors[0])}, "
                f"{name} {len(tensor)}"
            )
    if channels is not None:
        tensors = [select(tensor, channels) for tensor in tensors]
    return [tensor.contiguous() for tensor in tensors]


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
