"""Annotated images, split by donor: how they are made, and how they are read.

A folder holds ``train_cells``, ``val_cells`` and ``test_cells``, in each ``<stem>.tif`` ([H, W, 3]:
DAPI, marker, 0) and ``<stem>_mask.tif``; a stem is ``<marker>_<donor>_<name>``.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import yaml

from ..staging import write_bytes_atomically
from .images import (
    SUFFIXES,
    check_same_shape,
    read_image,
    read_mask,
    read_plane,
    write_tiff,
)
from .tables import write_json
from .tiles import Naming, Tile, channel_of, find_tiles

SPLITS = ("train", "val", "test")
SPLITS_FILE = "donor_splits.yaml"
_MASK = "_cellbodies"


class LeakageError(ValueError):
    """A donor, or one and the same image, is in two splits."""


@dataclass(frozen=True)
class Example:
    """An image of a prepared folder; mask_path is None where nobody annotated it."""

    stem: str
    image_path: Path
    mask_path: Path | None
    marker: str
    donor: str

    def image(self, *, zero_dapi: bool = False) -> np.ndarray:
        """[H, W, 3], unsigned integers: DAPI (or 0), marker, 0.

        Raises:
            ValueError: another shape, or see `read_image`.
        """
        pixels = read_image(self.image_path)
        if pixels.ndim == 2:
            pixels = np.stack([pixels, pixels, np.zeros_like(pixels)], axis=-1)
        if pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(
                f"{self.image_path} must be [H, W, 3]; found shape {list(pixels.shape)}"
            )
        if zero_dapi:
            pixels = pixels.copy()
            pixels[..., 0] = 0
        return pixels

    def mask(self, image: np.ndarray | None = None) -> np.ndarray:
        """uint16 or uint32 [H, W]; of the shape of `image`, if one is given.

        Raises:
            ValueError: there is no mask, or see `read_mask`.
        """
        if self.mask_path is None:
            raise ValueError(f"{self.stem} has no mask beside it")
        labels = read_mask(self.mask_path)
        if image is not None:
            check_same_shape(image, labels, self.stem)
        return labels


def list_examples(
    folder: str | Path,
    split: str,
    include: Collection[str] | None = None,
    exclude: Collection[str] = (),
) -> list[Example]:
    """The examples of one split, in order of their file names.

    Args:
        include: only these markers; None is all.
        exclude: not these markers.

    Raises:
        ValueError: no such split, or nothing left of it.
        LeakageError: the folder has a donor in two splits.
        OSError: the split's folder is not there.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    folder = Path(folder)
    if not (folder / f"{split}_cells").is_dir():
        raise NotADirectoryError(f"data: {folder} has no folder {split}_cells (see prepare)")
    donors = {name: {example.donor for example in _scan(folder, name)} for name in SPLITS}
    check_disjoint(donors, str(folder))
    examples = _scan(folder, split)
    markers = sorted({example.marker for example in examples})
    for name in [*(include or ()), *exclude]:
        if name not in markers:
            raise ValueError(f"no image of marker {name!r} in {split}; found {', '.join(markers)}")
    chosen = [
        example
        for example in examples
        if (include is None or example.marker in include) and example.marker not in exclude
    ]
    if not chosen:
        raise ValueError(f"{folder} has no annotated images in {split} for these markers")
    return chosen


def list_images(folder: str | Path) -> list[Example]:
    """The images of a folder, with a mask or without, in order of their file names."""
    examples = []
    for path in sorted(Path(folder).glob("*")):
        if path.suffix.lower() not in SUFFIXES or path.stem.endswith(("_mask", "_pred")):
            continue
        masks = [path.with_name(f"{path.stem}_mask{suffix}") for suffix in (".tif", ".tiff")]
        mask = next((mask for mask in masks if mask.exists()), None)
        words = path.stem.split("_")
        donor = words[1] if len(words) > 1 else "unknown"
        examples.append(Example(path.stem, path, mask, words[0].lower(), donor))
    return examples


def _scan(folder: Path, split: str) -> list[Example]:
    found = list_images(folder / f"{split}_cells")
    return [example for example in found if example.mask_path is not None]


def split_donors(
    donors: Collection[str], fractions: Sequence[float] = (0.6, 0.2, 0.2), seed: int = 2024
) -> dict[str, list[str]]:
    """Donors to train, val and test: sorted, shuffled by `numpy.random.default_rng(seed)`, cut.

    Train gets int(n * 0.6) donors, val int(n * 0.2), test the rest.

    Raises:
        ValueError: fractions that are not three shares of 1, or a split that stays empty.
    """
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions must be three shares that sum to 1; got {list(fractions)}")
    order = np.array(sorted(donors))
    np.random.default_rng(seed).shuffle(order)
    n_train, n_val = int(len(order) * fractions[0]), int(len(order) * fractions[1])
    parts = np.split(order, [n_train, n_train + n_val])
    splits = {name: sorted(part.tolist()) for name, part in zip(SPLITS, parts, strict=True)}
    if empty := [name for name, part in splits.items() if not part]:
        raise ValueError(f"{len(order)} donors are too few: {', '.join(empty)} would have none")
    return splits


