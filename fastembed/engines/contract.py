"""What an engine expects of its input."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class InputContract:
    """The input an engine takes: [B, P, size, size], P = len(channel_map).

    Plane p is source channel `channel_map[p]`, scaled to 0..1, then
    (x - mean[p]) / std[p], cast to `dtype`. `channels` counts source channels, and
    `interpolation` is the filter the model's own preprocessing resizes with.
    """

    size: int
    channels: int
    channel_map: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    dtype: torch.dtype

    def __post_init__(self) -> None:
        planes = len(self.channel_map)
        if len(self.mean) != planes or len(self.std) != planes:
            raise ValueError(
                f"mean and std must have one value per input plane ({planes}), "
                f"got {len(self.mean)} and {len(self.std)}"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")

    @property
    def planes(self) -> int:
        """P, the number of planes the engine is fed."""
        return len(self.channel_map)
