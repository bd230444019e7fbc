"""Images in a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from .. import npy, photo
from ..records import Item, Picture

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

# What the maps of one image add to its name: `a_mask.png` and `a.png` would share a file.
_SIDECAR = re.compile(r"(.+)_(?:mask|layer-?\d+)", re.DOTALL)
# A file system takes 255 bytes, and outputs and their temporary files add to the name.
_LONGEST_NAME = 160


class ImageFolder:
    """The images of a folder: PNG, JPEG, WebP, BMP and TIFF, told by extension, in any case.

    An item is named by its path in the folder without the extension. Of images whose outputs would
    share a file (`a.jpg` and `a.png`; `a.png` and `A.png`, where case counts for nothing; `a.png`
    and `a_mask.png`) the first by path keeps its name, and the others get their extension in it:
    `a_png`. This depends on the folder alone, not on the shard.

    Args:
        folder: itself may be a link.
        recursive: sub-folders too.

    Raises:
        OSError: the folder cannot be listed.

    Hidden files and folders are left out. Links to files are followed wherever they lead, as a
    folder of links is how subsets are made; linked sub-folders are not entered, since they may lead
    in circles.

    Attributes:
        paths: what each name stands for, relative to the folder.
        renamed: of these names those that are not the path without its extension.
        other_files: how many files have another extension.
        linked_folders: sub-folders that were not entered, because they are links.
    """

    def __init__(self, folder: str | Path, *, recursive: bool = False) -> None:
        self.folder = Path(folder)
        self.other_files = 0
        self.linked_folders: list[str] = []
        self.paths: dict[str, str] = {}
        self.renamed: list[str] = []
        self._unnameable: set[str] = set()
        names = _Names()
        for path in sorted(self._list("", recursive)):
            stem, extension = os.path.splitext(path)
            name = names.take(stem, extension[1:])
            self.paths[name] = path
            if name != stem:
                self.renamed.append(name)

    def items(self) -> Iterator[Item]:
        """The images, by path."""
        for name, path in self.paths.items():
            yield Item(path, path, name, defect=self._defect(name))

    def count(self) -> int:
        """Number of images."""
        return len(self.paths)

    def selection(self) -> dict:
        """Which parts of a sample are taken: images have none."""
        return {}

    def read(self, item: Item, channels: int = 3, buffer: npy.PixelBuffer | None = None) -> Picture:
        """The image and its alpha: see `photo.read_picture`."""
        return photo.read_picture(self.folder / item.path)

    def _list(self, below: str, recursive: bool) -> Iterator[str]:
        """Paths of the images, in no order."""
        with os.scandir(self.folder / below) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
        for entry in found:
            raw = below + entry.name
            path = os.fsencode(raw).decode("utf-8", "backslashreplace")
            if path != raw:
                self._unnameable.add(path)
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link in a circle: as a file it fails by itself, not the listing
                is_folder = False
            if not is_folder:
                if entry.name.lower().endswith(EXTENSIONS):
                    yield path
                else:
                    self.other_files += 1
            elif recursive and entry.is_symlink():
                self.linked_folders.append(path)
            elif recursive:
                yield from self._list(f"{raw}/", recursive)

    def _defect(self, name: str) -> str:
        if self.paths[name] in self._unnameable:
            return "the file name is not UTF-8"
        if len(os.fsencode(PurePosixPath(name).name)) > _LONGEST_NAME:
            return f"the file name is longer than {_LONGEST_NAME} bytes"
        return ""

    def __str__(self) -> str:
        return str(self.folder)


class _Names:
    """Names that are given away, and which others their outputs rule out."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._bases: set[str] = set()  # of `a_mask` it is `a`

    def take(self, stem: str, extension: str) -> str:
        """`stem`, or with its extension where that would share a file with a name before."""
        name, number = stem, 1
        while not self._free(key := name.casefold()):
            name = f"{stem}_{extension}" + (f"_{number}" if number > 1 else "")
            number += 1
        self._taken.add(key)
        if sidecar := _SIDECAR.fullmatch(key):
            self._bases.add(sidecar[1])
        return name

    def _free(self, key: str) -> bool:
        sidecar = _SIDECAR.fullmatch(key)
        return (
            key not in self._taken
            and key not in self._bases
            and not (sidecar and sidecar[1] in self._taken)
        )
