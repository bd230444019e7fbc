"""Where vectors go: files that are complete or not there."""

from __future__ import annotations

import os
from pathlib import Path

from . import npy
from .records import Embedded


class NpyPerSample:
    """One ``<name>.npy`` (float32 [D]) per sample in one folder.

    Files that do not start with `prefix` are not ours: neither counted nor ever removed.
    """

    form = "npy"

    def __init__(self, folder: str | Path, prefix: str = "emb_") -> None:
        self.folder = Path(folder).resolve()
        self.prefix = prefix

    def open(self) -> set[str]:
        """Makes the folder ready; returns the names of the outputs that are in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        npy.remove_stale_temporaries(self.folder)
        with os.scandir(self.folder) as entries:
            return {
                entry.name.removesuffix(".npy")
                for entry in entries
                if entry.name.startswith(self.prefix) and entry.name.endswith(".npy")
            }

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def write(self, embedded: Embedded) -> None:
        """Writes one file: complete and on disk when this returns. Safe from many threads."""
        npy.write_atomically(self.path(embedded.item.name), embedded.vector)

    def flush(self) -> None:
        """Makes the names of the files written so far survive a power cut."""
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)
