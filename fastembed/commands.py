"""``fastembed-runs.json``: the commands that made an output folder, and a copy of its settings.

A command stands there once, without what held for one run only (its shard, its limit) and without
secrets; `fastembed verify --repair` gives it again to make what was damaged.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from . import signature, staging

FILE_NAME = "fastembed-runs.json"
# Stands in a command for the output folder, which may be moved.
FOLDER = "{folder}"


@dataclass(frozen=True)
class Command:
    """A command line that makes an output folder, or goes on with it.

    Attributes:
        argv: what follows the program's name; an argument, or what follows the = in one, may be
            `FOLDER`.
        cwd: the folder that relative paths in it start from.
        version: of the library that ran it last.
    """

    argv: tuple[str, ...]
    cwd: str
    version: str

    def within(self, folder: Path) -> list[str]:
        """The arguments, for the outputs in `folder`."""
        return [
            f"{word.removesuffix(FOLDER)}{folder}"
            if word == FOLDER or word.endswith(f"={FOLDER}")
            else word
            for word in self.argv
        ]


@dataclass(frozen=True)
class Record:
    """What the file says.

    Attributes:
        folder: where the outputs were then.
        commands: those that made them, the newest last.
        settings: what `signature.claim` had written into the folder.
    """

    folder: str = ""
    commands: tuple[Command, ...] = ()
    settings: dict | None = None


def record(folder: Path, command: Command) -> None:
    """Adds a command to the folder's record. The folder must have its settings.

    Raises:
        OSError: disk full and the like; the record is as it was.
    """
    with _locked(folder):
        try:
            old = read(folder)
        except ValueError:  # damaged: the commands of before are lost
            old = Record()
        same = [c for c in old.commands if (c.argv, c.cwd) == (command.argv, command.cwd)]
        settings = json.loads((folder / signature.FILE_NAME).read_text())
        if same == [command] and (old.folder, old.settings) == (str(folder), settings):
            return
        others = [c for c in old.commands if c not in same]
        content = asdict(Record(str(folder), (*others, command), settings))
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        staging.write_bytes_atomically(
            folder / FILE_NAME, text.encode("utf-8", errors="surrogateescape")
        )


def read(folder: Path) -> Record:
    """The folder's record; an empty one where there is none.

    Raises:
        ValueError: the file is no such record.
    """
    path = folder / FILE_NAME
    try:
        content = json.loads(path.read_bytes().decode("utf-8", errors="surrogateescape"))
        commands = [
            Command(tuple(_strings(c["argv"])), *_strings([c["cwd"], c["version"]]))
            for c in content["commands"]
        ]
        return Record(content["folder"], tuple(commands), content["settings"])
    except FileNotFoundError:
        return Record()
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a record of commands: {error!r}") from error


def _strings(values: Sequence) -> Sequence[str]:
    if not all(isinstance(value, str) for value in values):
        raise TypeError(f"expected text; got {values}")
    return values


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time: shards start together."""
    with open(folder / f".{FILE_NAME}.lock", "w", opener=staging.no_link) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
