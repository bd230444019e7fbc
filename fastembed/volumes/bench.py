"""How fast finished volumes load, beside a plain read of the same files."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .files import array_paths
from .loader import create_preprocessed_dataloader


@dataclass
class LoadTimes:
    """Milliseconds per batch, and what they moved.

    Attributes:
        shapes: of the batch's tensors.
        batch_bytes: of features, gt and mask as they are stored.
        cold: of the first batch, with the files out of the operating system's cache; None where
            that could not be had.
        warm: of the following batches, from the cache.
        plain: of plain reads of the same files, one thread, into memory that is there already.
        why_not_cold: the reason, where `cold` is None.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    batch_bytes: int = 0
    cold: float | None = None
    warm: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    why_not_cold: str = ""


def measure(
    preprocessed_dir: str | Path, batch_size: int, num_batches: int, num_threads: int
) -> LoadTimes:
    """Loads batches of the first volumes, cold once and then warm."""
    count = len(_volumes(preprocessed_dir))
    chosen = [i % count for i in range(batch_size)]

    def loader():
        loader = create_preprocessed_dataloader(
            preprocessed_dir, batch_size, shuffle=False, num_threads=num_threads
        )
        return loader.dataset

    dataset = loader()
    files = _files(dataset, sorted(set(chosen)))
    times = LoadTimes()
    times.why_not_cold = drop_cache(files)
    for number in range(num_batches + 1):
        start = time.perf_counter()
        features, gt, mask = dataset.fetch(chosen)()
        elapsed = (time.perf_counter() - start) * 1e3
        if number == 0:
            shapes = {"Features": features, "GT": gt, "Mask": mask}
            times.shapes = {k: tuple(v.shape) for k, v in shapes.items() if v is not None}
            labels = sum(v.numel() for v in (gt, mask) if v is not None)
            times.batch_bytes = features.nbytes + labels
            if not times.why_not_cold:
                times.cold = elapsed
        else:
            times.warm.append(elapsed)
        del features, gt, mask
    batch = _files(dataset, chosen)
    buffer = torch.zeros(max(os.path.getsize(file) for file in batch), dtype=torch.uint8).numpy()
    for _ in range(max(3, min(num_batches, 10))):
        start = time.perf_counter()
        for file in batch:
            with open(file, "rb", buffering=0) as stream:
                stream.readinto(buffer)
        times.plain.append((time.perf_counter() - start) * 1e3)
    return times


def drop_cache(files: Sequence[Path]) -> str:
    """Asks the kernel to forget the files' pages; why it could not, or ""."""
    if not hasattr(os, "posix_fadvise"):
        return "this system has no posix_fadvise"
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            return f"the cache could not be dropped: {error}"
        finally:
            os.close(descriptor)
    return ""


def _volumes(folder: str | Path) -> list[str]:
    from .loader import PreprocessedDINOv3Dataset

    return PreprocessedDINOv3Dataset(folder).names


def _files(dataset, indices: Sequence[int]) -> list[Path]:
    """The chunk files of these volumes."""
    found: list[Path] = []
    for index in indices:
        metadata = dataset.metadata[index]
        layout = metadata["configuration"].get("layout", "files")
        paths = array_paths(dataset.folder, dataset.names[index], layout)
        for kind in metadata["paths"]:
            found += sorted(f for f in paths[kind].rglob("*") if f.is_file() and f.name[0] != ".")
    return found
