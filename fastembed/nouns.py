"""What the pipeline asks of its nouns: source, recipe, sink and index (an engine is `Engine`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from .engines.contract import InputContract
from .npy import PixelBuffer
from .records import Item


class Sized(Protocol):
    """Something that a source read."""

    nbytes: int


class Source(Protocol):
    """Lists samples and reads one's pixels."""

    def items(self) -> Iterator[Item]:
        """All samples in a fixed order, streamed."""

    def count(self) -> int:
        """Number of samples."""

    def selection(self) -> dict:
        """Which parts of a sample are taken, JSON-ready; empty where samples have no parts."""

    def read(self, item: Item, channels: int, buffer: PixelBuffer) -> Sized:
        """The item's pixels; OSError or ValueError where the file is bad. From many threads, each
        with a buffer of its own."""


class Inputs(Protocol):
    """A sample's rows of model input, written on demand.

    Attributes:
        parts: of a sample that has parts, those that there are, in the order of the rows.
        rest: what is written beside the features, kept until then.
    """

    parts: tuple[int, ...]
    rest: object

    def __len__(self) -> int: ...

    def fill(self, start: int, out: torch.Tensor) -> None:
        """Rows start, start + 1, ... into `out`, [n, P, height, width] of the engine's dtype."""


class Result(Protocol):
    """What a recipe makes of a sample's features; its length counts vectors or maps."""

    item: Item
    nbytes: int

    def __len__(self) -> int: ...


class Recipe(Protocol):
    """From pixels to model input, and from features to what is written.

    Attributes:
        dtype: of what is written.
        unit: what the length of a result counts, in a word for the report.
        channels_to_read: length of the channel prefix that a source has to read.
    """

    dtype: str
    unit: str
    channels_to_read: int

    def prepare(self, sample: Sized, key: str, contract: InputContract) -> Inputs:
        """Everything that needs the whole sample; ValueError where it cannot be used."""

    def embed(self, item: Item, features: Mapping[str, np.ndarray], rest: object) -> Result:
        """Of all rows' features, [N, *shape] float32 by the engine's outputs; ValueError where
        they cannot be used."""

    def settings(self) -> dict:
        """JSON form, part of the signature of the outputs."""


class Sink(Protocol):
    """Files that are complete or not there.

    Attributes:
        form: its name in the signature.
        holds_parts: whether a file holds parts of a sample: then which of them were chosen is a
            setting.
    """

    folder: Path
    form: str
    holds_parts: bool

    def open(self) -> set[str]:
        """Makes the folder ready; the names of the outputs that are in it."""

    def todo(self, item: Item, done: Set[str]) -> Item | None:
        """What of the item is not among the names `done`; None where all is."""

    def write(self, result: Result) -> None:
        """Writes a sample's files, durable and visible after `flush`; safe from many threads."""

    def flush(self) -> None:
        """What was written is complete, under its names, and survives a power cut when this
        returns. From one thread, while none writes."""

    def remove(self, name: str) -> None:
        """Removes an output, if it is there."""

    def close(self) -> None:
        """The run ends: nothing is written any more. Before the index closes."""


class Index(Protocol):
    """Which outputs are done: those that are committed here."""

    def open(self) -> set[str]:
        """Names of the outputs that are committed."""

    def commit(self, items: Sequence[Item]) -> None:
        """Adds samples: all on disk when this returns."""

    def remove(self, names: set[str]) -> None:
        """Drops outputs."""

    def close(self) -> None: ...


@runtime_checkable
class Waiting(Protocol):
    """A source or an index that waits for its server when that is away."""

    def stop_waiting(self) -> None:
        """Whoever waits, now or later, gets the error instead; from any thread. The run ends."""
