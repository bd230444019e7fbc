"""A model as every runtime sees it, and what the builders of all kinds share."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SAT493M = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))


@dataclass
class Backbone:
    """A loaded model: its functions, its dimensions and the statistics it was trained with.

    `tokens` maps [B, C, size, size] to post-norm tokens [B, T, D], `pooled` to [B, D]. `tokens` is
    None where a model has no final norm on its tokens. `mean` and `std` are for 0..1 input, or None
    where the checkpoint does not say.
    """

    module: nn.Module
    tokens: Callable[[Tensor], Tensor] | None
    pooled: Callable[[Tensor], Tensor]
    conv: nn.Conv2d
    dim: int
    prefix_tokens: int
    class_token: bool
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    interpolation: str
    weights_id: str
    architecture: str

    @property
    def patch_size(self) -> int:
        return self.conv.kernel_size[0]


def unknown(what: str, given: str, valid: Iterable[str], show: int = 40) -> str:
    """The message for a name that is not among `valid`: close matches, then the valid ones."""
    valid = list(valid)
    close = difflib.get_close_matches(given, valid, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    more = ", .." if len(valid) > show else ""
    return f"unknown {what} {given!r}{hint} (valid: {', '.join(valid[:show])}{more})"


def check_size(size: int, patch: int) -> None:
    """Raises ValueError naming the nearest valid sizes unless `size` is a multiple of `patch`."""
    if size % patch or size < patch:
        below = size // patch * patch
        nearest = f"{below} or {below + patch}" if below else str(patch)
        raise ValueError(
            f"size must be a multiple of the patch size {patch}, got {size}; the nearest are "
            f"{nearest}"
        )


def statistics(label: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std that a published DINO checkpoint was trained with, told by its name."""
    return SAT493M if "sat493m" in label.lower() else IMAGENET
