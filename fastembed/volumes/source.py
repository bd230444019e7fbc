"""Sampled volumes as a source of the pipeline."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ..records import Item
from .layout import DataSet, find_cellmap, read_datasets, with_organelles
from .record import Volume
from .sampling import Sampling, Scene, sample_volume
from .stores import Stores

_SEMANTICS = 1  # of the sampling; a change of what an index means raises it


class Volumes:
    """Volumes that are cut from larger ones at places which their index decides.

    Args:
        datasets: of `read_datasets` or `find_cellmap`; those without all of the organelles are
            left out.
        indices: which volumes, such as ``range(100)``; each is an item ``volume_%06d``.
        sampling: what a crop is.
        stores: threads, cache and attempts of reading.

    Raises:
        ValueError: an organelle that no data set has; an index that is negative or there twice.

    Data sets are opened when a volume first needs them, so a place that is not there is an
    error of `read`.
    """

    def __init__(
        self,
        datasets: Sequence[DataSet],
        indices: Iterable[int],
        sampling: Sampling | None = None,
        stores: Stores | None = None,
    ) -> None:
        self.sampling = sampling or Sampling()
        self.datasets = with_organelles(datasets, self.sampling.organelles)
        self.indices = list(indices)
        if any(index < 0 for index in self.indices):
            raise ValueError(f"volume indices must be >= 0; got {min(self.indices)}")
        if len(set(self.indices)) != len(self.indices):
            raise ValueError("volume indices must be different")
        self.stores = stores or Stores()
        self._scenes = [_Once(self._opener(dataset)) for dataset in self.datasets]

    @classmethod
    def from_yaml(cls, path: str | Path, indices: Iterable[int], *arguments, **options) -> Volumes:
        """Volumes of the data sets that a YAML file lists; see `layout`."""
        return cls(read_datasets(path), indices, *arguments, **options)

    @classmethod
    def from_cellmap(
        cls,
        root: str | Path,
        indices: Iterable[int],
        *arguments,
        crops: Sequence[str | int] | None = None,
        inference: Sequence[str] | None = None,
        em: str | None = None,
        **options,
    ) -> Volumes:
        """Volumes of a CellMap tree; see `find_cellmap`."""
        return cls(find_cellmap(root, crops, inference, em=em), indices, *arguments, **options)

    def items(self) -> Iterator[Item]:
        """The volumes, in the order of the indices."""
        for index in self.indices:
            name = f"volume_{index:06d}"
            yield Item(name, name, name, {"volume_index": index})

    def count(self) -> int:
        """Number of volumes."""
        return len(self.indices)

    def selection(self) -> dict:
        """All that decides what a volume of an index is, JSON-ready."""
        return {
            "semantics": _SEMANTICS,
            "datasets": [dataset.settings() for dataset in self.datasets],
            "sampling": self.sampling.settings(),
        }

    def read(self, item: Item, channels: int = 1, buffer: object = None) -> Volume:
        """The item's volume; see `sample_volume`.

        Raises:
            ValueError: no crop that does; damaged data; `channels` other than 1.
            OSError: data that are not there or cannot be reached.
        """
        if channels != 1:
            raise ValueError(f"volumes have one channel; asked for {channels}")
        return sample_volume(self._scenes, item.fields["volume_index"], self.sampling)

    def _opener(self, dataset: DataSet) -> Callable[[], Scene]:
        return lambda: Scene(dataset, self.sampling, self.stores)

    def __str__(self) -> str:
        return ", ".join(dataset.name for dataset in self.datasets)


class _Once:
    """A function's result, computed by the first call that succeeds, from any thread."""

    def __init__(self, function: Callable[[], Scene]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._result: Scene | None = None

    def __call__(self) -> Scene:
        with self._lock:
            if self._result is None:
                self._result = self._function()
            return self._result
