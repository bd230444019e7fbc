"""What every command that submits tasks has: its options, and what it tells."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Collection

from tqdm import tqdm

from ..cluster import (
    Elastic,
    Resources,
    Standing,
    Submission,
    TaskArray,
    format_indices,
    submit,
)
from ..cluster.local import gpus_here
from ..cluster.submission import NAMES
from ..cluster.workers import place_of
from .options import EXIT_FAILURES, UsageError, positive

SHOWN_FAILURES = 10


def add_scheduler(
    parser: argparse.ArgumentParser,
    *,
    processors: int = 8,
    memory_gb: float = 32,
    walltime: str | None = None,
    gpu: bool = False,
    workers: tuple[str, ...] = ("--workers", "--cluster-workers"),
) -> None:
    """The options of every command that submits; the defaults are those of Slurm and LSF.

    Args:
        workers: names of the option for a cluster's workers, for commands that have one of the
            usual names already.
    """
    group = parser.add_argument_group(
        "scheduler", "What each task may use. All of it is passed on; local heeds it too."
    )
    group.add_argument("--scheduler", choices=NAMES, help="of an array of tasks; default slurm")
    group.add_argument(
        "--num-processors",
        type=positive,
        metavar="N",
        help=f"cores per task; default {processors}, for local at most what is here",
    )
    group.add_argument(
        "--memory-gb",
        type=float,
        metavar="GIB",
        help=f"memory per task, not per core; default {memory_gb:g}, for local none",
    )
    group.add_argument(
        "--walltime",
        metavar="TIME",
        help="time limit per task: minutes, H:MM, H:MM:SS or D-HH:MM:SS; 2:00 is two hours; "
        + (f"default {walltime}, for local none" if walltime else "default the queue's"),
    )
    group.add_argument("--queue", metavar="NAME", help="LSF queue, Slurm partition")
    group.add_argument("--project", metavar="NAME", help="LSF project, Slurm account")
    group.add_argument(
        "--gpu",
        action=argparse.BooleanOptionalAction,
        help=f"one GPU per task, or none; default {'--gpu' if gpu else '--no-gpu'}"
        + (", for local what is here" if gpu else ""),
    )
    group.add_argument(
        "--gpus",
        metavar="N|REQUEST",
        help="GPUs per task, or in the scheduler's words: a100:2 (Slurm), num=1:gmem=24G (LSF)",
    )
    group.add_argument(
        "--running-limit",
        type=positive,
        metavar="N",
        help="tasks that may run at a time; default the scheduler's, for local as many as cores, "
        "memory and GPUs suffice for",
    )
    group.add_argument(
        "--scheduler-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="passed on to sbatch or bsub as it is; repeatable; --scheduler-option=--qos=high, "
        "--scheduler-option='-sp 50'",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print the script and the lines that would submit it; write and run nothing",
    )
    group = parser.add_argument_group(
        "cluster of Dask workers",
        "Instead of an array: workers that take task after task, watched to the end. What a task\n"
        "may use is then what each worker has; --walltime is the worker's. Needs\n"
        "pip install 'fastembed-vision[cluster]', and folders that all machines see.",
    )
    group.add_argument(
        "--cluster",
        metavar="WHERE",
        help="slurm or lsf: each worker is a job; local: a process here; or a Dask scheduler that "
        "is there: dask://HOST:PORT, tcp://.., tls://.., or the file that it wrote, NAME.json",
    )
    group.add_argument(
        *workers,
        dest="cluster_workers",
        type=positive,
        metavar="N",
        help="workers of slurm, lsf and local: at most so many; one that ends is replaced while "
        "tasks are left, one without a task ends",
    )
    group.add_argument(
        "--retries",
        type=int,
        metavar="N",
        help="how often a task starts again after its worker died with it; a task that fails by "
        "itself does not; default 3",
    )
    parser.set_defaults(
        workers_option=workers[0],
        scheduler_defaults={
            "processors": processors,
            "memory_gb": memory_gb,
            "walltime": walltime,
            "gpu": gpu,
        },
    )


def place(arguments: argparse.Namespace) -> str:
    """Where the tasks run: ``slurm``, ``lsf``, ``local``, or ``dask`` for a scheduler of Dask."""
    if arguments.cluster is None:
        return arguments.scheduler or "slurm"
    try:
        return place_of(arguments.cluster)
    except ValueError as error:
        raise UsageError(f"--{error}") from error


def scheduler_of(arguments: argparse.Namespace) -> str | Elastic:
    """Who gets the tasks.

    Raises:
        UsageError: options that contradict each other.
    """
    if arguments.cluster is None:
        options = {arguments.workers_option: arguments.cluster_workers}
        for option, value in (options | {"--retries": arguments.retries}).items():
            if value is not None:
                raise UsageError(f"{option} is for --cluster; arrays have --running-limit")
        return place(arguments)
    if arguments.scheduler is not None:
        raise UsageError("--scheduler is for arrays of tasks: give it or --cluster")
    retries = 3 if arguments.retries is None else arguments.retries
    place(arguments)
    try:
        return Elastic(arguments.cluster, arguments.cluster_workers, retries)
    except ValueError as error:
        raise UsageError(re.sub("^--workers", arguments.workers_option, f"--{error}")) from error


def resources_of(arguments: argparse.Namespace) -> Resources:
    """What the options of `add_scheduler` ask for.

    Raises:
        UsageError: what no scheduler could mean.
    """
    defaults = dict(arguments.scheduler_defaults)
    where = place(arguments)
    if where in ("local", "dask"):  # a batch system's memory and time limits are not theirs
        defaults["memory_gb"] = defaults["walltime"] = None
        defaults["gpu"] = defaults["gpu"] and not arguments.cluster and bool(gpus_here())
    if where == "local":
        defaults["processors"] = min(defaults["processors"], len(os.sched_getaffinity(0)))
    if arguments.gpus is not None and arguments.gpu is False:
        raise UsageError("--no-gpu and --gpus contradict each other")
    gpu = defaults["gpu"] if arguments.gpu is None else arguments.gpu
    gpus = int(gpu) if arguments.gpus is None else arguments.gpus

    def given(value, name: str):
        return defaults[name] if value is None else value

    try:
        return Resources(
            processors=given(arguments.num_processors, "processors"),
            memory_gb=given(arguments.memory_gb, "memory_gb"),
            walltime=given(arguments.walltime, "walltime"),
            queue=arguments.queue,
            gpus=int(gpus) if str(gpus).isdigit() else gpus,
            project=arguments.project,
            running_limit=arguments.running_limit,
            options=tuple(
                part for option in arguments.scheduler_option for part in shlex.split(option)
            ),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def run_submission(tasks: TaskArray, arguments: argparse.Namespace) -> int:
    """Submits as the options of `add_scheduler` say, tells what happened, gives the exit status."""
    scheduler, resources = scheduler_of(arguments), resources_of(arguments)
    if arguments.dry_run:
        _show(submit(tasks, resources, scheduler, dry_run=True))
        return 0
    with _Progress() as progress:
        submission = submit(tasks, resources, scheduler, progress=progress)
    print(f"script: {submission.script}\nlogs:   {tasks.log(tasks.indices[0], 'out')} ..")
    if scheduler == "local" or isinstance(scheduler, Elastic):
        failed = submission.failed
        print(f"{len(tasks.indices) - len(failed)} of {len(tasks.indices)} tasks done")
        if failed:
            print(f"failed: {format_indices(failed)}", file=sys.stderr)
            show_failures(tasks, failed)
        return EXIT_FAILURES if failed else 0
    jobs = " ".join(submission.jobs)
    show, cancel = {"slurm": ("squeue --jobs", "scancel"), "lsf": ("bjobs", "bkill")}[scheduler]
    listed = jobs.replace(" ", ",") if scheduler == "slurm" else jobs
    print(f"{len(tasks.indices)} tasks submitted as {scheduler} job {jobs}")
    print(f"to see them: {show} {listed}; to stop them: {cancel} {jobs}")
    return 0


def _show(planned: Submission) -> None:
    """What a dry run would write and run."""
    print(f"# {planned.script}\n{planned.text}\n# then")
    for command in planned.commands:
        print(shlex.join(command))
    if planned.worker:
        print(f"# for each worker, with this on its standard input\n{planned.worker}")


def show_failures(tasks: TaskArray, indices: Collection[int]) -> None:
    """A line for each of the first few tasks that started and did not finish."""
    started = [index for index in indices if tasks.status(index) is not None]
    for index in started[:SHOWN_FAILURES]:
        print(f"  {index}: {tasks.failure(index)}", file=sys.stderr)
    if len(started) > SHOWN_FAILURES:
        print(f"  and {len(started) - SHOWN_FAILURES} more", file=sys.stderr)


class _Progress:
    """How far a run is that we attend: a bar on a terminal, lines elsewhere."""

    def __init__(self, interval: float = 30.0) -> None:
        self._interval = interval
        self._shown = time.monotonic()
        self._bar: tqdm | None = None

    def __call__(self, now: Standing) -> None:
        if sys.stderr.isatty():
            self._bar = self._bar or tqdm(total=now.total, unit="task", file=sys.stderr)
            self._bar.set_postfix(failed=now.failed, running=now.running, refresh=False)
            self._bar.update(now.done - self._bar.n)
        elif time.monotonic() - self._shown >= self._interval or now.done == now.total:
            self._shown = time.monotonic()
            print(
                f"{now.done}/{now.total} tasks, {now.failed} failed, {now.running} running",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
