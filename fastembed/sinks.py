"""Where vectors go: files that are complete or not there.

A sink names its files, and so says what of a sample is still to do; an index knows them by the
same names.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Set
from pathlib import Path

import numpy as np

from . import npy
from .records import Embedded, Item


class NpyPerSample:
    """One ``<name>.npy`` (float32 [D]) per sample in one folder.

    Files that do not start with `prefix` are not ours: neither counted nor ever removed.
    """

    form = "npy"
    suffix = ".npy"
    # Whether a file holds parts of a sample: then which of them were chosen is a setting.
    holds_parts = False

    def __init__(self, folder: str | Path, prefix: str = "emb_") -> None:
        self.folder = Path(folder).resolve()
        self.pattern = re.compile(re.escape(prefix) + ".*", re.DOTALL)

    def open(self) -> set[str]:
        """Makes the folder ready; returns the names of the outputs that are in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        npy.remove_stale_temporaries(self.folder)
        with os.scandir(self.folder) as entries:
            names = [entry.name for entry in entries]
        return {
            name.removesuffix(self.suffix)
            for name in names
            if name.endswith(self.suffix) and self.pattern.fullmatch(name.removesuffix(self.suffix))
        }

    def path(self, name: str) -> Path:
        return self.folder / f"{name}{self.suffix}"

    def todo(self, item: Item, done: Set[str]) -> Item | None:
        """What of the item is not among the names `done`; None where all is."""
        return None if item.name in done else item

    def write(self, embedded: Embedded) -> None:
        """Writes a sample's files: complete and on disk when this returns. Safe from many
        threads."""
        npy.write_atomically(self.path(embedded.item.name), embedded.vectors[0])

    def flush(self) -> None:
        """Makes the names of the files written so far survive a power cut."""
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)


class NpyPerPart(NpyPerSample):
    """One ``<name>_<part>.npy`` ([D]) per part of a sample; a part is done by itself.

    Files whose names are not two numbers so joined are not ours.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.pattern = re.compile(r"\d+_\d+")

    def todo(self, item: Item, done: Set[str]) -> Item | None:
        missing = [part for part in item.parts if item.part_name(part) not in done]
        if len(missing) == len(item.parts):
            return item
        return item.only(missing) if missing else None

    def write(self, embedded: Embedded) -> None:
        item = embedded.item
        for part, vector in zip(item.parts, embedded.vectors, strict=True):
            npy.write_atomically(self.path(item.part_name(part)), vector)


class NpzPerSample(NpyPerSample):
    """One ``<name>.npz`` per sample with all its parts: segment_ids int32 [S], embeddings
    [S, D], labels int32 [S].

    Files whose names are not numbers are not ours.
    """

    form = "npz"
    suffix = ".npz"
    holds_parts = True

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.pattern = re.compile(r"\d+")

    def write(self, embedded: Embedded) -> None:
        parts = embedded.item.parts
        content = io.BytesIO()  # the same bytes every time: NumPy writes no date into it
        np.savez(
            content,
            segment_ids=np.array(list(parts), dtype=np.int32),
            embeddings=embedded.vectors,
            labels=np.array(list(parts.values()), dtype=np.int32),
        )
        npy.write_bytes_atomically(self.path(embedded.item.name), content.getvalue())
