"""Finished volumes for training: batches of features, labels and masks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .chunks import ChunkedArray
from .files import array_paths, finished, read_metadata, volume_name

Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


class PreprocessedDINOv3Dataset(Dataset):
    """The volumes that ``fastembed volumes preprocess`` finished: (features, gt, mask) each.

    features [C, D, H, W] as stored (float16 by default), gt [D, H, W] int64, mask [D, H, W] bool,
    or None where a volume has none. With `return_metadata` a fourth, the volume's metadata. With
    `patch_size` D, H, W are those of a sub-volume, drawn anew at each access by torch's random
    numbers, of which only the chunks it touches are read.

    Args:
        preprocessed_dir: the output folder.
        num_threads: chunks that are read at a time, per process.
        volume_indices: only these; by default all that are finished.
        return_metadata: give the metadata too.
        patch_size: (D, H, W) or one number; None for whole volumes.
        cache_bytes: memory for chunks that need decoding (compressed, sharded), per process.
            Plain chunks are the operating system's to cache.

    Raises:
        FileNotFoundError: no finished volumes, or one of `volume_indices` is not finished.
        ValueError: volumes of different shapes, or a patch larger than they are.

    Nothing is open until a volume is read, and each process opens for itself: it works in forked
    and in spawned DataLoader workers.
    """

    def __init__(
        self,
        preprocessed_dir: str | Path,
        num_threads: int = 8,
        volume_indices: Sequence[int] | None = None,
        return_metadata: bool = False,
        patch_size: int | Sequence[int] | None = None,
        cache_bytes: int = 0,
    ) -> None:
        self.folder = Path(preprocessed_dir)
        if num_threads < 1:
            raise ValueError(f"num_threads must be at least 1; got {num_threads}")
        self.num_threads = num_threads
        self.return_metadata = return_metadata
        self.cache_bytes = cache_bytes
        there = finished(self.folder)
        if volume_indices is None:
            self.names = sorted(there)
        else:
            self.names = [volume_name(index) for index in volume_indices]
        missing = [name for name in self.names if name not in there]
        if missing or not self.names:
            what = ", ".join(missing) or "volume"
            raise FileNotFoundError(f"{self.folder} has no finished {what}")
        self.metadata = [read_metadata(self.folder, name) for name in self.names]
        shapes = {tuple(metadata["shapes"]["features"]) for metadata in self.metadata}
        if len(shapes) > 1:
            raise ValueError(f"volumes must have one shape; {self.folder} has {sorted(shapes)}")
        self.shape: tuple[int, int, int, int] = shapes.pop()
        self.patch = _patch(patch_size, self.shape[1:])
        self._owner = 0
        self._memory = _Memory()
        self._pool: ThreadPoolExecutor | None = None
        self._arrays: dict[str, dict[str, ChunkedArray]] = {}

    def __len__(self) -> int:
        """Number of volumes."""
        return len(self.names)

    def __getitem__(self, index: int):
        """Volume `index` of those that the data set has."""
        features, gt, mask, *metadata = self.fetch([index])()
        return (features[0], gt[0], None if mask is None else mask[0], *(m[0] for m in metadata))

    def __getitems__(self, indices: Sequence[int]):
        """A batch, collated: each chunk is read straight into its place."""
        return self.fetch(indices)()

    def fetch(self, indices: Sequence[int], pin: bool = False):
        """Starts to read a batch; a call of what it returns waits for it and gives it.

        Args:
            pin: into page-locked memory, for asynchronous copies to a GPU.

        The batch: features [B, C, D, H, W], gt [B, D, H, W], mask [B, D, H, W] or None where no
        volume has one (where only some have, the others' is all True), and with
        `return_metadata` a list of B dicts.
        """
        indices = [range(len(self))[index] for index in indices]
        size = len(indices)
        dtype = self._open(indices[0])["features"].dtype
        features = self._memory.take((size, self.shape[0], *self.patch), dtype, pin)
        gt = torch.empty((size, *self.patch), dtype=torch.int64, pin_memory=pin)
        masked = any("mask" in self._open(index) for index in indices)
        mask = torch.ones((size, *self.patch), dtype=torch.bool, pin_memory=pin) if masked else None
        pending: list[Future] = []
        for row, index in enumerate(indices):
            arrays, part = self._open(index), self._part()
            pending += arrays["features"].read_into(
                features[row].numpy(), (slice(None), *part), self._pool
            )
            pending += arrays["gt"].read_into(gt[row].numpy(), part, self._pool)
            if "mask" in arrays:
                pending += arrays["mask"].read_into(mask[row].numpy(), part, self._pool)

        def wait():
            for future in pending:
                future.result()
            batch = features, gt, mask
            if self.return_metadata:
                return *batch, [self.metadata[index] for index in indices]
            return batch

        return wait

    def _part(self) -> tuple[slice, ...]:
        """Where a patch lies, drawn by torch's random numbers."""
        starts = [
            int(torch.randint(length - size + 1, ()))
            for length, size in zip(self.shape[1:], self.patch, strict=True)
        ]
        return tuple(slice(at, at + size) for at, size in zip(starts, self.patch, strict=True))

    def _open(self, index: int) -> dict[str, ChunkedArray]:
        if self._owner != os.getpid():  # a new process: what the old one had open is not ours
            self._owner, self._arrays = os.getpid(), {}
            self._pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="volumes")
        name = self.names[index]
        if name not in self._arrays:
            metadata = self.metadata[index]
            layout = metadata["configuration"].get("layout", "files")
            paths = array_paths(self.folder, name, layout)
            self._arrays[name] = {
                kind: ChunkedArray(paths[kind], self.num_threads, self.cache_bytes)
                for kind in metadata["paths"]
            }
        return self._arrays[name]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_owner": 0, "_pool": None, "_arrays": {}, "_memory": _Memory()}


