"""A volume as its slices in three orientations, and what the model says of them as a volume."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch

from ..engines.contract import InputContract
from ..engines.preprocess import model_input
from ..ops import triplane_accumulate
from ..ops.crops import kept_level_table
from ..ops.volumes import PLANES, UPSAMPLE_MODES
from ..records import Item, check_finite_features
from .record import Volume

DTYPES = {"float16": torch.float16, "float32": torch.float32}

# An axis that is more than so many times as long as the output is interpolated, not picked from.
_LONG = 2.0


@dataclass(frozen=True)
class TriPlane:
    """Slices of a cube along three axes through a 2D model; the mean of their features.

    Of each orientation there are as many slices as the output has voxels along its axis. An axis
    up to twice as long as the output gives slices ``int(linspace(0, n - 1, output))``; a longer
    one is first brought to the output's length linearly, in float32, as
    ``torch.nn.functional.interpolate(mode="trilinear", align_corners=False)`` does. A slice is
    stretched to 8 bits by its own range, (x - min) / (max - min + 1e-8) * 255 in float32,
    truncated, and fed as three equal channels.

    Attributes:
        orientations: of ``xy``, ``xz``, ``yz``, each once.
        upsample: how token grids meet the output's grid, ``bilinear`` or ``nearest``.
        dtype: of the features, ``float16`` or ``float32``.
    """

    channels_to_read: ClassVar[int] = 1
    unit: ClassVar[str] = "volumes"

    orientations: tuple[str, ...] = ("xy", "xz", "yz")
    upsample: str = "bilinear"
    dtype: str = "float16"

    def __post_init__(self) -> None:
        given = self.orientations
        if not given or len(set(given)) != len(given) or not set(given) <= PLANES.keys():
            raise ValueError(
                f"orientations must be of {', '.join(PLANES)}, each at most once; got {given}"
            )
        if self.upsample not in UPSAMPLE_MODES:
            raise ValueError(
                f"upsample must be one of {', '.join(UPSAMPLE_MODES)}; got {self.upsample!r}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")

    def prepare(self, volume: Volume, key: str, contract: InputContract) -> Slices:
        """The slices of all orientations, none of them cut yet.

        Raises:
            ValueError: an engine that takes no RGB; a voxel that is not finite.
        """
        if contract.channel_map != (0, 1, 2):
            raise ValueError(f"slices need an engine of RGB; its planes are {contract.channel_map}")
        if volume.raw.dtype.kind == "f" and not np.isfinite(volume.raw).all():
            raise ValueError("the raw volume has voxels that are not finite")
        return Slices(volume, self.orientations, contract)

    def embed(self, item: Item, features: Mapping[str, np.ndarray], rest: Rest) -> VolumeFeatures:
        """The token grids of all slices [N, C, h, w], sorted into planes."""
        (tokens,) = features.values()
        check_finite_features(tokens)
        counts = [rest.shape[PLANES[name][0]] for name in self.orientations]
        ends = np.cumsum(counts).tolist()
        planes = {
            name: tokens[end - count : end]
            for name, count, end in zip(self.orientations, counts, ends, strict=True)
        }
        seconds = time.perf_counter() - rest.started
        return VolumeFeatures(item, planes, self.upsample, DTYPES[self.dtype], rest, seconds)

    def settings(self) -> dict:
        """JSON form; `from_settings` reads it back."""
        return {
            "recipe": "triplane",
            "orientations": list(self.orientations),
            "upsample": self.upsample,
            "dtype": self.dtype,
        }

    @classmethod
    def from_settings(cls, settings: Mapping) -> TriPlane:
        return cls(tuple(settings["orientations"]), settings["upsample"], settings["dtype"])


@dataclass(frozen=True)
class Rest:
    """What is written beside the features of a volume.

    Attributes:
        gt, mask, provenance: of the `Volume`.
        raw_shape: of its raw cube.
        started: when its slices were ready to be cut, `time.perf_counter`.
    """

    gt: np.ndarray
    mask: np.ndarray | None
    provenance: Mapping[str, object]
    raw_shape: tuple[int, int, int]
    started: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W) of the output."""
        return self.gt.shape


