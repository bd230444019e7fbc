"""What the user names: a YAML of data sets, or a tree as CellMap keeps it.

The YAML, with every key there is; figures are nanometres along z, y, x, or one for all three::

    datasets:
      - name: vnc                      # unique
        raw: sections/raw              # a place, or a mapping:
        labels:
          mito:
            path: s3://bucket/vnc.zarr/labels/mito
            resolution: [50, 4.6, 4.6] # edges of the finest voxel
            translation: [0, 0, 0]     # centre of the first voxel
            values: [191]              # labels only: these ids are the organelle, all else not
            unknown: 255               # labels only: this id is where nobody knows

A place is a local path (relative to the YAML), or a ``file://``, ``http(s)://``, ``s3://`` or
``gs://`` address; see `stores.Stores.open`. Resolution and translation stand for those of the
metadata, and must be given where there are none, as with sections.

The tree, as https://janelia-cellmap.github.io/cellmap-segmentation-challenge describes it::

    <root>/<data set>/<data set>.zarr/recon-1/em/<array>
                                              labels/groundtruth/crop<N>/<organelle>
                                              labels/inference/segmentations/<organelle>

with ``recon-1`` also right under the data set's folder, and ``.n5`` for ``.zarr``.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from .addresses import shown
from .multiscales import Vector

_RAW_KEYS = ("path", "resolution", "translation")
_LABEL_KEYS = (*_RAW_KEYS, "values", "unknown")
_EM_ARRAYS = ("fibsem-uint8", "fibsem-uint16")


@dataclass(frozen=True)
class Place:
    """Where an image is, and what its own metadata do not say.

    Attributes:
        path: local, or an address.
        resolution: edges of the finest voxel along z, y, x, nm.
        translation: centre of the first voxel, nm.
        values: of labels, the ids that count; all but 0 and `unknown` where empty.
        unknown: of labels, the id of voxels that nobody knows.
    """

    path: str
    resolution: Vector | None = None
    translation: Vector | None = None
    values: tuple[int, ...] = ()
    unknown: int | None = None

    def settings(self) -> dict:
        """JSON form: what is given."""
        fields = {**asdict(self), "path": shown(self.path)}
        given = {name: value for name, value in fields.items() if value not in (None, ())}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}


@dataclass(frozen=True)
class DataSet:
    """A raw image and its labels, by organelle."""

    name: str
    raw: Place
    labels: Mapping[str, Place] = field(default_factory=dict)

    def settings(self) -> dict:
        """JSON form."""
        labels = {name: place.settings() for name, place in self.labels.items()}
        return {"name": self.name, "raw": self.raw.settings(), "labels": labels}


def read_datasets(path: str | Path) -> list[DataSet]:
    """The data sets of a YAML file, in its order.

    Raises:
        ValueError: not YAML, a key that is unknown or absent, a figure that is none.
        OSError: the file cannot be read.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    content = _mapping(content, ("datasets",), ("datasets",), str(path))
    rows = content["datasets"]
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: datasets must be a list with one data set at least")
    datasets: list[DataSet] = []
    for number, row in enumerate(rows):
        where = f"{path}: datasets[{number}]"
        row = _mapping(row, ("name", "raw", "labels"), ("name", "raw", "labels"), where)
        name = str(row["name"])
        if any(name == other.name for other in datasets):
            raise ValueError(f"{where}: the name {name!r} is there twice")
        raw = _place(row["raw"], _RAW_KEYS, f"{where}.raw", path.parent)
        if not isinstance(row["labels"], Mapping) or not row["labels"]:
            raise ValueError(f"{where}.labels must map organelles to places")
        labels = {
            str(organelle): _place(entry, _LABEL_KEYS, f"{where}.labels.{organelle}", path.parent)
            for organelle, entry in row["labels"].items()
        }
        datasets.append(DataSet(name, raw, labels))
    return datasets


def find_cellmap(
    root: str | Path,
    crops: Sequence[str | int] | None = None,
    inference: Sequence[str] | None = None,
    *,
    em: str | None = None,
) -> list[DataSet]:
    """The data sets of a CellMap tree, in alphabetical order and that of the crops' numbers.

    Args:
        root: local folder that holds the data sets' folders.
        crops: numbers of ground truth crops (``115`` or ``crop115``) to take.
        inference: names of data sets whose inference segmentations to take. Without `crops`
            and `inference` all ground truth is taken; with either, what it names, and no more.
        em: name of the array in ``em/``; by default the only one, or fibsem-uint8, or
            fibsem-uint16.

    Raises:
        ValueError: a tree without what is asked for; the message says what it has.
        OSError: the tree cannot be read.
    """
    if "://" in str(root):
        raise ValueError(
            f"data-root must be a local folder, since it is listed; got {root}. "
            "Name remote data in a datasets YAML"
        )
    root = Path(os.path.normpath(Path(root).absolute()))
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    wanted = None if crops is None else {_crop_number(crop) for crop in crops}
    truth: list[tuple[int, DataSet]] = []
    segmented: list[tuple[str, DataSet]] = []
    for name, recon in _reconstructions(root):
        raw = Place(str(_em_array(recon, em)))
        for number, folder in _crops(recon / "labels" / "groundtruth"):
            data = DataSet(f"{name}/{folder.name}", raw, _organelles(folder))
            truth.append((number, data))
        folder = recon / "labels" / "inference" / "segmentations"
        if folder.is_dir():
            data = DataSet(f"{name}/inference", raw, _organelles(folder))
            segmented.append((name.partition("/")[0], data))
    _check_filter("crop-filter", wanted, {number for number, _ in truth}, f"crops of {root}")
    have = {name for name, _ in segmented}
    _check_filter("inference-filter", inference, have, f"data sets of {root} with inference")
    found = []
    if wanted is not None or inference is None:
        found += [data for number, data in truth if wanted is None or number in wanted]
    if inference is not None:
        found += [data for name, data in segmented if name in inference]
    if not found:
        raise ValueError(f"{root} has no labels/groundtruth/crop<N> below <data set>/recon-<N>")
    return found


