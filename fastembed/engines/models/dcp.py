"""Distributed checkpoints (DCP folders), as DINO's training code writes them.

Their ``.metadata`` is a pickle that PyTorch reads without any restriction. Here it may name
the classes that describe tensors, and nothing else: a folder cannot run code.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import torch
from torch import Tensor

METADATA = ".metadata"

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "collections": {"OrderedDict"},
}


def dcp_files(folder: Path) -> list[Path]:
    """The metadata and the shards of a DCP folder, or nothing where it is none."""
    metadata = folder / METADATA
    return [metadata, *sorted(folder.glob("*.distcp"))] if metadata.is_file() else []


def read_dcp(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's model on the CPU; of a teacher and a student, the teacher's.

    Raises:
        ValueError: the metadata is damaged or names anything but tensors, or a shard is.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import StorageMeta, TensorStorageMetadata

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *_: object, **__: object):
            metadata = _read_metadata(folder / METADATA)
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    metadata = _read_metadata(folder / METADATA)
    for info in metadata.storage_data.values():
        if Path(info.relative_path).name != str(info.relative_path):
            raise ValueError(f"weights: {folder} names a shard outside of it: {info.relative_path}")
    shapes = {
        name: entry
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
    }
    chosen = [name for name in shapes if "teacher." in name] or list(shapes)
    state = {
        name: torch.empty(shapes[name].size, dtype=shapes[name].properties.dtype) for name in chosen
    }
    try:
        with warnings.catch_warnings():  # that there is no process group, which is meant
            warnings.simplefilter("ignore")
            dcp.load(state, storage_reader=Reader(folder), no_dist=True)
    except CheckpointException as error:  # of all ranks; there is one
        reason = str(next(iter(error.failures.values()))[0]).split(". ")[0]
        raise ValueError(
            f"weights: {folder} is a damaged distributed checkpoint: {reason}"
        ) from error
    return {name.removeprefix("model."): value for name, value in state.items()}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch":
            found = getattr(torch, name, None)
            if name == "Size" or isinstance(found, torch.dtype):
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no tensor's description")


def _read_metadata(path: Path):
    try:
        with path.open("rb") as stream:
            metadata = _Unpickler(stream).load()
        if not metadata.state_dict_metadata or metadata.storage_data is None:
            raise ValueError("it lists no tensors")
    except Exception as error:
        raise ValueError(f"weights: {path} is not readable as metadata: {error}") from error
    return metadata
