"""Folders with a file or more per sample, and an index of rows."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

from .. import checksums, commands, signature
from ..checksums import Checksum, Checksums, Listed, checksum
from ..indexes import Postgres, Tsv
from . import rows as index_rows
from .cache import (
    SET_ASIDE,
    Effort,
    Progress,
    drop_set_aside,
    each,
    is_temporary,
    set_aside,
    tell_temporary,
)
from .findings import (
    DAMAGED,
    LIST,
    MISSHAPEN,
    MISSING,
    OPEN,
    ORPHAN,
    ROW,
    STRAY,
    TEMPORARY,
    UNREADABLE,
    Verdict,
)

_OURS = (checksums.FILE_NAME, commands.FILE_NAME, signature.FILE_NAME)

Row = Sequence[str]
Form = tuple[object, ...]
"""Kind of file; dtype and shape, in words, that all of the kind have; what a row says of it."""


class Fault(NamedTuple):
    """What is wrong with a file: a kind of finding, and why."""

    kind: str
    reason: str


class _Seen(NamedTuple):
    """What reading a file gave."""

    file: str
    size: int = 0
    digest: bytes = b""
    fault: Fault | None = None
    form: Form = ()


class FileCache(ABC):
    """What all such folders have in common: rows promise files, and each has its checksum.

    Args:
        folder: of the outputs.
        index: its rows; None where they are in a database that is not at hand.
        dtype: of the features, as the settings have it; "" where these are unknown.
    """

    form: ClassVar[str]
    deep: ClassVar[bool] = False  # whether outputs have folders in their names

    def __init__(self, folder: Path, index: Tsv | Postgres | None, dtype: str = "") -> None:
        self.folder, self.index, self.dtype = folder, index, dtype
        self._rows: dict[str, Row] = {}
        self._rows_known = True

    # What each kind says of itself -----------------------------------------------------

    @abstractmethod
    def name_of(self, row: Row) -> str:
        """The name of a row's output."""

    @abstractmethod
    def fault_of_row(self, row: Row) -> str:
        """How a row contradicts itself; "" where it does not."""

    def doubt_of_row(self, row: Row) -> str:
        """Likewise, by a rule that the outputs of other sources need not follow."""
        return ""

    @abstractmethod
    def files_of(self, name: str, listed: Mapping[str, Checksum]) -> list[str]:
        """The files that an output has."""

    @abstractmethod
    def owner_of(self, file: str, there: set[str], listed: Mapping[str, Checksum]) -> str | None:
        """The output that a file belongs to; None for a foreign file."""

    @abstractmethod
    def look(self, file: str, content: bytes, trusted: bool) -> Form:
        """What a file's content is.

        Args:
            trusted: it is what was written, which was finite.

        Raises:
            ValueError: nothing that belongs there; its text is the reason, and its first argument
                may be a `Fault`.
        """

    def fault_of_form(self, row: Row, file: str, form: Form) -> str:
        """How a row contradicts its file; "" where it does not."""
        return ""

    # Looking ---------------------------------------------------------------------------

    def check(self, effort: Effort, progress: Progress | None) -> Verdict:
        """Looks; changes nothing."""
        verdict = Verdict(str(self.folder), self.form, str(self.index or "none"))
        # In this order: a run that is at work meanwhile adds files before rows.
        rows = self._read_rows(verdict)
        listed = Checksums(self.folder).read()
        there = self._list()
        expected = self._expected(rows, listed, there)
        verdict.outputs, verdict.files = len(rows or set(expected.values())), len(expected)
        self._tell_others(verdict, expected, listed, there)
        present = [file for file in sorted(expected) if file in there]
        self._tell_contents(verdict, present, expected, listed, effort, progress)
        return verdict

    def _read_rows(self, verdict: Verdict) -> dict[str, Row]:
        self._rows = {}
        if self.index is None:
            self._rows_known = False
            verdict.notes.append(
                f"there is no {Tsv.file_name}, and no database was given (--db ..): files are "
                "checked against their checksums only"
            )
        elif isinstance(self.index, Tsv):
            self._rows = index_rows.of_tsv(self.index, self, verdict)
        else:
            self._rows = {name: (name,) for name in index_rows.of_database(self.index)}
        return self._rows

    def _expected(self, rows: Mapping[str, Row], listed: Listed, there: set[str]) -> dict[str, str]:
        """The output of each file that must be there."""
        if self._rows_known:
            return {file: name for name in rows for file in self.files_of(name, listed.sums)}
        # A run that was stopped leaves checksums of files that never got their names, and another
        # that ends after it may have sealed them: they do not say what must be there.
        owners = {file: self.owner_of(file, there, listed.sums) for file in there}
        return {file: name for file, name in owners.items() if name is not None}

    def _list(self) -> set[str]:
        """All files of the folder, relative to it."""
        found: set[str] = set()
        for place, folders, files in os.walk(self.folder):
            below = os.path.relpath(place, self.folder)
            prefix = "" if below == "." else f"{below}/"
            found.update(prefix + file for file in files)
            folders[:] = [f for f in folders if self.deep and prefix + f != SET_ASIDE]
        return found

    def _tell_others(
        self, verdict: Verdict, expected: Mapping[str, str], listed: Listed, there: set[str]
    ) -> None:
        """Files without rows, rows without files, checksums without either."""
        for file, name in expected.items():
            if file not in there:
                verdict.add(MISSING, file, "it has a row, and is not there", [name])
        for file in sorted(there - expected.keys()):
            name = None if self._is_apart(file) else self.owner_of(file, there, listed.sums)
            if is_temporary(file):
                tell_temporary(verdict, file)
            elif name is not None:
                verdict.add(ORPHAN, file, "it has no row", [name])
            elif not self._is_apart(file):
                verdict.foreign += 1
        for file in sorted(listed.sums.keys() - there - expected.keys()):
            name = self.owner_of(file, there, listed.sums)
            reason = "a checksum without a file" + (" and a row" if self._rows_known else "")
            verdict.add(STRAY, file, reason, [name] if name else [])
        self._tell_list(verdict, listed)

        lost = isinstance(self.index, Tsv) and not self.index.path.exists()
        if lost and any(finding.kind in (ORPHAN, STRAY) for finding in verdict.findings):
            verdict.add(ROW, self.index.path.name, "the index is not there")

    def _tell_list(self, verdict: Verdict, listed: Listed) -> None:
        for line in listed.damaged:
            shown = line[:60].decode(errors="replace")
            verdict.add(LIST, checksums.FILE_NAME, f"a line is damaged: {shown!r}")
        if listed.seal == "broken":
            verdict.add(LIST, checksums.FILE_NAME, "it is not what was written")
        elif listed.seal == "open":
            reason = "it has no seal: a run is at work or was stopped, or its end was lost"
            verdict.add(OPEN, checksums.FILE_NAME, reason)

    def _is_apart(self, file: str) -> bool:
        """Whether a file is ours, and no output."""
        index = self.index.path.name if isinstance(self.index, Tsv) else ""
        return (
            file in (*_OURS, index)
            or (file.startswith("failures") and file.endswith(".jsonl"))
            or (file.startswith(".") and (file.endswith(".lock") or is_temporary(file)))
        )

    def _tell_contents(
        self,
        verdict: Verdict,
        present: Sequence[str],
        expected: Mapping[str, str],
        listed: Listed,
        effort: Effort,
        progress: Progress | None,
    ) -> None:
        """Compares files with their checksums, and looks into those that have none."""
        read = set(effort.chosen(present))
        unlisted: list[_Seen] = []
        weights: Counter[Form] = Counter()

        def see(file: str) -> _Seen:
            return self._see(file, listed.sums.get(file), file in read)

        for done, seen in enumerate(each(see, present, effort.threads), 1):
            file, name, is_listed = seen.file, expected[seen.file], seen.file in listed.sums
            row = self._rows.get(name)
            verdict.bytes += seen.size if file in read else 0
            verdict.unlisted += not is_listed
            if seen.fault is not None:
                verdict.add(seen.fault.kind, file, seen.fault.reason, [name])
            else:
                verdict.verified += is_listed and file in read
                if seen.form:
                    weights[seen.form[:2]] += 1
                if seen.form and row and (reason := self.fault_of_form(row, file, seen.form)):
                    verdict.add(ROW, f"row of {name}", reason, [name])
                if not is_listed:
                    unlisted.append(seen)
            if progress is not None and (done % 256 == 0 or done == len(present)):
                progress(done, len(present))
        self._tell_unlisted(verdict, unlisted, expected, listed)
        self._tell_misshapen(verdict, unlisted, weights, expected)

    def _see(self, file: str, entry: Checksum | None, read: bool) -> _Seen:
        path = self.folder / file
        try:
            size = path.stat().st_size
            if entry is not None and size != entry.size:
                return _Seen(file, size, fault=Fault(
                    DAMAGED, f"it has {size} bytes; {entry.size} when it was written"))  # fmt: skip
            if not read:
                fault = None if size else Fault(UNREADABLE, "it is empty")
                return _Seen(file, size, fault=fault)
            content = path.read_bytes()
        except OSError as error:
            return _Seen(file, fault=Fault(UNREADABLE, error.strerror or str(error)))
        found = checksum(content)
        if entry is not None and found != entry:
            return _Seen(file, size, fault=Fault(
                DAMAGED, "its content is not what was written"))  # fmt: skip
        try:
            return _Seen(file, size, found.digest, form=self.look(file, content, entry is not None))
        except ValueError as error:
            fault = error.args[0] if error.args else ""
            if not isinstance(fault, Fault):
                fault = Fault(UNREADABLE, str(error) or type(error).__name__)
            return _Seen(file, size, found.digest, fault)

    def _tell_unlisted(
        self,
        verdict: Verdict,
        unlisted: Sequence[_Seen],
        expected: Mapping[str, str],
        listed: Listed,
    ) -> None:
        """Files that have no checksum, where the list cannot be trusted to be whole."""
        if listed.seal in ("open", "broken"):
            for seen in unlisted:
                reason = "it has no checksum, and the list may have lost its line"
                verdict.add(LIST, seen.file, reason, [expected[seen.file]])

    def _tell_misshapen(
        self,
        verdict: Verdict,
        unlisted: Sequence[_Seen],
        weights: Mapping[Form, int],
        expected: Mapping[str, str],
    ) -> None:
        """Of files without checksums those are right that are like most."""
        usual: dict[object, Form] = {}
        for form in sorted(weights, key=weights.__getitem__):
            usual[form[0]] = form  # the most frequent comes last
        for seen in unlisted:
            if seen.form and seen.form[1] != usual[seen.form[0]][1]:
                reason = f"it is {seen.form[1]}; others are {usual[seen.form[0]][1]}"
                verdict.add(MISSHAPEN, seen.file, reason, [expected[seen.file]])

    # Repairing -------------------------------------------------------------------------

    def withdraw(self, verdict: Verdict) -> set[str]:
        """Rows first: a row without its file would be worse than a file without its row."""
        names = verdict.to_make
        if names and not self._rows_known:
            raise ValueError(f"the rows of {self.folder} are in a database: give it by --db ..")
        if isinstance(self.index, Tsv):
            self.index.keep(row for name, row in self._rows.items() if name not in names)
        elif self.index is not None:
            index_rows.drop(self.index, names)
        for finding in verdict.findings:
            if finding.kind == TEMPORARY:
                (self.folder / finding.name).unlink(missing_ok=True)
            elif finding.outputs and finding.kind != ROW:
                set_aside(self.folder, finding.name)
        return names

    def committed(self) -> set[str]:
        """Names of the outputs that the index holds now."""
        if isinstance(self.index, Tsv):
            return set(index_rows.of_tsv(self.index, self, Verdict("", "")))
        return index_rows.of_database(self.index) if self.index is not None else set()

    def tidy(self) -> None:
        """Drops what was set aside and is there again, and lines without files."""
        if isinstance(self.index, Tsv):
            self.index.close()
        there = self._list()
        listed = Checksums(self.folder)
        listed.remove(listed.read().sums.keys() - there)
        drop_set_aside(self.folder, there.__contains__)
