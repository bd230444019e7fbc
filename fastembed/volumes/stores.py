"""Opens volumes through TensorStore: OME-Zarr, zarr, N5 and sections, local or remote.

What a place holds is found out from its metadata files, never from its name:

| found there | what it is |
|---|---|
| ``zarr.json`` of an array, ``.zarray`` | one array: `multiscales.parse_plain` |
| ``zarr.json`` or ``.zattrs`` with ``multiscales`` | OME-Zarr: `multiscales.parse_ome` |
| ``attributes.json`` | N5, an array or a group of scales: `multiscales.parse_n5` |
| a local folder of TIFF or PNG files, a local TIFF | sections: `sections.open_sections` |

An array's missing chunks are its fill value: so zarr and N5 have it, over HTTP too.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorstore as ts

from .addresses import join, kvstore, local_path, normal, shown
from .multiscales import Multiscale, Scale, Vector, parse_n5, parse_ome, parse_plain
from .sections import SUFFIXES, open_sections, section_files

_METADATA = ("zarr.json", ".zarray", ".zattrs", ".zgroup", "attributes.json")
_MOST_SCALES = 32
_SLACK = 1e-6  # of a voxel: what float64 may lose between two descriptions of one place
# Status codes of a place that cannot be reached now, as against data that are bad.
_UNREACHABLE = (
    "ABORTED", "UNAVAILABLE", "PERMISSION_DENIED", "UNAUTHENTICATED", "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED", "CANCELLED", "UNKNOWN",
)  # fmt: skip
_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)  # fmt: skip


@dataclass(frozen=True)
class Level:
    """One scale of an image, opened; reading is lazy.

    Attributes:
        url: of the array.
        array: [z, y, x].
        voxel: edges of a voxel along z, y, x, nm.
        origin: centre of the first voxel, nm.
        unknown: the label that its annotator gave to what is not known, if the metadata name one.
    """

    url: str
    array: ts.TensorStore
    voxel: Vector
    origin: Vector
    unknown: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype.numpy_dtype

    @property
    def corner(self) -> np.ndarray:
        """Where the first voxel begins, nm: [3] float64."""
        return np.array(self.origin) - np.array(self.voxel) / 2

    @property
    def end(self) -> np.ndarray:
        """Where the last voxel ends, nm: [3] float64."""
        return self.corner + np.array(self.voxel) * np.array(self.shape)

    def read(self, rows: Sequence[slice | np.ndarray]) -> np.ndarray:
        """The voxels at a slice or at indices of each axis, read from their chunks only.

        Raises:
            ValueError: a damaged chunk.
            OSError: a chunk that cannot be reached.
        """
        return _wait(self.array.oindex[tuple(rows)].read(), self.url)

    def settings(self) -> dict:
        """What it is, JSON-ready."""
        return {
            "url": self.url,
            "shape": list(self.shape),
            "dtype": self.dtype.name,
            "voxel_size_nm": list(self.voxel),
            "translation_nm": list(self.origin),
        }


class Pyramid:
    """An image's scales; each is opened when it is first asked for."""

    def __init__(self, url: str, scales: Sequence[Scale], opener) -> None:
        self.url = url
        self.scales = tuple(scales)
        self._opener = opener
        self._levels: dict[str, Level] = {}
        self._lock = threading.Lock()

    def choose(self, resolution: float) -> Level:
        """The scale to make voxels of `resolution` nm from.

        On each axis a voxel may not be coarser than asked, or, where all are, than the finest
        there is; of the scales that hold this the one with the largest voxels is taken. Where
        none holds it on all axes, the finest is.

        Raises:
            ValueError: its array is damaged or has no three axes.
            OSError: its array is not there, or cannot be reached.
        """
        limit = [
            max(resolution, min(scale.voxel[axis] for scale in self.scales)) * (1 + _SLACK)
            for axis in range(3)
        ]
        fit = [
            scale
            for scale in self.scales
            if all(edge <= most for edge, most in zip(scale.voxel, limit, strict=True))
        ]
        if fit:
            return self.open(max(fit, key=lambda scale: math.prod(scale.voxel)))
        return self.open(min(self.scales, key=lambda scale: math.prod(scale.voxel)))

    def open(self, scale: Scale) -> Level:
        with self._lock:
            if scale.path not in self._levels:
                self._levels[scale.path] = self._opener(scale)
            return self._levels[scale.path]


