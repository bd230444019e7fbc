"""A photo's segments, each cut out, as vectors of unit length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch

from ..engines.contract import InputContract
from ..engines.preprocess import model_input
from ..ops import Segments, blend_crops, pool_crops
from ..ops.masks import RESIZES, blended_crops, fade_table
from ..records import Embedded, Item, Photo


@dataclass(frozen=True)
class SegmentCrops:
    """Cut out each segment, its background faded to grey; a vector of unit length for each.

    Attributes:
        bg_alpha: what remains of the background, 0..1.
        pad_ratio: growth of a segment's box per side, in extents, >= 0.

    See `blend_crops`. A crop is brought to the model's input by the model's own rule. Vectors
    are divided by their Euclidean norm in float32 and rounded once, to float16.
    """

    dtype: ClassVar[str] = "float16"  # of the vectors
    unit: ClassVar[str] = "vectors"
    channels_to_read: ClassVar[int] = 3

    bg_alpha: float = 0.3
    pad_ratio: float = 0.1

    def __post_init__(self) -> None:
        fade_table(self.bg_alpha)
        if not (math.isfinite(self.pad_ratio) and self.pad_ratio >= 0):
            raise ValueError(f"pad_ratio must be a number >= 0; got {self.pad_ratio}")

    def prepare(self, photo: Photo, key: str, contract: InputContract) -> SegmentInputs:
        """The crops of the photo's segments, none of them cut yet.

        Raises:
            ValueError: an engine that takes no RGB.
        """
        if contract.channel_map != (0, 1, 2):
            raise ValueError(
                f"segments of a photo need an engine of RGB; its planes are {contract.channel_map}"
            )
        return SegmentInputs(photo, self.bg_alpha, self.pad_ratio, contract)

    def embed(self, item: Item, features: Mapping[str, np.ndarray], rest: None) -> Embedded:
        """The crops' vectors [S, D] of unit length: [S, D] float16."""
        (vectors,) = features.values()
        return Embedded(item, pool_crops(vectors[:, None], l2_normalize=True, dtype=torch.float16))

    def settings(self) -> dict:
        """JSON form; `from_settings` reads it back."""
        return {"recipe": "segmentcrops", **asdict(self)}

    @classmethod
    def from_settings(cls, settings: Mapping) -> SegmentCrops:
        return cls(settings["bg_alpha"], settings["pad_ratio"])


@dataclass(frozen=True)
class SegmentInputs:
    """One photo's segments, ready to be written into a batch."""

    rest: ClassVar[None] = None

    photo: Photo
    bg_alpha: float
    pad_ratio: float
    contract: InputContract

    @property
    def parts(self) -> tuple[int, ...]:
        """Ids of the segments, in the order of the crops."""
        return tuple(self.photo.segments.ids.tolist())

    def __len__(self) -> int:
        return len(self.photo.segments.ids)

    def fill(self, start: int, out: torch.Tensor) -> None:
        """Crops start, start + 1, ... into `out` [n, 3, height, width] of the engine's dtype."""
        photo, contract = self.photo, self.contract
        part = slice(start, start + len(out))
        segments = Segments(*(column[part] for column in photo.segments))
        squash = contract.resize.shorter is None and contract.height == contract.width
        if squash and contract.resize.filter in RESIZES:
            blend_crops(
                photo.image, photo.ids, segments, contract.height, self.bg_alpha, self.pad_ratio,
                mean=contract.mean, std=contract.std, dtype=contract.dtype,
                resize=contract.resize.filter, out=out,
            )  # fmt: skip
            return
        # The slow and general way: any filter, and models that are fed the centre only.
        crops = blended_crops(photo.image, photo.ids, segments, self.bg_alpha, self.pad_ratio)
        for row, crop in zip(out, crops, strict=True):
            row.copy_(model_input(crop, contract))