def check_disjoint(splits: dict[str, Collection[str]], name: str) -> None:
    """
    Raises:
        LeakageError: something is in two splits; the message names it.
    """
    counts = Counter(donor for donors in splits.values() for donor in set(donors))
    if leaked := sorted(donor for donor, count in counts.items() if count > 1):
        raise LeakageError(f"{name}: donors in more than one split: {', '.join(leaked)}")


@dataclass
class Prepared:
    """What `prepare` found and did; the keys of ``prepare.json``.

    Attributes:
        masks: annotation files found.
        written: images written by split, marker and donor.
        marker_missing: masks that have DAPI only.
        image_missing: masks without DAPI.
        donor_unknown, marker_unknown: masks whose path does not say whose or what they are.
        fallback: stems whose marker is channel c2.
        unpaired_tiles: channel files without partner.
        tiles_without_mask: paired tiles that nobody annotated.
        empty_masks: written, with no object in them.
        objects: annotated objects by split.
    """

    masks: int = 0
    written: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    by_marker: dict[str, dict[str, int]] = field(default_factory=dict)
    by_donor: dict[str, dict[str, int]] = field(default_factory=dict)
    objects: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    image_missing: list[str] = field(default_factory=list)
    marker_missing: list[str] = field(default_factory=list)
    donor_unknown: list[str] = field(default_factory=list)
    marker_unknown: list[str] = field(default_factory=list)
    fallback: list[str] = field(default_factory=list)
    unpaired_tiles: list[str] = field(default_factory=list)
    tiles_without_mask: list[str] = field(default_factory=list)
    empty_masks: list[str] = field(default_factory=list)

    @property
    def left_out(self) -> list[str]:
        return [
            *self.image_missing,
            *self.marker_missing,
            *self.donor_unknown,
            *self.marker_unknown,
        ]


@dataclass(frozen=True)
class _Source:
    """A mask and the files of its two channels."""

    stem: str
    mask: Path
    dapi: Path
    marker_image: Path
    marker: str
    donor: str


def prepare(
    tiles: str | Path,
    output: str | Path,
    *,
    masks: str | Path | None = None,
    naming: Naming | None = None,
    fractions: Sequence[float] = (0.6, 0.2, 0.2),
    seed: int = 2024,
    splits: str | Path | None = None,
) -> Prepared:
    """Turns masks ``*_cellbodies`` and channel tiles into a folder that `list_examples` reads.

    A mask's image is the tile of the same name: ``x_cellbodies.npy`` goes with ``x_b0c0.tif`` and
    ``x_b0c1.tif`` (else ``x_b0c2.tif``), or with ``x.tif`` and ``x_marker.tif``. What cannot be
    used is left out and named in the result. Runs again to the same bytes.

    Args:
        tiles: folder of the channel files, searched with its subfolders.
        output: folder to write; also gets ``donor_splits.yaml`` and ``prepare.json``.
        masks: folder of the masks; `tiles` by default.
        naming: how marker and donor stand in a mask's path.
        fractions, seed: of `split_donors`.
        splits: a ``donor_splits.yaml`` to follow instead.

    Raises:
        LeakageError: a donor in two splits, or one image in two splits under two donors.
        ValueError: no masks, two masks of one name, image and mask of different shapes, labels
            that are none; a donor that `splits` does not have.
        OSError: a file cannot be read or written.
    """
    tiles, output, naming = Path(tiles), Path(output), naming or Naming()
    report = Prepared()
    sources = _pair_masks(tiles, Path(masks or tiles), naming, report)
    donors = {source.donor for source in sources}
    chosen = split_donors(donors, fractions, seed) if splits is None else read_splits(splits)
    split_of = {donor: name for name, members in chosen.items() for donor in members}
    if strangers := sorted(donors - split_of.keys()):
        raise ValueError(f"{splits} has no split for donors {', '.join(strangers)}")

    seen: dict[bytes, tuple[str, str]] = {}
    for source in sources:
        split = split_of[source.donor]
        image, labels = _read_pair(source)
        digest = hashlib.sha256(image.tobytes()).digest()
        twin, twin_split = seen.setdefault(digest, (source.stem, split))
        if twin_split != split:
            raise LeakageError(
                f"{source.stem} ({split}) and {twin} ({twin_split}) are the same image"
            )
        folder = output / f"{split}_cells"
        folder.mkdir(parents=True, exist_ok=True)
        write_tiff(folder / f"{source.stem}.tif", image)
        write_tiff(folder / f"{source.stem}_mask.tif", labels)
        _count(report, source, split, labels)
    text = yaml.safe_dump(chosen, sort_keys=True)
    write_bytes_atomically(output / SPLITS_FILE, text.encode())
    write_json(output / "prepare.json", asdict(report))
    return report


