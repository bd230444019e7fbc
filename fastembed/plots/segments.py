"""The cache of a panoptic data set as a picture: segments and those most like them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..datasets import PanopticFeatures
from ..engines.contract import InputContract, Resize
from ..indexes import ImageTsv, SegmentTsv
from ..recipes.segments import SegmentCrops, SegmentInputs
from ..signature import FILE_NAME
from ..sources import CocoPanoptic
from .sheet import ACCENT, INK, QUIET, TILE, Cell, Layout, model_name, pages, tile_of

Key = tuple[str, int]

MOST_NEIGHBOURS = 14

# What a cache without a settings file was made with: SigLIP's input and the script's crops.
_SIGLIP = InputContract(
    224, 224, 3, (0, 1, 2), (0.5,) * 3, (0.5,) * 3, Resize("pillow-bicubic"), torch.float32
)


def is_panoptic_cache(folder: str | Path) -> bool:
    """Whether ``fastembed panoptic`` (or the script of its format) left this folder."""
    folder = Path(folder)
    if any((folder / kind.file_name).exists() for kind in (SegmentTsv, ImageTsv)):
        return True
    return _made_with(folder) is not None


def neighbour_sheet(
    cache_dir: str | Path,
    data_path: str | Path,
    split: str = "train2017",
    *,
    like: Sequence[Key] = (),
    limit: int = 8,
    k: int = 8,
    font: str | Path | None = None,
) -> Iterator[Image.Image]:
    """Sheet of a panoptic cache: in each row a segment and the `k` most like it.

    Crops are what the model saw: cut, faded and resized as the cache's settings say (in the
    model's size up to 224, else shrunk). Below a neighbour stands its cosine, to the exact
    nearest of the whole cache.

    Args:
        cache_dir: of ``fastembed panoptic``.
        data_path, split: the data set that it was made of, as `CocoPanoptic` takes them.
        like: segments (image_id, segment_id) to ask for; by default `limit` segments of
            different classes, as evenly as the classes allow, always the same.
        limit: number of rows without `like`.
        k: neighbours in a row, 1..14: what a page is wide.
        font: of the captions, a file; for class names beyond Latin letters.

    Returns:
        The pages, RGB, no side above 4000 pixels.

    Raises:
        ValueError: k or limit out of range, a cache of fewer than two segments, a segment that
            the cache does not hold, or whose photo the data set does not list.
        OSError: index, list, photo or map cannot be read.
    """
    if not 1 <= k <= MOST_NEIGHBOURS:
        raise ValueError(f"k must be in 1..{MOST_NEIGHBOURS}; got {k}")
    if limit < 1:
        raise ValueError(f"limit must be at least 1; got {limit}")
    features = PanopticFeatures(cache_dir)
    if len(features) < 2:
        raise ValueError(f"{cache_dir} holds {len(features)} segments; neighbours need two")
    crops = _Crops(cache_dir, CocoPanoptic(data_path, split, include_crowd=True))
    for key in like:
        if key not in features:
            raise ValueError(f"like: the cache holds no segment {key[1]} of image {key[0]!r}")
    queries = list(like) or _spread(features, crops, limit)
    k = min(k, len(features) - 1)
    cells = (cell for query in queries for cell in _row(features, crops, query, k))
    title = f"{Path(cache_dir).resolve().name}: {len(features)} segments"
    notes = [crops.model] * bool(crops.model) + [
        f"Framed: a segment; then the {k} most like it in the whole cache, with their cosines "
        "(blue: same class)"
    ]
    layout = Layout(tiles=1, lines=2, columns=k + 1, notes=len(notes))
    return pages(title, notes, cells, len(queries) * (k + 1), layout, font)


class _Crops:
    """Segments of a data set as a cache's model saw them."""

    def __init__(self, cache_dir: str | Path, source: CocoPanoptic) -> None:
        self.source = source
        self._items = {item.name: item for item in source.items() if not item.defect}
        made = _made_with(Path(cache_dir)) or (SegmentCrops(), _SIGLIP, "")
        self.recipe, contract, self.model = made
        # The levels as they are: no model's mean and std.
        self.contract = dataclasses.replace(
            contract, mean=(0.0,) * 3, std=(1.0,) * 3, dtype=torch.float32
        )

    def class_of(self, key: Key) -> str:
        """Name of the segment's class."""
        image, segment = key
        if image not in self._items or segment not in self._items[image].parts:
            raise ValueError(
                f"segment {segment} of image {image!r} is in the cache, but not in {self.source}: "
                "is it of another split?"
            )
        return self.source.class_names[self._items[image].parts[segment]]

    def read(self, keys: Sequence[Key]) -> list[Image.Image]:
        """The crops, one per key, on tiles; each photo is read once."""
        tiles: dict[Key, Image.Image] = {}
        for image in dict.fromkeys(image for image, _ in keys):
            wanted = dict.fromkeys(segment for name, segment in keys if name == image)
            photo = self.source.read(self._items[image].only(wanted))
            inputs = SegmentInputs(
                photo, self.recipe.bg_alpha, self.recipe.pad_ratio, self.contract
            )
            levels = torch.empty(len(inputs), *self.contract.shape)
            inputs.fill(0, levels)
            pixels = (levels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            for segment, crop in zip(inputs.parts, pixels, strict=True):
                tiles[image, segment] = _shrunk(crop)
        absent = [key for key in keys if key not in tiles]
        if absent:
            image, segment = absent[0]
            raise ValueError(f"the map of image {image!r} has no segment {segment}")
        return [tiles[key] for key in keys]


def _row(features: PanopticFeatures, crops: _Crops, query: Key, k: int) -> Iterator[Cell]:
    nearest = features.nearest(*query, k=k)
    tiles = crops.read([query, *(key for key, _ in nearest)])
    own = crops.class_of(query)
    yield Cell([tiles[0]], [(own, INK), ("{}_{}".format(*query), QUIET)], framed=True)
    for tile, (key, cosine) in zip(tiles[1:], nearest, strict=True):
        name = crops.class_of(key)
        colour = ACCENT if name == own else INK
        yield Cell([tile], [(f"{cosine:.3f}  {name}", colour), ("{}_{}".format(*key), QUIET)])


def _spread(features: PanopticFeatures, crops: _Crops, count: int) -> list[Key]:
    """`count` segments, the same in every run: one of each class in turn, evenly chosen classes
    where there are more of them."""
    classes: dict[str, list[Key]] = {}
    for key in features:
        classes.setdefault(crops.class_of(key), []).append(key)
    names = [name for name in crops.source.class_names if name in classes]
    if len(names) > count:
        names = [names[i] for i in np.linspace(0, len(names) - 1, count).astype(int)]
    # By a hash, so that not all come from the first photos.
    piles = [sorted(classes[name], key=_hashed) for name in names]
    deepest = max(map(len, piles))
    turns = (pile[turn] for turn in range(deepest) for pile in piles if turn < len(pile))
    return [key for key, _ in zip(turns, range(count), strict=False)]


def _hashed(key: Key) -> bytes:
    return hashlib.sha1("{}_{}".format(*key).encode(), usedforsecurity=False).digest()


def _shrunk(crop: np.ndarray) -> Image.Image:
    image = Image.fromarray(crop)
    if max(image.size) > TILE:
        image.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    return tile_of(image)


def _made_with(folder: Path) -> tuple[SegmentCrops, InputContract, str] | None:
    """What a cache was made with, and the model's name; None without settings of segments."""
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
        recipe = settings.get("recipe", {})
        if recipe.get("recipe") != "segmentcrops":
            return None
        engine = settings["engine"]
        contract = InputContract.from_settings(engine["input"])
        return SegmentCrops.from_settings(recipe), contract, model_name(engine)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a settings file of fastembed: {type(error).__name__}: {error}"
        ) from error