class _Memory:
    """Memory of batches, used again once nobody holds a tensor in it.

    The pages of a fresh gigabyte cost more time than the bytes that are read into it.
    """

    _KEPT = 3  # one that is used, one that is being filled, one that was just let go

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...], dtype: np.dtype, pin: bool) -> torch.Tensor:
        like = torch.from_numpy(np.empty(0, dtype))
        if pin:  # torch keeps page-locked memory by itself
            return like.new_empty(shape, pin_memory=True)
        for array in self._arrays:
            # Beside the list, this loop and the call itself only a tensor's storage refers to it.
            if (array.shape, array.dtype) == (shape, dtype) and sys.getrefcount(array) == 3:
                return torch.from_numpy(array)
        array = like.new_empty(shape).numpy()  # of torch: whole cache lines, as `_place` likes them
        self._arrays = [*self._arrays[-self._KEPT + 1 :], array]
        return torch.from_numpy(array)


def create_preprocessed_dataloader(
    preprocessed_dir: str | Path,
    batch_size: int = 1,
    shuffle: bool = True,
    num_threads: int = 8,
    num_workers: int = 0,
    volume_indices: Sequence[int] | None = None,
    return_metadata: bool = False,
    drop_last: bool = False,
    patch_size: int | Sequence[int] | None = None,
    cache_bytes: int = 0,
    pin_memory: bool | None = None,
    seed: int | None = None,
) -> DataLoader:
    """Batches (features [B, C, D, H, W], gt [B, D, H, W], mask [B, D, H, W] or None).

    Args:
        preprocessed_dir, num_threads, volume_indices, return_metadata, patch_size, cache_bytes:
            of `PreprocessedDINOv3Dataset`.
        num_workers: processes; with 0 the next batch is read by threads while one is used.
        drop_last: leave out a last batch that is not full.
        pin_memory: page-locked batches; by default where there is a CUDA device.
        seed: of the order; torch's own random numbers by default.

    Raises: what `PreprocessedDINOv3Dataset` raises.
    """
    dataset = PreprocessedDINOv3Dataset(
        preprocessed_dir, num_threads, volume_indices, return_metadata, patch_size, cache_bytes
    )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return _PrefetchingLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        collate_fn=_as_it_is,
        generator=generator,
    )


class _PrefetchingLoader(DataLoader):
    """Without workers: reads the next batch, straight into its memory, while one is used."""

    def __iter__(self) -> Iterator:
        return super().__iter__() if self.num_workers else self._prefetched()

    def _prefetched(self) -> Iterator:
        following = None
        for indices in self.batch_sampler:
            current, following = following, self.dataset.fetch(indices, pin=self.pin_memory)
            if current is not None:
                yield current()
        if following is not None:
            yield following()


def _as_it_is(batch):
    return batch


def _patch(
    patch_size: int | Sequence[int] | None, shape: tuple[int, int, int]
) -> tuple[int, int, int]:
    if patch_size is None:
        return shape
    patch = (patch_size,) * 3 if isinstance(patch_size, int) else tuple(patch_size)
    if len(patch) != 3 or any(not 1 <= p <= n for p, n in zip(patch, shape, strict=True)):
        raise ValueError(f"patch_size must be within {list(shape)} voxels; got {patch_size}")
    return patch
