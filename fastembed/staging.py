"""Files that are complete and on disk, or not there at all; many of them for one wait.

A disk that has to keep each small file by itself (fsync) does little else. But the files of one
commit need only be safe before their index rows are. So they are written under temporary names,
the file system is asked once to keep them all (syncfs), and then they get their names. A killed
run or a power cut leaves temporary files at worst, never half a file under its name.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import re
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checksums import Checksums

# Where syncfs returns when data, metadata and the disk's cache are flushed, and tells of what
# failed. Elsewhere (network, FUSE, overlay, unknown) each file is synchronised by itself.
_SYNCED_WHOLE = ("ext4", "xfs")
_TELLS_ERRORS = (5, 8)  # the Linux from which it does
_THEIRS = re.compile(r"\..*[A-Za-z][^./]*-\d+\.tmp", re.DOTALL)  # any host's


class StagedFiles:
    """Files of a folder, and of folders in it, that `flush` makes durable and visible.

    Args:
        folder: must exist when the first file is written.
        checksums: the folder's list. It gets a line of every file, which is on disk before the
            file has its name: with the files' own wait where the file system is synchronised
            whole.
    """

    def __init__(self, folder: Path, checksums: Checksums | None = None) -> None:
        self.folder = folder
        self.checksums = checksums
        self._lock = threading.Lock()
        self._staged: list[tuple[Path, Path]] = []
        # Of the folder, open while files are staged: syncfs tells of errors since it was opened.
        self._descriptor: int | None = None
        self._whole = False
        self._error: BaseException | None = None

    def write(self, name: str, content: bytes) -> None:
        """Writes a file that `flush` will call `name`, which may have folders; they are made.
        Safe from many threads.

        Raises:
            OSError: disk full and the like, now or in an earlier call. Nothing that was staged
                remains then.
        """
        path = self.folder / name
        temporary = temporary_of(path)
        try:
            self._begin()
            self._check_inside(path.parent)
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_new(temporary, content, sync=not self._whole)
            if self.checksums is not None:
                self.checksums.note(name, content)
            with self._lock:
                self._check()
                self._staged.append((temporary, path))
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            self._abandon(error)
            raise

    def flush(self) -> None:
        """All files written so far are on disk, under their names, when this returns.

        For one thread, while none writes.

        Raises:
            OSError: the disk did not keep them, or an earlier call failed.
        """
        self._check()
        if self._descriptor is None:
            return
        try:
            if self.checksums is not None:
                self.checksums.append(sync=not self._whole)
            if self._whole:
                _syncfs(self._descriptor)
            folders = self._folders()
            while self._staged:
                os.replace(*self._staged[-1])
                self._staged.pop()
            for folder in folders:
                sync_folder(folder)
        except BaseException as error:
            self._abandon(error)
            raise
        os.close(self._descriptor)
        self._descriptor = None

    def close(self) -> None:
        """Leaves the list of checksums sorted."""
        if self.checksums is not None:
            self.checksums.close()

    def _folders(self) -> set[Path]:
        """Those whose names change: of the files, and of the folders that may be new."""
        parents = {path.parent for _, path in self._staged}
        return {self.folder}.union(
            folder for parent in parents for folder in (parent, *parent.parents)
            if self.folder in folder.parents
        )  # fmt: skip

    def _check_inside(self, folder: Path) -> None:
        # A linked sub-folder may lead anywhere; one that stays inside is a folder like others.
        if folder != self.folder and not folder.resolve().is_relative_to(self.folder.resolve()):
            raise OSError(errno.ELOOP, "a link leads out of the output folder", str(folder))

    def _begin(self) -> None:
        with self._lock:
            self._check()
            if self._descriptor is None:
                self._descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
                self._whole = _syncs_whole(self._descriptor)

    def _check(self) -> None:
        if self._error is not None:
            raise OSError(f"an earlier write to {self.folder} failed: {self._error}")

    def _abandon(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
            for temporary, _ in self._staged:
                temporary.unlink(missing_ok=True)
            self._staged.clear()
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Writes a file by itself: complete and on disk, or not there at all.

    Raises:
        OSError: disk full and the like; the temporary file is gone then.
    """
    temporary = temporary_of(path)
    try:
        _write_new(temporary, content, sync=True)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_stale_temporaries(folder: Path) -> None:
    """Deletes the temporary files that a killed process of this host left in `folder`."""
    ours = _ours()
    for path in folder.glob(".*.tmp"):
        owner = ours.fullmatch(path.name)
        if owner and not _is_alive(int(owner[1])):
            path.unlink(missing_ok=True)


