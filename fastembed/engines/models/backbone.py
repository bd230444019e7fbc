"""A model as every runtime sees it, and what the builders of all kinds share."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..contract import Resize

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SAT493M = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))

Size = tuple[int, int]  # height, width


@dataclass
class Backbone:
    """A loaded model: its functions, its dimensions and the statistics it was trained with.

    Attributes:
        forward: [B, C, height, width] to tokens [B, T, dim] and the model's own pooled vector
            [B, pooled_dim], in one pass. Tokens are those that maps are made of: after the final
            norm, or before it where `norm` is given (CLIP). None where there are none to offer.
        blocks: the transformer blocks, each giving the residual stream [B, T, dim].
        norm: the final norm, where `forward` leaves it off.
        project: tokens after `norm` to the space of `pooled`, where the model has one (CLIP).
        mean, std: for 0..1 input; None where the checkpoint does not say.
    """

    module: nn.Module
    forward: Callable[[Tensor], tuple[Tensor | None, Tensor]]
    blocks: Sequence[nn.Module]
    conv: nn.Conv2d
    size: Size
    dim: int
    pooled_dim: int
    prefix_tokens: int
    class_token: bool
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    resize: Resize
    weights_id: str
    architecture: str
    has_tokens: bool = True
    norm: nn.Module | None = None
    project: Callable[[Tensor], Tensor] | None = None

    @property
    def patch_size(self) -> int:
        return self.conv.kernel_size[0]

    @property
    def grid(self) -> Size:
        """Patches down and across."""
        return self.size[0] // self.patch_size, self.size[1] // self.patch_size


def unknown(what: str, given: str, valid: Iterable[str], show: int = 40) -> str:
    """The message for a name that is not among `valid`: close matches, then the valid ones."""
    valid = list(valid)
    close = difflib.get_close_matches(given, valid, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    more = ", .." if len(valid) > show else ""
    return f"unknown {what} {given!r}{hint} (valid: {', '.join(valid[:show])}{more})"


def check_size(size: Size, patch: int) -> None:
    """Raises ValueError naming the nearest valid sizes unless both are multiples of `patch`."""
    for side in dict.fromkeys(size):
        if side % patch or side < patch:
            below = side // patch * patch
            nearest = f"{below} or {below + patch}" if below else str(patch)
            raise ValueError(
                f"size must be a multiple of the patch size {patch}, got {side}; the nearest are "
                f"{nearest}"
            )


def own_resize(filter: str, own: Size, shorter: int | None, size: Size) -> Resize:
    """The model's resize at another input size: a centre crop keeps its share of the image."""
    if shorter is None:
        return Resize(filter)
    return Resize(filter, round(shorter * min(size) / min(own)))


def statistics(label: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std that a published DINO checkpoint was trained with, told by its name."""
    return SAT493M if "sat493m" in label.lower() else IMAGENET
