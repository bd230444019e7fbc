"""What the network says of images, kept on disk: one pass serves every threshold."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import zarr

from ..signature import claim
from .network import Network

_KIND = "cellpose flows"


class FlowCache:
    """Flows and cell probabilities of images, ``<stem>.zarr`` each, float16 [3, H, W].

    A folder belongs to one network and its settings; an entry to the pixels it was made from. An
    image that has changed is run again, and an entry is whole or not there.

    Args:
        folder: made if it is not there.
        network: what fills it.
        dtype: float16, or float32 for the network's own numbers.

    Raises:
        SignatureMismatch: the folder belongs to another network or other settings.
    """

    def __init__(self, folder: str | Path, network: Network, dtype: str = "float16") -> None:
        if dtype not in ("float16", "float32"):
            raise ValueError(f"dtype must be float16 or float32; got {dtype!r}")
        self.folder, self.network, self.dtype = Path(folder), network, dtype
        self.hits = self.passes = 0
        claim(self.folder, {"kind": _KIND, "dtype": dtype, **network.settings()})

    def flows(self, stem: str, image: np.ndarray) -> np.ndarray:
        """[3, H, W] of the image, from the folder if it is there; see `Network.flows`.

        Raises:
            ValueError: flows that float16 cannot hold.
        """
        path = self.folder / f"{stem}.zarr"
        digest = _digest(image)
        if (there := _read(path, digest)) is not None:
            self.hits += 1
            return there
        self.passes += 1
        exact = self.network.flows(image)
        flows = exact.astype(self.dtype)
        if not np.isfinite(flows).all():
            raise ValueError(f"{stem}: flows up to {np.abs(exact).max():.3g} are beyond float16")
        _write(path, flows, digest)
        return flows


def _digest(image: np.ndarray) -> str:
    head = f"{image.dtype.str} {image.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(image).tobytes()).hexdigest()


def _read(path: Path, digest: str) -> np.ndarray | None:
    if not path.is_dir():
        return None
    array = zarr.open_array(path, mode="r")
    return array[:] if array.attrs.get("image") == digest else None


def _write(path: Path, flows: np.ndarray, digest: str) -> None:
    # A folder cannot be replaced in one step: an old entry goes first, and a kill between the two
    # costs a pass.
    part = path.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    array = zarr.create_array(
        part, shape=flows.shape, chunks=flows.shape, dtype=flows.dtype, zarr_format=3
    )
    array[:] = flows
    array.attrs["image"] = digest
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)
