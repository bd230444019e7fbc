"""`submit`, and what earlier submissions left: which tasks are held, which are missing."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import local
from .resources import Resources
from .schedulers import SCHEDULERS, submit_job
from .script import render
from .tasks import TaskArray, format_indices, parse_indices

NAMES = (*SCHEDULERS, "local")


@dataclass(frozen=True)
class Submission:
    """What `submit` did, or would do.

    Args:
        script: the script's path.
        text: what is in it.
        commands: the lines that submit it; where one waits for the job of another, that job is
            ``JOB1``, ``JOB2`` and so on.
        jobs: the scheduler's names of the arrays; empty for a dry run, and for ``local``.
        failed: exit status of the tasks that failed; known to ``local`` only.
    """

    script: Path
    text: str
    commands: tuple[tuple[str, ...], ...]
    jobs: tuple[str, ...] = ()
    failed: dict[int, int] = field(default_factory=dict)


def submit(
    tasks: TaskArray,
    resources: Resources,
    scheduler: str = "slurm",
    *,
    dry_run: bool = False,
    progress: local.Progress | None = None,
) -> Submission:
    """Writes one script into the folder of the logs and has a scheduler run it for every index.

    More tasks than an array may have become several arrays. Where `Resources.running_limit` is
    set, each of these waits for the one before it, so that the limit holds for all of them
    together. ``local`` runs the tasks in processes here and returns after the last one.

    Args:
        scheduler: ``slurm``, ``lsf`` or ``local``.
        dry_run: writes and runs nothing.
        progress: called with (done, all, failed) as the tasks of ``local`` end.

    Raises:
        ValueError: no such scheduler; resources that it cannot provide; tasks that an earlier
            submission still holds.
        OSError: the scheduler refuses, with what it says, or a file cannot be written.
    """
    if scheduler not in NAMES:
        raise ValueError(f"scheduler must be one of {', '.join(NAMES)}; got {scheduler!r}")
    _check(tasks, resources, scheduler)
    stem = _free_stem(tasks)
    script = tasks.logs / f"{stem}.sh"
    if scheduler == "local":
        number, job = "$1", "local_$1"
        commands = [local.command(tasks, stem, i + 1) for i in range(len(tasks.indices))]
    else:
        backend = SCHEDULERS[scheduler]
        number, job = backend.number, backend.job
        size = backend.largest_array()
        firsts = list(range(0, len(tasks.indices), size))

        def line(first: int, after: str | None) -> list[str]:
            count = min(size, len(tasks.indices) - first)
            chained = after if resources.running_limit else None
            return backend.command(tasks, resources, stem, first, count, chained)

        commands = [line(first, f"JOB{i}" if i else None) for i, first in enumerate(firsts)]
    told = [local.command(tasks, stem, "NUMBER")] if scheduler == "local" else commands
    text = render(tasks, stem, resources.processors, number, job, told)
    planned = Submission(script, text, tuple(map(tuple, commands)))
    if dry_run:
        return planned

    held = active(tasks)
    if clash := [index for index in tasks.indices if index in held]:
        jobs = ", ".join(sorted({held[index] for index in clash}))
        raise ValueError(
            f"indices {format_indices(clash)} of {tasks.name} are still queued or running ({jobs})"
        )
    (tasks.logs / "scheduler").mkdir(parents=True, exist_ok=True)
    with open(script, "x", opener=_private) as stream:
        stream.write(text)
    record = _Record(scheduler, format_indices(tasks.indices), tasks.digest, [])
    if scheduler == "local":
        with record.locked(script) as lock:
            failed = local.run(tasks, resources, stem, lock, progress)
        return dataclasses.replace(planned, failed=failed)
    for first in firsts:
        after = record.arrays[-1][0] if record.arrays else None
        try:
            record.arrays.append((backend.job_id(submit_job(line(first, after))), first))
            record.save(script)
        except OSError as error:
            if not record.arrays:
                script.unlink()
                raise
            jobs = ", ".join(job for job, _ in record.arrays)
            raise OSError(f"{error}; what was submitted before that: {jobs}") from error
    return dataclasses.replace(planned, jobs=tuple(job for job, _ in record.arrays))


def missing(tasks: TaskArray) -> tuple[int, ...]:
    """The indices to submit again: neither finished nor held by an earlier submission.

    Finished means that a task left exit status 0 for this very command (`TaskArray.finished`);
    held, that a scheduler still has it queued or running (`active`).
    """
    held = active(tasks)
    return tuple(i for i in tasks.indices if i not in held and not tasks.finished(i))


def active(tasks: TaskArray) -> dict[int, str]:
    """Which indices earlier submissions of this name still hold, and the job of each.

    Raises:
        OSError: the scheduler that has them cannot be asked.
    """
    held: dict[int, str] = {}
    asked: dict[str, set[tuple[str, int]]] = {}
    for script, record in _records(tasks):
        # Most submissions have ended, all with a status: for those nobody needs to be asked.
        open_ = {
            number: index
            for number, index in enumerate(parse_indices(record.indices), start=1)
            if not _ended(tasks, index, script.stem)
        }
        if not open_:
            continue
        if record.scheduler == "local":
            if record.is_locked(script):
                held |= dict.fromkeys(open_.values(), f"process here, {script.stem}")
            continue
        if record.scheduler not in asked:
            asked[record.scheduler] = SCHEDULERS[record.scheduler].held()
        firsts = dict(record.arrays)
        for job, task in asked[record.scheduler]:
            if job in firsts and firsts[job] + task in open_:
                held[open_[firsts[job] + task]] = f"{record.scheduler} job {job}"
    return held


def _ended(tasks: TaskArray, index: int, submission: str) -> bool:
    """Whether a task of that submission is over for sure: by its status, or by a later one's.

    An index is submitted again only after the earlier submission let go of it.
    """
    status = tasks.status(index)
    if status is None:
        return False
    if status.submission == submission:
        return status.state is not None
    return _number(status.submission) > _number(submission)


def _number(submission: str) -> int:
    return int(submission.rpartition("_")[2])


@dataclass
class _Record:
    """A submission, for later ones: ``<stem>.json`` beside its script.

    Args:
        indices: of the tasks, in order of their numbers, as `format_indices` writes them.
        digest: of the command.
        arrays: the scheduler's name of each array, and how many tasks come before it.
    """

    scheduler: str
    indices: str
    digest: str
    arrays: list[tuple[str, int]]

    def save(self, script: Path) -> None:
        path = script.with_suffix(".json")
        part = path.with_suffix(".part")
        part.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        part.replace(path)

    @contextlib.contextmanager
    def locked(self, script: Path) -> Iterator[int]:
        """Saves, and holds a lock that ends with the last process that has the descriptor."""
        self.save(script)
        with script.with_suffix(".json").open() as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield stream.fileno()

    def is_locked(self, script: Path) -> bool:
        with script.with_suffix(".json").open() as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


def _records(tasks: TaskArray) -> Iterator[tuple[Path, _Record]]:
    for path in sorted(tasks.logs.glob(f"{tasks.name}_*.json")):
        if not re.fullmatch(rf"{re.escape(tasks.name)}_\d+", path.stem):
            continue
        try:
            parts = json.loads(path.read_text())
            parts["arrays"] = [tuple(array) for array in parts["arrays"]]
            yield path.with_suffix(".sh"), _Record(**parts)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not the record of a submission") from error


def _free_stem(tasks: TaskArray) -> str:
    number = 1
    while (tasks.logs / f"{tasks.name}_{number:03d}.sh").exists():
        number += 1
    return f"{tasks.name}_{number:03d}"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o700)


def _check(tasks: TaskArray, resources: Resources, scheduler: str) -> None:
    """What one scheduler lacks is refused, never left out in silence."""
    if scheduler == "local":
        for name in ("queue", "project", "options"):
            if getattr(resources, name):
                raise ValueError(f"{name}: local has none; got {getattr(resources, name)!r}")
        if isinstance(resources.gpus, str) and not resources.gpus.isdigit():
            raise ValueError(f"gpus must be a number for local; got {resources.gpus!r}")
        local.slots(resources)
        return
    if "%" in str(tasks.logs):
        raise ValueError(f"logs: {scheduler} would replace the % in {tasks.logs}")
    for option in resources.options:
        if option.partition("=")[0] in SCHEDULERS[scheduler].reserved:
            raise ValueError(f"options: {option} is set by the submission itself")
