"""Feature maps as pictures: each photo beside the colours of its patches, and its mask."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .pca import as_colours, otsu_threshold, principal_components
from .photos import FIT_RULES, Photos
from .sheet import (
    DARK,
    EMPTY,
    INK,
    LIGHT,
    QUIET,
    TILE,
    Cell,
    Layout,
    balanced_columns,
    model_name,
    pages,
    tile_of,
    tile_size,
)

_BELONGS = re.compile(r"(.+)(?:_mask|_layer-?\d+)")


def map_names(folder: str | Path) -> list[str]:
    """The images whose maps a folder holds: paths of ``<name>.npy`` in it, in order.

    ``<name>_mask.npy`` and ``<name>_layer<K>.npy`` belong to ``<name>.npy`` where that is there.
    """
    folder = Path(folder)
    names = {
        path.relative_to(folder).with_suffix("").as_posix()
        for path in folder.rglob("*.npy")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    owners = {name: _BELONGS.fullmatch(name) for name in names}
    return sorted(name for name, owner in owners.items() if not (owner and owner[1] in names))


def holds_maps(folder: str | Path) -> bool:
    """Whether the first array of a folder is a feature map."""
    names = map_names(folder)
    if not names:
        return False
    first = np.load(Path(folder) / f"{names[0]}.npy", mmap_mode="r", allow_pickle=False)
    return first.ndim == 3 and first.dtype.kind == "f"


def feature_sheet(
    folder: str | Path,
    *,
    images: str | Path | None = None,
    limit: int = 24,
    layer: int | None = None,
    per_image: bool = False,
    foreground: bool = False,
    smooth: bool = False,
    resize: str | None = None,
    font: str | Path | None = None,
) -> Iterator[Image.Image]:
    """Contact sheet of a folder of feature maps: photo, patch features as colours, mask.

    The three directions in which the patches of the sheet's images differ most are red, green
    and blue, so a colour means the same in all of them. Patches outside of the mask have no
    part in it and are dark.

    Args:
        folder: of ``<name>.npy`` [C, h, w], ``<name>_mask.npy`` [h, w], ``<name>.json``; in
            folders below it as well.
        images: where the photos are, if not where the JSON files say; under the same names.
        limit: at most so many images, evenly chosen of all.
        layer: the maps of this layer, ``<name>_layer<K>.npy``.
        per_image: directions and colours of each image by itself.
        foreground: parts the patches at Otsu's threshold of the first direction; the side
            that has less of the images' borders is shown, in directions of its own, the rest
            is dark.
        smooth: colours are interpolated between patches; else a patch is a square.
        resize: how the photos were brought to the model's input, of `FIT_RULES`. By default
            as JSON or settings say, else the centre: so did the scripts that wrote neither.
        font: of the captions, a file; for names beyond Latin letters.

    Returns:
        The pages, RGB, no side above 4000 pixels.

    Raises:
        ValueError: no maps, another layer, a file that is no map, one that is not finite,
            maps of different C, nothing but masked patches.

    Exactness: the components are exact, in float64 (`principal_components`). Memory holds a
    page, one map and three numbers per patch.
    """
    folder = Path(folder)
    if resize is not None and resize not in FIT_RULES:
        raise ValueError(f"resize must be one of {', '.join(FIT_RULES)}; got {resize!r}")
    if limit < 1:
        raise ValueError(f"limit must be at least 1; got {limit}")
    names = map_names(folder)
    if not names:
        raise ValueError(f"{folder} holds no feature maps: no .npy files")
    # int, so that the choice is the first, the last and an even stride between.
    chosen = [names[i] for i in np.linspace(0, len(names) - 1, min(limit, len(names))).astype(int)]
    maps = [_Map(folder, name, layer) for name in chosen]
    photos = Photos(folder, None if images is None else Path(images), resize)

    pictures, shares = [], None
    for group in [[one] for one in maps] if per_image else [maps]:
        colours, shares = _colours(group, foreground)
        pictures += colours
    masked = any(not one.mask().all() for one in maps)
    tiles = 3 if masked else 2
    layout = Layout(tiles, lines=1, columns=balanced_columns(len(maps), tiles), notes=3)
    photo = "Photo as the model saw it" if photos.knows_fit(chosen[0]) else "Photo, its centre"
    what = "foreground patches" if foreground else "patches"
    mask = "; mask." if masked else ". No patch is masked."
    fitted = (
        "each image by itself: colours of two images do not compare."
        if per_image
        else "all images together: "
        + ", ".join(f"{share:.0%}" for share in shares)
        + " of the variance."
    )
    count = len(names) if len(names) == len(maps) else f"{len(maps)} of {len(names)}"
    title = f"{folder.resolve().name}: {count} image{'s' * (len(names) != 1)}"
    if missing := sum(photos.path(name) is None for name in chosen):
        title += f", {missing} without photo (see --images)"
    notes = (
        _made_of(maps[0], photos),
        f"{photo}; features of its {what} as red, green and blue{mask}",
        f"The colours are the first three principal components of {fitted}",
    )
    cells = (
        _cell(one, picture, photos, masked, smooth)
        for one, picture in zip(maps, pictures, strict=True)
    )
    return pages(title, notes, cells, len(maps), layout, font)


def _made_of(one: _Map, photos: Photos) -> str:
    """Shape, layer and model of a map."""
    parts = [" x ".join(map(str, one.shape()))]
    if one.layer is not None:
        parts.append(f"layer {one.layer}")
    engine = photos.settings.get("engine", {})
    parts.append(model_name(engine) or str(photos.meta(one.name).get("model", "")))
    return " · ".join(filter(None, parts))


@dataclass(frozen=True)
class _Map:
    """One image's files."""

    folder: Path
    name: str
    layer: int | None

    @property
    def path(self) -> Path:
        return self.folder / (
            f"{self.name}.npy" if self.layer is None else f"{self.name}_layer{self.layer}.npy"
        )

    @property
    def mask_path(self) -> Path:
        return self.folder / f"{self.name}_mask.npy"

    def shape(self) -> tuple[int, int, int]:
        """(C, h, w), from the file's head."""
        return self._open().shape

    def rows(self) -> np.ndarray:
        """Features of the patches, row by row: [h * w, C], finite."""
        features = np.asarray(self._open())
        if not np.isfinite(features).all():
            raise ValueError(f"{self.path} has values that are not finite")
        return features.reshape(len(features), -1).T

    def mask(self) -> np.ndarray:
        """Which patches show something: bool [h, w]."""
        shape = self.shape()[1:]
        if not self.mask_path.exists():
            return np.ones(shape, bool)
        mask = np.load(self.mask_path, allow_pickle=False)
        if mask.shape != shape:
            raise ValueError(
                f"{self.mask_path} must be of its map's shape {list(shape)}; "
                f"it is {list(mask.shape)}"
            )
        return mask > 0

    def _open(self) -> np.ndarray:
        if self.layer is not None and not self.path.exists():
            layers = sorted(
                int(path.stem.rpartition("_layer")[2])
                for path in self.path.parent.glob("*_layer*.npy")
                if re.fullmatch(re.escape(Path(self.name).name) + r"_layer-?\d+", path.stem)
            )
            there = ", ".join(map(str, layers)) or "none"
            raise ValueError(f"layer {self.layer} of {self.name} is not there; layers: {there}")
        features = np.load(self.path, mmap_mode="r", allow_pickle=False)
        if features.ndim != 3 or features.dtype.kind != "f" or 0 in features.shape:
            raise ValueError(
                f"{self.path} must be a feature map [C, h, w] of floats; "
                f"it is {features.dtype} {list(features.shape)}"
            )
        return features


