"""Photos and their segments, as a panoptic data set of COCO's format lists them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from .. import npy, photo
from ..ops import Segments, panoptic_png_segments, panoptic_segments
from ..records import Item, Photo


class CocoPanoptic:
    """Photos whose segments a panoptic data set of COCO's format lists.

    Photos are ``<split>/*.jpg``, their maps ``panoptic_<split>/*.png``, and the list is
    ``panoptic_<split>.json``; the latter two stand in ``annotations/`` or beside the photos. An
    item is a photo with its listed segments, named by the first number in the photo's file
    name: of 12 digits as it is, else without leading zeros. Its parts are segment ids, labelled
    by the rank of their category in the list, by id: 0..132 for COCO, the 80 things first.
    `class_names` are the categories' names by label.

    Args:
        data_path: the data set's folder.
        split: such as ``train2017``.
        classes: ids or names of the categories to take; all by default.
        min_area: only segments whose listed area is at least this, pixels.
        include_crowd: take also the segments that are marked as crowds.

    Raises:
        ValueError: the list is no panoptic annotation, or lacks a category of `classes`.
        OSError: the list cannot be read, or a folder is not there.

    A pixel whose id is not listed belongs to no segment. A photo of which no segment is taken
    is no item.
    """

    def __init__(
        self,
        data_path: str | Path,
        split: str = "train2017",
        *,
        classes: Sequence[int | str] = (),
        min_area: int = 0,
        include_crowd: bool = False,
    ) -> None:
        if not _stays_inside(split):
            raise ValueError(f"split must name a folder in data_path; got {split!r}")
        self.folder = Path(data_path)
        self.split = split
        self.min_area, self.include_crowd = min_area, include_crowd
        self.path = self._find(f"panoptic_{split}.json")
        self.maps = self._find(f"panoptic_{split}")
        if not (self.folder / split).is_dir():
            raise FileNotFoundError(f"there is no folder of photos {self.folder / split}")
        with self.path.open("rb") as stream:
            try:
                listing = json.load(stream)
                self._labels = _ranked(listing["categories"])
                self._photos = {row["id"]: row["file_name"] for row in listing["images"]}
                rows = list(listing["annotations"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path} must be a panoptic annotation with images, annotations and "
                    f"categories; {type(error).__name__}: {error}"
                ) from error
        self._chosen = _chosen(classes, listing["categories"])
        self.class_names = _names(listing["categories"])
        self._items: list[Item] = []
        names: dict[str, str] = {}
        for number, row in enumerate(rows):
            try:
                item = self._item(row)
                if names.setdefault(item.name, item.path) != item.path:
                    raise ValueError(f"{item.path} and {names[item.name]} have the same number")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                name = f"annotation_{number}"
                reason = f"annotation {number} of {self.path.name}: {type(error).__name__}: {error}"
                item = Item(name, str(self.path), name, defect=reason)
            if item.parts or item.defect:
                self._items.append(item)

    def items(self) -> Iterator[Item]:
        """The photos, in the order of the list."""
        return iter(self._items)

    def count(self) -> int:
        """Number of photos."""
        return len(self._items)

    def selection(self) -> dict:
        """Which segments are taken, JSON-ready."""
        return {
            "classes": None if self._chosen is None else sorted(self._chosen),
            "min_area": self.min_area,
            "include_crowd": self.include_crowd,
        }

    def read(self, item: Item, channels: int = 3, buffer: npy.PixelBuffer | None = None) -> Photo:
        """The photo, its map and those of its segments that the map has.

        Of another size than the photo, the map is resized nearest: PyTorch's ``nearest``,
        pixel floor(i * length / size), as torchvision resizes a mask.

        Raises:
            ValueError: a file that is damaged or of another kind; a map without any of the
                segments.
            OSError: a file cannot be read.
        """
        png = self.maps / item.fields["map"]
        try:
            segments, ids = panoptic_png_segments(png, with_ids=True)
        except ValueError as error:
            raise ValueError(f"{png.name}: {error}") from error
        # The map first: a photo is decoded only where it has something to show.
        segments = _listed(segments, item.parts)
        image = photo.read_rgb(self.folder / item.path)
        if ids.shape != image.shape[:2]:
            ids = _resized_nearest(ids, image.shape[:2])
            segments = _listed(panoptic_segments(ids), item.parts)
        return Photo(image, ids, segments)

    def _find(self, name: str) -> Path:
        places = [self.folder / "annotations" / name, self.folder / name]
        for place in places:
            if place.exists():
                return place
        raise FileNotFoundError(f"there is neither {places[0]} nor {places[1]}")

    def _item(self, row: Mapping) -> Item:
        if row["image_id"] not in self._photos:
            raise ValueError(f"image_id {row['image_id']} is not among the images")
        photo_name, map_name = self._photos[row["image_id"]], row["file_name"]
        for name in (photo_name, map_name):
            if not _stays_inside(name):
                raise ValueError(f"file name {name!r} leaves its folder")
        digits = re.search(r"\d+", PurePosixPath(photo_name).stem)
        if digits is None:
            raise ValueError(f"file name {photo_name!r} has no number")
        number = digits[0] if len(digits[0]) == 12 else digits[0].lstrip("0") or "0"
        parts = {}
        for segment in row["segments_info"]:
            if self._takes(segment):
                if not (isinstance(segment["id"], int) and 0 < segment["id"] < 2**24):
                    raise ValueError(f"segment ids must be in 1..16777215; got {segment['id']!r}")
                parts[segment["id"]] = self._labels[segment["category_id"]]
        fields = {"image_id": number, "map": map_name}
        return Item(number, f"{self.split}/{photo_name}", number, fields, parts=parts)

    def _takes(self, segment: Mapping) -> bool:
        category = segment["category_id"]
        return (
            category in self._labels
            and (self._chosen is None or category in self._chosen)
            and (self.include_crowd or not segment.get("iscrowd", 0))
            and (self.min_area <= 0 or segment["area"] >= self.min_area)
        )

    def __str__(self) -> str:
        return str(self.path)


def _stays_inside(name: str) -> bool:
    """Whether a relative path of a list names something in its folder."""
    path = PurePosixPath(name)
    return (
        bool(path.parts)
        and not path.is_absolute()
        and ".." not in path.parts
        and not set(name) & {"\0", "\\"}
    )


def _ranked(categories: Sequence[Mapping]) -> dict[int, int]:
    """Rank by id of each category."""
    return {number: rank for rank, number in enumerate(sorted(row["id"] for row in categories))}


def _names(categories: Sequence[Mapping]) -> list[str]:
    """Name by rank of each category; its id where it has none."""
    ranked = sorted(categories, key=lambda row: row["id"])
    return [str(row.get("name", row["id"])) for row in ranked]


def _chosen(classes: Sequence[int | str], categories: Sequence[Mapping]) -> set[int] | None:
    """Ids of the categories that `classes` names; None for all."""
    if not classes:
        return None
    ids = {str(row["id"]): row["id"] for row in categories}
    names = {row.get("name", ""): row["id"] for row in categories}
    unknown = [str(key) for key in classes if str(key) not in names.keys() | ids.keys()]
    if unknown:
        known = ", ".join(f"{number} {name}" for name, number in names.items())
        raise ValueError(f"classes must be categories of the list; got {unknown}; it has {known}")
    return {names.get(str(key), ids.get(str(key))) for key in classes}


def _listed(segments: Segments, parts: Mapping[int, int]) -> Segments:
    """Those of the map's segments that are wanted."""
    chosen = np.isin(segments.ids, np.array(list(parts), dtype=np.int32))
    if not chosen.any():
        raise ValueError(f"the map has none of the listed segments {list(parts)}")
    return Segments(*(column[chosen] for column in segments))


def _resized_nearest(ids: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    # Ids have 24 bits: exact in float32.
    source = torch.from_numpy(ids)[None, None].float()
    return torch.nn.functional.interpolate(source, shape, mode="nearest")[0, 0].int().numpy()
