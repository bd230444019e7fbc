"""How a run ends when something goes wrong: with the right status, a reason, and no hang."""

from __future__ import annotations

import json
import re
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from bench import DONE, ERROR, KILLED, Bench
from shim import Fault

PROMPT = 40.0  # seconds, on a machine that is busy with other tests


@pytest.fixture
def bench(benches) -> Bench:
    return benches("multichannel npy")


@pytest.fixture
def store(benches) -> Bench:
    return benches("multichannel zarr")


# An error that nobody expects ------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "count"),
    [("list", 9), ("read", 9), ("prepare", 1), ("prepare", 12), ("engine", 1), ("engine", 5),
     ("pool", 3), ("write", 1), ("write", 10), ("flush", 2), ("commit", 1), ("commit", 3),
     ("close", 1), *[("start of a thread", i) for i in range(1, 6)]],
)  # fmt: skip
def test_an_unexpected_error_in_any_thread_stops_the_run(bench, place, count):
    stopped(bench, place, count)


@pytest.mark.parametrize(
    ("place", "count"), [("append", 1), ("append", 3), ("merge", 1), ("start of a thread", 1)]
)
def test_and_one_in_a_store(store, place, count):
    stopped(store, place, count)


def stopped(bench: Bench, place: str, count: int) -> None:
    out = bench.new_output()
    ending = bench.run(out, hook=["failing", place, count], timeout=PROMPT)
    assert ending.status == ERROR
    assert f"fastembed: made to fail: {place}" in ending.text
    bench.finish(out, bench.check(out))


# Signals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_leaves_all_that_was_embedded_committed(bench, name, status):
    """The signal comes in the first commit, while the engine is at work."""
    out = bench.new_output()
    argv = bench.argv(out)
    fault = Fault(out, "signal", "write", name, first=12, last=12)
    ending = bench.server.run(argv, fault, hook=["slow_engine", 0.05])
    assert (ending.status, ending.hit[0]) == (status, 1)
    assert f"{name}: finishing the batch in hand; again to stop at once" in ending.text
    assert "the same command goes on from there" in ending.text
    rows = int(re.search(r"rows embedded: (\d+)", ending.text)[1])
    committed = bench.check(out)
    # Two readers fill batches side by side: at the most two samples are not whole yet.
    assert rows // 4 - 2 <= len(committed) <= rows // 4 < len(bench.reference.committed)
    assert committed
    bench.finish(out, committed)


def test_a_second_signal_ends_at_once(bench):
    """While the engine is at a batch that takes a minute."""
    out = bench.new_output()
    options = {"hook": ["slow_engine", 60], "signals": [[1.5, 15], [2.5, 15]], "timeout": PROMPT}
    ending = bench.run(out, **options)
    assert ending.status == 143 and ending.seconds < 10
    bench.finish(out, bench.check(out))


# Two runs, one output --------------------------------------------------------------------


def test_two_runs_on_one_output(bench):
    """One is stopped in the middle and holds the folder; the other says who does, and leaves."""
    out = bench.new_output()
    first = Fault(out, "signal", "write", "SIGSTOP", first=10, last=10)
    one, other = bench.server.run_together(
        (bench.argv(out), (first,), {"signals": [[4.0, 18]]}),
        (bench.argv(out), (), {"hook": ["impatient", 0.2], "delay": 2.0}),
    )
    assert one.status == DONE and other.status == ERROR
    said = re.search(r"is being written by process (\d+) on (\S+) since \d{4}-", other.text)
    assert said and "--shard I/N" in other.text
    bench.check_complete(out)


def test_the_lock_of_a_killed_run_is_stale(bench):
    out = bench.new_output()
    assert bench.run(out, Fault(out, "kill-after", "write", first=10)).status == KILLED
    lock = json.loads((out / ".fastembed-run-0-of-1.lock").read_text())
    assert not Path(f"/proc/{lock['pid']}").exists()
    ending = bench.run(out, hook=["impatient", 0.0])
    assert ending.status == DONE
    bench.check_complete(out)


# Disks -----------------------------------------------------------------------------------


@contextmanager
def mounted(place: Path, *options: str):
    """A tmpfs; skips, with the reason, where that is not allowed."""
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join(("mode=700", *options)), "none", str(place)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


@pytest.mark.parametrize("name", ["multichannel npy", "panoptic zarr", "volumes", "cellpose infer"])
def test_a_full_disk(benches, tmp_path, name):
    """A real one: it fills up in the middle, is made larger, and the same command goes on."""
    bench = benches(name)
    need = sum(-(-len(content) // 4096) * 4096 for content in bench.reference.files.values())
    with mounted(tmp_path / "small", f"size={need // 2}") as small:
        ending = bench.run(small / "out")
        assert ending.status == ERROR and "No space left on device" in ending.text
        committed = bench.check(small / "out")
        remount(small, "size=64m")
        bench.finish(small / "out", committed)


@pytest.mark.parametrize("name", ["multichannel npy", "panoptic zarr", "maps", "volumes",
                                  "cellpose infer"])  # fmt: skip
def test_a_read_only_output(benches, tmp_path, name):
    """A clear error, nothing written there nor anywhere else; a finished one stays as it is."""
    bench = benches(name)
    with mounted(tmp_path / "disk") as disk:
        (disk / "new").mkdir()
        assert bench.run(disk / "done").status == DONE
        remount(disk, "ro")
        before = listing(tmp_path) | listing(Path.cwd())
        for place in (disk / "new", disk / "not there", disk / "done"):
            ending = bench.run(place)
            assert ending.status == ERROR
            assert "Read-only file system" in ending.text
            assert str(place) in ending.text
        assert listing(tmp_path) | listing(Path.cwd()) == before
        bench.check_complete(disk / "done")


def listing(folder: Path) -> dict[str, int]:
    """Files by path, and when they were written."""
    return {
        str(path): path.lstat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and not {".git", ".pytest_cache", "__pycache__"} & set(path.parts)
    }
