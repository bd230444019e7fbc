"""Where vectors go: files that are complete or not there.

A sink names its files, and so says what of a sample is still to do; an index knows them by the
same names.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Set
from pathlib import Path

import numpy as np

from . import npy, signature
from .checksums import Checksums
from .records import Embedded, Item, Maps
from .staging import StagedFiles, remove_stale_temporaries

_LAYER_FILE = re.compile(r"(.+)(_layer-?\d+\.npy)", re.DOTALL)


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
        self.files = StagedFiles(self.folder, Checksums(self.folder))

    def open(self) -> set[str]:
        """Makes the folder ready; returns the names of the outputs that are in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_stale_temporaries(self.folder)
        # Afresh: what failed before does not count now.
        self.files = StagedFiles(self.folder, Checksums(self.folder))
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
        """Writes a sample's files, which `flush` then makes durable and visible. Safe from many
        threads."""
        self.files.write(self.path(embedded.item.name).name, npy.encoded(embedded.vectors[0]))

    def flush(self) -> None:
        """All that was written so far is complete and on disk when this returns."""
        self.files.flush()

    def close(self) -> None:
        """Leaves the list of checksums sorted."""
        self.files.close()

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
        return item.missing(done)

    def write(self, embedded: Embedded) -> None:
        item = embedded.item
        for part, vector in zip(item.parts, embedded.vectors, strict=True):
            self.files.write(self.path(item.part_name(part)).name, npy.encoded(vector))


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
        self.files.write(self.path(embedded.item.name).name, content.getvalue())


class MapFiles:
    """``<name>.npy`` ([D, g, g]) and ``<name>_mask.npy`` (uint8 [g, g]) per image, and where they
    are asked for ``<name>_layer<K>.npy`` per block and ``<name>.json``; names may have folders.

    Args:
        folder: a pair of map and mask in it is ours once the folder has its settings file.
        outputs: of the engine: ``map`` or ``processed``, and ``map@K``. K stands in the file's name
            as it was given: ``map@-1`` is ``<name>_layer-1.npy``.
        meta: what the JSON says of every image, such as the model; None for no JSON.

    An image is there when all its files are.
    """

    form = "maps"
    holds_parts = False

    def __init__(
        self,
        folder: str | Path,
        outputs: Iterable[str] = ("map",),
        meta: Mapping[str, object] | None = None,
    ) -> None:
        self.folder = Path(folder).resolve()
        self.meta = meta
        self.suffixes = {output: _map_suffix(output) for output in outputs}
        if list(self.suffixes.values()).count(".npy") != 1:
            raise ValueError(
                f"outputs must have one of map and processed, and any map@K; "
                f"got {', '.join(self.suffixes)}"
            )
        self.files = StagedFiles(self.folder, Checksums(self.folder))
        self._layers: dict[str, list[str]] = {}  # also of blocks that are no output now

    def open(self) -> set[str]:
        self.folder.mkdir(parents=True, exist_ok=True)
        # Afresh: what failed before does not count now.
        self.files = StagedFiles(self.folder, Checksums(self.folder))
        if not (self.folder / signature.FILE_NAME).exists():
            return set()
        suffixes = [*self.suffixes.values(), "_mask.npy"]
        if self.meta is not None:
            suffixes.append(".json")
        names = set()
        for place, _, files in os.walk(self.folder):
            remove_stale_temporaries(Path(place))
            there, below = set(files), os.path.relpath(place, self.folder)
            prefix = "" if below == "." else f"{below}/"
            for file in files:
                name = file.removesuffix(".npy")
                if name != file and all(name + suffix in there for suffix in suffixes):
                    names.add(prefix + name)
                if layer := _LAYER_FILE.fullmatch(file):
                    self._layers.setdefault(prefix + layer[1], []).append(layer[2])
        return names

    def todo(self, item: Item, done: Set[str]) -> Item | None:
        """What of the item is not among the names `done`; None where all is."""
        return None if item.name in done else item

    def write(self, result: Maps) -> None:
        """Writes an image's files, which `flush` then makes durable and visible. Safe from many
        threads."""
        name = result.item.name
        for output, array in result.maps.items():
            self.files.write(f"{name}{self.suffixes[output]}", npy.encoded(array))
        self.files.write(f"{name}_mask.npy", npy.encoded(result.mask))
        if self.meta is not None:
            facts = json.dumps({**result.facts, **self.meta}, indent=2, ensure_ascii=False)
            self.files.write(f"{name}.json", f"{facts}\n".encode())

    def flush(self) -> None:
        """All that was written so far is complete and on disk when this returns."""
        self.files.flush()

    def close(self) -> None:
        """Leaves the list of checksums sorted."""
        self.files.close()

    def remove(self, name: str) -> None:
        for suffix in (".npy", "_mask.npy", ".json", *self._layers.get(name, ())):
            self._path(name, suffix).unlink(missing_ok=True)

    def _path(self, name: str, suffix: str) -> Path:
        return self.folder / f"{name}{suffix}"


def _map_suffix(output: str) -> str:
    name, at, block = output.partition("@")
    if name not in ("map", "processed"):
        raise ValueError(f"outputs must be maps; got {output!r}")
    return f"_layer{block}.npy" if at else ".npy"
