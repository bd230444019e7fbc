"""A volume's files: where they lie, in which form, and what their metadata say."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from ..staging import write_bytes_atomically

CHUNKS = (256, 64, 64, 64)
LAYOUTS = ("files", "ome-zarr")
_NAME = re.compile(r"volume_\d{6,}")
METADATA = "_metadata.json"
_BLOSC = {"id": "blosc", "cname": "lz4", "clevel": 3, "shuffle": 2}  # 2: bits


def volume_name(index: int) -> str:
    """``volume_000007``."""
    return f"volume_{index:06d}"


@dataclass(frozen=True)
class Form:
    """How arrays are stored.

    Attributes:
        chunks: of the features, [C, D, H, W].
        shards: zarr v3 with these shards, of whole chunks; None for zarr v2 without.
        compression: blosc with lz4 level 3, bit-shuffled: smaller, but read through TensorStore.
        layout: ``files``, an array of its own per kind; ``ome-zarr``, one OME-Zarr group with
            the features as its image, gt and mask as its labels.
    """

    chunks: tuple[int, int, int, int] = CHUNKS
    shards: tuple[int, int, int, int] | None = None
    compression: bool = False
    layout: str = "files"

    def __post_init__(self) -> None:
        for name, sizes in (("chunks", self.chunks), ("shards", self.shards or self.chunks)):
            if len(sizes) != 4 or min(sizes) < 1:
                raise ValueError(f"{name} must be four numbers >= 1 (C, D, H, W); got {sizes}")
        if any(shard % chunk for shard, chunk in zip(self.unit, self.chunks, strict=True)):
            raise ValueError(
                f"shards must hold whole chunks; got {self.shards} of chunks {self.chunks}"
            )
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {self.layout!r}")

    @property
    def unit(self) -> tuple[int, int, int, int]:
        """What is written at a time: a file of its own."""
        return self.shards or self.chunks

    def spec(self, path: Path, shape: Sequence[int], dtype: np.dtype) -> dict:
        """TensorStore's spec of the features."""
        chunks = np.minimum(self.chunks, shape).tolist()
        if self.shards is None:
            return _zarr2(path, shape, chunks, dtype, _BLOSC if self.compression else None)
        codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
        if self.compression:
            blosc = {
                "cname": "lz4", "clevel": 3, "shuffle": "bitshuffle",
                "typesize": dtype.itemsize, "blocksize": 0,
            }  # fmt: skip
            codecs.append({"name": "blosc", "configuration": blosc})
        # Shards are of whole chunks, also where the array is smaller than one.
        shards = [
            min(shard, -(-length // chunk) * chunk)
            for shard, length, chunk in zip(self.shards, shape, chunks, strict=True)
        ]
        sharding = {"chunk_shape": chunks, "codecs": codecs}
        return _zarr3(path, shape, shards, dtype,
                      [{"name": "sharding_indexed", "configuration": sharding}])  # fmt: skip

    def label_spec(self, path: Path, shape: Sequence[int], dtype: np.dtype) -> dict:
        """TensorStore's spec of gt and mask: one chunk, uncompressed."""
        if self.shards is None:
            return _zarr2(path, shape, shape, dtype, None)
        return _zarr3(path, shape, shape, dtype, [{"name": "bytes"}])

    def settings(self) -> dict:
        """JSON form."""
        return {
            "chunks": list(self.chunks),
            "shards": None if self.shards is None else list(self.shards),
            "compression": "blosc-lz4-3-bitshuffle" if self.compression else "none",
            "layout": self.layout,
        }


def array_paths(folder: Path, name: str, layout: str) -> dict[str, Path]:
    """Where a volume's arrays lie, by kind."""
    if layout == "ome-zarr":
        group = folder / f"{name}.ome.zarr"
        return {
            "features": group / "features",
            "gt": group / "labels/gt/0",
            "mask": group / "labels/mask/0",
        }
    return {kind: folder / f"{name}_{kind}.zarr" for kind in ("features", "gt", "mask")}


def metadata_path(folder: Path, name: str) -> Path:
    return folder / f"{name}{METADATA}"


def read_metadata(folder: Path, name: str) -> dict:
    """A finished volume's metadata.

    Raises:
        FileNotFoundError: it is not finished. ValueError: the file is no such JSON.
    """
    path = metadata_path(folder, name)
    try:
        metadata = json.loads(path.read_text())
        metadata["shapes"]["features"], metadata["configuration"]["chunks"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the metadata of a volume: {error!r}") from error
    return metadata


def finished(folder: Path) -> set[str]:
    """Names of the volumes whose metadata are in the folder."""
    with os.scandir(folder) as entries:
        names = [entry.name.removesuffix(METADATA) for entry in entries
                 if entry.name.endswith(METADATA)]  # fmt: skip
    return {name for name in names if _NAME.fullmatch(name)}


def units(shape: Sequence[int], unit: Sequence[int]) -> Iterator[tuple[str, tuple[slice, ...]]]:
    """The aligned parts of an array, in C order: ("0.1.0.0", slices)."""
    starts = [range(0, length, size) for length, size in zip(shape, unit, strict=True)]
    for start in itertools.product(*starts):
        key = ".".join(str(at // size) for at, size in zip(start, unit, strict=True))
        yield (
            key,
            tuple(
                slice(at, min(at + size, length))
                for at, size, length in zip(start, unit, shape, strict=True)
            ),
        )


def checksum(array: np.ndarray) -> str:
    """XXH3 (64 bits) of the values in C order, little-endian, as 16 hexadecimal digits."""
    values = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return xxhash.xxh3_64_hexdigest(values.reshape(-1).view(np.uint8).data)


def write_ome_metadata(group: Path, voxel: float, labels: Sequence[str], version: int) -> None:
    """Groups and multiscales of one OME-Zarr image: 0.4 in zarr v2, 0.5 in zarr v3."""

    def multiscales(path: str, axes: str) -> list[dict]:
        scale = [1.0 if axis == "c" else voxel for axis in axes]
        kinds = {"c": {"name": "c", "type": "channel"}}
        entry = {
            "name": path,
            "axes": [
                kinds.get(axis, {"name": axis, "type": "space", "unit": "nanometer"})
                for axis in axes
            ],
            "datasets": [
                {"path": path, "coordinateTransformations": [{"type": "scale", "scale": scale}]}
            ],
        }
        return [entry if version == 3 else {"version": "0.4", **entry}]

    def write(folder: Path, attributes: dict) -> None:
        if version == 3:
            content = {
                "zarr_format": 3,
                "node_type": "group",
                "attributes": {"ome": {"version": "0.5", **attributes}},
            }
            files = {"zarr.json": content}
        else:
            files = {".zgroup": {"zarr_format": 2}, ".zattrs": attributes}
        for name, content in files.items():
            write_bytes_atomically(folder / name, json.dumps(content, indent=2).encode())

    write(group, {"multiscales": multiscales("features", "czyx")})
    write(group / "labels", {"labels": list(labels)})
    for label in labels:
        colours = {"image-label": {"source": {"image": "../../"}}}
        write(group / "labels" / label, {"multiscales": multiscales("0", "zyx"), **colours})


def _zarr2(path: Path, shape, chunks, dtype: np.dtype, compressor: dict | None) -> dict:
    metadata = {
        "shape": list(shape),
        "chunks": list(chunks),
        "dtype": dtype.newbyteorder("<").str,
        "compressor": compressor,
    }
    return {"driver": "zarr", **_place(path), "metadata": metadata}


def _zarr3(path: Path, shape, chunks, dtype: np.dtype, codecs: list[dict]) -> dict:
    metadata = {
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
        "codecs": codecs,
    }
    return {"driver": "zarr3", **_place(path), "metadata": metadata}


def _place(path: Path) -> dict:
    return {
        "kvstore": {"driver": "file", "path": f"{path}/"},
        # A chunk that is not there is then a chunk that was lost.
        "store_data_equal_to_fill_value": True,
    }
