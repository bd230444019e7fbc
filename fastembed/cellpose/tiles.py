"""Tiles of a study on disk: which files belong together, and whose they are."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .images import SUFFIXES

MARKERS = ("gfap", "iba1", "neun", "olig2", "pecam")

# "_dapi-b0c0", "_b0c1", "-c2": with its separator, and nothing of a longer word.
_CHANNEL = re.compile(
    r"(?:[_-][A-Za-z0-9]+(?=-b\d))?(?:^|[_-])(?:b\d+)?c([012])(?![A-Za-z0-9])", re.I
)


@dataclass(frozen=True)
class Naming:
    """How marker and donor stand in the path of a tile.

    Args:
        markers: names, one of which is a folder of the path or a word of the file's name.
        donor: regular expression; its first match in the path, from the left, is the donor.
    """

    markers: tuple[str, ...] = MARKERS
    donor: str = r"\d{6,12}"

    def marker_of(self, path: Path) -> str | None:
        words = [part.lower() for part in path.parts]
        words += re.split(r"[_\-. ]", path.name.lower())
        return next((word for word in words if word in self.markers), None)

    def donor_of(self, path: Path) -> str | None:
        found = (re.search(self.donor, part) for part in path.parts)
        return next((match.group() for match in found if match), None)


@dataclass(frozen=True)
class Tile:
    """One field of view.

    Args:
        key: its path under the folder of all tiles, without channel and suffix, lower case.
        dapi: file of channel c0.
        image: file of the marker's channel, c1, or c2 where there is no c1.
        fallback: whether that is c2.
        marker, donor: None where the path does not say.
    """

    key: str
    dapi: Path
    image: Path
    fallback: bool
    marker: str | None
    donor: str | None


@dataclass(frozen=True)
class Tiles:
    """What is in a folder: tiles in order of their keys, and files that have no partner."""

    tiles: tuple[Tile, ...]
    unpaired: tuple[Path, ...]


def find_tiles(folder: str | Path, naming: Naming | None = None) -> Tiles:
    """Pairs the files ``*c0*`` of a folder and its subfolders with ``*c1*``, else ``*c2*``.

    Two files belong together if their paths are equal but for the channel: ``x_b0c0.tif`` and
    ``x_b0c1.tif``, or ``x_dapi-b0c0.tif`` and ``x_gfap-b0c1.tif``.

    Raises:
        OSError: the folder is not there.
        ValueError: two files of one channel would be the same tile.
    """
    folder, naming = Path(folder), naming or Naming()
    if not folder.is_dir():
        raise NotADirectoryError(f"tiles: {folder} is not a folder")
    channels: tuple[dict[str, Path], ...] = ({}, {}, {})
    for path in sorted(folder.rglob("*")):
        found = channel_of(path.stem) if path.suffix.lower() in SUFFIXES else None
        if found is None or path.stem.lower().endswith(("_mask", "_pred", "_cellbodies")):
            continue
        core, channel = found
        key = (path.relative_to(folder).parent / core).as_posix().lower()
        if key in channels[channel]:
            raise ValueError(
                f"{path} and {channels[channel][key]} would both be channel c{channel} of {key}"
            )
        channels[channel][key] = path

    tiles, unpaired = [], []
    for key in sorted(set().union(*channels)):
        dapi, first, second = (files.get(key) for files in channels)
        if dapi and (first or second):
            inside = dapi.relative_to(folder)
            tiles.append(
                Tile(key, dapi, first or second, first is None,
                     naming.marker_of(inside), naming.donor_of(inside))
            )  # fmt: skip
        else:
            unpaired += [path for path in (dapi, first, second) if path]
    return Tiles(tuple(tiles), tuple(unpaired))


def channel_of(stem: str) -> tuple[str, int] | None:
    """("x", 1) of "x_b0c1"; None where the name has no channel."""
    match = _CHANNEL.search(stem)
    if match is None:
        return None
    return stem[: match.start()] + stem[match.end() :], int(match.group(1))


@dataclass(frozen=True)
class Audit:
    """How far tiles and a clinical table cover each other; the keys of `audit`'s JSON."""

    n_paired_tiles: int
    n_marker_from_c2_fallback: int
    n_unpaired_files: int
    n_tile_donors: int
    n_clinical_donors: int
    unknown_donor_tiles: int
    unknown_marker_tiles: int
    donors_not_in_clinical: list[str]
    clinical_donors_missing_tiles: list[str]
    clinical_duplicate_donors: list[str]
    marker_tile_counts: dict[str, int]
    unpaired_files: list[str] = field(default_factory=list)


def audit(tiles: Tiles, clinical_donors: Iterable[str]) -> Audit:
    """Counts tiles, donors and markers, and names what is on one side only."""
    rows = Counter(clinical_donors)
    donors = {tile.donor for tile in tiles.tiles} - {None}
    markers = Counter(tile.marker or "unknown" for tile in tiles.tiles)
    return Audit(
        n_paired_tiles=len(tiles.tiles),
        n_marker_from_c2_fallback=sum(tile.fallback for tile in tiles.tiles),
        n_unpaired_files=len(tiles.unpaired),
        n_tile_donors=len(donors),
        n_clinical_donors=len(rows),
        unknown_donor_tiles=sum(tile.donor is None for tile in tiles.tiles),
        unknown_marker_tiles=markers.get("unknown", 0),
        donors_not_in_clinical=sorted(donors - rows.keys()),
        clinical_donors_missing_tiles=sorted(rows.keys() - donors),
        clinical_duplicate_donors=sorted(donor for donor, count in rows.items() if count > 1),
        marker_tile_counts=dict(sorted(markers.items())),
        unpaired_files=[str(path) for path in tiles.unpaired],
    )


def read_clinical_donors(path: str | Path, column: str = "projid") -> list[str]:
    """The donors of a clinical CSV, one per row.

    "10100574.0", as spreadsheets write it, is 10100574.

    Raises:
        ValueError: there is no such column.
        OSError: the file cannot be read.
    """
    with open(path, newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        if column not in (reader.fieldnames or ()):
            raise ValueError(f"{path} has no column {column}; it has {reader.fieldnames}")
        return [re.sub(r"\.0+$", "", row[column].strip()) for row in reader if row[column].strip()]
