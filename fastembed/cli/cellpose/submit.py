"""``fastembed cellpose submit``: a step of the study as a job on Slurm, LSF, Dask or here."""

from __future__ import annotations

import argparse
import sys

from ...cluster import INDEX, TaskArray, missing
from ..options import Formatter, UsageError, positive
from ..scheduling import add_scheduler, place, run_submission

_PARTITION = "l40s"  # the study's


def add(steps) -> None:
    parser = steps.add_parser(
        "submit",
        help="a step as a job on Slurm, LSF, a Dask cluster or here",
        formatter_class=Formatter,
        usage="fastembed cellpose submit [options] -- STEP ...",
        description=(
            "Runs a step as a job; one that has --shard (budget, lomo, ..) as an array of parts.\n"
            "A job that ran out of time goes on where it stopped when it is submitted again."
        ),
        epilog=(
            "examples:\n"
            "  fastembed cellpose submit -- train --data cells --output-dir study\n"
            "  fastembed cellpose submit --shards 25 --walltime 4:00 -- \\\n"
            "      budget --data cells --output-dir study --no-keep-models\n"
            "  fastembed cellpose submit --shards 25 --cluster slurm --workers 8 -- budget ...\n"
            "\n"
            f"Slurm's partition is {_PARTITION} unless --queue says otherwise."
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--shards", type=positive, default=1, metavar="N", help="parts of the work; default 1"
    )
    parser.add_argument(
        "--missing", action="store_true", help="nothing if the job finished, or is still there"
    )
    add_scheduler(parser, processors=8, memory_gb=64, walltime="12:00", gpu=True)
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    command = arguments.command[arguments.command[:1] == ["--"] :]
    parsed = _check(command, arguments.shards)
    where = place(arguments)
    full = [sys.executable, "-m", "fastembed.cli", "cellpose", *command]
    if arguments.shards > 1:
        full += ["--shard", f"{INDEX}/{arguments.shards}"]
    tasks = TaskArray(
        name=command[0],
        command=full,
        indices=range(arguments.shards),
        logs=parsed.output_dir / "logs" / where,
        pattern=f"{command[0]}_%06d",
    )
    if arguments.missing:
        left = missing(tasks)
        print(f"{len(left)} of {len(tasks.indices)} to submit again", file=sys.stderr)
        if not left:
            return 0
        tasks = TaskArray(tasks.name, tasks.command, left, tasks.logs, tasks.pattern)
    if where == "slurm" and arguments.queue is None:
        arguments.queue = _PARTITION
    if arguments.gpu is None and arguments.gpus is None:
        # This machine and an existing cluster are asked for GPUs only if the user says so; steps
        # without network need none.
        arguments.gpu = hasattr(parsed, "model") and where in ("slurm", "lsf")
    return run_submission(tasks, arguments)


def _check(command: list[str], shards: int) -> argparse.Namespace:
    """Holds the step against its own parser, now and not in the job."""
    from .. import build_parser

    if not command or command[0].startswith("-") or command[0] == "submit":
        raise UsageError("submit needs a step after its options: submit -- train --data ..")
    parsed = build_parser().parse_args(["cellpose", *command])
    if not hasattr(parsed, "output_dir"):
        raise UsageError(f"{command[0]} has no --output-dir to put logs into: run it here")
    if shards > 1 and not hasattr(parsed, "shard"):
        raise UsageError(f"{command[0]} has no --shard, so it is one job: leave --shards out")
    if getattr(parsed, "shard", (0, 1)) != (0, 1):
        raise UsageError("--shard is what submit adds: leave it out of the step")
    return parsed
