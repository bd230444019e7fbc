"""What `verify` says of a folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

# Kinds of findings, and what each means.
MISSING = "missing"  # an index row whose file is not there
DAMAGED = "damaged"  # another content than was written
UNREADABLE = "unreadable"  # without checksum, and not a file of the kind
MISSHAPEN = "misshapen"  # without checksum, and of another shape or dtype than the others
NOT_FINITE = "not finite"  # without checksum, and with values that are no numbers
ROW = "row"  # an index row that does not fit itself, its file or the index
ORPHAN = "no row"  # a file of ours without an index row: a killed run leaves such
STRAY = "no file"  # a checksum without a file and a row: a killed run may leave such
LIST = "checksums"  # a damaged line of the list of checksums, or what lost its line by it
OPEN = "open"  # a list of checksums that no finished run has sealed
STALE = "stale"  # a table that is not that of its records; any run makes it anew
SETTINGS = "settings"  # the settings file, or the record of commands
TEMPORARY = "temporary"  # what a killed run left half-written
UNMERGED = "unmerged"  # vectors that are committed, but not in the store yet

# What a killed run leaves; the next run makes it good.
_LEFT_BEHIND = (ORPHAN, STRAY, OPEN, STALE, TEMPORARY, UNMERGED)


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        kind: one of this module's constants.
        name: the file in the folder, or the row.
        reason: what is wrong with it.
        outputs: names of the outputs that have to be made again for it.
    """

    kind: str
    name: str
    reason: str
    outputs: tuple[str, ...] = ()

    @property
    def is_damage(self) -> bool:
        """Whether something was lost or altered; the rest is what killed runs leave."""
        return self.kind not in _LEFT_BEHIND

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass
class Verdict:
    """What a folder holds, and what is wrong with it.

    Attributes:
        folder, form, index: what was looked at.
        outputs: rows of the index.
        files: what the rows promise: files, chunks of a store, volumes, tiles.
        verified: of these, those that are what their checksums say.
        unlisted: of these, those that have no checksum, as those of earlier versions. Whether they
            can be read, and are of the right shape, was checked.
        foreign: files that are not ours; left alone.
        bytes: that were read.
        findings: all that is wrong.
        notes: what could not be checked.
    """

    folder: str
    form: str
    index: str = ""
    outputs: int = 0
    files: int = 0
    verified: int = 0
    unlisted: int = 0
    foreign: int = 0
    bytes: int = 0
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def counts(self) -> dict[str, int]:
        """Findings by kind."""
        return dict(Counter(finding.kind for finding in self.findings).most_common())

    @property
    def to_make(self) -> set[str]:
        """Names of the outputs that have to be made again."""
        return {name for finding in self.findings for name in finding.outputs}

    def add(self, kind: str, name: str, reason: str, outputs: Iterable[str] = ()) -> None:
        self.findings.append(Finding(kind, name, reason, tuple(outputs)))

    def to_json(self) -> str:
        head = {"sound": self.sound, "counts": self.counts}
        return json.dumps({**head, **asdict(self)}, indent=2, ensure_ascii=False)
