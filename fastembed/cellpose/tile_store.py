"""Committed tiles of an inference, and the table that is made of them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .. import checksums, commands, signature
from ..checksums import Checksums
from ..records import Item
from ..staging import no_link, remove_stale_temporaries, write_bytes_atomically
from .images import tiff_bytes
from .tables import write_json, write_tsv
from .tiles import Tile

UNKNOWN = "unknown"
TABLE, SUMMARY, FAILURES = "tile_counts.tsv", "infer.json", "failures"
RECORDS, MASKS = "tiles", "pred_masks"
_PLAIN = ("tile_key", "tile_c0", "tile_c1", "c2_fallback", "donor", "marker")


class TileStore:
    """The committed tiles of a folder, and the table that is made of them."""

    def __init__(self, folder: Path, keep_masks: bool) -> None:
        self.folder, self.keep_masks = folder, keep_masks
        self.checksums = Checksums(folder)
        self.records, self.masks = folder / RECORDS, folder / MASKS

    def open(self) -> set[str]:
        """Makes the folders; names of the tiles that are done."""
        self.records.mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, self.records):
            remove_stale_temporaries(folder)
        done = {path.stem for path in self._paths()}
        if self.keep_masks:
            self.masks.mkdir(exist_ok=True)
            remove_stale_temporaries(self.masks)
            done &= {path.stem for path in self.masks.glob("*.tif")}
        return done

    def commit(self, tile: Tile, root: Path, labels: np.ndarray, percentiles, counts) -> None:
        name = as_item(tile).name
        files = {f"{MASKS}/{name}.tif": tiff_bytes(labels)} if self.keep_masks else {}
        total, thresholds, positive = counts
        names = [label_of(percentile) for percentile in percentiles]
        record = {
            "tile_key": tile.key,
            "tile_c0": tile.dapi.relative_to(root).as_posix(),
            "tile_c1": tile.image.relative_to(root).as_posix(),
            "c2_fallback": int(tile.fallback),
            "donor": tile.donor or UNKNOWN,
            "marker": tile.marker or UNKNOWN,
            "shape": list(labels.shape),
            "n_total_cells": total,
            "n_marker_positive": dict(zip(names, positive.tolist(), strict=True)),
            "threshold": dict(zip(names, thresholds.tolist(), strict=True)),
        }
        files[f"{RECORDS}/{name}.json"] = json.dumps(record).encode()
        for file, content in files.items():
            self.checksums.note(file, content)
        self.checksums.append(sync=True)
        for file, content in files.items():  # the record last: it says that the tile is done
            write_bytes_atomically(self.folder / file, content)

    def rebuild(self, model: str, positive: float, keys: Sequence[str] | None) -> int:
        """Table and summary from all records; `keys` are the tiles there are to do."""
        with self._locked():
            # Listed within the lock: whoever rebuilds last has seen all that is committed.
            rows = self.table(model, positive)
            self.checksums.close()
            if rows:
                write_tsv(self.folder / TABLE, rows)
            else:
                (self.folder / TABLE).unlink(missing_ok=True)
            if keys is not None:
                there = {row["tile_key"] for row in rows}
                write_json(
                    self.folder / SUMMARY,
                    {
                        "model": model,
                        "n_tiles": len(keys),
                        "n_committed": len(rows),
                        "missing": sorted(set(keys) - there),
                        "no_longer_in_folder": sorted(there - set(keys)),
                    },
                )
        return len(rows)

    def table(self, model: str, positive: float) -> list[dict[str, object]]:
        """The table's rows, of all records; ValueError where one is damaged."""
        rows = (_row(path, model, label_of(positive)) for path in self._paths())
        return sorted(rows, key=lambda row: row["tile_key"])

    def remove_all(self) -> None:
        for path in [*self._paths(), *self.masks.glob("*.tif"), *self.folder.glob("*.jsonl")]:
            path.unlink()
        for name in (TABLE, SUMMARY, checksums.FILE_NAME, commands.FILE_NAME, signature.FILE_NAME):
            (self.folder / name).unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        return [path for path in self.records.glob("*.json") if not path.name.startswith(".")]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time; the lock ends with its process, however it ends."""
        with open(self.folder / f".{TABLE}.lock", "w", opener=no_link) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


def _row(path: Path, model: str, positive: str) -> dict[str, object]:
    try:
        record = json.loads(path.read_text())
        total, area = record["n_total_cells"], int(np.prod(record["shape"]))
        counts, thresholds = record["n_marker_positive"], record["threshold"]
        count = counts[positive]
        row = {name: record[name] for name in _PLAIN}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not the record of a tile ({error!r}); remove it to have the tile made again"
        ) from error
    return {
        "model": model,
        **row,
        "n_total_cells": total,
        "n_marker_positive": count,
        "area_px": area,
        "total_density_mpx": total / area * 1e6,
        "pos_density_mpx": count / area * 1e6,
        "ratio": count / total if total else "",
        **{f"n_marker_positive_{name}": number for name, number in counts.items()},
        **{f"threshold_{name}": number for name, number in thresholds.items()},
    }


def label_of(percentile: float) -> str:
    """How a percentile stands in column names: 75 is "q75", 97.5 is "q97.5"."""
    return f"q{percentile:g}"


def as_item(tile: Tile) -> Item:
    """The tile as the library's shards know samples; its name is that of its files."""
    # The digest keeps a/b_c and a_b/c apart, and names below what file systems take.
    digest = hashlib.sha1(tile.key.encode(), usedforsecurity=False).hexdigest()[:10]
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", tile.key)[-150:]
    return Item(key=tile.key, path=str(tile.dapi), name=f"{plain}-{digest}")
