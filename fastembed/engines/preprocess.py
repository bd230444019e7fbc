"""An RGB image as the model's own preprocessing feeds it.

One fused kernel where the image is squashed; else the libraries' own resize and a table.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..ops import blend_crops
from ..ops.crops import kept_level_table
from ..ops.masks import RESIZES
from .contract import InputContract


def model_input(image: Image.Image | np.ndarray, contract: InputContract) -> Tensor:
    """One image as an engine of this contract takes it.

    Args:
        image: a Pillow image of any mode, converted to RGB, or [H, W, 3] uint8.
        contract: `engine.contract`.

    Returns:
        [P, height, width] of `contract.dtype`.

    Exactness: the levels are those of the named filter's library (Pillow, or torchvision on
        uint8); then (level / 255 - mean) / std in float32 and one cast. ``float-*`` resizes
        level / 255, within 4e-6 / std of torchvision in float32.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if _is_one_kernel(contract):
        return _squashed(np.asarray(image), contract)
    levels = input_levels(image, contract)
    planes = levels[list(contract.channel_map)]
    if levels.is_floating_point():
        mean = torch.tensor(contract.mean)[:, None, None]
        return ((planes - mean) / torch.tensor(contract.std)[:, None, None]).to(contract.dtype)
    table = kept_level_table(contract.mean, contract.std, contract.dtype, len(planes))
    return torch.stack([row[plane.long()] for row, plane in zip(table, planes, strict=True)])


def input_levels(image: Image.Image, contract: InputContract) -> Tensor:
    """A Pillow image of mode RGB or L resized and cut as an engine's input is: [C, height, width]
    uint8, or float32 in 0..1 with a ``float-*`` filter."""
    whose, _, interpolation = contract.resize.filter.rpartition("-")
    height, width, top, left = placement((image.height, image.width), contract)
    if whose.startswith("pillow"):
        image = image.resize((width, height), Image.Resampling[interpolation.upper()])
    levels = torch.from_numpy(np.array(image)).reshape(*image.size[::-1], -1).permute(2, 0, 1)
    if not whose.startswith("pillow"):
        if whose == "float":
            levels = levels / torch.tensor(255.0)
        levels = _torch_resize(levels, (height, width), interpolation)
    return levels[:, top : top + contract.height, left : left + contract.width]


def placement(shape: tuple[int, int], contract: InputContract) -> tuple[int, int, int, int]:
    """(height, width) that an image [H, W] is resized to, and (top, left) of the input in that.

    Where the centre cannot be cut evenly, torchvision's transforms (of timm and open_clip) round
    to even, and transformers rounds down.
    """
    shorter, (height, width) = contract.resize.shorter, shape
    if shorter is None:
        return contract.height, contract.width, 0, 0
    if width <= height:
        height, width = int(shorter * height / width), shorter
    else:
        height, width = shorter, int(shorter * width / height)
    top, left = height - contract.height, width - contract.width
    if contract.resize.filter.startswith("pillow"):
        return height, width, round(top / 2), round(left / 2)
    return height, width, top // 2, left // 2


def _is_one_kernel(contract: InputContract) -> bool:
    """Whether `blend_crops` does it all: the whole image squashed into a square of RGB."""
    squashes = contract.resize.shorter is None and contract.height == contract.width
    return squashes and contract.channel_map == (0, 1, 2) and contract.resize.filter in RESIZES


def _squashed(pixels: np.ndarray, contract: InputContract) -> Tensor:
    height, width = pixels.shape[:2]
    whole = SimpleNamespace(
        ids=np.zeros(1, np.int32), boxes=np.array([[0, 0, height - 1, width - 1]], np.int32)
    )
    crops = blend_crops(
        torch.from_numpy(np.array(pixels)),
        torch.from_numpy(np.zeros((height, width), np.int32)),
        whole,
        contract.size,
        bg_alpha=1.0,
        pad_ratio=0.0,
        mean=contract.mean,
        std=contract.std,
        dtype=contract.dtype,
        resize=contract.resize.filter,
    )
    return crops[0]


def _torch_resize(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    from torchvision.transforms.v2 import InterpolationMode, functional

    mode = InterpolationMode(interpolation)
    return functional.resize(image, list(size), mode, antialias=True)
