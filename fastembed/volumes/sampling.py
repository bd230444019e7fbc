"""From a volume's index to a crop of the world, its raw voxels and its labels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from .grids import Grid, read_mean, read_nearest
from .layout import DataSet, Place
from .record import Volume
from .stores import Level, Stores

_AXES = "zyx"
_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
_RAW_TYPES = ("uint8", "uint16", "int16", "float32")
_SLACK = 1e-6  # of a voxel


@dataclass(frozen=True)
class Sampling:
    """What a crop is and which crops count. Every field decides the samples' content.

    Attributes:
        organelles: the classes, in this order: the i-th is class i of the labels. Where several
            overlap, the last of them stands, so larger structures come first.
        base_resolution: edge of a label voxel, and of an output voxel, nm.
        min_resolution_for_raw: edge of a raw voxel, nm.
        output_image_dim: label voxels along each edge of the crop.
        min_label_fraction: of the known voxels, those that any organelle has, at least.
        min_unique_ids: different ids among them, at least; 0 is none, and ids of two organelles
            are different.
        min_ground_truth_fraction: of the crop's voxels, those whose labels are known, at least.
        gt_extension: the crop may leave the labelled box, by half of its own length along an
            axis, or of the box's where that is shorter; `Volume.mask` says where labels are.
            Without, there is no mask, and voxels that nobody knows are background.
        augment: one of the 48 ways to turn and mirror a cube, drawn for each volume.
        seed: of all volumes.
        attempts: crops that are drawn before a volume is given up.
    """

    organelles: tuple[str, ...] = ("cell",)
    base_resolution: float = 128
    min_resolution_for_raw: float = 32
    output_image_dim: int = 128
    min_label_fraction: float = 0.01
    min_unique_ids: int = 2
    min_ground_truth_fraction: float = 0.05
    gt_extension: bool = True
    augment: bool = True
    seed: int = 0
    attempts: int = 100

    def __post_init__(self) -> None:
        names = self.organelles
        if isinstance(names, str):
            raise TypeError(f"organelles must be a sequence of names; got {names!r}")
        if not names or len(set(names)) != len(names) or len(names) > 255:
            raise ValueError(f"organelles must be 1 to 255 different names; got {list(names)}")
        if not (0 < self.min_resolution_for_raw <= self.base_resolution < math.inf):
            raise ValueError(
                "min_resolution_for_raw must be > 0 and at most base_resolution; "
                f"got {self.min_resolution_for_raw} and {self.base_resolution}"
            )
        if self.output_image_dim < 1 or self.attempts < 1:
            raise ValueError(
                "output_image_dim and attempts must be >= 1; "
                f"got {self.output_image_dim} and {self.attempts}"
            )
        side = self.output_image_dim * self.base_resolution / self.min_resolution_for_raw
        if abs(side - round(side)) > _SLACK:
            raise ValueError(
                "output_image_dim * base_resolution / min_resolution_for_raw is the raw crop's "
                f"length and must be a whole number; got {side}"
            )
        for name in ("min_label_fraction", "min_ground_truth_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1; got {getattr(self, name)}")
        if self.min_unique_ids < 0 or self.seed < 0:
            raise ValueError(
                f"min_unique_ids and seed must be >= 0; got {self.min_unique_ids} and {self.seed}"
            )

    @property
    def raw_dim(self) -> int:
        """Raw voxels along each edge of the crop."""
        return round(self.output_image_dim * self.base_resolution / self.min_resolution_for_raw)

    @property
    def extent(self) -> float:
        """Edge of the crop, nm."""
        return self.output_image_dim * self.base_resolution

    def settings(self) -> dict:
        """JSON form."""
        return {**asdict(self), "organelles": list(self.organelles)}


class Scene:
    """A data set's raw image and labels at the scales that a sampling takes, opened."""

    def __init__(self, dataset: DataSet, sampling: Sampling, stores: Stores) -> None:
        self.dataset = dataset
        self.sampling = sampling
        self.raw = _open(stores, dataset.raw, sampling.min_resolution_for_raw)
        if self.raw.dtype.name not in _RAW_TYPES:
            raise TypeError(
                f"{self.raw.url}: raw must be {', '.join(_RAW_TYPES)}; it is {self.raw.dtype}"
            )
        self.places = {name: dataset.labels[name] for name in sampling.organelles}
        self.labels = {
            name: _open(stores, place, sampling.base_resolution)
            for name, place in self.places.items()
        }
        for level in self.labels.values():
            if level.dtype.kind not in "iub":
                raise TypeError(f"{level.url}: labels must be integers; they are {level.dtype}")
        # Labels of a class are known where its array is; of all classes, where all are.
        self.corner = np.max([level.corner for level in self.labels.values()], axis=0)
        self.end = np.min([level.end for level in self.labels.values()], axis=0)
        overlap = np.minimum(self.end, self.raw.end) - np.maximum(self.corner, self.raw.corner)
        if (overlap <= 0).any():
            raise ValueError(
                f"{dataset.name}: raw and labels must overlap; raw is at "
                f"{_box(self.raw.corner, self.raw.end)}, labels at {_box(self.corner, self.end)}"
            )
        self.unfit = ""
        self._low, self._high = self._range()

    def _range(self) -> tuple[np.ndarray, np.ndarray]:
        """Where a crop may begin, nm; says `unfit` where it may nowhere."""
        extent, raw = self.sampling.extent, self.raw
        if self.sampling.gt_extension:
            shared = np.minimum(extent, self.end - self.corner) / 2
            low = np.maximum(raw.corner, self.corner - extent + shared)
            high = np.minimum(raw.end - extent, self.end - shared)
        else:
            low = np.maximum(raw.corner, self.corner)
            high = np.minimum(raw.end, self.end) - extent
        voxel = np.array(raw.voxel)
        # In whole raw voxels, so that no raw voxel is interpolated where the scale is right.
        first = np.ceil((low - raw.corner) / voxel - _SLACK).astype(np.int64)
        last = np.floor((high - raw.corner) / voxel + _SLACK).astype(np.int64)
        for axis in np.flatnonzero(last < first)[:1]:
            self.unfit = self._why_unfit(_AXES[axis], raw.end[axis] - raw.corner[axis])
        return first, last

    def _why_unfit(self, axis: str, raw: float) -> str:
        extent = self.sampling.extent
        if raw < extent:
            return f"a crop of {extent:g} nm does not fit into raw, {raw:g} nm along {axis}"
        if self.sampling.gt_extension:
            return f"no crop of {extent:g} nm in raw reaches the labels by half along {axis}"
        return f"no crop of {extent:g} nm lies in the labels along {axis}, without gt extension"

    def draw(self, dice: Dice) -> np.ndarray:
        """A crop's corner, nm: [3] float64.

        On the lattice of the first organelle's box in steps of a label voxel, moved to the
        nearest corner of a raw voxel.
        """
        step, raw = self.sampling.base_resolution, self.raw
        voxel = np.array(raw.voxel)
        corner = np.empty(3)
        for axis in range(3):
            lattice = next(iter(self.labels.values())).corner[axis]
            low, high = (
                raw.corner[axis] + limit[axis] * voxel[axis] for limit in (self._low, self._high)
            )
            first = math.ceil((low - lattice) / step - _SLACK)
            last = max(first, math.floor((high - lattice) / step + _SLACK))
            at = lattice + (first + dice.below(last - first + 1)) * step
            whole = round((at - raw.corner[axis]) / voxel[axis])
            whole = min(max(whole, int(self._low[axis])), int(self._high[axis]))
            corner[axis] = raw.corner[axis] + whole * voxel[axis]
        return corner

    def known_at_most(self, corner: np.ndarray) -> float:
        """How much of a crop the labels' box covers, before any voxel is read: 0..1."""
        extent = self.sampling.extent
        shared = np.minimum(corner + extent, self.end) - np.maximum(corner, self.corner)
        return float(np.prod(np.clip(shared, 0, None) / extent))

    def settings(self) -> dict:
        """The scales that are read, JSON-ready."""
        labels = {name: level.settings() for name, level in self.labels.items()}
        return {"raw": self.raw.settings(), **labels}


