"""One run per shard of an output folder: two that made the same samples would be in each other's
way.

The truth is a lock of the operating system (flock), which ends with its process however that ends,
so a lock that nobody holds is stale and simply taken over. What stands in the file (host, process,
since when) is for the message. It is as good as the file system's flock: across hosts on NFS, GPFS
and Lustre (mounted with flock), on this host only where a file system keeps locks to itself.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

from .staging import no_link

_GUARD = ".fastembed-runs.lock"
_FILE = re.compile(r"\.fastembed-run-(?P<part>\d+)-of-(?P<parts>\d+)(?:-(?P<name>.+))?\.lock")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_POLL_SECONDS = 0.1


class FolderBusy(OSError):
    """Another run is making the same samples in this folder."""


class RunLock:
    """Holds a shard of a folder while in a with block; the folder is made if it is not there.

    Args:
        folder: of the outputs.
        shard: (i, n), part i of n. Parts with no sample in common do not exclude each other, 0/2
            and 3/4 for example; those that have some do, and 0/1 all.
        name: of a run that shares the folder with runs of other names, which make other samples.
        patience: seconds to wait for a holder: a process that was just killed needs a moment to
            end, one with a GPU some seconds.

    Raises:
        FolderBusy: a run that is alive holds the same samples; says which process, where and
            since when.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        shard: tuple[int, int] = (0, 1),
        name: str = "",
        patience: float = 5.0,
    ) -> None:
        self.folder = Path(folder)
        self.shard, self.name, self.patience = shard, name, patience
        part, parts = shard
        label = f"-{name}" if name else ""
        self.path = self.folder / f".fastembed-run-{part}-of-{parts}{label}.lock"
        self._held: IO | None = None

    def __enter__(self) -> RunLock:
        deadline = time.monotonic() + self.patience
        while (holder := self._take()) is not None:
            if time.monotonic() > deadline:
                raise FolderBusy(
                    f"{self.folder} is being written by {holder}: wait for it, stop it, or give "
                    "each run a shard of its own (--shard I/N)"
                )
            time.sleep(_POLL_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        with self._guarded():
            self.path.unlink(missing_ok=True)
            self._held.close()
            self._held = None

    def _take(self) -> str | None:
        """Takes the shard, or says who has it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._guarded():
                for path in self._overlapping():
                    if (holder := _holder(path)) is not None:
                        return holder
                    path.unlink(missing_ok=True)  # its run is gone
                self._held = open(self.path, "w", encoding="utf-8", opener=no_link)
                _lock(self._held)
                json.dump(_here(), self._held)
                self._held.flush()
        except OSError as error:
            raise OSError(f"cannot write into {self.folder}: {error.strerror or error}") from error
        return None

    def _overlapping(self) -> Iterator[Path]:
        """The locks, held or not, of runs that have samples in common with this one."""
        part, parts = self.shard
        for path in self.folder.glob(".fastembed-run-*.lock"):
            found = _FILE.fullmatch(path.name)
            if found is None or (found["name"] or "") != self.name:
                continue
            # Numbers that leave i by n and j by m exist where i and j agree by their divisor.
            if (int(found["part"]) - part) % math.gcd(int(found["parts"]), parts) == 0:
                yield path

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """One process at a time looks and takes."""
        with open(self.folder / _GUARD, "w", opener=no_link) as stream:
            _lock(stream, wait=True)
            yield


def _here() -> dict[str, object]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _holder(path: Path) -> str | None:
    """Who holds a lock, None where nobody does."""
    try:
        stream = path.open(encoding="utf-8")
    except FileNotFoundError:
        return None
    with stream:
        if _lock(stream):
            return None
        try:
            said = json.load(stream)
            return f"process {said['pid']} on {said['host']} since {said['since']}"
        except (ValueError, KeyError, TypeError):
            return "another process"


def _lock(stream: IO, wait: bool = False) -> bool:
    """Whether this process has the file's lock now."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"{Path(stream.name).parent}: its file system has no locks, so nothing here keeps two "
            "runs of one shard apart",
            stacklevel=2,
        )
    return True
