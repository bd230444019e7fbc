"""Old store and logs into a new store: sorted by key, beside the old one, put in its place."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence, Set
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .. import signature
from . import journal, shards
from .shards import Shards

ARRAY = "embeddings.zarr"
INDEX = "index.parquet"
FINGERPRINTS = "shards.crc"
_STORE = re.compile(r"store-[0-9a-f]{16}|\.store-building")
_BUILDING = ".store-building"
_ROW_GROUP = 1 << 17


def current(folder: Path) -> Path | None:
    """The folder that holds the array and the index; None where there is no store yet."""
    array = folder / ARRAY
    return array.resolve().parent if (array / "zarr.json").exists() else None


def check_writable(folder: Path) -> None:
    """Raises FileExistsError where the store's names are taken by something else."""
    for name in (ARRAY, INDEX):
        if (folder / name).exists() and not (folder / name).is_symlink():
            raise FileExistsError(
                f"{folder / name} is no link into a store-<digest> folder (a copy that followed "
                "links, or another program's): use another output folder"
            )


def merge(
    folder: Path,
    order: Sequence[str],
    drop: Set[str] = frozenset(),
    lost: Set[int] = frozenset(),
) -> None:
    """Leaves one store with all that is committed, less what is named in `drop`, and no logs.

    For whoever has the folder alone. Memory grows with the index, not with the vectors.

    Args:
        order: columns of the index that sort it. Names settle what is equal in them.
        lost: shards that cannot be read; all that they held must be in `drop`.
    """
    old = current(folder)
    logs = [(path, log) for path in journal.paths(folder) if len(log := journal.Log(path))]
    if logs or (old and drop):
        sources = [Shards(old / ARRAY, lost)] if old else []
        tables = [pq.read_table(old / INDEX).drop_columns("row")] if old else []
        places = [np.arange(len(source)) for source in sources]
        for _, log in logs:
            sources.append(log)
            tables.append(log.index)
            places.append(log.places)
        index = _sorted(tables, places, order, drop)
        new = None if index is None else _build(folder, index, sources, old)
        _flip(folder, new)
        old = new
    for path in journal.paths(folder):
        path.unlink()
    for path in folder.iterdir():
        if _STORE.fullmatch(path.name) and path != old:
            shutil.rmtree(path)


def _sorted(
    tables: list[pa.Table], places: list[np.ndarray], order: Sequence[str], drop: Set[str]
) -> pa.Table | None:
    """All index rows in order, each once, with `source` and `place` of its vector; None where
    there is none."""
    dropped = pa.array(drop, pa.large_string())
    parts = []
    for number, (table, place) in enumerate(zip(tables, places, strict=True)):
        table = table.replace_schema_metadata()
        table = table.append_column("source", pa.array(np.full(len(place), number, np.int32)))
        table = table.append_column("place", pa.array(place))
        table = table.filter(pc.invert(pc.is_in(table["name"], dropped))) if drop else table
        parts += [table] if len(table) else []
    if not parts:
        return None
    table = pa.concat_tables(parts)
    table = table.sort_by([(name, "ascending") for name in (*order, "name", "source", "place")])
    names = table["name"].combine_chunks()
    # Two runs of the same samples, or a kill between a merge and the removal of its logs.
    first = np.ones(len(names), bool)
    first[1:] = pc.not_equal(names[1:], names[:-1])
    return table.filter(pa.array(first)).combine_chunks()


def _build(folder: Path, index: pa.Table, sources: list, old: Path | None) -> Path:
    """The store of these rows, complete and on disk, under its own name."""
    dtype, dim = sources[-1].dtype, sources[-1].dim
    of, place = (index[name].to_numpy() for name in ("source", "place"))
    index = index.drop_columns(["source", "place"])
    index = index.append_column("row", pa.array(np.arange(len(index))))
    about = {"signature": _signature(folder), "dtype": dtype.name, "dim": dim}
    index = index.replace_schema_metadata({"fastembed": json.dumps(about)})

    building = folder / _BUILDING
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    pq.write_table(index, building / INDEX, compression="zstd", row_group_size=_ROW_GROUP)
    digest = hashlib.sha256((building / INDEX).read_bytes()).hexdigest()[:16]
    final = folder / f"store-{digest}"
    if final == old:
        return final

    def fill(number: int, rows: np.ndarray) -> Path | None:
        start = number * shards.SHARD_ROWS
        part = slice(start, start + len(rows))
        if old and _is_shard(of[part], place[part], number, len(sources[0])):
            return shards.shard_path(old / ARRAY, number)
        present = np.unique(of[part])
        if len(present) == 1:
            sources[present[0]].rows_into(rows, place[part])
            return None
        for source in present:
            mine = of[part] == source
            some = np.empty((np.count_nonzero(mine), dim), dtype)
            sources[source].rows_into(some, place[part][mine])
            rows[mine] = some
        return None

    shards.write(building / ARRAY, (len(index), dim), dtype, {"fastembed": about}, fill)
    _write_fingerprints(building, len(index), dim, dtype)
    # Shards are on disk, new or linked; folders and all else is not.
    for path in [*building.rglob("*"), building]:
        if path.is_dir() or path.name in (INDEX, FINGERPRINTS, "zarr.json"):
            journal.sync(path)
    shutil.rmtree(final, ignore_errors=True)  # of a run that was killed before it flipped
    os.rename(building, final)
    return final


def fingerprints(store: Path) -> list[str] | None:
    """Of a store's shards, as they were when it was built; None of an earlier version's store."""
    path = store / FINGERPRINTS
    return path.read_text(errors="replace").split("\n")[:-1] if path.exists() else None


def _write_fingerprints(store: Path, rows: int, dim: int, dtype: np.dtype) -> None:
    lines = [
        shards.fingerprint(
            shards.shard_path(store / ARRAY, number), shards.shard_rows(rows, number), dim, dtype
        )
        for number in range(-(-rows // shards.SHARD_ROWS))
    ]
    (store / FINGERPRINTS).write_text("".join(f"{line}\n" for line in lines))


def _is_shard(of: np.ndarray, place: np.ndarray, number: int, old_rows: int) -> bool:
    """Whether these rows are shard `number` of the old store, which is source 0."""
    start = number * shards.SHARD_ROWS
    return (
        start < old_rows
        and len(of) == shards.shard_rows(old_rows, number)
        and not of.any()
        and np.array_equal(place, np.arange(start, start + len(of)))
    )


def _flip(folder: Path, new: Path | None) -> None:
    """Puts a store in the place of the old one, in one step; with None there is none after it."""
    journal.sync(folder)
    if new is None:
        for name in (ARRAY, INDEX):
            (folder / name).unlink(missing_ok=True)
    else:
        # The first time there are two links to make: until the array's is there, neither is.
        _point(folder / INDEX, f"{ARRAY}/../{INDEX}")
        _point(folder / ARRAY, f"{new.name}/{ARRAY}")
    journal.sync(folder)


def _point(link: Path, target: str) -> None:
    if link.is_symlink() and os.readlink(link) == target:
        return
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def _signature(folder: Path) -> str:
    """Of the settings that the folder's vectors were made with; empty where none stand there."""
    path = folder / signature.FILE_NAME
    return json.loads(path.read_text())["signature"] if path.exists() else ""