def with_organelles(datasets: Sequence[DataSet], organelles: Sequence[str]) -> list[DataSet]:
    """Those of the data sets that have labels for all the organelles.

    Raises:
        ValueError: an organelle that no data set has, or no data set that has them all.
    """
    there = sorted({organelle for dataset in datasets for organelle in dataset.labels})
    if absent := [organelle for organelle in organelles if organelle not in there]:
        raise ValueError(f"no data set has the organelles {absent}; there are {there}")
    chosen = [dataset for dataset in datasets if set(organelles) <= dataset.labels.keys()]
    if not chosen:
        have = "; ".join(f"{dataset.name}: {sorted(dataset.labels)}" for dataset in datasets[:20])
        raise ValueError(f"no data set has all of the organelles {list(organelles)}; {have}")
    return chosen


def _place(entry: object, keys: Sequence[str], where: str, folder: Path) -> Place:
    if isinstance(entry, str):
        entry = {"path": entry}
    entry = _mapping(entry, keys, ("path",), where)
    path = entry["path"]
    if not isinstance(path, str) or not path:
        raise ValueError(f"{where}.path must be a path or an address; got {path!r}")
    resolution, translation = entry.get("resolution"), entry.get("translation")
    if resolution is not None:
        resolution = _vector(resolution, f"{where}.resolution", lambda v: v > 0, "numbers > 0")
    if translation is not None:
        translation = _vector(translation, f"{where}.translation", lambda v: True, "numbers")
    values, unknown = entry.get("values", []), entry.get("unknown")
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError(f"{where}.values must be a list of integers; got {values!r}")
    if unknown is not None and type(unknown) is not int:
        raise ValueError(f"{where}.unknown must be an integer; got {unknown!r}")
    # Absolute, since it is part of a cache's settings: a job may be started from anywhere.
    place = path if "://" in path else os.path.normpath(folder.absolute() / Path(path).expanduser())
    return Place(place, resolution, translation, tuple(values), unknown)


def _vector(value: object, what: str, check: Callable[[float], bool], rule: str) -> Vector:
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value] * 3
    good = len(values) == 3 and all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and check(v)
        for v in values
    )
    if not good:
        raise ValueError(f"{what} must be {rule}, one or three along z, y, x; got {value!r}")
    return tuple(float(v) for v in values)


def _mapping(entry: object, keys: Iterable[str], needed: Iterable[str], where: str) -> Mapping:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} must be a mapping with {', '.join(keys)}; got {entry!r}")
    if unknown := [str(key) for key in entry if key not in keys]:
        raise ValueError(f"{where} has unknown keys {unknown}; there are {', '.join(keys)}")
    if absent := [key for key in needed if key not in entry]:
        raise ValueError(f"{where} lacks {', '.join(absent)}")
    return entry


def _check_filter(option: str, wanted: Iterable | None, there: set, what: str) -> None:
    if absent := sorted(set(wanted or ()) - there):
        raise ValueError(f"{option} names {absent}, which are none of the {what}: {sorted(there)}")


def _reconstructions(root: Path) -> list[tuple[str, Path]]:
    found = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        name = folder.name.removesuffix(".zarr").removesuffix(".n5")
        homes = [folder / f"{name}.zarr", folder / f"{name}.n5", folder]
        recons = [path for home in homes for path in sorted(home.glob("recon-*")) if path.is_dir()]
        for recon in recons:
            several = len(recons) > 1
            found.append((f"{name}/{recon.name}" if several else name, recon))
    if not found:
        raise ValueError(f"{root} has no data set: no <data set>/<data set>.zarr/recon-<N>")
    return found


def _em_array(recon: Path, em: str | None) -> Path:
    folder = recon / "em"
    names = (
        sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.exists() else []
    )
    if em is None:
        usual = [name for name in _EM_ARRAYS if name in names]
        choice = names[0] if len(names) == 1 else next(iter(usual), None)
    else:
        choice = em if em in names else None
    if choice is None:
        raise ValueError(
            f"{folder} must have the array {em or ' or '.join(_EM_ARRAYS)}; it has {names}"
        )
    return folder / choice


def _crops(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    matches = [(re.fullmatch(r"crop0*(\d+)", path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in matches if match and path.is_dir())


def _crop_number(crop: str | int) -> int:
    digits = re.fullmatch(r"(?:crop)?(\d+)", str(crop))
    if digits is None:
        raise ValueError(f"crop-filter takes numbers of crops, as 115 or crop115; got {crop!r}")
    return int(digits[1])


def _organelles(folder: Path) -> dict[str, Place]:
    return {
        path.name: Place(str(path))
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    }
