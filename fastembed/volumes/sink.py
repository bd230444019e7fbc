"""Volumes to files that are complete or do not count.

``volume_000007_{features,gt,mask}.zarr`` are written chunk by aligned chunk, each durable before
the next is counted; ``volume_000007_metadata.json`` appears by a rename when all are. So a volume
whose metadata exist is whole, and one that a killed run left behind is made again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import IO

import numpy as np
import torch

from ..records import Item
from ..staging import no_link, sync_folder, write_bytes_atomically
from .files import (
    METADATA,
    Form,
    array_paths,
    checksum,
    finished,
    metadata_path,
    units,
    write_ome_metadata,
)
from .recipe import VolumeFeatures


class VolumeFiles:
    """Sink of volumes: arrays through TensorStore, and metadata to be put in place by the index.

    Args:
        folder: the output folder.
        form: chunks, compression, layout.
        configuration: what the metadata say of the settings, JSON-ready.
        voxel: side of an output voxel, nm.
        threads: chunks in flight, each with a buffer of its own.
    """

    holds_parts = True  # what was drawn is a setting

    def __init__(
        self,
        folder: str | Path,
        form: Form | None = None,
        *,
        configuration: Mapping[str, object] | None = None,
        voxel: float = 1.0,
        threads: int = 8,
    ) -> None:
        self.folder = Path(folder).resolve()
        self.files = form or Form()
        self.configuration = dict(configuration or {})
        self.voxel = voxel
        self.threads = threads
        self._locks: dict[str, IO] = {}

    @property
    def form(self) -> dict:
        """For the signature."""
        return self.files.settings()

    def open(self) -> set[str]:
        """Makes the folder ready; returns the names of the volumes that are finished in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return finished(self.folder)

    def todo(self, item: Item, done: Set[str]) -> Item | None:
        """The item, if it is not among the names `done`."""
        return None if item.name in done else item

    def remove(self, name: str) -> None:
        # Metadata first: arrays without them are nothing, and they without arrays a lie.
        metadata_path(self.folder, name).unlink(missing_ok=True)
        # The group first: its arrays lie in it, and it may be a link.
        _remove_tree(self.folder / f"{name}.ome.zarr")
        for path in array_paths(self.folder, name, "files").values():
            _remove_tree(path)

    def write(self, result: VolumeFeatures) -> None:
        """Writes a volume's arrays, durably, and its metadata beside their final name."""
        import tensorstore as ts

        start = time.perf_counter()
        name, rest = result.item.name, result.rest
        self._lock(name)
        self.remove(name)  # what a killed run left
        paths = array_paths(self.folder, name, self.files.layout)
        # Files are synced as they are written (TensorStore's default): a chunk is large, and the
        # sync of one goes on while others are computed.
        context = ts.Context({
            "cache_pool": {"total_bytes_limit": 0},
            "data_copy_concurrency": {"limit": self.threads},
            "file_io_concurrency": {"limit": self.threads},
        })  # fmt: skip
        checksums = {"features": self._write_features(result, paths["features"], context)}
        for kind, labels in (("gt", rest.gt), ("mask", rest.mask)):
            if labels is not None:
                spec = self.files.label_spec(paths[kind], labels.shape, labels.dtype)
                ts.open(spec, context=context, create=True).result().write(labels).result()
                checksums[kind] = {"0.0.0": checksum(labels)}
        if self.files.layout == "ome-zarr":
            write_ome_metadata(
                self.folder / f"{name}.ome.zarr",
                self.voxel,
                [kind for kind in ("gt", "mask") if kind in checksums],
                version=3 if self.files.shards else 2,
            )
        seconds = time.perf_counter() - start
        metadata = self._metadata(result, paths, checksums, seconds)
        write_bytes_atomically(self._staged(name), (json.dumps(metadata, indent=2) + "\n").encode())

    def flush(self) -> None:
        """Nothing to do: every file is synced when it is written."""

    def close(self) -> None:
        """Nothing is open; checksums stand in the metadata."""

    def put_in_place(self, name: str) -> None:
        """Makes a written volume a finished one."""
        os.replace(self._staged(name), metadata_path(self.folder, name))
        sync_folder(self.folder)
        self._locks.pop(name).close()

    def _lock(self, name: str) -> None:
        """This process alone writes the volume, until it is in place or the process ends."""
        lock = open(self.folder / f".{name}.lock", "w", opener=no_link)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ValueError(f"{name} is being written by another process") from None
        self._locks[name] = lock

    def _staged(self, name: str) -> Path:
        return self.folder / f".{name}{METADATA}.written"

    def _write_features(self, result: VolumeFeatures, path: Path, context) -> dict[str, str]:
        import tensorstore as ts

        dtype = np.dtype(str(result.dtype).removeprefix("torch."))
        spec = self.files.spec(path, result.shape, dtype)
        store = ts.open(spec, context=context, create=True).result()
        local = threading.local()
        checksums: dict[str, str] = {}

        def write(unit: tuple[str, tuple[slice, ...]]) -> None:
            key, block = unit
            shape = tuple(part.stop - part.start for part in block)
            if not hasattr(local, "buffer"):
                # Of torch: aligned to cache lines, as the fast stores need it.
                size = int(np.prod(self.files.unit, dtype=np.int64))
                local.buffer = torch.empty(size, dtype=result.dtype).numpy()
            voxels = local.buffer[: int(np.prod(shape, dtype=np.int64))].reshape(shape)
            result.block(block, voxels)
            writing = store[block].write(voxels, can_reference_source_data_indefinitely=True)
            checksums[key] = checksum(voxels)
            writing.result()

        with ThreadPoolExecutor(self.threads, thread_name_prefix="chunk") as pool:
            list(pool.map(write, units(result.shape, self.files.unit)))
        return dict(sorted(checksums.items()))

    def _metadata(
        self, result: VolumeFeatures, paths: dict[str, Path], checksums: dict, seconds: float
    ) -> dict:
        rest, shapes = result.rest, {"features": list(result.shape)}
        drawn = dict(rest.provenance)
        sizes = {kind: _disk_bytes(path) for kind, path in paths.items() if kind in checksums}
        shapes["raw"], shapes["gt"] = list(rest.raw_shape), list(rest.gt.shape)
        if rest.mask is not None:
            shapes["mask"] = list(rest.mask.shape)
        classes = np.unique(rest.gt).tolist()
        valid = 1.0 if rest.mask is None else float(np.count_nonzero(rest.mask) / rest.mask.size)
        return {
            "volume_index": int(result.item.name.removeprefix("volume_")),
            "volume_name": result.item.name,
            "timestamp": datetime.now().astimezone().isoformat(timespec="seconds"),
            "paths": {kind: str(path) for kind, path in paths.items() if kind in checksums},
            "source_dataset": drawn.pop("source_dataset", {}),
            "shapes": shapes,
            "configuration": {
                **self.configuration,
                **self.files.settings(),
                "chunks": np.minimum(self.files.chunks, result.shape).tolist(),
            },
            "timing": {
                "feature_extraction_seconds": result.seconds,
                "tensorstore_write_seconds": seconds,
                "total_seconds": result.seconds + seconds,
            },
            "storage": {
                **{f"{kind}_gb": size / 1e9 for kind, size in sizes.items()},
                "total_gb": sum(sizes.values()) / 1e9,
            },
            "statistics": {
                "num_classes": len(classes),
                "unique_classes": classes,
                "valid_gt_fraction": valid,
            },
            "sample": drawn,
            "checksums": checksums,
        }

    def __str__(self) -> str:
        return str(self.folder)


class VolumeMetadata:
    """Index of volumes: a volume is done when its metadata are in place."""

    def __init__(self, sink: VolumeFiles) -> None:
        self.sink = sink

    def open(self) -> set[str]:
        """Names of the volumes that are done."""
        return finished(self.sink.folder)

    def commit(self, items: Sequence[Item]) -> None:
        for item in items:
            self.sink.put_in_place(item.name)

    def remove(self, names: set[str]) -> None:
        for name in names:
            metadata_path(self.sink.folder, name).unlink(missing_ok=True)

    def close(self) -> None:
        """Nothing is open."""

    def __str__(self) -> str:
        return f"{self.sink.folder}/volume_*{METADATA}"


def _disk_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _remove_tree(path: Path) -> None:
    """A folder, or a link in its place: never what that leads to."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
