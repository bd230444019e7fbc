"""What the jobs' folders of files look like: samples, segments, photos, maps."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from .. import npy
from ..checksums import Checksum
from ..indexes import ImageTsv, MapTsv, Postgres, SegmentTsv, Tsv
from ..sources.images import EXTENSIONS
from .files import Fault, FileCache, Form, Row
from .findings import MISSHAPEN, NOT_FINITE

_FLOATS = ("float16", "float32")


class Samples(FileCache):
    """``emb_<sha1>.npy`` and image_embeddings, of `fastembed multichannel`."""

    form = "npy"
    index_type = Tsv

    def name_of(self, row: Row) -> str:
        return Path(row[0]).stem

    def fault_of_row(self, row: Row) -> str:
        if os.path.basename(row[0]) != row[0] or not row[0].endswith(".npy"):
            return "embedding_path must be a .npy file"
        return "" if re.fullmatch(r"-?\d+", row[1]) else "text_id must be a number"

    def doubt_of_row(self, row: Row) -> str:
        path, text = row[2], int(row[1])
        # A name is made of the listed text, which may have been " 7" or "007".
        texts = [str(text), f" {text}", f"{text} ", f"+{text}"]
        texts += [f"{text:0{width}d}" for width in range(2, 12)]
        if any(row[0] == f"emb_{_sha1(f'{path}|{text}')}.npy" for text in texts):
            return ""
        return "the file's name is not that of path and text"

    def files_of(self, name: str, listed: Mapping[str, Checksum]) -> list[str]:
        return [f"{name}.npy"]

    def owner_of(self, file: str, there: set[str], listed: Mapping[str, Checksum]) -> str | None:
        ours = file.endswith(".npy") and (file.startswith("emb_") or file in listed)
        return file.removesuffix(".npy") if ours else None

    def look(self, file: str, content: bytes, trusted: bool) -> Form:
        return _form("npy", _array(content, self.dtype, 1, trusted))


class Segments(Samples):
    """``<image_id>_<segment_id>.npy`` and inst2feat.tsv, of `fastembed panoptic`."""

    index_type = SegmentTsv

    def name_of(self, row: Row) -> str:
        return Path(row[2]).stem

    def fault_of_row(self, row: Row) -> str:
        image, segment, file = row
        if not (image.isdecimal() and segment.isdecimal()):
            return "image_id and segment_id must be numbers"
        return "" if file == f"{image}_{segment}.npy" else "feat_file is not that of the segment"

    def doubt_of_row(self, row: Row) -> str:
        return ""

    def owner_of(self, file: str, there: set[str], listed: Mapping[str, Checksum]) -> str | None:
        return file.removesuffix(".npy") if re.fullmatch(r"\d+_\d+\.npy", file) else None


class Photos(Samples):
    """``<image_id>.npz`` and image_index.tsv, of `fastembed panoptic --format npz`."""

    form = "npz"
    index_type = ImageTsv
    _arrays: ClassVar[dict[str, int]] = {"segment_ids": 1, "embeddings": 2, "labels": 1}

    def name_of(self, row: Row) -> str:
        return Path(row[1]).stem

    def fault_of_row(self, row: Row) -> str:
        image, file, number = row
        if not (image.isdecimal() and number.isdecimal()):
            return "image_id and num_segments must be numbers"
        return "" if file == f"{image}.npz" else "feat_file is not that of the image"

    def doubt_of_row(self, row: Row) -> str:
        return ""

    def fault_of_form(self, row: Row, file: str, form: Form) -> str:
        return "" if form[2] == int(row[2]) else f"{row[2]} segments; {file} has {form[2]}"

    def files_of(self, name: str, listed: Mapping[str, Checksum]) -> list[str]:
        return [f"{name}.npz"]

    def owner_of(self, file: str, there: set[str], listed: Mapping[str, Checksum]) -> str | None:
        return file.removesuffix(".npz") if re.fullmatch(r"\d+\.npz", file) else None

    def look(self, file: str, content: bytes, trusted: bool) -> Form:
        arrays = {}
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                for name, dims in self._arrays.items():
                    dtype = self.dtype if name == "embeddings" else "int32"
                    arrays[name] = _array(archive.read(f"{name}.npy"), dtype, dims, trusted)
        except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError) as error:
            raise ValueError(f"not the arrays of a photo: {error}") from error
        counts = {name: len(array) for name, array in arrays.items()}
        if len(set(counts.values())) != 1:
            raise ValueError(Fault(MISSHAPEN, f"its arrays are of different lengths: {counts}"))
        vectors = arrays["embeddings"]
        return "npz", f"{vectors.dtype} [., {vectors.shape[1]}]", len(vectors)


class MapsOf(FileCache):
    """``<name>.npy``, ``<name>_mask.npy``, layers and JSON, and maps.tsv, of `fastembed maps`.

    Args:
        layers: suffixes of the files of single blocks that every image has.
    """

    form = "maps"
    deep = True
    index_type = MapTsv

    def __init__(
        self, folder: Path, index: Tsv | Postgres | None, dtype: str = "", layers: tuple = ()
    ) -> None:
        super().__init__(folder, index, dtype)
        self.layers = layers

    def name_of(self, row: Row) -> str:
        return row[0]

    def fault_of_row(self, row: Row) -> str:
        if not all(part and not part.startswith(".") for part in row[0].split("/")):
            return "name must be a path in the folder"
        if not re.fullmatch(r"\d+x\d+x\d+", row[2]) or row[3] not in _FLOATS:
            return "shape and dtype must be those of a map"
        return ""

    def doubt_of_row(self, row: Row) -> str:
        stem, extension = os.path.splitext(row[1])
        plain = row[0] == stem
        renamed = re.fullmatch(rf"{re.escape(f'{stem}_{extension[1:]}')}(_\d+)?", row[0])
        if extension.lower() in EXTENSIONS and (plain or renamed):
            return ""
        return "the name is not that of the image"

    def fault_of_form(self, row: Row, file: str, form: Form) -> str:
        if form[0] != "map" or form[1] == _words(row[3], row[2].split("x")):
            return ""
        return f"{row[3]} {row[2]}; {file} is {form[1]}"

    def files_of(self, name: str, listed: Mapping[str, Checksum]) -> list[str]:
        files = [f"{name}{suffix}" for suffix in (".npy", "_mask.npy", *self.layers)]
        return files + ([f"{name}.json"] if f"{name}.json" in listed else [])

    def owner_of(self, file: str, there: set[str], listed: Mapping[str, Checksum]) -> str | None:
        for name in self._owners(file):
            pair = {f"{name}.npy", f"{name}_mask.npy"}
            if file in listed or name in self._rows or pair <= there:
                return name
        return None

    def _owners(self, file: str) -> Iterator[str]:
        """What a file may belong to: first the images whose sidecar it may be."""
        if sidecar := re.fullmatch(r"(.+)_(?:mask|layer-?\d+)\.npy", file, re.DOTALL):
            yield sidecar[1]
        if file.endswith((".npy", ".json")):
            yield file.rpartition(".")[0]

    def look(self, file: str, content: bytes, trusted: bool) -> Form:
        if file.endswith(".json"):
            if not isinstance(json.loads(content), dict):
                raise ValueError("it must be an object of JSON")
            return ()
        name = file.removesuffix(".npy")
        if name.endswith("_mask") and name not in self._rows:
            mask = _array(content, "uint8", 2, trusted)
            return "mask", _words(mask.dtype, ("." for _ in mask.shape))
        array = _array(content, self.dtype, 3, trusted)
        if name in self._rows:
            return "map", _words(array.dtype, array.shape)
        return "layer", _words(array.dtype, array.shape)

    def _tell_misshapen(self, verdict, unlisted, weights, expected) -> None:
        """Nothing: rows say how large a map is, and images may differ."""


def _array(content: bytes, dtype: str, dims: int, trusted: bool) -> np.ndarray:
    array = npy.decoded(content)
    if array.ndim != dims or array.dtype.name not in ((dtype,) if dtype else _FLOATS):
        expected = f"{dtype or ' or '.join(_FLOATS)} of {dims} dimensions"
        raise ValueError(
            Fault(MISSHAPEN, f"it must be {expected}; it is {_words(array.dtype, array.shape)}")
        )
    if not trusted and array.dtype.kind == "f":
        bad = array.size - int(np.count_nonzero(np.isfinite(array)))
        if bad:
            raise ValueError(Fault(NOT_FINITE, f"{bad} of {array.size} values are not finite"))
    return array


def _form(kind: str, array: np.ndarray) -> Form:
    return kind, _words(array.dtype, array.shape)


def _words(dtype, shape) -> str:
    return f"{dtype} [{', '.join(map(str, shape))}]"


def _sha1(text: str) -> str:
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
