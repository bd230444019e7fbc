"""Looking at a folder, and making it good."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

from ..database import DBConfig
from ..runlock import RunLock
from .cache import Cache, Effort, Progress, tell_set_aside
from .findings import Finding, Verdict
from .recognise import recognise, restore_settings


@dataclass
class Repair:
    """What a repair did.

    Attributes:
        before: the folder as it was.
        withdrawn: names of the outputs that were taken out to be made again; None where they
            could not be told, and all that is not there is made.
        after: the folder as it is.
    """

    before: Verdict
    withdrawn: set[str] | None
    after: Verdict

    @property
    def made(self) -> bool:
        """Whether the folder is sound now."""
        return self.after.sound


def verify(
    folder: str | Path,
    *,
    database: DBConfig | None = None,
    threads: int = 8,
    quick: bool = False,
    sample: int | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Compares an output folder with its checksums and its index, both ways; changes nothing.

    Args:
        folder: of `extract` in any form, of ``fastembed volumes`` or ``fastembed cellpose infer``.
        database: where the rows are, if they are in PostgreSQL.
        threads: files that are read at a time.
        quick: index and sizes only.
        sample: read the content of so many files, evenly spread; the sizes of all.
        progress: called with (parts checked, parts in all).

    Returns:
        `Verdict`: what is there, and every finding.

    Raises:
        FileNotFoundError, NotRecognised: there is nothing that can be checked.
        DatabaseError: the database cannot be reached or refuses.
        ImportError: a package that this kind of output needs is not installed.
    """
    cache, findings = recognise(Path(folder).resolve(), database)
    return _check(cache, findings, Effort(threads, quick, sample), progress)


def repair(
    folder: str | Path,
    make: Callable[[Set[str] | None], object] | None = None,
    *,
    database: DBConfig | None = None,
    threads: int = 8,
    progress: Progress | None = None,
) -> Repair:
    """Makes what `verify` finds broken again, so that the folder holds the bytes it had.

    First the rows of broken outputs are dropped and their files moved to ``set-aside/``; then
    `make` makes them; then what was set aside for them is deleted, and all is verified again.

    Args:
        folder: as for `verify`.
        make: makes the outputs of these names, or all that are not there for None:
            ``lambda names: extract(.., only=names)``. Without it the folder is left ready for
            that: the rows of what is broken are gone.
        database: where the rows are, if they are in PostgreSQL. Without it files whose rows are
            there cannot be repaired.
        threads: files that are read at a time.
        progress: called with (parts checked, parts in all).

    Raises:
        ValueError: the rows are in a database that was not given.
        FolderBusy: a run is writing into the folder.
        OSError, DatabaseError and what `make` raises: the folder may be verified and repaired
            again.
    """
    folder = Path(folder).resolve()
    with RunLock(folder):
        cache, findings = recognise(folder, database)
        if findings and restore_settings(folder):
            cache, _ = recognise(folder, database)
        before = _check(cache, findings, Effort(threads), progress)
        if before.sound:
            return Repair(before, set(), before)
        names = cache.withdraw(before)
    if make is not None and (names is None or names):
        make(names)
    with RunLock(folder):
        cache, findings = recognise(folder, database)
        cache.tidy()
        after = _check(cache, findings, Effort(threads), progress)
    return Repair(before, names, after)


def _check(
    cache: Cache, findings: list[Finding], effort: Effort, progress: Progress | None
) -> Verdict:
    verdict = cache.check(effort, progress)
    verdict.findings[:0] = findings
    tell_set_aside(verdict, cache.folder)
    return verdict


def committed(folder: str | Path, database: DBConfig | None = None) -> set[str]:
    """Names of the outputs that the folder's index holds."""
    return recognise(Path(folder).resolve(), database)[0].committed()
