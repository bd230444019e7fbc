"""What travels through the pipeline: listed, then read, then embedded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from .ops import Segments


@dataclass(frozen=True)
class Item:
    """One sample as its source lists it.

    Attributes:
        key: unique in its source; seeds the sample's crops and decides its shard.
        path: what the source reads.
        name: file name of the output, without suffix.
        fields: what the index stores beside the path, such as ``{"text_id": 7}``.
        defect: why the row cannot be used, where the listing itself is broken.
        parts: of a sample that gives several vectors, id and label of each part that gives
            one, such as an image's segments and their classes; empty where it gives one.
    """

    key: str
    path: str
    name: str
    fields: Mapping[str, object] = field(default_factory=dict)
    defect: str = ""
    parts: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"name must be a plain file name; got {self.name!r}")

    def in_shard(self, index: int, count: int) -> bool:
        """Whether this item is in shard `index` of `count`: by key, whatever the order."""
        digest = hashlib.sha1(self.key.encode(), usedforsecurity=False).digest()
        return int.from_bytes(digest[:8], "big") % count == index

    def part_name(self, part: int) -> str:
        """File name, without suffix, of a part's own output."""
        return f"{self.name}_{part}"

    def only(self, parts: Iterable[int]) -> Item:
        """The same sample with these of its parts, in this order."""
        return replace(self, parts={part: self.parts[part] for part in parts})


@dataclass(frozen=True)
class Photo:
    """An image and where its segments are, as a source reads it.

    Attributes:
        image: [H, W, 3] uint8, RGB.
        ids: [H, W] int32, the segment of each pixel.
        segments: those that are wanted, S of them.
    """

    image: np.ndarray
    ids: np.ndarray
    segments: Segments

    @property
    def nbytes(self) -> int:
        return self.image.nbytes + self.ids.nbytes


@dataclass(frozen=True)
class Embedded:
    """One sample's vectors, ready to be written: [V, D] float32 or float16, finite.

    V is the number of the item's parts, in their order, and 1 where it has none.
    """

    item: Item
    vectors: np.ndarray

    def __post_init__(self) -> None:
        vectors, count = self.vectors, len(self.item.parts) or 1
        if vectors.ndim != 2 or len(vectors) != count or vectors.dtype not in ("f4", "f2"):
            raise ValueError(
                f"vectors must be float32 or float16 [{count}, D]; "
                f"got {vectors.dtype} {list(vectors.shape)}"
            )
        check_finite_features(vectors)

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def nbytes(self) -> int:
        return self.vectors.nbytes


def check_finite_features(features: np.ndarray) -> None:
    """Raises ValueError where the model gave anything but numbers."""
    finite = np.isfinite(features)
    if not finite.all():
        bad = features.size - int(np.count_nonzero(finite))
        raise ValueError(f"the model gave {bad} non-finite values of {features.size}")
