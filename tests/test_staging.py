"""Files that are there and on disk, or not there: whatever fails, and in this order."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fastembed import NpyPerPart, NpyPerSample, NpzPerSample, npy, staging
from fastembed.records import Embedded, Item
from fastembed.staging import StagedFiles, remove_stale_temporaries


@pytest.fixture(params=["whole", "file by file"])
def synced(request, monkeypatch):
    """Both ways to make files durable, on whatever file system the tests run."""
    monkeypatch.setattr(staging, "_syncs_whole", lambda descriptor: request.param == "whole")
    return request.param


@pytest.fixture
def calls(monkeypatch):
    """The system calls that matter, in their order: ("fsync", file name) and the like."""
    seen: list[tuple[str, str]] = []

    def watch(holder, function, name_of):
        original = getattr(holder, function)

        def watched(*arguments):
            seen.append((function.strip("_"), name_of(*arguments)))
            return original(*arguments)

        monkeypatch.setattr(holder, function, watched)

    def open_file(descriptor, *_):
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    watch(os, "write", open_file)
    watch(os, "fsync", open_file)
    watch(staging, "_syncfs", open_file)
    watch(os, "replace", lambda source, target: Path(target).name)
    return seen


def test_a_name_is_given_after_its_bytes_are_on_disk(tmp_path, synced, calls):
    files = StagedFiles(tmp_path)
    for name in ("a.npy", "b.json"):
        files.write(name, name.encode() * 99)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    files.flush()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "b.json"]
    assert (tmp_path / "a.npy").read_bytes() == b"a.npy" * 99
    kinds = [kind for kind, _ in calls]
    if synced == "whole":
        assert kinds == ["write", "write", "syncfs", "replace", "replace", "fsync"]
    else:
        assert kinds == ["write", "fsync", "write", "fsync", "replace", "replace", "fsync"]
        assert calls[0][1] == calls[1][1] and calls[2][1] == calls[3][1]  # each file's own
    assert calls[-1] == ("fsync", tmp_path.name)  # the names


def test_flush_without_a_write_does_nothing(tmp_path, synced, calls):
    files = StagedFiles(tmp_path)
    files.flush()
    files.write("a.npy", b"1")
    files.flush()
    done = len(calls)
    files.flush()
    assert len(calls) == done


def test_many_threads_and_groups(tmp_path, synced):
    before = len(os.listdir("/proc/self/fd"))
    files = StagedFiles(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        for group in range(3):
            names = [f"{group}_{i}.npy" for i in range(100)]
            list(pool.map(files.write, names, [name.encode() for name in names]))
            files.flush()
            assert len(list(tmp_path.iterdir())) == 100 * (group + 1)
    assert all(path.read_bytes() == path.name.encode() for path in tmp_path.iterdir())
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_failed_write_leaves_nothing(tmp_path, synced, monkeypatch):
    files = StagedFiles(tmp_path)
    files.write("a.npy", b"before")
    files.flush()
    files.write("a.npy", b"after")
    files.write("b.npy", b"new")

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            files.write("c.npy", b"more")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
    assert (tmp_path / "a.npy").read_bytes() == b"before"
    for late in (files.flush, lambda: files.write("d.npy", b"late")):
        with pytest.raises(OSError, match=r"an earlier write to .* failed: .*No space left"):
            late()
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_what_the_disk_does_not_keep_gets_no_name(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "_syncs_whole", lambda descriptor: True)

    def broken(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(staging, "_syncfs", broken)
    files = StagedFiles(tmp_path)
    files.write("a.npy", b"1")
    with pytest.raises(OSError, match="Input/output"):
        files.flush()
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="an earlier write"):
        files.flush()


def test_a_file_by_itself(tmp_path, calls, monkeypatch):
    path = tmp_path / "a.json"
    staging.write_bytes_atomically(path, b"before")
    assert [kind for kind, _ in calls] == ["write", "fsync", "replace"]

    def broken(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        staging.write_bytes_atomically(path, b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert path.read_bytes() == b"before"


def test_short_writes_are_continued(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    files = StagedFiles(tmp_path)
    files.write("a.npy", b"0123456789")
    files.flush()
    assert (tmp_path / "a.npy").read_bytes() == b"0123456789"


def test_killed_before_the_flush(tmp_path):
    """No name was given; the next run clears what is left."""
    code = (
        "import os, sys; from pathlib import Path; from fastembed.staging import StagedFiles\n"
        "files = StagedFiles(Path(sys.argv[1]))\n"
        "for i in range(3): files.write(f'{i}_{i}.npy', b'x' * 999)\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 3 and all(name.startswith(".") for name in left)
    assert NpyPerPart(tmp_path).open() == set()
    assert not list(tmp_path.iterdir())


def test_stale_temporaries_of_dead_processes_go(tmp_path):
    host = staging.socket.gethostname()
    names = [f".emb_x.npy.{host}-999999999.tmp", f".x.json.{host}-999999998.tmp"]
    kept = [f".emb_x.npy.{host}-{os.getpid()}.tmp", ".emb_x.npy.other-host-1.tmp", ".notes.tmp"]
    for name in names + kept:
        (tmp_path / name).write_bytes(b"half")
    remove_stale_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


SINKS = {"sample": NpyPerSample, "part": NpyPerPart, "npz": NpzPerSample}


@pytest.mark.parametrize("kind", SINKS)
def test_a_sink_shows_its_files_after_flush(tmp_path, kind, synced):
    parts = {} if kind == "sample" else {5: 0, 9: 1}
    item = Item("k", "p", "emb_7" if kind == "sample" else "7", parts=parts)
    vectors = np.random.default_rng(0).standard_normal((len(parts) or 1, 6)).astype(np.float16)
    sink = SINKS[kind](tmp_path)
    assert sink.open() == set()
    sink.write(Embedded(item, vectors))
    assert SINKS[kind](tmp_path).open() == set()
    sink.flush()
    names = {"sample": {"emb_7"}, "part": {"7_5", "7_9"}, "npz": {"7"}}[kind]
    assert SINKS[kind](tmp_path).open() == names
    if kind != "npz":
        read = [np.load(tmp_path / f"{name}.npy") for name in sorted(names)]
        np.testing.assert_array_equal(np.stack(read), vectors)


def test_only_file_systems_that_are_known_are_synchronised_whole(tmp_path, monkeypatch):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        device = os.fstat(descriptor).st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        mounts = tmp_path / "mountinfo"
        original = open
        monkeypatch.setattr(
            "builtins.open",
            lambda path, *a, **k: original(
                mounts if path == "/proc/self/mountinfo" else path, *a, **k
            ),
        )
        for kind, release, expected in [
            ("ext4", "6.1.0-18-amd64", True),
            ("xfs", "5.8.0", True),
            ("ext4", "5.4.0-generic", False),  # says nothing of failed writes
            ("ext4", "4.18.0-553.el8", False),
            ("nfs4", "6.1.0", False),
            ("overlay", "6.1.0", False),
            ("fuse.sshfs", "6.1.0", False),
        ]:
            mounts.write_text(
                "21 1 0:5 / / rw - ext4 /dev/root rw\n"
                f"36 35 {number} / /data rw,noatime master:1 - {kind} /dev/x rw,errors=continue\n"
            )
            monkeypatch.setattr(staging.platform, "release", lambda release=release: release)
            assert staging._syncs_whole(descriptor) is expected, (kind, release)
        mounts.write_text("21 1 0:5 / / rw - ext4 /dev/root rw\n")  # not listed at all
        assert not staging._syncs_whole(descriptor)
    finally:
        os.close(descriptor)


def test_encoded_is_what_np_save_writes(tmp_path):
    for array in (
        np.arange(384, dtype=np.float32),
        np.ones((2, 3, 4), np.float16),
        np.zeros(0, np.uint8),
        np.array(3, ">f4"),
    ):
        np.save(tmp_path / "theirs.npy", array)
        assert npy.encoded(array) == (tmp_path / "theirs.npy").read_bytes()