def _colours(maps: Sequence[_Map], foreground: bool) -> tuple[list[np.ndarray], np.ndarray]:
    """Each map's picture, [h, w, 4] uint8 with 255 in the last plane where a patch counts; and
    the components' shares of the variance."""
    kept = [one.mask() for one in maps]
    channels = {one.shape()[0]: one.path.name for one in maps}
    if len(channels) > 1:
        (a, first), (b, second), *_ = channels.items()
        raise ValueError(f"maps of one sheet must be of one C; {first} has {a}, {second} has {b}")
    if sum(map(np.count_nonzero, kept)) < 2:
        which = maps[0].name if len(maps) == 1 else f"{len(maps)} images"
        raise ValueError(f"{which}: fewer than two patches are not masked; nothing to compare")
    if foreground:
        kept = _foreground(maps, kept)
    components = principal_components(
        one.rows()[keep.ravel()] for one, keep in zip(maps, kept, strict=True)
    )
    values = [components.project(one.rows()) for one in maps]
    scale = np.concatenate([value[keep.ravel()] for value, keep in zip(values, kept, strict=True)])
    pictures = []
    for value, keep in zip(values, kept, strict=True):
        colours = as_colours(value, components.shares, scale).reshape(*keep.shape, 3)
        pictures.append(np.dstack([colours, keep * np.uint8(255)]))
    return pictures, components.shares


