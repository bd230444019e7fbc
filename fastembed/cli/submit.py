"""``fastembed submit``: any sharded command as an array of tasks on Slurm, LSF or here.

Also what other commands need to submit theirs: `add_scheduler`, `run_submission`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Collection
from pathlib import Path

from tqdm import tqdm

from ..cluster import (
    INDEX,
    Resources,
    TaskArray,
    active,
    format_indices,
    missing,
    parse_indices,
    submit,
)
from ..cluster.local import gpus_here
from ..cluster.submission import NAMES
from ..database import DBConfig
from .options import EXIT_FAILURES, Formatter, UsageError, positive, wants_embedded

OUTPUT_OPTIONS = ("output_dir", "cache_dir", "output")
SHOWN_FAILURES = 10


def add(commands) -> None:
    parser = commands.add_parser(
        "submit",
        help="a command as an array of shards on Slurm, LSF or here",
        formatter_class=Formatter,
        usage="fastembed submit [options] --shards N -- COMMAND ...",
        description=(
            "Runs a command of fastembed as N tasks, each with its --shard I/N: as a job array\n"
            "of Slurm or LSF, or as processes of this machine. Together they leave the bytes of\n"
            "one run. Everything that a task leaves is in the folder of the logs: its output\n"
            "(.out, .err), its exit status (.status), what the scheduler said (scheduler/)."
        ),
        epilog=(
            "examples:\n"
            "  fastembed submit --shards 16 --gpu --memory-gb 64 --walltime 2:00 \\\n"
            "      --queue gpu --running-limit 4 -- \\\n"
            "      multichannel --manifest tensors.csv --output-dir out --model dinov3:vitl16\n"
            "  fastembed submit --scheduler lsf --shards 100 --gpus num=1:gmem=24G \\\n"
            "      --project cellmap -- panoptic --data_path coco --cache_dir out\n"
            "  fastembed submit --scheduler local --shards 8 --running-limit 2 -- panoptic ...\n"
            "\n"
            "After it ended, the same line with --missing submits the shards that did not finish:\n"
            "those that left no exit status 0 for this very command, and that no scheduler still\n"
            "has queued or running. A shard goes on from where it stopped.\n"
            "\n"
            "exit status: 0 submitted, or with local all done; 1 the scheduler refused;\n"
            "2 wrong options; 3 tasks of local failed"
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--shards", type=positive, required=True, metavar="N", help="parts, so tasks, of the work"
    )
    parser.add_argument(
        "--indices",
        type=indices,
        metavar="LIST",
        help="only these shards, from 0, such as 3,7,20-40",
    )
    parser.add_argument(
        "--missing", action="store_true", help="only shards that did not finish; see below"
    )
    parser.add_argument(
        "--logs",
        type=Path,
        metavar="DIR",
        help="folder for scripts and logs; default logs in the command's output folder",
    )
    add_scheduler(parser)
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def indices(text: str) -> tuple[int, ...]:
    try:
        return parse_indices(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_scheduler(
    parser: argparse.ArgumentParser,
    *,
    processors: int = 8,
    memory_gb: float = 32,
    walltime: str | None = None,
    gpu: bool = False,
) -> None:
    """The options of every command that submits; the defaults are those of Slurm and LSF."""
    group = parser.add_argument_group(
        "scheduler", "What each task may use. All of it is passed on; local heeds it too."
    )
    group.add_argument("--scheduler", choices=NAMES, default="slurm", help="default slurm")
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
    parser.set_defaults(
        scheduler_defaults={
            "processors": processors,
            "memory_gb": memory_gb,
            "walltime": walltime,
            "gpu": gpu,
        }
    )


def resources_of(arguments: argparse.Namespace) -> Resources:
    """What the options of `add_scheduler` ask for.

    Raises:
        UsageError: what no scheduler could mean.
    """
    defaults = dict(arguments.scheduler_defaults)
    if arguments.scheduler == "local":  # a cluster's memory and time limits are not this machine's
        defaults["processors"] = min(defaults["processors"], len(os.sched_getaffinity(0)))
        defaults["memory_gb"] = defaults["walltime"] = None
        defaults["gpu"] = defaults["gpu"] and bool(gpus_here())
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


def run(arguments: argparse.Namespace) -> int:
    command = arguments.command[arguments.command[:1] == ["--"] :]
    logs = _check(command, arguments)
    shards = range(arguments.shards) if arguments.indices is None else arguments.indices
    if max(shards) >= arguments.shards:
        raise UsageError(f"--indices must be below --shards {arguments.shards}; got {max(shards)}")
    tasks = TaskArray(
        name=command[0],
        command=[sys.executable, "-m", "fastembed.cli", *command,
                 "--shard", f"{INDEX}/{arguments.shards}"],
        indices=shards,
        logs=logs,
        pattern=f"{command[0]}_%06d",
    )  # fmt: skip
    if arguments.missing:
        left = missing(tasks)
        held = len(active(tasks))
        print(
            f"{len(left)} of {len(tasks.indices)} shards to submit again"
            + (f"; {held} still queued or running" if held else ""),
            file=sys.stderr,
        )
        if not left:
            return 0
        show_failures(tasks, left)
        tasks = dataclasses.replace(tasks, indices=left)
    return run_submission(tasks, arguments)


def run_submission(tasks: TaskArray, arguments: argparse.Namespace) -> int:
    """Submits as the options of `add_scheduler` say, tells what happened, gives the exit status."""
    resources, scheduler = resources_of(arguments), arguments.scheduler
    if arguments.dry_run:
        planned = submit(tasks, resources, scheduler, dry_run=True)
        print(f"# {planned.script}\n{planned.text}\n# then")
        for command in planned.commands:
            print(shlex.join(command))
        return 0
    with _Progress() as progress:
        submission = submit(tasks, resources, scheduler, progress=progress)
    print(f"script: {submission.script}\nlogs:   {tasks.log(tasks.indices[0], 'out')} ..")
    if scheduler == "local":
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


def show_failures(tasks: TaskArray, indices: Collection[int]) -> None:
    """A line for each of the first few tasks that started and did not finish."""
    started = [index for index in indices if tasks.status(index) is not None]
    for index in started[:SHOWN_FAILURES]:
        print(f"  {index}: {tasks.failure(index)}", file=sys.stderr)
    if len(started) > SHOWN_FAILURES:
        print(f"  and {len(started) - SHOWN_FAILURES} more", file=sys.stderr)


def _check(command: list[str], arguments: argparse.Namespace) -> Path:
    """Holds the command against its own parser, now and not in every task; the folder for logs."""
    from . import build_parser

    if not command or command[0].startswith("-"):
        raise UsageError("submit needs a command after its options: submit --shards 8 -- panoptic")
    if any(INDEX in argument for argument in command):
        raise UsageError(f"{INDEX} in the command would be replaced by the shard's number")
    parsed = build_parser().parse_args(command)
    if not hasattr(parsed, "shard"):
        raise UsageError(f"{command[0]} has no --shard, so it cannot be split into tasks")
    if parsed.shard != (0, 1):
        raise UsageError("--shard is what submit adds: leave it out of the command")
    if getattr(parsed, "overwrite", False) and arguments.shards > 1:
        raise UsageError("--overwrite removes the outputs of all shards: run it without submit")
    if hasattr(parsed, "db"):
        _check_database(parsed, arguments.scheduler)
    outputs = [getattr(parsed, name) for name in OUTPUT_OPTIONS if hasattr(parsed, name)]
    if arguments.logs is None and not outputs:
        raise UsageError(f"{command[0]} has no output folder to put logs into: name --logs DIR")
    return arguments.logs or outputs[0] / "logs"


def _check_database(parsed: argparse.Namespace, scheduler: str) -> None:
    if wants_embedded(parsed):
        if scheduler != "local":
            raise UsageError(
                "the embedded PostgreSQL serves one machine: name a --db or a --manifest"
            )
        return
    url = parsed.db or ""
    if parsed.db_password or DBConfig(url=url).redact(url) != url:
        raise UsageError(
            "a password in the command would stand in a script: use PGPASSWORD or ~/.pgpass"
        )


class _Progress:
    """How many tasks of a local run have ended: a bar on a terminal, lines elsewhere."""

    def __init__(self, interval: float = 30.0) -> None:
        self._interval = interval
        self._shown = time.monotonic()
        self._bar: tqdm | None = None

    def __call__(self, done: int, total: int, failed: int) -> None:
        if sys.stderr.isatty():
            self._bar = self._bar or tqdm(total=total, unit="task", file=sys.stderr)
            self._bar.set_postfix(failed=failed, refresh=False)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._shown >= self._interval or done == total:
            self._shown = time.monotonic()
            print(f"{done}/{total} tasks, {failed} failed", file=sys.stderr, flush=True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