class Dice:
    """Whole numbers that depend on (seed, index) alone.

    From the raw 64 bits of PCG64 on a SeedSequence, both of which NumPy keeps for good, as it
    does not keep what a Generator makes of them.
    """

    def __init__(self, seed: int, index: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence([seed, index]))

    def below(self, count: int) -> int:
        """One of 0..count - 1, all alike but for count / 2**64."""
        return int(self._bits.random_raw()) * count >> 64


@dataclass
class _Tally:
    """What was drawn and why it did not do."""

    reasons: Counter
    best: dict[str, float]
    datasets: set[str]

    def refuse(self, scene: Scene, name: str, value: float) -> None:
        self.datasets.add(scene.dataset.name)
        self.reasons[name] += 1
        self.best[name] = max(value, self.best.get(name, 0))


def sample_volume(scenes: Sequence[Callable[[], Scene]], index: int, sampling: Sampling) -> Volume:
    """Volume `index`: the same bits whatever was sampled before, in which order, where.

    A data set is drawn, then a corner of the crop in it; then the labels are read, and where
    they do not hold what the sampling demands, it is drawn again. Raw is read at last.

    Args:
        scenes: one per data set: a function that gives its `Scene`, called when it is drawn.
        index: >= 0.

    Raises:
        ValueError: no crop does; the message says what was tried and the best figures.
            Damaged data.
        OSError: data that are not there or cannot be reached.
    """
    if index < 0:
        raise ValueError(f"volume index must be >= 0; got {index}")
    dice = Dice(sampling.seed, index)
    tally, unfit = _Tally(Counter(), {}, set()), {}
    for attempt in range(1, sampling.attempts + 1):
        number = dice.below(len(scenes))
        scene = scenes[number]()
        if scene.unfit:
            unfit[scene.dataset.name] = scene.unfit
            if len(unfit) == len(scenes):
                break
            continue
        corner = scene.draw(dice)
        if scene.known_at_most(corner) < sampling.min_ground_truth_fraction - _SLACK:
            tally.refuse(scene, "min_ground_truth_fraction", scene.known_at_most(corner))
            continue
        labels = _read_labels(scene, corner)
        for name, figure in labels.figures.items():
            if figure < getattr(sampling, name):
                tally.refuse(scene, name, figure)
                break
        else:
            return _finish(scene, number, index, corner, labels, attempt, dice)
    raise ValueError(_nothing(index, sampling, tally, unfit))