def read_splits(path: str | Path) -> dict[str, list[str]]:
    """The donors of a ``donor_splits.yaml`` by split.

    Raises:
        ValueError: not such a file.
        LeakageError: a donor is in two splits.
    """
    content = yaml.safe_load(Path(path).read_text())
    if not isinstance(content, dict) or set(content) != set(SPLITS):
        raise ValueError(f"{path} must list donors under {', '.join(SPLITS)}")
    splits = {name: [str(donor) for donor in content[name] or ()] for name in SPLITS}
    check_disjoint(splits, str(path))
    return splits


def _pair_masks(tiles: Path, masks: Path, naming: Naming, report: Prepared) -> list[_Source]:
    found = find_tiles(tiles, naming)
    report.unpaired_tiles = [str(path) for path in found.unpaired]
    by_name: dict[str, list[Tile]] = {}
    for tile in found.tiles:
        by_name.setdefault(tile.key.rpartition("/")[2], []).append(tile)
    lonely = {channel_of(path.stem)[0].lower(): path for path in found.unpaired}
    used, sources = set(), {}
    paths = [
        path
        for path in sorted(masks.rglob(f"*{_MASK}.*"))
        if path.suffix.lower() in SUFFIXES and path.stem.endswith(_MASK)
    ]
    if not paths:
        raise ValueError(f"masks: no *{_MASK}.npy, .tif or .png in {masks}")
    for path in paths:
        report.masks += 1
        name = path.stem.removesuffix(_MASK)
        core = (channel_of(name) or (name, 0))[0].lower()
        pair = _image_files(path, core, by_name.get(core, []), used)
        inside = path.relative_to(masks)
        marker, donor = naming.marker_of(inside), naming.donor_of(inside)
        if pair is None:
            half = core in lonely or _beside(path, name) is not None
            (report.marker_missing if half else report.image_missing).append(str(path))
        elif donor is None:
            report.donor_unknown.append(str(path))
        elif marker is None:
            report.marker_unknown.append(str(path))
        else:
            start = f"{marker}_{donor}_"
            stem = name if name.lower().startswith(start) else start + name
            stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", stem)
            if stem in sources:
                raise ValueError(f"{path} and {sources[stem].mask} would both be {stem}")
            sources[stem] = _Source(stem, path, *pair[:2], marker, donor)
            if pair[2]:
                report.fallback.append(stem)
    report.tiles_without_mask = [tile.key for tile in found.tiles if tile.key not in used]
    return list(sources.values())


def _image_files(
    mask: Path, core: str, tiles: list[Tile], used: set[str]
) -> tuple[Path, Path, bool] | None:
    """(DAPI, marker, whether that is c2) of a mask."""
    near = [tile for tile in tiles if tile.dapi.parent == mask.parent] or tiles
    if len(near) > 1:
        names = ", ".join(str(tile.dapi) for tile in near)
        raise ValueError(f"{mask} could belong to any of {names}")
    if near:
        used.add(near[0].key)
        return near[0].dapi, near[0].image, near[0].fallback
    name = mask.stem.removesuffix(_MASK)
    dapi, marker = _beside(mask, name), _beside(mask, f"{name}_marker")
    return (dapi, marker, False) if dapi and marker else None


def _beside(mask: Path, stem: str) -> Path | None:
    paths = (mask.with_name(stem + suffix) for suffix in SUFFIXES)
    return next((path for path in paths if path.exists()), None)


def _read_pair(source: _Source) -> tuple[np.ndarray, np.ndarray]:
    dapi, marker = read_plane(source.dapi), read_plane(source.marker_image)
    if dapi.shape != marker.shape or dapi.dtype != marker.dtype:
        raise ValueError(
            f"{source.stem}: DAPI and marker must be alike; found {dapi.dtype} "
            f"{list(dapi.shape)} and {marker.dtype} {list(marker.shape)}"
        )
    labels = read_mask(source.mask)
    check_same_shape(dapi, labels, source.stem)
    return np.stack([dapi, marker, np.zeros_like(dapi)], axis=-1), labels


def _count(report: Prepared, source: _Source, split: str, labels: np.ndarray) -> None:
    report.written[split] += 1
    for table, name in ((report.by_marker, source.marker), (report.by_donor, source.donor)):
        row = table.setdefault(name, dict.fromkeys(SPLITS, 0))
        row[split] += 1
    objects = np.unique(labels)
    report.objects[split] += len(objects) - int(objects[0] == 0)
    if len(objects) == 1 and objects[0] == 0:
        report.empty_masks.append(source.stem)