def _foreground(maps: Sequence[_Map], kept: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Of the patches that count, those of the side that has less of the borders."""
    components = principal_components(
        one.rows()[keep.ravel()] for one, keep in zip(maps, kept, strict=True)
    )
    firsts = [
        components.project(one.rows())[:, 0].reshape(keep.shape)
        for one, keep in zip(maps, kept, strict=True)
    ]
    threshold = otsu_threshold(
        np.concatenate([first[keep] for first, keep in zip(firsts, kept, strict=True)])
    )
    border, all_over = [], []
    for first, keep in zip(firsts, kept, strict=True):
        edge = np.ones(keep.shape, bool)
        edge[1:-1, 1:-1] = False
        border.append(first[edge & keep] > threshold)
        all_over.append(first[keep] > threshold)
    above = np.concatenate(border).sum() * np.concatenate(all_over).size <= (
        np.concatenate(all_over).sum() * np.concatenate(border).size
    )
    return [keep & ((first > threshold) == above) for first, keep in zip(firsts, kept, strict=True)]


def _cell(one: _Map, picture: np.ndarray, photos: Photos, masked: bool, smooth: bool) -> Cell:
    height, width = picture.shape[:2]
    size = tile_size(height, width)
    colours = picture[..., :3]
    if smooth:
        colours = _interpolated(picture, size)
    keep = np.asarray(Image.fromarray(picture[..., 3]).resize(size, Image.Resampling.NEAREST)) > 0
    colours = np.asarray(Image.fromarray(colours).resize(size, Image.Resampling.NEAREST))
    photo = photos.read(one.name, size)
    tiles = [
        Image.new("RGB", (TILE, TILE), EMPTY) if photo is None else tile_of(photo),
        tile_of(np.where(keep[..., None], colours, np.uint8(DARK))),
    ]
    if masked:
        mask = np.where(one.mask()[..., None], np.uint8(LIGHT), np.uint8(DARK))
        tiles.append(tile_of(mask))
    caption = (one.name, INK) if photo is not None else (f"{one.name} (photo not found)", QUIET)
    return Cell(tiles, [caption])


def _interpolated(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The colours between patches, bilinear, those that do not count weighing nothing."""
    weight = (picture[..., 3:] > 0).astype(np.float32)
    planes = np.dstack([picture[..., :3] * weight, weight])
    planes = np.dstack(
        [
            np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR))
            for plane in np.moveaxis(planes, 2, 0)
        ]
    )
    return np.rint(planes[..., :3] / np.maximum(planes[..., 3:], 1e-6)).astype(np.uint8)
