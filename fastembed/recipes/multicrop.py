"""Quantised crops of an N-channel tensor, pooled into one vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch

from ..engines.contract import InputContract
from ..ops import Percentile, ZScore, check_finite, crop_origins, gather_crops, pool_crops
from ..ops.arrays import select
from ..ops.crops import CROP_MODES, POOL_MODES, resize_crops
from ..ops.quantize import Rule
from ..records import Embedded, Item

_RULES = {"percentile": Percentile, "zscore": ZScore}


@dataclass(frozen=True)
class MultiCrop:
    """Quantise to 8 bits, cut crops, normalise; pool the crops' vectors afterwards.

    Attributes:
        quantize: `Percentile` or `ZScore`.
        channels: which channels of the file, in this order.
        n_crops: crops per sample, >= 1.
        crops: ``random`` (seeded per sample), ``grid`` or ``center``; see `crop_origins`.
        seed: of the random crops.
        pool: ``avg`` or ``max`` over the crops.

    A crop is as large as the model's input; of an image that is smaller than that on a side,
    it is the largest square, enlarged bilinearly.
    """

    dtype: ClassVar[str] = "float32"  # of the vectors
    unit: ClassVar[str] = "vectors"

    quantize: Rule
    channels: tuple[int, ...] = (0, 1, 2, 3, 4)
    n_crops: int = 4
    crops: str = "random"
    seed: int = 0
    pool: str = "avg"

    def __post_init__(self) -> None:
        if not self.channels or min(self.channels) < 0:
            raise ValueError(f"channels must be non-negative numbers; got {self.channels}")
        if self.n_crops < 1 or (self.crops == "center" and self.n_crops != 1):
            raise ValueError(
                f"n_crops must be >= 1, and 1 for center crops; got {self.n_crops} {self.crops}"
            )
        if self.crops not in CROP_MODES:
            raise ValueError(f"crops must be one of {', '.join(CROP_MODES)}; got {self.crops!r}")
        if self.pool not in POOL_MODES:
            raise ValueError(f"pool must be one of {', '.join(POOL_MODES)}; got {self.pool!r}")
        if isinstance(self.quantize, ZScore) and len(self.quantize.mean) != len(self.channels):
            raise ValueError(
                f"mean and std need {len(self.channels)} values, one per channel; "
                f"got {len(self.quantize.mean)}"
            )

    @property
    def channels_to_read(self) -> int:
        """Length of the channel prefix that holds all chosen channels."""
        return max(self.channels) + 1

    def prepare(self, image: torch.Tensor, key: str, contract: InputContract) -> Crops:
        """Everything that needs the whole image, so that filling a batch cannot fail.

        An image on CUDA is measured without waiting for it; a bad one fails when its crops
        are filled in.

        Args:
            image: [channels_to_read, H, W].
            key: the sample's key.
            contract: what the engine takes.

        Raises:
            ValueError: a non-finite pixel, of an image in main memory.
        """
        image = select(image, self.channels)
        side = min(contract.size, *image.shape[1:])
        origins = crop_origins(image.shape, self.n_crops, side, self.seed, key, self.crops)
        ramp = self.quantize.measure(image)
        return Crops(image, torch.from_numpy(origins), side, ramp, contract)

    def embed(self, item: Item, features: Mapping[str, np.ndarray], rest: None) -> Embedded:
        """The crops' vectors [N, D] pooled into the sample's one: [1, D] float32."""
        (vectors,) = features.values()
        return Embedded(item, pool_crops(vectors[None], self.pool))

    def settings(self) -> dict:
        """JSON form; `from_settings` reads it back."""
        name = next(name for name, rule in _RULES.items() if isinstance(self.quantize, rule))
        return {
            "recipe": "multicrop",
            **{k: v for k, v in vars(self).items() if k != "quantize"},
            "channels": list(self.channels),
            "quantize": {"rule": name, **asdict(self.quantize)},
        }

    @classmethod
    def from_settings(cls, settings: Mapping) -> MultiCrop:
        fields = {name: value for name, value in settings.items() if name != "recipe"}
        rule = dict(fields.pop("quantize"))
        kind = _RULES[rule.pop("rule")]
        rule = {k: tuple(v) if isinstance(v, list) else v for k, v in rule.items()}
        return cls(kind(**rule), **{**fields, "channels": tuple(fields["channels"])})


@dataclass(frozen=True)
class Crops:
    """One sample's crops, ready to be written into a batch."""

    parts: ClassVar[tuple[int, ...]] = ()
    rest: ClassVar[None] = None

    image: torch.Tensor
    origins: torch.Tensor
    side: int
    ramp: torch.Tensor
    contract: InputContract

    def __len__(self) -> int:
        return len(self.origins)

    def fill(self, start: int, out: torch.Tensor) -> None:
        """Crops start, start + 1, ... into `out` [n, P, size, size] of the engine's dtype.

        An image on CUDA is cut there, and waited for if `out` is in main memory.

        Raises:
            ValueError: a non-finite pixel that was not seen when the image was measured.
        """
        contract = self.contract
        origins = self.origins[start : start + len(out)]
        normalise = {"mean": contract.mean, "std": contract.std, "dtype": contract.dtype}
        common = {"quantize": self.ramp, "channels": contract.channel_map}
        target = out if out.device == self.image.device else None
        if self.side == contract.size:
            crops = gather_crops(self.image, origins, self.side, **common, **normalise, out=target)
        else:
            levels = gather_crops(self.image, origins, self.side, **common, dtype=torch.uint8)
            crops = resize_crops(levels, contract.size, **normalise, out=target)
        if target is None:
            out.copy_(crops)
        check_finite(self.image, self.ramp)
