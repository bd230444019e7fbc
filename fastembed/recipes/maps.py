"""An image as a whole, as a map of its patches' features, and which of them show something."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from ..engines.contract import InputContract, Resize
from ..engines.preprocess import input_levels, model_input, placement
from ..ops.crops import kept_level_table
from ..records import Item, Maps, Picture, check_finite_features

FITS = ("center-crop", "squash", "letterbox")
_DTYPES = ("float32", "float16")
_TOO_LARGE = 65520  # rounds to infinity in float16
# Of a resized image, in inputs: what only shows a line of pixels would fill the memory.
_LONGEST_SIDE = 100


@dataclass(frozen=True)
class SpatialMaps:
    """Multiply by alpha, bring to the model's input; a feature map and a mask for each image.

    Attributes:
        resize: ``center-crop``: the shorter side to the input's size, then the centre of the
            longer one. ``squash``: the whole image, whatever its shape. ``letterbox``: the longer
            side to the input's size, and black beside the image.
        upsample: the maps are enlarged by this, bilinearly; >= 1.
        dtype: of the maps, float32 or float16.

    The image is multiplied by alpha / 255 in float32 and truncated to 8 bits, at its full size, so
    that colours behind transparent pixels never show. It is resized by the model's own filter.
    Alpha takes the same way: a patch's mask is 1 where any of its pixels has alpha > 0 after that.
    What is beside the image in a letterbox is masked out.

    Exactness: the input is that of `model_input`; enlarging is torch's bilinear ``interpolate``
        (align_corners False) in float32; float16 is rounded once. A value that float16 cannot hold
        is an error.
    """

    unit: ClassVar[str] = "maps"
    channels_to_read: ClassVar[int] = 3

    resize: str = "center-crop"
    upsample: int = 1
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.resize not in FITS:
            raise ValueError(f"resize must be one of {', '.join(FITS)}; got {self.resize!r}")
        if self.upsample < 1 or int(self.upsample) != self.upsample:
            raise ValueError(f"upsample must be an integer >= 1; got {self.upsample}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}; got {self.dtype!r}")

    def prepare(self, picture: Picture, key: str, contract: InputContract) -> MapInput:
        """The image and its mask, at the input's size.

        Raises:
            ValueError: an engine that takes no RGB or no square; a center crop of an image that is
                hundreds of times longer than wide.
        """
        if contract.channel_map != (0, 1, 2):
            raise ValueError(
                f"maps of an image need an engine of RGB; its planes are {contract.channel_map}"
            )
        shape = picture.image.shape[:2]
        inner, top, left = self._fit(shape, contract)
        height, width, *cut = placement(shape, inner)
        if max(height, width) > _LONGEST_SIDE * contract.size:
            raise ValueError(
                f"{shape[0]} x {shape[1]} pixels are too long to cut out the centre; "
                "resize must be squash or letterbox"
            )
        alpha = picture.alpha
        mask = np.zeros(contract.shape[1:], dtype=np.uint8)
        window = np.s_[top : top + inner.height, left : left + inner.width]
        mask[window] = (
            1 if alpha is None else input_levels(Image.fromarray(alpha), inner)[0].numpy() > 0
        )
        y, x = cut[0] - top, cut[1] - left
        facts = {
            "orig_size_hw": list(shape),
            "size_input": contract.size,
            "image_box": [
                round(edge * extent / resized, 6)
                for edge, extent, resized in (
                    (y, shape[0], height),
                    (x, shape[1], width),
                    (y + contract.size, shape[0], height),
                    (x + contract.size, shape[1], width),
                )
            ],
            "preprocessing": f"alpha_multiplication {self.resize} {contract.resize.filter}",
        }
        return MapInput(premultiplied(picture), contract, inner, top, left, (mask, facts))

    def _fit(
        self, shape: tuple[int, int], contract: InputContract
    ) -> tuple[InputContract, int, int]:
        """How the image's own part of the input is made, and where (top, left) that is."""
        size, filter = contract.size, contract.resize.filter
        if self.resize == "center-crop":
            return replace(contract, resize=Resize(filter, size)), 0, 0
        height = width = size
        if self.resize == "letterbox":
            height = max(1, round(size * shape[0] / max(shape)))
            width = max(1, round(size * shape[1] / max(shape)))
        inner = replace(contract, height=height, width=width, resize=Resize(filter))
        return inner, (size - height) // 2, (size - width) // 2

    def embed(self, item: Item, features: Mapping[str, np.ndarray], rest: tuple) -> Maps:
        """The image's maps and its mask, at the maps' size."""
        mask, facts = rest
        maps = {output: self._map(output, feature[0]) for output, feature in features.items()}
        final = next((output for output in maps if "@" not in output), next(iter(maps)))
        first = maps[final]
        mask = _pooled(mask, first.shape[1:])
        facts = {
            "source": item.path,
            **facts,
            "feature_shape": list(first.shape),
            "mask_shape": list(mask.shape),
            "dtype": str(first.dtype),
            "feature_type": "patch_map",
            "spatial_mode": "processed" if final == "processed" else "last",
            "outputs": list(maps),
            "grid_size": features[final].shape[2],
            "hidden_dim": first.shape[0],
            "interpolated": self.upsample > 1,
            "interpolation_factor": self.upsample,
        }
        fields = {"shape": "x".join(map(str, first.shape)), "dtype": str(first.dtype)}
        return Maps(replace(item, fields={**item.fields, **fields}), maps, mask, facts)

    def _map(self, output: str, feature: np.ndarray) -> np.ndarray:
        if feature.ndim != 3:
            raise ValueError(f"{output} is no map: it has shape {list(feature.shape)}")
        if self.upsample > 1:
            feature = torch.nn.functional.interpolate(
                torch.from_numpy(feature)[None], scale_factor=self.upsample, mode="bilinear"
            )[0].numpy()
        check_finite_features(feature)  # before float16 makes more of them
        if self.dtype == "float16" and (largest := np.abs(feature).max()) >= _TOO_LARGE:
            raise ValueError(f"{output} reaches {largest:g}, too large for float16: use float32")
        return np.ascontiguousarray(feature, dtype=self.dtype)

    def settings(self) -> dict:
        """JSON form; `from_settings` reads it back."""
        return {"recipe": "spatialmaps", **asdict(self)}

    @classmethod
    def from_settings(cls, settings: Mapping) -> SpatialMaps:
        return cls(**{name: value for name, value in settings.items() if name != "recipe"})


