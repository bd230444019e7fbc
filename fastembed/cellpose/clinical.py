"""The tables that donor statistics start from: counts of tiles, and what is known of donors."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .infer import POSITIVE
from .tile_store import UNKNOWN

OUTCOMES = ("braaksc", "ceradsc", "cogdx", "dcfdx_lv", "plaq_d", "plaq_n", "nft", "gpath")
DONOR = "projid"
MISSING = frozenset({"", "na", "n/a", "nan", "none", "null", "."})
_PERCENTILE = re.compile(r"n_marker_positive_q(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class TileCounts:
    """The rows of a ``tile_counts.tsv``, T of them, columns as arrays.

    Attributes:
        donor, marker: str [T].
        total, area: int64 [T], objects and pixels.
        positive: int64 [T], objects above the threshold that the study reports.
        by_percentile: the same for every percentile that the table has.
    """

    donor: np.ndarray
    marker: np.ndarray
    total: np.ndarray
    area: np.ndarray
    positive: np.ndarray
    by_percentile: dict[float, np.ndarray]

    def __len__(self) -> int:
        return len(self.donor)

    def of(self, rows: np.ndarray) -> TileCounts:
        return TileCounts(
            self.donor[rows],
            self.marker[rows],
            self.total[rows],
            self.area[rows],
            self.positive[rows],
            {q: counts[rows] for q, counts in self.by_percentile.items()},
        )


@dataclass(frozen=True)
class Clinical:
    """A row per donor; outcomes float64 [D, Q], NaN where a value is missing."""

    donors: tuple[str, ...]
    outcomes: tuple[str, ...]
    values: np.ndarray
    not_in_table: tuple[str, ...] = ()


def read_tile_counts(path: str | Path) -> TileCounts:
    """Reads a ``tile_counts.tsv`` of `infer`, or of the study, which has one percentile.

    Raises:
        ValueError: a column is missing; no rows; a count that is none, more positive objects
            than objects, no pixels, a tile twice; by file, line and column.
        OSError: the file cannot be read.
    """
    names, rows = _read_table(Path(path))
    needed = ("donor", "marker", "n_total_cells", "n_marker_positive", "area_px")
    if lacking := [name for name in needed if name not in names]:
        raise ValueError(f"{path} has no column {', '.join(lacking)}; it has {', '.join(names)}")
    if not rows:
        raise ValueError(f"{path} has no tiles")
    if "tile_key" in names:
        twice = [key for key, n in Counter(row["tile_key"] for row in rows).items() if n > 1]
        if twice:
            raise ValueError(f"{path} has a tile more than once: {_some(twice)}")

    def counts(name: str) -> np.ndarray:
        return np.array([_count(row[name], path, line, name) for line, row in enumerate(rows, 2)])

    total, area, positive = counts("n_total_cells"), counts("area_px"), counts("n_marker_positive")
    by_percentile = {
        float(match[1]): counts(name) for name in names if (match := _PERCENTILE.fullmatch(name))
    } or {float(POSITIVE): positive}
    for column in (positive, *by_percentile.values()):
        if (column > total).any():
            line = 2 + int(np.argmax(column > total))
            raise ValueError(f"{path}, line {line}: more positive objects than objects")
    if (area == 0).any():
        raise ValueError(f"{path}, line {2 + int(np.argmax(area == 0))}: area_px must be above 0")
    return TileCounts(
        np.array([_donor(row["donor"]) or UNKNOWN for row in rows]),
        np.array([row["marker"].strip().lower() or UNKNOWN for row in rows]),
        total,
        area,
        positive,
        by_percentile,
    )


def read_clinical(
    path: str | Path, outcomes: Sequence[str] | None = None, donor_column: str | None = None
) -> Clinical:
    """Reads a clinical table, CSV or TSV, one row per donor.

    Args:
        outcomes: columns; None is those of `OUTCOMES` that there are, the others are named in
            `not_in_table`.
        donor_column: None is "projid", or the first column where there is no such one.

    Raises:
        ValueError: a column that is not there, an outcome that is no number, a donor with two
            rows, no rows; by name.
        OSError: the file cannot be read.
    """
    names, rows = _read_table(Path(path))
    column = donor_column or (DONOR if DONOR in names else names[0])
    if column not in names:
        raise ValueError(f"{path} has no column {column}; it has {', '.join(names)}")
    absent = [name for name in outcomes or OUTCOMES if name not in names]
    if outcomes is not None and absent:
        raise ValueError(
            f"outcomes: {path} has no column {', '.join(absent)}; it has {', '.join(names)}"
        )
    chosen = [name for name in dict.fromkeys(outcomes or OUTCOMES) if name in names]
    if not chosen:
        raise ValueError(
            f"outcomes: {path} has none of {', '.join(OUTCOMES)}; name some of {', '.join(names)}"
        )
    rows = [row for row in rows if _donor(row[column])]
    donors = [_donor(row[column]) for row in rows]
    if not donors:
        raise ValueError(f"{path} has no donors in column {column}")
    if twice := [donor for donor, n in Counter(donors).items() if n > 1]:
        raise ValueError(f"{path} has more than one row of donor {_some(sorted(twice))}")
    values = np.array(
        [
            [_outcome(row[name], path, name, donor) for name in chosen]
            for donor, row in zip(donors, rows, strict=True)
        ]
    )
    return Clinical(tuple(donors), tuple(chosen), values, tuple(absent) if not outcomes else ())


def _read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Column names and rows; tabs or commas, whichever the header has."""
    text = path.read_text(encoding="utf-8-sig")
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    reader = csv.DictReader(text.splitlines(), delimiter=delimiter, restkey="", restval="")
    names = [name.strip() for name in reader.fieldnames or ()]
    if not names:
        raise ValueError(f"{path} is empty")
    if len(set(names)) != len(names):
        raise ValueError(f"{path} has two columns of one name; it has {', '.join(names)}")
    reader.fieldnames = names
    rows = list(reader)
    for line, row in enumerate(rows, 2):
        if row.get(""):
            raise ValueError(f"{path}, line {line}: more fields than columns")
    return names, rows


def _donor(text: str) -> str:
    """ "10100574.0", as spreadsheets write it, is donor 10100574; "" where there is none."""
    donor = re.sub(r"\.0+$", "", text.strip())
    return "" if donor.lower() in MISSING else donor


def _count(text: str, path: str | Path, line: int, name: str) -> int:
    try:
        number = float(text)
        if number < 0 or number != int(number):
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"{path}, line {line}: {name} must be a count; got {text!r}") from None
    return int(number)


def _outcome(text: str, path: str | Path, name: str, donor: str) -> float:
    if text.strip().lower() in MISSING:
        return math.nan
    try:
        number = float(text)
    except ValueError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(
            f"{path}: outcome {name} must be numbers, or empty; donor {donor} has {text!r}"
        )
    return number


def _some(names: Sequence[str], limit: int = 10) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
