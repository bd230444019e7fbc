"""`submit`: one script, and who runs it for every index."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path

from . import elastic, local
from .progress import Progress
from .records import Record, active, free_stem
from .resources import Resources
from .schedulers import SCHEDULERS, submit_job
from .script import render
from .tasks import TaskArray, format_indices
from .workers import Elastic, worker_script

NAMES = (*SCHEDULERS, "local")


@dataclass(frozen=True)
class Submission:
    """What `submit` did, or would do.

    Args:
        script: the script's path.
        text: what is in it.
        commands: the lines that submit it; where one waits for the job of another, that job is
            ``JOB1``, ``JOB2`` and so on.
        jobs: the scheduler's names of the arrays; empty for a dry run, and where `submit` stays
            until the end.
        failed: exit status of the tasks that failed; known where `submit` stays until the end.
        worker: for an `Elastic` of jobs, the script of such a job.
    """

    script: Path
    text: str
    commands: tuple[tuple[str, ...], ...]
    jobs: tuple[str, ...] = ()
    failed: dict[int, int] = field(default_factory=dict)
    worker: str = ""


def submit(
    tasks: TaskArray,
    resources: Resources,
    scheduler: str | Elastic = "slurm",
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Submission:
    """Writes one script into the folder of the logs and has a scheduler run it for every index.

    More tasks than an array may have become several arrays. Where `Resources.running_limit` is
    set, each of these waits for the one before it, so that the limit holds for all of them
    together. ``local`` runs the tasks in processes here, an `Elastic` on workers of Dask; both
    return after the last task.

    Args:
        scheduler: ``slurm``, ``lsf``, ``local`` or an `Elastic`. Every one leaves the same logs
            and statuses, so what one left unfinished another can go on with.
        dry_run: writes and runs nothing.
        progress: called with a `Standing` as the tasks end, where `submit` stays until then.

    Raises:
        ValueError: no such scheduler; resources that it cannot provide; tasks that an earlier
            submission still holds.
        ImportError: an `Elastic` without Dask.
        OSError: the scheduler refuses, with what it says, or a file cannot be written.
    """
    if scheduler not in NAMES and not isinstance(scheduler, Elastic):
        raise ValueError(
            f"scheduler must be one of {', '.join(NAMES)} or an Elastic; got {scheduler!r}"
        )
    _check(tasks, resources, scheduler)
    stem = free_stem(tasks)
    if scheduler in SCHEDULERS:
        return _submit_arrays(tasks, resources, scheduler, stem, dry_run)
    is_local = scheduler == "local"
    job = "local_$1" if is_local else "dask_$1"
    told = [local.command(tasks, stem, "NUMBER")]
    planned = _planned(tasks, resources, stem, "$1", job, told)
    if not is_local and scheduler.place in SCHEDULERS:
        line = SCHEDULERS[scheduler.place].worker_command(tasks, resources, stem)
        worker = worker_script(scheduler, tasks, resources, stem)
        planned = dataclasses.replace(planned, commands=(tuple(line),), worker=worker)
    elif is_local:
        lines = [local.command(tasks, stem, i + 1) for i in range(len(tasks.indices))]
        planned = dataclasses.replace(planned, commands=tuple(map(tuple, lines)))
    if dry_run:
        return planned
    _write(tasks, planned)
    record = Record(
        "local" if is_local else "dask", format_indices(tasks.indices), tasks.digest, []
    )
    with record.locked(planned.script) as lock:
        if is_local:
            failed = local.run(tasks, resources, stem, lock, progress)
        else:
            failed = elastic.run(tasks, resources, stem, scheduler, progress)
    return dataclasses.replace(planned, failed=failed)


def _submit_arrays(
    tasks: TaskArray, resources: Resources, scheduler: str, stem: str, dry_run: bool
) -> Submission:
    backend = SCHEDULERS[scheduler]
    size = backend.largest_array()
    firsts = list(range(0, len(tasks.indices), size))

    def line(first: int, after: str | None) -> list[str]:
        count = min(size, len(tasks.indices) - first)
        chained = after if resources.running_limit else None
        return backend.command(tasks, resources, stem, first, count, chained)

    commands = [line(first, f"JOB{i}" if i else None) for i, first in enumerate(firsts)]
    planned = _planned(tasks, resources, stem, backend.number, backend.job, commands)
    if dry_run:
        return planned
    _write(tasks, planned)
    record = Record(scheduler, format_indices(tasks.indices), tasks.digest, [])
    for first in firsts:
        after = record.arrays[-1][0] if record.arrays else None
        try:
            record.arrays.append((backend.job_id(submit_job(line(first, after))), first))
            record.save(planned.script)
        except OSError as error:
            if not record.arrays:
                planned.script.unlink()
                raise
            jobs = ", ".join(job for job, _ in record.arrays)
            raise OSError(f"{error}; what was submitted before that: {jobs}") from error
    return dataclasses.replace(planned, jobs=tuple(job for job, _ in record.arrays))


def _planned(tasks, resources, stem, number: str, job: str, commands) -> Submission:
    text = render(tasks, stem, resources.processors, number, job, commands)
    return Submission(tasks.logs / f"{stem}.sh", text, tuple(map(tuple, commands)))


def _write(tasks: TaskArray, planned: Submission) -> None:
    """Writes the script, unless an earlier submission still holds one of the tasks."""
    held = active(tasks)
    if clash := [index for index in tasks.indices if index in held]:
        jobs = ", ".join(sorted({held[index] for index in clash}))
        raise ValueError(
            f"indices {format_indices(clash)} of {tasks.name} are still queued or running ({jobs})"
        )
    (tasks.logs / "scheduler").mkdir(parents=True, exist_ok=True)
    with open(planned.script, "x", opener=_private) as stream:
        stream.write(planned.text)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o700)


def _check(tasks: TaskArray, resources: Resources, scheduler: str | Elastic) -> None:
    """What one scheduler lacks is refused, never left out in silence."""
    if isinstance(scheduler, Elastic):
        scheduler.check(resources)
        if "%" in str(tasks.logs) and scheduler.place in SCHEDULERS:
            raise ValueError(f"logs: {scheduler.place} would replace the % in {tasks.logs}")
        return
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