def is_being_written(name: str) -> bool:
    """Whether the process whose temporary file this is may be alive: on another host, it may."""
    if owner := _ours().fullmatch(name):
        return _is_alive(int(owner[1]))
    return _THEIRS.fullmatch(name) is not None


def _ours() -> re.Pattern[str]:
    return re.compile(rf"\..*\.{re.escape(socket.gethostname())}-(\d+)\.tmp", re.DOTALL)


def temporary_of(path: Path) -> Path:
    """Where this process writes what shall get the name `path`, in the same folder; once the
    process has ended, `remove_stale_temporaries` finds it."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def _write_new(path: Path, content: bytes, sync: bool) -> None:
    descriptor = no_link(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        write_fully(descriptor, content)
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def no_link(path: str | Path, flags: int) -> int:
    """An opener for `open`: of a file, not of what a link in its place leads to. For every file
    that is written under its own name in a folder where others may have put something."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def append_lines(path: Path, text: bytes, header: bytes = b"", sync: bool = True) -> None:
    """Adds lines to a file of lines; for one process at a time. A line that a killed process left
    half-written is cut off first: it would swallow the next one.

    Args:
        text: whole lines.
        header: what an empty or new file gets before them.
        sync: on disk when this returns; otherwise the caller sees to that.

    Raises:
        OSError: disk full and the like; the file is as it was.
    """
    descriptor = no_link(path, os.O_RDWR | os.O_CREAT)
    try:
        end = _end_of_lines(descriptor)
        os.ftruncate(descriptor, end)
        os.lseek(descriptor, end, os.SEEK_SET)
        try:
            write_fully(descriptor, text if end else header + text)
            if sync:
                os.fsync(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)


def _end_of_lines(descriptor: int) -> int:
    """Where the last whole line of a file ends."""
    with open(descriptor, "rb", closefd=False) as stream:
        size = stream.seek(0, os.SEEK_END)
        if not size:
            return 0
        stream.seek(size - 1)
        if stream.read(1) == b"\n":
            return size
        stream.seek(0)
        return stream.read().rfind(b"\n") + 1


def write_fully(descriptor: int, data: bytes | memoryview) -> None:
    """Writes all of the data at the descriptor's position."""
    view = memoryview(data)
    while view:
        written = os.write(descriptor, view)
        if written == 0:
            raise OSError(errno.EIO, "write returned 0")
        view = view[written:]


def _syncs_whole(descriptor: int) -> bool:
    """Whether the file system of an open file or folder can be trusted to be synchronised whole."""
    version = tuple(int(number) for number in re.findall(r"\d+", platform.release())[:2])
    if platform.system() != "Linux" or version < _TELLS_ERRORS:
        return False
    if not hasattr(ctypes.CDLL(None), "syncfs"):
        return False
    device = os.fstat(descriptor).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        kinds = {line.split()[2]: line.partition(" - ")[2].split()[0] for line in mounts}
    return kinds.get(number) in _SYNCED_WHOLE


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _syncfs(descriptor: int) -> None:
    while ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
        if (code := ctypes.get_errno()) != errno.EINTR:  # as Python's own calls go on after it
            raise OSError(code, os.strerror(code))


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
