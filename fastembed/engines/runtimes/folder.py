"""A folder with an exported model: what it is, the ONNX graph, and TensorRT's plans of it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import uuid
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...signature import FILE_NAME, SEMANTICS_VERSION, signature
from ..cache import cache_folder, installed
from ..contract import InputContract
from ..gate import references
from ..models.weights import hash_files
from ..outputs import Features
from .export import OPSET, export_onnx

ONNX = "model.onnx"
REFERENCES = "references.npz"
_FORMAT = 1
# Their versions can change the exported graph, or the weights as they are read.
_EXPORTERS = (
    "fastembed-vision",
    "torch",
    "onnx",
    "onnxscript",
    "timm",
    "transformers",
    "open_clip_torch",
)
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt_rtx")


@dataclass(frozen=True)
class Description:
    """What an engine is, apart from the device and the batches it runs in; see `Engine`."""

    spec: str
    runtime: str
    contract: InputContract
    outputs: Mapping[str, tuple[int, ...]]
    dim: int
    precision: str
    facts: Mapping[str, Any]

    def settings(self) -> dict[str, Any]:
        """JSON form; `from_settings` reads it back."""
        return {**asdict(self), "contract": self.contract.settings()}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Description:
        contract = InputContract.from_settings(settings["contract"])
        outputs = {name: tuple(shape) for name, shape in settings["outputs"].items()}
        return cls(**{**settings, "contract": contract, "outputs": outputs})


class EngineFolder:
    """An exported model on disk, checked when it is opened.

    Attributes:
        batch_size: of an engine loaded from here, unless another is asked for.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises FileNotFoundError, or ValueError for what is no such folder or is damaged."""
        self.path = Path(path)
        file = self.path / FILE_NAME
        if not file.is_file():
            raise FileNotFoundError(
                f"{self.path} is no engine folder: it has no {FILE_NAME} (`fastembed export` "
                "makes such folders)"
            )
        try:
            self.manifest = json.loads(file.read_text())
            if self.manifest["format"] != _FORMAT:
                raise ValueError(f"format {self.manifest['format']!r}, not {_FORMAT}")
            self.description = Description.from_settings(self.manifest["engine"])
            self.signature: str = self.manifest["signature"]
            self.batch_size: int = self.manifest["batch_size"]
            files, self._plans = dict(self.manifest["files"]), dict(self.manifest["plans"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} does not describe an engine ({type(error).__name__}: {error})"
            ) from error
        for name, digest in files.items():
            if not (self.path / name).is_file():
                raise FileNotFoundError(f"{self.path} has no {name}, which its {FILE_NAME} names")
            if hash_files([self.path / name]) != digest:
                raise ValueError(
                    f"{self.path / name} is not the file that was exported here (its sha256 is "
                    "another); export the model again"
                )

    @property
    def onnx(self) -> Path:
        return self.path / ONNX

    def references(self) -> list[torch.Tensor]:
        """What the model gives in float32, for `Gate`."""
        with np.load(self.path / REFERENCES, allow_pickle=False) as arrays:
            return [torch.from_numpy(arrays[name]) for name in arrays.files]

    def plan(self, key: Mapping[str, Any]) -> bytes | None:
        """The stored plan made under `key` (device, library, version, batch), if it is whole."""
        entry = self._plans.get(_plan_name(key))
        if entry is None:
            return None
        file = self.path / _plan_name(key)
        if file.is_file() and hash_files([file]) == entry["sha256"]:
            return file.read_bytes()
        warnings.warn(f"{file} is missing or damaged, and is built again", stacklevel=2)
        return None

    def keep_plan(self, key: Mapping[str, Any], plan: bytes) -> None:
        """Store a plan under `key`; a folder that cannot be written gives a warning."""
        name = _plan_name(key)
        self._plans[name] = {**key, "sha256": hashlib.sha256(plan).hexdigest()}
        try:
            _replace(self.path / name, plan)
            _write_manifest(self.path, {**self.manifest, "plans": self._plans})
        except OSError as error:
            warnings.warn(
                f"the TensorRT engine could not be kept in {self.path} ({error}); it will be "
                "built again at the next load",
                stacklevel=2,
            )

    def plans(self) -> list[str]:
        """The plans that there are, in words, such as ``NVIDIA L4, tensorrt 10.9, batch 128``."""
        return [
            f"{p['device']}, {p['library']} {p['version']}, batch {p['batch_size']}"
            for p in self._plans.values()
        ]


def exported(
    features: Features, description: Description, batch_size: int, path: str | Path | None = None
) -> EngineFolder:
    """The folder of this model: the one that is there, or a new one that appears all at once.

    `path` None is a folder in the cache, named by everything that decides the graph's numbers.
    Raises ValueError where `path` holds anything else.
    """
    versions = {name: installed(name) for name in _EXPORTERS}
    settings = {
        "semantics_version": SEMANTICS_VERSION,
        "engine": description.settings(),
        "opset": OPSET,
        "versions": versions,
    }
    key = signature(settings)
    target = Path(path) if path is not None else cache_folder() / "engines" / key[:32]
    if target.exists() and (path is None or any(target.iterdir())):
        try:
            return _same(target, key)
        except (ValueError, FileNotFoundError) as error:
            if path is not None:
                raise
            warnings.warn(f"{error}; the cache makes it anew", stacklevel=3)
            shutil.rmtree(target)
    with _appearing(target) as folder:
        if description.precision != "fp32":  # before the module is cast
            np.savez(folder / REFERENCES, *references(features, description.contract))
        export_onnx(features, description.contract, folder / ONNX)
        manifest = {
            "format": _FORMAT,
            "signature": key,
            **settings,
            "versions": {**versions, **{name: installed(name) for name in _RUNTIMES}},
            "machine": platform.machine(),
            "batch_size": batch_size,
            "files": {file.name: hash_files([file]) for file in sorted(folder.iterdir())},
            "plans": {},
        }
        _write_manifest(folder, manifest)
    return _same(target, key)


def _same(path: Path, key: str) -> EngineFolder:
    folder = EngineFolder(path)
    if folder.signature != key:
        raise ValueError(
            f"{path} holds another engine ({folder.description.spec}, or other settings or library "
            "versions); name another folder, or remove it"
        )
    return folder


@contextmanager
def _appearing(target: Path):
    """A new folder that takes the name `target` when it is complete, and vanishes otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not of tempfile, whose folders are their owner's alone whatever the umask.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        yield temporary
        try:
            temporary.rename(target)
        except OSError:
            # Another process was first with the same model; the caller checks that it is.
            if not (target / FILE_NAME).is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_manifest(folder: Path, manifest: dict) -> None:
    _replace(folder / FILE_NAME, (json.dumps(manifest, indent=2) + "\n").encode())


def _replace(file: Path, content: bytes) -> None:
    """Write it whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _plan_name(key: Mapping[str, Any]) -> str:
    return f"{signature(dict(key))[:16]}.plan"