@dataclass(frozen=True)
class _Labels:
    gt: np.ndarray
    known: np.ndarray
    figures: Mapping[str, float]


def _read_labels(scene: Scene, corner: np.ndarray) -> _Labels:
    sampling = scene.sampling
    grid = Grid(tuple(corner), sampling.base_resolution, (sampling.output_image_dim,) * 3)
    gt = np.zeros(grid.shape, np.uint8)
    known = np.ones(grid.shape, bool)
    found = []
    for number, (name, level) in enumerate(scene.labels.items(), 1):
        values, inside = read_nearest(level, grid)
        place = scene.places[name]
        unknown = level.unknown if place.unknown is None else place.unknown
        if unknown is not None:
            inside &= values != unknown
        here = np.isin(values, place.values) if place.values else values != 0
        here &= inside
        gt[here] = number
        known &= inside
        found.append((values, here))
    gt[~known] = 0
    count = int(known.sum())
    ids = sum(len(np.unique(values[here & known])) for values, here in found)
    figures = {
        "min_ground_truth_fraction": count / known.size,
        "min_label_fraction": int(np.count_nonzero(gt)) / count if count else 0.0,
        "min_unique_ids": ids,
    }
    return _Labels(gt, known, figures)


def _finish(
    scene: Scene,
    number: int,
    index: int,
    corner: np.ndarray,
    labels: _Labels,
    attempt: int,
    dice: Dice,
) -> Volume:
    sampling = scene.sampling
    raw_grid = Grid(tuple(corner), sampling.min_resolution_for_raw, (sampling.raw_dim,) * 3)
    order, flips, turn = (0, 1, 2), (), None
    if sampling.augment:
        order = _ORDERS[dice.below(len(_ORDERS))]
        flips = tuple(axis for axis in range(3) if dice.below(2))
        turn = {"axes": list(order), "flips": list(flips)}
    raw = np.empty(raw_grid.shape, scene.raw.dtype)
    # Through a view that is turned back: a turned copy would be as large as raw again.
    read_mean(scene.raw, raw_grid, out=np.flip(raw, flips).transpose(np.argsort(order)))
    if raw.dtype.kind == "f" and not np.isfinite(raw).all():
        raise ValueError(f"{scene.raw.url} has pixels that are no numbers at {corner.tolist()} nm")
    gt, mask = turned(labels.gt, order, flips), None
    if sampling.gt_extension:
        mask = turned(labels.known.astype(np.uint8), order, flips)
    paths = {"raw": scene.raw.url, **{name: level.url for name, level in scene.labels.items()}}
    figures = labels.figures
    provenance = {
        "volume_index": index,
        "source_dataset": {"index": number, "name": scene.dataset.name, "paths": paths},
        "levels": scene.settings(),
        "crop": {"offset_nm": corner.tolist(), "shape_nm": [float(sampling.extent)] * 3},
        "voxel_size_nm": {
            "raw": float(sampling.min_resolution_for_raw),
            "gt": float(sampling.base_resolution),
        },
        "attempts": attempt,
        "augmentation": turn,
        "num_classes": len(sampling.organelles) + 1,
        "unique_classes": np.unique(gt).tolist(),
        "unique_ids": figures["min_unique_ids"],
        "label_fraction": figures["min_label_fraction"],
        "valid_gt_fraction": figures["min_ground_truth_fraction"],
    }
    return Volume(raw, gt, mask, provenance)


def turned(cube: np.ndarray, order: Sequence[int], flips: Sequence[int]) -> np.ndarray:
    """Axis i of the result is axis order[i] of the cube; then the axes in `flips` run backwards."""
    return np.ascontiguousarray(np.flip(cube.transpose(order), flips))


def _open(stores: Stores, place: Place, resolution: float) -> Level:
    return stores.open(place.path, place.resolution, place.translation).choose(resolution)


def _box(corner: np.ndarray, end: np.ndarray) -> str:
    return " x ".join(f"{low:g}..{high:g}" for low, high in zip(corner, end, strict=True)) + " nm"


def _nothing(index: int, sampling: Sampling, tally: _Tally, unfit: Mapping[str, str]) -> str:
    parts = [
        f"{count} below {name} {getattr(sampling, name)} (best {tally.best[name]:.4g})"
        for name, count in tally.reasons.items()
    ]
    parts += [f"{name}: {reason}" for name, reason in unfit.items()]
    drawn = sum(tally.reasons.values())
    names = sorted(tally.datasets)
    names = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    tried = f"none of {drawn} crops of {names} will do" if drawn else "no crop can be drawn"
    return f"volume {index}: {tried}: {'; '.join(parts)}"
