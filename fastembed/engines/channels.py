"""How N source channels meet a model that was trained on three."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

CHANNEL_MODES = ("inflate", "replicate")


def channel_map(mode: str, channels: int, model_channels: int) -> tuple[int, ...]:
    """The source channel of each input plane, checked against the model's channel count.

    inflate: (0, 1, .., C-1); replicate: (0, 0, 0, 1, 1, 1, ..), one RGB image per channel.
    Raises ValueError for a count that the mode cannot serve.
    """
    if mode == "replicate":
        if model_channels != 3:
            raise ValueError(
                f"channel_mode='replicate' feeds each channel as an RGB image and needs a "
                "3-channel "
                f"model; this checkpoint takes {model_channels} channels (use "
                "channel_mode='inflate')"
            )
        return tuple(c for c in range(channels) for _ in range(3))
    if channels == model_channels or (model_channels == 3 and channels > 3):
        return tuple(range(channels))
    if model_channels == 3:
        raise ValueError(
            f"channel_mode='inflate' keeps the three RGB kernels and needs channels >= 3, got "
            f"{channels}; use channel_mode='replicate'"
        )
    raise ValueError(
        f"channels must be {model_channels}, the input channels of this checkpoint, got {channels}"
    )


def inflate_kernel(weight: Tensor, channels: int) -> Tensor:
    """An RGB patch kernel [D, 3, p, p] as [D, C, p, p]: three kept, the others their mean.

    Nothing is rescaled: the extra channels add to the response, as in the training code
    that fine-tunes from such a kernel.
    """
    mean = weight.mean(dim=1, keepdim=True)
    return torch.cat([weight, mean.expand(-1, channels - 3, -1, -1)], dim=1)


def inflate_stats(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Statistics for C channels: the RGB ones, then their mean for each extra channel."""
    values = tuple(float(v) for v in values)
    if len(values) == channels:
        return values
    if len(values) != 3 or channels < 3:
        raise ValueError(f"cannot extend {len(values)} channel statistics to {channels} channels")
    return values + (sum(values) / 3,) * (channels - 3)


def inflate_conv(conv: nn.Conv2d, channels: int) -> None:
    """Widen a patch embedding in place from 3 to `channels` input channels."""
    conv.weight = nn.Parameter(inflate_kernel(conv.weight.detach(), channels), requires_grad=False)
    conv.in_channels = channels