class Stores:
    """How volumes are read: threads, cache, attempts.

    Args:
        num_threads: of TensorStore, for files and for decoding, >= 1.
        cache_bytes: decoded chunks that are kept in memory, at most.
        retries: further attempts at a request that a server refuses or cuts off (HTTP 429 and
            5xx, no connection), with growing pauses of `pause` to 8 seconds.
        s3_credentials: ``default`` (environment, profile, instance role), ``anonymous``, or
            ``auto``: default where the environment or ``~/.aws`` has any, else anonymous. The
            variables AWS_ENDPOINT_URL and AWS_REGION are honoured.
    """

    def __init__(
        self,
        num_threads: int = 8,
        *,
        cache_bytes: int = 256 << 20,
        retries: int = 5,
        pause: float = 0.5,
        s3_credentials: str = "auto",
    ) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads must be >= 1; got {num_threads}")
        if cache_bytes < 0 or retries < 0:
            raise ValueError(
                f"cache_bytes and retries must be >= 0; got {cache_bytes} and {retries}"
            )
        if s3_credentials not in ("auto", "default", "anonymous"):
            raise ValueError(
                f"s3_credentials must be auto, default or anonymous; got {s3_credentials!r}"
            )
        patience = {
            "max_retries": retries,
            "initial_delay": f"{round(pause * 1000)}ms",
            "max_delay": "8s",
        }
        kind = _credentials() if s3_credentials == "auto" else s3_credentials
        self.context = ts.Context(
            {
                "data_copy_concurrency": {"limit": num_threads},
                "file_io_concurrency": {"limit": num_threads},
                "cache_pool": {"total_bytes_limit": cache_bytes},
                "http_request_retries": patience,
                "s3_request_retries": patience,
                "gcs_request_retries": patience,
                "aws_credentials": {"type": kind},
            }
        )

    def open(
        self,
        path: str | Path,
        resolution: Vector | None = None,
        translation: Vector | None = None,
    ) -> Pyramid:
        """The image at a local path, ``file://``, ``http(s)://``, ``s3://`` or ``gs://``.

        Args:
            path: of an array, of a group of scales, of a folder of sections or of a TIFF.
            resolution: edges of the finest voxel along z, y, x, nm, instead of what the
                metadata say; coarser scales keep their ratio to it.
            translation: centre of the finest scale's first voxel, nm, likewise. Where neither
                says it, 0.

        Raises:
            ValueError: nothing that is known, or metadata that are incomplete or wrong; the
                message names the place and what is missing.
            OSError: nothing there, or it cannot be reached.
        """
        url = normal(str(path))
        local = local_path(url)
        if local is not None and not local.exists():
            raise FileNotFoundError(f"there is no {local}")
        if local is not None and (local.is_file() or _holds_sections(local)):
            if local.is_file() and local.suffix.lower() not in SUFFIXES[:2]:
                raise ValueError(f"{local} is a file, but no TIFF")
            kind, found = "sections", parse_plain({}, None, url)
        else:
            kind, found = self._explore(url)
        found = found.placed(resolution, translation)
        if found.missing:
            raise ValueError(
                f"{shown(url)}: {found.missing}; give the resolution in the datasets YAML"
            )
        return Pyramid(shown(url), found.scales, lambda scale: self._level(url, kind, scale))

    def _explore(self, url: str) -> tuple[str, Multiscale]:
        """(driver, scales) of what stands at `url`."""
        where = shown(url)
        found = self._documents(url)
        if "zarr.json" in found:
            document = found["zarr.json"]
            attributes = document.get("attributes", {})
            if document.get("node_type") == "array":
                return "zarr3", parse_plain(attributes, document.get("dimension_names"), where)
            ome = attributes.get("ome", attributes)
            return "zarr3", parse_ome(_multiscales(ome, attributes, where), where)
        if ".zarray" in found:
            attributes = found.get(".zattrs", {})
            # xarray's own way to name dimensions, which zarr v2 has none for
            return "zarr", parse_plain(attributes, attributes.get("_ARRAY_DIMENSIONS"), where)
        if ".zattrs" in found or ".zgroup" in found:
            attributes = found.get(".zattrs", {})
            return "zarr", parse_ome(_multiscales(attributes, attributes, where), where)
        if "attributes.json" in found:
            return "n5", self._n5(url, found["attributes.json"])
        names = ", ".join(_METADATA)
        raise FileNotFoundError(f"{where} has no array or multiscale group: none of {names}")

    def _n5(self, url: str, group: Mapping) -> Multiscale:
        if "dimensions" in group:
            return parse_n5({}, {"": group}, shown(url))
        listed = (group.get("multiscales") or [{}])[0].get("datasets", ())
        paths = [str(entry["path"]).strip("/") for entry in listed]
        levels = {}
        for path in paths or (f"s{i}" for i in range(_MOST_SCALES)):
            attributes = self._documents(join(url, path)).get("attributes.json")
            if attributes is None and paths:
                raise FileNotFoundError(f"{shown(url)} lists the scale {path}, which is not there")
            if attributes is None:
                break
            levels[path] = attributes
        if not levels:
            raise ValueError(
                f"{shown(url)} is an N5 group without multiscales and without an array s0; "
                f"its attributes are {sorted(group)}"
            )
        return parse_n5(group, levels, shown(url))

    def _level(self, url: str, kind: str, scale: Scale) -> Level:
        place = join(url, scale.path)
        unknown = None
        if kind == "sections":
            array = open_sections(local_path(url), self.context)
        else:
            spec = {"driver": kind, "kvstore": kvstore(place), "recheck_cached_data": "open"}
            array = _wait(ts.open(spec, context=self.context, open=True, read=True), shown(place))
            unknown = _unknown_label(self._documents(place)) if kind != "n5" else None
        where = shown(place)
        if array.ndim < 3:
            raise ValueError(f"{where} must have the axes z, y, x; its shape is {array.shape}")
        dims = [dim % array.ndim for dim in scale.dims]
        rest = [dim for dim in range(array.ndim) if dim not in dims]
        if any(array.shape[dim] != 1 for dim in rest):
            raise ValueError(
                f"{where} must have one channel and one time point; its shape is {array.shape}"
            )
        if 0 in array.shape:
            raise ValueError(f"{where} is empty: its shape is {array.shape}")
        array = array.transpose(rest + dims)[(0,) * len(rest)]
        return Level(where, array, scale.voxel, scale.origin, unknown)

    def _documents(self, url: str) -> dict[str, dict]:
        """The metadata files that stand at `url`, parsed, by name."""
        store = _wait(ts.KvStore.open(kvstore(url), context=self.context), shown(url))
        pending = {name: store.read(name) for name in _METADATA}
        found, refused = {}, None
        for name, future in pending.items():
            try:
                result = _wait(future, f"{shown(url)}/{name}")
            except PermissionError as error:
                refused = error  # S3 says so of a missing key, where listing is not allowed
                continue
            if result.state == "value":
                found[name] = _parse(result.value, f"{shown(url)}/{name}")
        if refused and not found:
            raise refused
        return found


