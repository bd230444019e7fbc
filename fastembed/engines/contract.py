"""What an engine expects of its input."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Resize:
    """How the model's own preprocessing brings an image to the input's size.

    Attributes:
        filter: whose numbers, one of `fastembed.ops.RESIZES`.
        shorter: the shorter side is brought to this many pixels and the centre cut out; None
            squashes the whole image into the input.
    """

    filter: str
    shorter: int | None = None


@dataclass(frozen=True)
class InputContract:
    """The input an engine takes: [B, P, height, width], P = len(channel_map).

    Plane p is source channel `channel_map[p]` (of an RGB image: 0 is red), scaled to 0..1, then
    (x - mean[p]) / std[p], cast to `dtype`. `channels` counts source channels, and `resize` is
    what the model's own preprocessing does.
    """

    height: int
    width: int
    channels: int
    channel_map: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize
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

    @property
    def shape(self) -> tuple[int, int, int]:
        """(P, height, width)."""
        return self.planes, self.height, self.width

    @property
    def size(self) -> int:
        """Side of a square input; ValueError if it is not square."""
        if self.height != self.width:
            raise ValueError(
                f"this needs a square input, and the engine's is {self.height}x{self.width}"
            )
        return self.height

    def settings(self) -> dict:
        """JSON form; `from_settings` reads it back."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {**fields, "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_settings(cls, settings: dict) -> InputContract:
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        fields["resize"] = Resize(**fields["resize"])
        fields["dtype"] = getattr(torch, fields["dtype"])
        return cls(**fields)
