"""The shards of a submission as tasks of Dask: handed out, followed, and ended together."""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import pickle
import queue
import time
import uuid
from pathlib import Path

from . import lifeline, remote
from .progress import Progress, Standing
from .resources import Resources
from .tasks import TaskArray
from .workers import Elastic, connected, gpus_of

_TICK_SECONDS = 1.0
KILLED = 137  # the exit status of what SIGKILL ended


def run(
    tasks: TaskArray, resources: Resources, stem: str, elastic: Elastic, progress: Progress | None
) -> dict[int, int]:
    """Runs all tasks; returns the exit status of those that failed.

    A task whose worker died starts again, at most `Elastic.retries` times; one that fails does
    not. Any exception that arrives meanwhile (Ctrl-C and SIGTERM of the command line are two)
    ends the tasks first, with time to clean up, and then the workers.

    Raises:
        ImportError: Dask is not installed.
        OSError: no scheduler answers, or it went away; Slurm or LSF refuse a worker.
    """
    with connected(elastic, tasks, resources, stem) as connection:
        return _Run(tasks, resources, stem, elastic, connection, progress).run()


class _Run:
    def __init__(self, tasks, resources, stem, elastic, connection, progress) -> None:
        self._tasks, self._stem = tasks, stem
        self._elastic = elastic
        self._connection, self._client = connection, connection.client
        self._progress = progress
        self._limit = resources.running_limit or len(tasks.indices)
        self._gpus = gpus_of(resources, elastic)
        self._name = f"shard-{uuid.uuid4().hex}"
        job = remote.Job(
            script=str(tasks.logs / f"{stem}.sh"),
            guard=inspect.getsource(lifeline),
            retries=elastic.retries,
            topic=self._name,
        )
        self._function = _ByValue(functools.partial(remote.run, job))
        self._rounds: collections.Counter[int] = collections.Counter()
        self._futures: dict = {}  # of its key: number and future
        self._running: dict[int, str] = {}  # of its number: the worker that has it
        self._ended: queue.SimpleQueue = queue.SimpleQueue()
        self._failed: dict[int, int] = {}

    def run(self) -> dict[int, int]:
        waiting = collections.deque(range(1, len(self._tasks.indices) + 1))
        total, done = len(waiting), 0
        self._client.subscribe_topic(self._name, self._heard)
        try:
            while waiting or self._futures:
                free = self._limit - len(self._futures)
                self._submit([waiting.popleft() for _ in range(min(free, len(waiting)))])
                with contextlib.suppress(queue.Empty):
                    number, again = self._settle(self._ended.get(timeout=_TICK_SECONDS))
                    if again:
                        waiting.append(number)
                    else:
                        done += 1
                self._connection.check()
                if self._progress:
                    self._progress(Standing(total, done, len(self._failed), len(self._running)))
        finally:
            self._stop()
        return self._failed

    def _submit(self, numbers: list[int]) -> None:
        if not numbers:
            return
        # Tuples: tasks of one group, which Dask then keeps on the scheduler until a worker is free.
        keys = [(self._name, number, self._rounds[number]) for number in numbers]
        futures = self._client.map(
            self._function,
            numbers,
            [str(self._lock(number)) for number in numbers],
            [str(self._log(number)) for number in numbers],
            key=keys,
            pure=False,
            retries=0,
            resources=self._gpus,
        )
        for number, key, future in zip(numbers, keys, futures, strict=True):
            self._futures[key] = number, future
            future.add_done_callback(self._ended.put)

    def _log(self, number: int) -> Path:
        return self._tasks.scheduler_log(self._stem, f"dask_{number}")

    def _lock(self, number: int) -> Path:
        """The same for all submissions: whoever has the index, another waits for it."""
        index = self._tasks.indices[number - 1]
        return self._tasks.logs / "scheduler" / f"{self._tasks.pattern % index}.lock"

    def _settle(self, future) -> tuple[int, bool]:
        """Takes note of a task's end; returns its number, and whether it is to start again."""
        from distributed.scheduler import KilledWorker

        number, _ = self._futures.pop(future.key)
        self._running.pop(number, None)
        index = self._tasks.indices[number - 1]
        if future.status in ("cancelled", "lost"):
            raise OSError(
                f"the Dask scheduler {self._client.scheduler.address} dropped the shards; the same "
                "command goes on from there"
            )
        if future.status == "error":
            # Not the command's failure: its worker died, or could not start it. KilledWorker
            # counts tasks that waited on a dead worker as well, so that `remote` counts for itself.
            error = future.exception()
            self._rounds[number] += 1
            if self._rounds[number] <= self._elastic.retries:
                return number, True
            if not isinstance(error, KilledWorker):
                self._note(number, f"TERM_WORKERS: {type(error).__name__}: {error}")
            self._failed[index] = KILLED
        elif status := future.result():
            self._failed[index] = status
        elif status is None:
            self._failed[index] = KILLED
        return number, False

    def _note(self, number: int, text: str) -> None:
        with self._log(number).open("a") as log:
            log.write(f"{text}\n")

    def _heard(self, event) -> None:
        _, said = event
        if said["running"]:
            self._running[said["number"]] = said["worker"]
        else:
            self._running.pop(said["number"], None)

    def _stop(self) -> None:
        """Leaves no task of this submission queued or running."""
        with contextlib.suppress(OSError, TimeoutError):  # where nobody is left to be told
            if self._futures:
                self._connection.keep()
                self._client.cancel([future for _, future in self._futures.values()])
            deadline = time.monotonic() + remote.GRACE_SECONDS + 5
            while self._running and time.monotonic() < deadline:
                alive = self._client.scheduler_info(n_workers=-1)["workers"]
                if not any(worker in alive for worker in list(self._running.values())):
                    break
                time.sleep(0.1)
            self._client.unsubscribe_topic(self._name)


class _ByValue:
    """A function of `remote` that workers need not import: they load neither us nor torch."""

    def __init__(self, function) -> None:
        import cloudpickle

        # For good: a scheduler in this process reads the bytes, and writes them for its workers.
        cloudpickle.register_pickle_by_value(remote)
        self._bytes = cloudpickle.dumps(function)

    def __reduce__(self):
        return pickle.loads, (self._bytes,)

    def __call__(self, *_: object) -> None:
        raise TypeError("runs on workers only")