def _wait(future: ts.Future, what: str) -> object:
    """The future's result, with TensorStore's failures as the house's."""
    try:
        return future.result()
    except ValueError as error:
        code, _, reason = str(error).partition(": ")
        if not re.fullmatch("[A-Z_]+", code):
            raise
        reason = re.split(r" \[(?:http_response_body|tensorstore_spec|source locations)=", reason)
        reason = f"{what}: {reason[0]}".replace("\n", " ")
        if code == "PERMISSION_DENIED":
            raise PermissionError(reason) from error
        if code == "NOT_FOUND":
            raise FileNotFoundError(reason) from error
        raise (OSError if code in _UNREACHABLE else ValueError)(reason) from error


def _holds_sections(folder: Path) -> bool:
    return not any((folder / name).exists() for name in _METADATA) and bool(section_files(folder))


def _multiscales(holder: Mapping, attributes: Mapping, where: str) -> Mapping:
    entries = holder.get("multiscales")
    if not entries:
        raise ValueError(
            f"{where} is a zarr group without multiscales; its attributes are {sorted(attributes)}"
        )
    return entries[0]


def _parse(content: bytes, where: str) -> dict:
    try:
        document = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{where} must be a JSON object; it is a {type(document).__name__}")
    return document


def _unknown_label(documents: Mapping[str, Mapping]) -> int | None:
    """CellMap's annotation schema: encoding.unknown of the array's attributes."""
    attributes = documents.get("zarr.json", {}).get("attributes", documents.get(".zattrs", {}))
    try:
        encoding = attributes["cellmap"]["annotation"]["annotation_type"]["encoding"]
        unknown = encoding.get("unknown")
    except (KeyError, TypeError, AttributeError):
        return None
    return unknown if isinstance(unknown, int) else None


def _credentials() -> str:
    folder = Path.home() / ".aws"
    known = any(os.environ.get(name) for name in _CREDENTIALS)
    return "default" if known or (folder / "credentials").exists() else "anonymous"
