"""What is asked of a cache: a row by its name, or an image through the cache's own model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from . import engines, npy, photo, signature
from .caches import EmbeddingStore
from .ops import Segments
from .recipes import MultiCrop, SegmentCrops
from .records import Item, Photo

_RECIPES = {"multicrop": MultiCrop, "segmentcrops": SegmentCrops}
# Settings of an engine that `load_engine` takes under the same names.
_OPTIONS = (
    "runtime", "precision", "output", "batch_size", "device", "channel_mode", "channel_pool",
    "normalize", "compile", "provider",
)  # fmt: skip


def find_row(store: EmbeddingStore, words: Sequence[str]) -> int | None:
    """The row that a person means; None where there is none.

    Args:
        words: an image's and a segment's id; or one word: a name (``emb_<sha1>``,
            ``<image_id>_<segment_id>``), or the path of a tensor, if it is of one row.

    Raises:
        ValueError: the path is of several rows.
    """
    if len(words) == 2:
        image, segment = words
        try:
            return store.row((image, int(segment)))
        except (ValueError, KeyError):
            return None
    (word,) = words
    if "segment_id" in store.columns:
        image, _, segment = word.rpartition("_")
        return find_row(store, [image, segment])
    try:
        return store.row(word)
    except KeyError:
        pass
    if "tensor_path" not in store.columns:
        return None
    rows = np.flatnonzero(store.column("tensor_path") == word)
    if len(rows) > 1:
        names = ", ".join(store.column("name")[rows[:3]])
        raise ValueError(f"{word} is the tensor of {len(rows)} rows: name one, such as {names}")
    return int(rows[0]) if len(rows) else None


class ImageQueries:
    """Images as a cache's job embeds them: its recipe and its engine, of the settings that stand
    in the cache.

    Of a panoptic cache an image is one segment that has all its pixels. Of a multichannel cache it
    is a tensor in a .npy file; random crops are drawn for its path.

    Args:
        folder: of the cache.
        weights: as `load_engine` takes them; not of models from a hub, nor of random ones.
        model: a folder that ``fastembed export`` made, where the cache was made with such.

    Raises:
        SignatureMismatch: the engine that was loaded is not the one that made the cache; the
            message names what differs.
        ValueError: the cache is of another job. And what `load_engine` raises.
    """

    def __init__(
        self, folder: str | Path, weights: str | Path | None = None, model: str | None = None
    ) -> None:
        settings = signature.read(Path(folder))
        kind = settings["recipe"].get("recipe")
        if kind not in _RECIPES:
            raise ValueError(f"{folder} must hold one vector per sample or segment; it is {kind}")
        self.recipe = _RECIPES[kind].from_settings(settings["recipe"])
        self.engine = _load(settings["engine"], weights, model)
        if lines := signature.differences(settings["engine"], self.engine.settings()):
            raise signature.SignatureMismatch(
                f"{folder} was made by another engine than is loaded here:\n" + "\n".join(lines)
            )

    def embed(self, path: str | Path) -> np.ndarray:
        """The vector of an image file: [D], of the cache's dtype.

        Raises:
            OSError, ValueError, TypeError: the file cannot be read or used.
        """
        path = Path(path)
        if isinstance(self.recipe, MultiCrop):
            sample = npy.read_channels(path, self.recipe.channels_to_read, npy.PixelBuffer())
            item = Item(str(path), str(path), "query")
        else:
            sample = _whole(photo.read_rgb(path))
            item = Item(str(path), str(path), "query", parts={1: 0})
        engine = self.engine
        inputs = self.recipe.prepare(sample, item.key, engine.contract)
        batch = torch.empty(
            min(len(inputs), engine.batch_size), *engine.contract.shape, dtype=engine.contract.dtype
        )
        rows = []
        for start in range(0, len(inputs), len(batch)):
            part = batch[: len(inputs) - start]
            inputs.fill(start, part)
            rows.append(engine(part).cpu().numpy().copy())
        (output,) = engine.outputs
        features = {output: np.concatenate(rows)}
        return self.recipe.embed(item, features, inputs.rest).vectors[0]


def _load(wanted: dict, weights: str | Path | None, model: str | None):
    options = {name: wanted[name] for name in _OPTIONS if name in wanted}
    if model is not None and Path(model).is_dir():
        fixed = {name: options.get(name) for name in ("runtime", "batch_size", "device")}
        return engines.load_engine(model, output=wanted["output"], **fixed)
    if "input" in wanted:
        size = wanted["input"]["height"], wanted["input"]["width"]
        options |= {"size": size, "channels": wanted["input"]["channels"]}
    identity = wanted.get("weights_id", "")
    if weights is None and identity.startswith("random:"):
        weights, options["seed"] = "random", int(identity.removeprefix("random:"))
    return engines.load_engine(model or wanted["spec"], weights=weights, **options)


def _whole(image: np.ndarray) -> Photo:
    """An image [H, W, 3] as a photo of one segment."""
    height, width = image.shape[:2]
    box = np.array([[0, 0, height - 1, width - 1]], np.int32)
    one = Segments(np.ones(1, np.int32), box, np.array([height * width], np.int64))
    return Photo(image, np.ones((height, width), np.int32), one)
