"""One sampled volume in main memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Volume:
    """A cube of raw image and the labels of the same cube of the world.

    Attributes:
        raw: [D, H, W] of the source's dtype: uint8, uint16, int16 or float32.
        gt: [d, h, w] uint8, class of each voxel: 0 background, i for the i-th organelle.
        mask: [d, h, w] uint8, 1 where the labels are known; None where a crop may not leave
            the labelled box.
        provenance: where it comes from and how it was drawn, JSON-ready; see `sample_volume`.
    """

    raw: np.ndarray
    gt: np.ndarray
    mask: np.ndarray | None
    provenance: Mapping[str, object]

    @property
    def nbytes(self) -> int:
        mask = 0 if self.mask is None else self.mask.nbytes
        return self.raw.nbytes + self.gt.nbytes + mask
