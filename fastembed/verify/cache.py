"""What `verify` and `repair` ask of each kind of folder."""

from __future__ import annotations

import itertools
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from .. import staging
from .findings import TEMPORARY, Verdict

# What a repair takes out of the way; kept until it has been made again.
SET_ASIDE = "set-aside"
_GROUP = 32  # files per task: one by one, handing them over would cost as much as reading

Progress = Callable[[int, int], None]
"""Called with (parts checked, parts in all)."""

T, R = TypeVar("T"), TypeVar("R")


@dataclass(frozen=True)
class Effort:
    """How thoroughly to look.

    Attributes:
        threads: files that are read at a time.
        quick: sizes only, no content.
        sample: read the content of so many, evenly spread; the sizes of all. None for all.
    """

    threads: int = 8
    quick: bool = False
    sample: int | None = None

    def __post_init__(self) -> None:
        if self.threads < 1 or (self.sample is not None and self.sample < 1):
            raise ValueError(
                f"threads and sample must be at least 1; got {self.threads} and {self.sample}"
            )

    def chosen(self, things: Sequence[T]) -> Sequence[T]:
        """Those whose content is to be read."""
        if self.quick:
            return []
        if self.sample is None or self.sample >= len(things):
            return things
        return [things[i * len(things) // self.sample] for i in range(self.sample)]


class Cache(Protocol):
    """A folder of one kind."""

    folder: Path

    def check(self, effort: Effort, progress: Progress | None) -> Verdict:
        """Looks; changes nothing."""

    def withdraw(self, verdict: Verdict) -> Set[str] | None:
        """Takes what is broken out of index and folder, the rows first. Returns the names of the
        outputs to make again; None where they cannot be told: all that is not there."""

    def committed(self) -> set[str]:
        """Names of the outputs that the index holds now."""

    def tidy(self) -> None:
        """After they were made: drops what was set aside for them, and lines that are left."""


def each(
    function: Callable[[T], R], things: Iterable[T], threads: int, group: int = _GROUP
) -> Iterator[R]:
    """`function` of each, by several threads, in order; a bounded number under way."""

    def run(group: Sequence[T]) -> list[R]:
        return [function(thing) for thing in group]

    things, waiting = iter(things), deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        while batch := list(itertools.islice(things, group)):
            waiting.append(pool.submit(run, batch))
            if len(waiting) > 2 * threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def set_aside(folder: Path, name: str) -> None:
    """Moves a file of the folder out of the way, if it is there."""
    source, target = folder / name, folder / SET_ASIDE / name
    if source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            shutil.rmtree(target)
        source.replace(target)


def drop_set_aside(folder: Path, made: Callable[[str], bool]) -> None:
    """Deletes what was set aside and is there again.

    Args:
        made: whether this file, by its name in the folder, has been made again.
    """
    aside = folder / SET_ASIDE
    for path in sorted(aside.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif made(path.relative_to(aside).as_posix()):
            path.unlink()
    if aside.is_dir() and not any(aside.iterdir()):
        aside.rmdir()


_TEMPORARY = re.compile(r"\..+\.tmp", re.DOTALL)


def is_temporary(name: str) -> bool:
    """Whether a file has a name that only unfinished ones have."""
    return _TEMPORARY.fullmatch(name.rpartition("/")[2]) is not None


def tell_temporary(verdict: Verdict, name: str) -> None:
    """Counts a temporary file, unless a process that is alive writes it."""
    if not staging.is_being_written(name.rpartition("/")[2]):
        verdict.add(TEMPORARY, name, "left half-written by a run that was stopped")


def tell_set_aside(verdict: Verdict, folder: Path) -> None:
    """Counts what earlier repairs took out and nothing has made again."""
    count = sum(path.is_file() for path in (folder / SET_ASIDE).rglob("*"))
    if count:
        verdict.notes.append(
            f"{count} files are set aside in {SET_ASIDE}/: they were damaged, and nothing has made "
            "them again"
        )