@dataclass(frozen=True)
class MapInput:
    """One image, ready to be written into a batch.

    Attributes:
        inner: the contract of the image's own part of the input, which is at (top, left).
        rest: mask of the input's size and facts, for `SpatialMaps.embed`.
    """

    parts: ClassVar[tuple[int, ...]] = ()

    image: np.ndarray
    contract: InputContract
    inner: InputContract
    top: int
    left: int
    rest: tuple

    def __len__(self) -> int:
        return 1

    def fill(self, start: int, out: torch.Tensor) -> None:
        """The image into `out` [1, 3, size, size] of the engine's dtype."""
        inner, contract = self.inner, self.contract
        if inner.shape != contract.shape:
            black = kept_level_table(contract.mean, contract.std, contract.dtype, 3)[:, 0]
            out[0] = black[:, None, None]
        rows = slice(self.top, self.top + inner.height)
        columns = slice(self.left, self.left + inner.width)
        out[0, :, rows, columns] = model_input(self.image, inner)


def premultiplied(picture: Picture) -> np.ndarray:
    """RGB times alpha / 255 in float32, truncated: [H, W, 3] uint8."""
    if picture.alpha is None:
        return np.ascontiguousarray(picture.image)
    alpha = picture.alpha.astype(np.float32) / np.float32(255)
    return (picture.image * alpha[..., None]).astype(np.uint8)


def _pooled(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The largest value under each cell of a grid."""
    pixels = torch.from_numpy(mask)[None].float()
    return torch.nn.functional.adaptive_max_pool2d(pixels, shape)[0].byte().numpy()