class Slices:
    """One volume's slices, ready to be written into a batch: orientation by orientation."""

    parts: ClassVar[tuple[int, ...]] = ()

    def __init__(
        self, volume: Volume, orientations: Sequence[str], contract: InputContract
    ) -> None:
        self.rest = Rest(
            volume.gt, volume.mask, volume.provenance, volume.raw.shape, time.perf_counter()
        )
        self._contract = contract
        self._stacks = [
            _Stack(np.moveaxis(volume.raw, PLANES[name][0], 0), self.rest.shape[PLANES[name][0]])
            for name in orientations
        ]
        self._rows = [(stack, i) for stack in self._stacks for i in range(stack.count)]

    def __len__(self) -> int:
        return len(self._rows)

    def fill(self, start: int, out: torch.Tensor) -> None:
        """Slices start, start + 1, ... into `out` [n, 3, height, width] of the engine's dtype."""
        for row, (stack, i) in zip(out, self._rows[start : start + len(out)], strict=True):
            self._feed(stretched(stack.slice(i)), row)

    def _feed(self, levels: np.ndarray, row: torch.Tensor) -> None:
        contract = self._contract
        if levels.shape != (contract.height, contract.width):
            image = np.ascontiguousarray(np.broadcast_to(levels[..., None], (*levels.shape, 3)))
            row.copy_(model_input(image, contract))
            return
        # No resize: each level is one number per plane.
        index = torch.from_numpy(levels).flatten().int()
        for plane, table in zip(row, self._tables, strict=True):
            torch.index_select(table, 0, index, out=plane.view(-1))

    @cached_property
    def _tables(self) -> torch.Tensor:
        contract = self._contract
        return kept_level_table(contract.mean, contract.std, contract.dtype, contract.planes)


class _Stack:
    """The slices of one orientation: `count` of raw [n, H, W], or between them."""

    def __init__(self, raw: np.ndarray, count: int) -> None:
        self.raw, self.count = raw, count
        n = len(raw)
        if n / count > _LONG:
            scale = np.float32(n) / np.float32(count)
            at = (np.arange(count, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
        else:
            at = np.linspace(0, n - 1, count).astype(np.int64).astype(np.float32)
        self._first = at.astype(np.int64)
        self._weight = at - self._first

    def slice(self, i: int) -> np.ndarray:
        """[H, W], of the raw volume's dtype or float32."""
        first, weight = self._first[i], self._weight[i]
        if weight == 0:
            return self.raw[first]
        low, high = self.raw[first], self.raw[min(first + 1, len(self.raw) - 1)]
        mixed = low.astype(np.float32) * (np.float32(1) - weight)
        return mixed + high.astype(np.float32) * weight


def stretched(image: np.ndarray) -> np.ndarray:
    """8 bits of an image's own range: [H, W] uint8.

    (x - min) / (max - min + 1e-8) * 255 in float32, truncated; all 0 where the image is flat.
    """
    low, high = np.float32(image.min()), np.float32(image.max())
    span = np.float32(high - low) + np.float32(1e-8)
    if image.dtype.kind == "u" and image.dtype.itemsize <= 2 and int(high) < image.size:
        # Fewer levels than pixels: the same arithmetic, once a level.
        levels = np.arange(int(high) + 1, dtype=np.float32)
        levels = np.maximum(levels - low, 0) / span * np.float32(255)
        return levels.astype(np.uint8)[image]
    return ((image.astype(np.float32) - low) / span * np.float32(255)).astype(np.uint8)


@dataclass(frozen=True)
class VolumeFeatures:
    """One volume's features as token grids, and what is written beside them.

    Attributes:
        planes: [S, C, h, w] float32 by orientation; see `triplane_accumulate`.
        upsample, dtype: how the grids become voxels.
        seconds: from the first slice to the last one's features.
    """

    item: Item
    planes: Mapping[str, np.ndarray]
    upsample: str
    dtype: torch.dtype
    rest: Rest
    seconds: float

    def __len__(self) -> int:
        return 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[C, D, H, W]."""
        return next(iter(self.planes.values())).shape[1], *self.rest.shape

    @property
    def nbytes(self) -> int:
        """Of the voxels, as they are written."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def block(self, block: Sequence[slice], out: np.ndarray) -> None:
        """The voxels of a part of [C, D, H, W], into `out`."""
        triplane_accumulate(
            self.planes, self.rest.shape, block=block, mode=self.upsample, dtype=self.dtype,
            out=out,
        )  # fmt: skip
