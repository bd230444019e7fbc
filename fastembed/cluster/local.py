"""The same script, run here: a few processes at a time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from .progress import Progress, Standing
from .resources import Resources
from .tasks import TaskArray

GRACE_SECONDS = 30.0
_POLL_SECONDS = 0.05


@dataclass
class _Running:
    index: int
    devices: list[str] | None
    log: Path
    process: subprocess.Popen
    deadline: float


def command(tasks: TaskArray, stem: str, number: int | str) -> list[str]:
    """The line that runs one task."""
    return ["/bin/bash", str(tasks.logs / f"{stem}.sh"), str(number)]


def slots(resources: Resources) -> list[list[str] | None]:
    """One entry per task that may run at a time: its GPUs, or None where none were asked for.

    As many as `running_limit` says, by default as cores and memory have room for, and no more
    than there are GPUs for.

    Raises:
        ValueError: there are fewer GPUs than one task needs.
    """
    count = resources.running_limit
    if count is None:
        count = len(os.sched_getaffinity(0)) // resources.processors
        if resources.megabytes:
            here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
            count = min(count, here // resources.megabytes)
        count = max(1, count)
    each = int(resources.gpus or 0)
    if not each:
        return [None] * count
    devices = gpus_here()
    if len(devices) < each:
        raise ValueError(f"gpus: each task needs {each}, and there are {len(devices)} here")
    groups = [devices[i : i + each] for i in range(0, len(devices) - each + 1, each)]
    return groups[:count]


def gpus_here() -> list[str]:
    """The GPUs that a process may use, as CUDA_VISIBLE_DEVICES has them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device for device in visible.split(",") if device.strip() not in ("", "-1")]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def run(
    tasks: TaskArray, resources: Resources, stem: str, lock: int, progress: Progress | None
) -> dict[int, int]:
    """Runs all tasks; returns the exit status of those that failed.

    Any exception that arrives meanwhile (Ctrl-C and SIGTERM of the command line are two) ends
    the tasks first: SIGTERM, and after `GRACE_SECONDS` SIGKILL.

    Args:
        lock: file descriptor that every task keeps open, to be seen as running.
    """
    free = slots(resources)
    waiting = list(enumerate(tasks.indices, start=1))[::-1]
    running: list[_Running] = []
    failed: dict[int, int] = {}
    total = len(waiting)
    try:
        while waiting or running:
            while waiting and free:
                number, index = waiting.pop()
                devices = free.pop(0)
                log = tasks.scheduler_log(stem, f"local_{number}")
                process = _start(command(tasks, stem, number), devices, log, lock)
                deadline = time.monotonic() + (resources.seconds or float("inf"))
                running.append(_Running(index, devices, log, process, deadline))
            time.sleep(_POLL_SECONDS)
            for task in [task for task in running if task.process.poll() is not None]:
                running.remove(task)
                free.append(task.devices)
                if task.process.returncode:
                    failed[task.index] = task.process.returncode
                if progress:
                    done = total - len(waiting) - len(running)
                    progress(Standing(total, done, len(failed), len(running)))
            late = [task for task in running if time.monotonic() > task.deadline]
            for task in late:
                with task.log.open("a") as stream:
                    stream.write("TERM_RUNLIMIT: ended after its walltime\n")
            _stop(late)
    finally:
        _stop(running)
    return failed


def _start(command: list[str], devices: list[str] | None, log: Path, lock: int) -> subprocess.Popen:
    environment = dict(os.environ)
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    with log.open("ab") as stream:  # to append: we write there as well
        # In a session of its own, where the terminal's Ctrl-C does not reach it: we stop it.
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
        )


def _stop(running: list[_Running]) -> None:
    for task in running:
        _signal(task, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for task in running:
        try:
            task.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(task, signal.SIGKILL)
            task.process.wait()


def _signal(task: _Running, number: signal.Signals) -> None:
    """To the script and its command, as a scheduler does; they are a process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(task.process.pid, number)
