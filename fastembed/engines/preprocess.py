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
    whose, _, interpolation = contract.resize.filter.rpartition("-")
    size = _resized(image.size, contract)
    if whose.startswith("pillow"):
        image = image.resize(size[::-1], Image.Resampling[interpolation.upper()])
        levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    else:
        levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if whose == "float":
            levels = levels / torch.tensor(255.0)
        levels = _torch_resize(levels, size, interpolation)
    levels = _center(levels, contract, rounded=whose.startswith("pillow"))
    planes = levels[list(contract.channel_map)]
    if whose == "float":
        mean = torch.tensor(contract.mean)[:, None, None]
        return ((planes - mean) / torch.tensor(contract.std)[:, None, None]).to(contract.dtype)
    table = kept_level_table(contract.mean, contract.std, contract.dtype, len(planes))
    return torch.stack([row[plane.long()] for row, plane in zip(table, planes, strict=True)])


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


def _resized(size: tuple[int, int], contract: InputContract) -> tuple[int, int]:
    """(height, width) that an image of (width, height) is resized to."""
    shorter, (width, height) = contract.resize.shorter, size
    if shorter is None:
        return contract.height, contract.width
    if width <= height:
        return int(shorter * height / width), shorter
    return shorter, int(shorter * width / height)


def _torch_resize(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    from torchvision.transforms.v2 import InterpolationMode, functional

    mode = InterpolationMode(interpolation)
    return functional.resize(image, list(size), mode, antialias=True)


def _center(image: Tensor, contract: InputContract, rounded: bool) -> Tensor:
    """The centre of the input's size. Where it cannot be cut evenly, torchvision's transforms (of
    timm and open_clip) round to even, and transformers rounds down."""
    spare = [have - want for have, want in zip(image.shape[1:], contract.shape[1:], strict=True)]
    top, left = (round(s / 2) if rounded else s // 2 for s in spare)
    return image[:, top : top + contract.height, left : left + contract.width]
