"""How N source channels meet a model that was trained on three."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

CHANNEL_MODES = ("inflate", "replicate")

# Patch embeddings of DINO configurations: one kernel over all channels, or one per channel.
PATCH_EMBEDDINGS = ("inflate", "channelvit", "dichavit")


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


class FusedChannels(nn.Module):
    """One patch kernel per channel, the channels then weighed by what the image holds.

    f_c = conv_c(x_c) and m_c its mean over all D x h x w, so m is [B, C]. ``channelvit`` gives
    sum_c w_c f_c with w = sigmoid(W2 relu(W1 m + b1) + b2); ``dichavit`` makes two such sums and
    mixes them by a gate, clamped to 0..1. [B, C, H, W] -> [B, D, h, w]. Parameters carry the
    names of the checkpoints.
    """

    def __init__(self, fusion: str, channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.in_channels, self.kernel_size = channels, (patch_size, patch_size)
        self.per_channel_proj = nn.ModuleList(
            nn.Conv2d(1, dim, patch_size, patch_size) for _ in range(channels)
        )
        self.mixers = ("fuse_mlp",) if fusion == "channelvit" else ("fuse_mlp_a", "fuse_mlp_b")
        hidden = max(32, dim // 16)
        for name in self.mixers:
            layers = nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels)
            setattr(self, name, nn.Sequential(*layers))
        if fusion == "dichavit":
            self.combine_gate = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, image: Tensor) -> Tensor:
        parts = zip(self.per_channel_proj, image.split(1, dim=1), strict=True)
        features = torch.stack([conv(channel) for conv, channel in parts], dim=1)  # B C D h w
        means = features.mean(dim=(2, 3, 4))
        # Of 2 or 3 rows each has a kernel, and so bits, of its own in MKL (torch 2.14): so more.
        rows = nn.functional.pad(means, (0, 0, 0, max(0, 8 - len(means))))
        mixed = [
            torch.einsum(
                "bcdhw,bc->bdhw", features, getattr(self, name)(rows)[: len(means)].sigmoid()
            )
            for name in self.mixers
        ]
        if len(mixed) == 1:
            return mixed[0]
        gate = self.combine_gate.clamp(0.0, 1.0)
        return gate * mixed[0] + (1 - gate) * mixed[1]
