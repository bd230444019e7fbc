"""The photos that features were made of, as the model saw them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image

from ..signature import FILE_NAME

FIT_RULES = ("squash", "center-crop", "letterbox")

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class Photos:
    """The photos of a folder of maps, as the model saw them."""

    def __init__(self, folder: Path, images: Path | None, resize: str | None) -> None:
        if images is not None and not images.is_dir():
            raise FileNotFoundError(f"images: there is no folder {images}")
        self.folder, self.images, self.resize = folder, images, resize
        self.settings = _json(folder / FILE_NAME).get("settings", {})
        self._index = _sources(folder / "maps.tsv")

    def meta(self, name: str) -> dict:
        """What the image's JSON says; nothing where it has none."""
        return _json(self.folder / f"{name}.json")

    def path(self, name: str) -> Path | None:
        """Where the image is; None where it is not."""
        source = self.meta(name).get("source") or self._index.get(name)
        if self.images is None:
            tried = [Path(source), self.folder / source] if source else []
        else:
            tried = []
            if source:  # in full where it was recorded below its folder, else by its name
                below = Path(source).relative_to(Path(source).anchor)
                tried = [self.images / below, self.images / Path(name).parent / below.name]
            for ending in _IMAGES:
                tried += [self.images / (name + ending), self.images / (name + ending.upper())]
        return next((path for path in tried if path.is_file()), None)

    def knows_fit(self, name: str) -> bool:
        """Whether it is recorded, or was asked for, how the photo was fitted."""
        return self._rule(self.meta(name)) is not None or "image_box" in self.meta(name)

    def read(self, name: str, size: tuple[int, int]) -> Image.Image | None:
        """What of the photo the map covers, RGB of `size` (width, height), black beside the photo;
        None where there is no photo.

        Raises:
            OSError: it cannot be read.
        """
        path = self.path(name)
        if path is None:
            return None
        with Image.open(path) as image:
            image = _multiplied(image)
        meta = self.meta(name)
        if "image_box" in meta and self.resize is None:
            top, left, bottom, right = meta["image_box"]
        else:
            rule, zoom = self._rule(meta) or ("center-crop", 1.0)
            left, top, right, bottom = _covered(image.size, size, rule, zoom)
        return _cut_out(image, (left, top, right, bottom), size)

    def _rule(self, meta: dict) -> tuple[str, float] | None:
        """How the photo was fitted, and how much larger it was then than what was cut out."""
        recorded = meta.get("resize") or self.settings.get("recipe", {}).get("resize")
        rule = self.resize or recorded
        if rule in FIT_RULES:
            return rule, 1.0
        contract = self.settings.get("engine", {}).get("input")
        if contract is None:
            return None
        shorter = contract["resize"]["shorter"]
        if shorter is None:
            return "squash", 1.0
        return "center-crop", shorter / min(contract["height"], contract["width"])


def _covered(
    have: tuple[int, int], want: tuple[int, int], rule: str, zoom: float
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of what an input of `want` (width, height) shows, in pixels of an
    image of `have`; beyond its edges in a letterbox."""
    if rule == "squash":
        return 0, 0, *have
    ratios = [h / w for h, w in zip(have, want, strict=True)]
    scale = max(ratios) if rule == "letterbox" else min(ratios) / zoom
    left, top = ((h - w * scale) / 2 for h, w in zip(have, want, strict=True))
    return left, top, have[0] - left, have[1] - top


def _cut_out(
    image: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int]
) -> Image.Image:
    """The box of an image (left, top, right, bottom), resized to `size`, black beyond its edges."""
    left, top, right, bottom = box
    inside = max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)
    across, down = size[0] / (right - left), size[1] / (bottom - top)
    x0, x1 = (round((x - left) * across) for x in inside[::2])
    y0, y1 = (round((y - top) * down) for y in inside[1::2])
    part = image.resize((max(1, x1 - x0), max(1, y1 - y0)), Image.Resampling.BICUBIC, box=inside)
    result = Image.new("RGB", size)
    result.paste(part, (x0, y0))
    return result


def _multiplied(image: Image.Image) -> Image.Image:
    """RGB of 8 bits, on black where the image is transparent."""
    if image.mode.startswith("I;16"):  # which Pillow would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image).convert("RGB")
    return image.convert("RGB")


def _json(path: Path) -> dict:
    """A JSON object; nothing where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object")
    return content


def _sources(path: Path) -> dict[str, str]:
    """Source by name, as the index of the maps has them; nothing where there is none."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, dialect="excel-tab"))
    try:
        return {row["name"]: row["source"] for row in rows}
    except KeyError as error:
        raise ValueError(f"{path} must have the columns name and source") from error
