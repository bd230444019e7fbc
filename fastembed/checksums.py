"""``checksums.tsv``: what every file of an output folder held when it was written.

A line per file: its name in the folder, its bytes, its XXH3 of 128 bits (that of ``xxh128sum``).
The lines of a commit are appended and made durable before its files get their names, and these
before their index rows. So no committed file lacks its line, whatever kills a run; a line without
its file may be left, and the run that makes the file writes the line again.

Any number of processes (shards) may append. The last line of a name counts. A finished run leaves
a line per name, sorted, so that one run and the union of shards give the same bytes, and last a
line of the list itself, its seal: the bytes before that line, and their XXH3. So lines that were
lost or altered show, which matters since a file without a line is taken for one of an earlier
version.
"""

from __future__ import annotations

import fcntl
import os
import re
import threading
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import xxhash

from . import staging

FILE_NAME = "checksums.tsv"
_HEADER = b"name\tbytes\txxh3_128"
_LINE = re.compile(rb"([^\t\n]+)\t(\d+)\t([0-9a-f]{32})")
# A name is whatever a file system takes; a line is one line.
_ESCAPES = ((b"\\", b"\\\\"), (b"\n", b"\\n"), (b"\t", b"\\t"), (b"\r", b"\\r"))
_SPECIAL = re.compile(rb"[\\\n\t\r]")
_ESCAPED = re.compile(rb"\\(.)", re.DOTALL)
_PLAIN = {b"\\": b"\\", b"n": b"\n", b"t": b"\t", b"r": b"\r"}


class Checksum(NamedTuple):
    """Of a file's content: number of bytes and XXH3, 16 bytes."""

    size: int
    digest: bytes


class Listed(NamedTuple):
    """What a list says.

    Attributes:
        sums: the checksums by file name.
        damaged: the lines that are none.
        seal: ``sealed``; ``open`` where a run that is at work or was stopped has added lines, or
            lines were lost; ``broken`` where what it seals is not what was written; ``none`` where
            there is no list.
    """

    sums: dict[str, Checksum]
    damaged: list[bytes]
    seal: str


def checksum(content: bytes) -> Checksum:
    """The checksum of a file's content."""
    return Checksum(len(content), xxhash.xxh3_128_digest(content))


class Checksums:
    """The list of a folder. Nothing is written before the first `append`."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder).resolve() / FILE_NAME
        self._lock = threading.Lock()
        self._noted: dict[str, Checksum] = {}

    def note(self, name: str, content: bytes) -> None:
        """Keeps a file's checksum for `append`. Safe from many threads.

        Args:
            name: relative to the folder.
        """
        entry = checksum(content)
        with self._lock:
            self._noted[name] = entry

    def append(self, sync: bool) -> None:
        """Adds the lines of what was noted, in one piece.

        Args:
            sync: on disk when this returns; otherwise the caller sees to that.

        Raises:
            OSError: disk full and the like; the list is as it was.
        """
        noted, self._noted = self._noted, {}
        text = b"".join(_line(_raw(name), entry) + b"\n" for name, entry in noted.items())
        if not text:
            return
        with self._locked():
            staging.append_lines(self.path, text, _HEADER + b"\n", sync)

    def read(self) -> Listed:
        """All lines. One that is half-written at the end does not count."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return Listed({}, [], "none")
        lines, damaged, seal = _parsed(data)
        sums = {_name(raw): _entry(line) for raw, line in lines.items()}
        return Listed(sums, damaged, seal)

    def close(self) -> None:
        """Leaves the list sorted, a line per name, and sealed; if its seal was not broken."""
        self._rewrite(frozenset(), keep_damage=True)

    def remove(self, names: Set[str]) -> None:
        """Drops the lines of these files, and those that are none. The list is sealed then."""
        self._rewrite({_raw(name) for name in names}, keep_damage=False)

    def _rewrite(self, names: Set[bytes], keep_damage: bool) -> None:
        with self._locked():
            if not self.path.exists():
                return
            data = self.path.read_bytes()
            lines, damaged, seal = _parsed(data)
            kept = [line for raw, line in lines.items() if raw not in names]
            # They tell of damage until somebody has looked into it.
            kept += damaged if keep_damage else []
            text = b"".join(line + b"\n" for line in (_HEADER, *sorted(kept)))
            if seal != "broken" or not keep_damage:
                text += _line(_raw(FILE_NAME), checksum(text)) + b"\n"
            if text != data:
                staging.write_bytes_atomically(self.path, text)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time; the lock ends with its process, however it ends."""
        lock = self.path.with_name(f".{self.path.name}.lock")
        with open(lock, "w", opener=staging.no_link) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


def _parsed(data: bytes) -> tuple[dict[bytes, bytes], list[bytes], str]:
    """The last line of each name as it stands there, the lines that are none, and the seal."""
    lines: dict[bytes, bytes] = {}
    damaged: list[bytes] = []
    seal, start = "open", 0
    for line in data.split(b"\n")[:-1]:
        fields = _LINE.fullmatch(line)
        if fields is None:
            damaged += [line] if line != _HEADER else []
        elif fields[1] == FILE_NAME.encode():
            sound = _entry(line) == checksum(data[:start])
            seal = "broken" if not sound or seal == "broken" else "sealed"
        else:
            lines[fields[1]] = line
            seal = "open" if seal == "sealed" else seal
        start += len(line) + 1
    return lines, damaged, seal


def _line(raw: bytes, entry: Checksum) -> bytes:
    return b"%s\t%d\t%s" % (raw, entry.size, entry.digest.hex().encode())


def _entry(line: bytes) -> Checksum:
    _, size, digest = line.split(b"\t")
    return Checksum(int(size), bytes.fromhex(digest.decode()))


def _raw(name: str) -> bytes:
    """A name as it stands in the list."""
    raw = os.fsencode(name)
    if _SPECIAL.search(raw):
        for plain, escaped in _ESCAPES:
            raw = raw.replace(plain, escaped)
    return raw


def _name(raw: bytes) -> str:
    if b"\\" in raw:
        raw = _ESCAPED.sub(lambda match: _PLAIN.get(match[1], match[0]), raw)
    return os.fsdecode(raw)
