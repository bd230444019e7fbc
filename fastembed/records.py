"""What travels through the pipeline: listed, then read, then embedded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Item:
    """One sample as its source lists it.

    Attributes:
        key: unique in its source; seeds the sample's crops and decides its shard.
        path: what the source reads.
        name: file name of the output, without suffix.
        fields: what the index stores beside the path, such as ``{"text_id": 7}``.
        defect: why the row cannot be used, where the listing itself is broken.
    """

    key: str
    path: str
    name: str
    fields: Mapping[str, object] = field(default_factory=dict)
    defect: str = ""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"name must be a plain file name; got {self.name!r}")

    def in_shard(self, index: int, count: int) -> bool:
        """Whether this item is in shard `index` of `count`: by key, whatever the order."""
        digest = hashlib.sha1(self.key.encode(), usedforsecurity=False).digest()
        return int.from_bytes(digest[:8], "big") % count == index


@dataclass(frozen=True)
class Embedded:
    """One sample's vector, ready to be written: float32 [D], finite."""

    item: Item
    vector: np.ndarray

    def __post_init__(self) -> None:
        if self.vector.ndim != 1 or self.vector.dtype != np.float32:
            raise ValueError(
                f"vector must be float32 [D]; got {self.vector.dtype} {list(self.vector.shape)}"
            )
        if not np.isfinite(self.vector).all():
            count = int((~np.isfinite(self.vector)).sum())
            raise ValueError(f"the model gave {count} non-finite values of {self.vector.size}")
