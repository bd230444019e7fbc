"""Folders with a zarr store: chunks, index, logs."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .. import commands, signature, staging
from ..store import journal, shards
from ..store.merge import ARRAY, FINGERPRINTS, INDEX, current, fingerprints, merge
from ..store.writer import Zarr
from .cache import (
    SET_ASIDE,
    Effort,
    Progress,
    drop_set_aside,
    each,
    is_temporary,
    set_aside,
    tell_temporary,
)
from .findings import DAMAGED, MISSING, ROW, TEMPORARY, UNMERGED, UNREADABLE, Verdict

_STORE = re.compile(r"store-[0-9a-f]{16}")


class StoreOf:
    """``embeddings.zarr`` and ``index.parquet``, of any job with --format zarr."""

    form = "zarr"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: list[str] = []  # by row
        self._lost: set[int] = set()  # shards that cannot be opened
        self._whole = True  # whether the index can be trusted
        self._torn = False  # whether commits in a log are damaged: nothing names their outputs
        self._metadata: bytes | None = None  # of the array, where its own are damaged

    def check(self, effort: Effort, progress: Progress | None) -> Verdict:
        """Looks; changes nothing."""
        verdict = Verdict(str(self.folder), self.form, str(self.folder / INDEX))
        store = self._store()
        self._names, self._lost, self._whole, self._metadata = [], set(), True, None
        self._torn = False
        self._tell_logs(verdict)
        if store is not None or (self.folder / ARRAY).is_symlink():
            self._tell_store(store, verdict, effort, progress)
        self._tell_others(store, verdict)
        return verdict

    def _store(self) -> Path | None:
        """The folder that the links lead to, also where the array has lost its metadata."""
        store = (self.folder / ARRAY).resolve().parent
        return store if (store / INDEX).exists() or current(self.folder) else None

    def _tell_logs(self, verdict: Verdict) -> None:
        for path in journal.paths(self.folder):
            try:
                log = journal.Log(path)
            except (OSError, ValueError, pa.ArrowException) as error:
                self._torn = True
                verdict.add(DAMAGED, path.name, f"it cannot be read: {error}")
                continue
            verdict.outputs += len(log)
            verdict.add(UNMERGED, path.name, f"{len(log)} vectors are committed and not merged: "
                        "a run is at work, or the next one merges them")  # fmt: skip
            if log.damaged:
                self._torn = True
                verdict.add(DAMAGED, path.name, f"{log.damaged} commits in it are damaged")

    def _tell_store(
        self, store: Path | None, verdict: Verdict, effort: Effort, progress: Progress | None
    ) -> None:
        try:
            if store is None:
                raise ValueError(f"{ARRAY} leads nowhere")
            table, about = self._read_index(store, verdict)
        except (OSError, ValueError, pa.ArrowException) as error:
            self._whole = False
            verdict.add(UNREADABLE, INDEX, str(error))
            return
        self._names = table["name"].to_pylist()
        verdict.outputs += len(self._names)
        reason, right = _fault_of_metadata(store / ARRAY, len(self._names), about)
        if reason:
            verdict.add(DAMAGED, f"{ARRAY}/zarr.json", reason)
            self._metadata = right
        dtype, dim = np.dtype(about["dtype"]), about["dim"]
        count = -(-len(self._names) // shards.SHARD_ROWS)
        verdict.files = -(-len(self._names) // shards.CHUNK_ROWS)
        read = set(effort.chosen(range(count)))
        prints: list[str | None] | None = fingerprints(store)
        if prints is None:
            verdict.notes.append("a store of an earlier version: it has no fingerprints of shards")
            prints = [None] * count
        elif len(prints) != count:
            verdict.add(DAMAGED, FINGERPRINTS, f"it has {len(prints)} lines; shards are {count}")
            prints += [""] * count

        def look(number: int) -> tuple[int, str, Sequence[int]]:
            rows = shards.shard_rows(len(self._names), number)
            path = shards.shard_path(store / ARRAY, number)
            return number, *shards.faults(path, rows, dim, dtype, prints[number], number in read)

        for number, reason, chunks in each(look, range(count), effort.threads, group=1):
            start = number * shards.SHARD_ROWS
            rows = shards.shard_rows(len(self._names), number)
            file = f"{ARRAY}/c/{number}/0"
            if reason:
                self._lost.add(number)
                kind = MISSING if reason.startswith("it is not there") else DAMAGED
                verdict.add(kind, file, reason, self._names[start : start + rows])
                continue
            for chunk in chunks:
                first = start + chunk * shards.CHUNK_ROWS
                verdict.add(DAMAGED, f"{file} chunk {chunk}", "its CRC-32C differs",
                            self._names[first : first + shards.CHUNK_ROWS])  # fmt: skip
            if number in read:
                verdict.verified += -(-rows // shards.CHUNK_ROWS) - len(chunks)
                verdict.bytes += rows * dim * dtype.itemsize
            if progress is not None:
                progress(number + 1, count)

    def _read_index(self, store: Path, verdict: Verdict) -> tuple[pa.Table, dict]:
        content = (store / INDEX).read_bytes()
        if _STORE.fullmatch(store.name):
            digest = hashlib.sha256(content).hexdigest()[:16]
            if store.name != f"store-{digest}":
                verdict.add(DAMAGED, INDEX, f"its digest {digest} is not that of {store.name}")
                self._whole = False
        else:
            verdict.notes.append(f"a copy that followed links: {INDEX} has no checksum")
            verdict.unlisted += 1
        table = pq.read_table(pa.BufferReader(content))
        about = json.loads(table.schema.metadata[b"fastembed"])
        if not np.array_equal(table["row"].to_numpy(), np.arange(len(table))):
            verdict.add(ROW, INDEX, "its rows are not those of the array, in order")
            self._whole = False
        return table, about

    def _tell_others(self, store: Path | None, verdict: Verdict) -> None:
        logs = set(journal.paths(self.folder))
        ours = {ARRAY, INDEX, signature.FILE_NAME, commands.FILE_NAME, SET_ASIDE}
        for path in sorted(self.folder.iterdir()):
            name = path.name
            if _STORE.fullmatch(name) or name == ".store-building":
                if path != store:
                    verdict.add(TEMPORARY, name, "left by a merge that was stopped")
            elif is_temporary(name) and not path.is_symlink():
                tell_temporary(verdict, name)
            elif is_temporary(name):
                verdict.add(TEMPORARY, name, "left by a merge that was stopped")
            elif not (name in ours or name.endswith((".lock", ".jsonl")) or path in logs):
                verdict.foreign += 1

    # Repairing -------------------------------------------------------------------------

    def withdraw(self, verdict: Verdict) -> set[str] | None:
        """Drops the vectors of damaged chunks from the store; all of it, where its index is.

        Returns None then: which vectors there were, only the source can tell.
        """
        order = self._order()
        with Zarr(self.folder).lock.alone() as alone:
            if not alone:
                raise OSError(f"another run is writing into {self.folder}: try again later")
            if self._metadata is not None:
                path = self._store() / ARRAY / "zarr.json"
                staging.write_bytes_atomically(path, self._metadata)
            if not self._whole:
                self._set_aside()
            drop = verdict.to_make if self._whole else frozenset()
            merge(self.folder, order, drop, self._lost if self._whole else frozenset())
        return verdict.to_make if self._whole and not self._torn else None

    def _set_aside(self) -> None:
        for name in (INDEX, ARRAY):
            (self.folder / name).unlink(missing_ok=True)
        journal.sync(self.folder)
        for path in self.folder.glob("store-*"):
            if _STORE.fullmatch(path.name):
                set_aside(self.folder, path.name)

    def _order(self) -> list[str]:
        """The columns that sort the index."""
        schemas = [
            log.index.schema for path in journal.paths(self.folder) if len(log := journal.Log(path))
        ]
        if self._whole and (store := self._store()) is not None:
            schemas.append(pq.read_schema(store / INDEX))
        names = schemas[-1].names if schemas else []
        return [name for name in names if name not in ("name", "row")]

    def committed(self) -> set[str]:
        """Names of the outputs that the store or its logs hold now."""
        names: set[str] = set()
        if (store := current(self.folder)) is not None:
            names.update(pq.read_table(store / INDEX, columns=["name"])["name"].to_pylist())
        for path in journal.paths(self.folder):
            if len(log := journal.Log(path)):
                names.update(log.index["name"].to_pylist())
        return names

    def tidy(self) -> None:
        """Deletes a store that was set aside, once there is one of the same name."""
        drop_set_aside(self.folder, lambda name: (self.folder / name).exists())


def _fault_of_metadata(array: Path, rows: int, about: dict) -> tuple[str, bytes]:
    """What is wrong with an array's metadata, and what they should be."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / ARRAY
        shards.create(path, (rows, about["dim"]), np.dtype(about["dtype"]), {"fastembed": about})
        right = (path / "zarr.json").read_bytes()
    try:
        if json.loads((array / "zarr.json").read_bytes()) == json.loads(right):
            return "", right
        return "it is not what stands in the index", right
    except (OSError, ValueError) as error:
        return f"it cannot be read: {error}", right
