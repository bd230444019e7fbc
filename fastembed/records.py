"""What travels through the pipeline: listed, then read, then embedded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace

import numpy as np

from .ops import Segments


@dataclass(frozen=True)
class Item:
    """One sample as its source lists it.

    Attributes:
        key: unique in its source; seeds the sample's crops and decides its shard.
        path: what the source reads.
        name: of the output, without suffix: a file name, or a path of such in the output folder.
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
        parts = self.name.split("/")
        if any(not part or part.startswith(".") for part in parts) or "\0" in self.name:
            raise ValueError(
                f"name must be a file name, or such joined by /, none hidden; got {self.name!r}"
            )

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

    def missing(self, done: Set[str]) -> Item | None:
        """What of the sample is not among the names `done`, of parts or, where it has none, its
        own; None where all is."""
        if not self.parts:
            return None if self.name in done else self
        missing = [part for part in self.parts if self.part_name(part) not in done]
        if len(missing) == len(self.parts):
            return self
        return self.only(missing) if missing else None


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
class Picture:
    """An image as a source reads it.

    Attributes:
        image: [H, W, 3] uint8, RGB, not multiplied by alpha.
        alpha: [H, W] uint8; None where all is opaque.
    """

    image: np.ndarray
    alpha: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return self.image.nbytes + (0 if self.alpha is None else self.alpha.nbytes)


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


@dataclass(frozen=True)
class Maps:
    """One image's feature maps, ready to be written.

    Attributes:
        maps: by engine output, [D, g, g'] float32 or float16, finite.
        mask: [g, g'] uint8, 1 where something of the image is not transparent.
        facts: what the JSON beside the maps says of the image, ready for it.
    """

    item: Item
    maps: Mapping[str, np.ndarray]
    mask: np.ndarray
    facts: Mapping[str, object]

    def __post_init__(self) -> None:
        for output, array in self.maps.items():
            if array.ndim != 3 or array.dtype not in ("f4", "f2"):
                raise ValueError(
                    f"{output} must be float32 or float16 [D, g, g']; "
                    f"got {array.dtype} {list(array.shape)}"
                )
            if array.shape[1:] != self.mask.shape:
                raise ValueError(
                    f"mask must be {list(array.shape[1:])} as {output} is; "
                    f"got {list(self.mask.shape)}"
                )
            check_finite_features(array)

    def __len__(self) -> int:
        return len(self.maps)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.maps.values()) + self.mask.nbytes


def check_finite_features(features: np.ndarray) -> None:
    """Raises ValueError where the model gave anything but numbers."""
    finite = np.isfinite(features)
    if not finite.all():
        bad = features.size - int(np.count_nonzero(finite))
        raise ValueError(f"the model gave {bad} non-finite values of {features.size}")
