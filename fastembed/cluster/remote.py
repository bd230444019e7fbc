"""What a Dask worker does with one task.

Workers get this module by value (`elastic`), so they need Dask and the folder of the logs, and
nothing of ours in their own process: a task's command is a process of its own, whose crash is a
task's failure and not a worker's death. Hence no import of ours here.

A worker may die at any moment, and its task then starts again elsewhere. Two things keep that
safe. The command dies with its worker (`lifeline`). And it holds a lock on a file beside the logs,
which the next attempt waits for: the kernel frees it when the last process of the dead attempt is
gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

GRACE_SECONDS = 30.0
LOCK_SECONDS = 300.0
_POLL_SECONDS = 0.1
_STARTED, _ENDED, _GAVE_UP = "worker attempt", "worker ended", "TERM_WORKERS:"


@dataclass(frozen=True)
class Job:
    """What is the same for all tasks of a submission.

    Args:
        script: its path; takes the number of a task.
        guard: source text of `lifeline`.
        retries: how often a task starts again after its worker died with it.
        topic: of the events that say which tasks run.
    """

    script: str
    guard: str
    retries: int
    topic: str


def run(job: Job, number: int, lock: str, log: str) -> int | None:
    """Runs a task to its end; returns its exit status, None if too many workers died with it.

    Ends the command early, with time to clean up, when the task is cancelled, when whoever wants
    it is gone, and when the worker itself is about to end (`distributed.Reschedule` then has the
    task start again elsewhere; that attempt counts for nothing).

    Args:
        number: of the task, from 1.
        lock: path of a file that one attempt at a time may lock.
        log: path of the task's log, in which its attempts are counted.

    Raises:
        OSError: a file is not there or cannot be written; the lock was not free in time.
    """
    from distributed import Reschedule, get_worker
    from distributed.core import Status

    worker = get_worker()
    key = worker.get_current_task()

    def wanted() -> bool:
        state = worker.state.tasks.get(key)
        cancelled = state is None or state.state == "cancelled"
        return worker.status == Status.running and not cancelled

    with Path(lock).open("ab") as held, Path(log).open("a+b") as stream:
        _acquire(held, wanted)
        stream.seek(0)
        started, died = attempts(stream.read().decode(errors="replace"))
        if died > job.retries:
            _say(stream, f"{_GAVE_UP} {died} workers died with this task, so it is not tried again")
            return None
        event = {"number": number, "worker": worker.address}
        worker.log_event(job.topic, event | {"running": True})
        _say(stream, f"{_STARTED} {started + 1} on {socket.gethostname()}, {worker.name}")
        status = _attend(job, number, held.fileno(), stream, wanted)
        _say(stream, f"{_ENDED} with status {status}")
        worker.log_event(job.topic, event | {"running": False})
        if status and worker.status != Status.running:
            raise Reschedule
        return status


def attempts(text: str) -> tuple[int, int]:
    """How often a task started, and how many workers died with it, by the text of its log."""
    lines = text.splitlines()
    started = sum(line.startswith(_STARTED) for line in lines)
    return started, started - sum(line.startswith(_ENDED) for line in lines)


def _attend(job: Job, number: int, lock: int, log: BinaryIO, wanted: Callable[[], bool]) -> int:
    read, write = os.pipe()
    try:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", job.guard, str(read), str(lock),
                 "/bin/bash", job.script, str(number)],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(read, lock),
            )  # fmt: skip
        finally:
            os.close(read)
        while wanted():
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_POLL_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(GRACE_SECONDS)
    finally:
        os.close(write)  # what is left of it is killed
    return 128 - process.wait()


def _acquire(held: BinaryIO, wanted: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wanted():
                raise InterruptedError("not wanted any more") from None
            if time.monotonic() > deadline:
                raise OSError(
                    f"an earlier attempt still holds {held.name} after {LOCK_SECONDS:g} s"
                ) from None
        time.sleep(_POLL_SECONDS)


def _environment() -> dict[str, str]:
    """The worker's, without what Dask sets for threads inside of workers."""
    import dask

    of_dask = dask.config.get("distributed.nanny.pre-spawn-environ", {})
    return {k: v for k, v in os.environ.items() if str(of_dask.get(k)) != v}


def _say(log: BinaryIO, text: str) -> None:
    log.write(f"{text}\n".encode())
    log.flush()
