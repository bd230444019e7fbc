"""``fastembed submit``: any sharded command as tasks on Slurm, LSF, a Dask cluster or here."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from ..cluster import INDEX, TaskArray, active, missing, parse_indices
from ..database import DBConfig
from .options import Formatter, UsageError, positive, wants_embedded
from .scheduling import add_scheduler, place, run_submission, show_failures

OUTPUT_OPTIONS = ("output_dir", "cache_dir", "output")


def add(commands) -> None:
    parser = commands.add_parser(
        "submit",
        help="a command in shards on Slurm, LSF, a Dask cluster or here",
        formatter_class=Formatter,
        usage="fastembed submit [options] --shards N -- COMMAND ...",
        description=(
            "Runs a command of fastembed as N tasks, each with its --shard I/N: as a job array\n"
            "of Slurm or LSF, on workers of Dask (--cluster), or as processes of this machine.\n"
            "Together they leave the bytes of one run. Everything that a task leaves is in the\n"
            "folder of the logs: its output (.out, .err), its exit status (.status), what the\n"
            "scheduler said (scheduler/)."
        ),
        epilog=(
            "examples:\n"
            "  fastembed submit --shards 16 --gpu --memory-gb 64 --walltime 2:00 \\\n"
            "      --queue gpu --running-limit 4 -- \\\n"
            "      multichannel --manifest tensors.csv --output-dir out --model dinov3:vitl16\n"
            "  fastembed submit --scheduler lsf --shards 100 --gpus num=1:gmem=24G \\\n"
            "      --project cellmap -- panoptic --data_path coco --cache_dir out\n"
            "  fastembed submit --scheduler local --shards 8 --running-limit 2 -- panoptic ...\n"
            "  fastembed submit --cluster slurm --workers 16 --gpu --shards 256 -- \\\n"
            "      multichannel ...         # 16 jobs that take the 256 shards one after another\n"
            "  fastembed submit --cluster dask://scheduler:8786 --shards 256 -- maps ...\n"
            "\n"
            "After it ended, the same line with --missing submits the shards that did not finish:\n"
            "those that left no exit status 0 for this very command, and that no scheduler still\n"
            "has queued or running. A shard goes on from where it stopped. The line may name\n"
            "another --scheduler or --cluster than before.\n"
            "\n"
            "With --cluster a shard whose worker died starts again by itself; Ctrl-C ends shards\n"
            "and workers. What a site has in Dask's jobqueue.yaml (network interface, prologue,\n"
            "local folder) holds for the workers of slurm and lsf.\n"
            "\n"
            "exit status: 0 submitted, or with local and --cluster all done; 1 the scheduler\n"
            "refused; 2 wrong options; 3 tasks of local or --cluster failed"
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
        _check_database(parsed, place(arguments))
    outputs = [getattr(parsed, name) for name in OUTPUT_OPTIONS if hasattr(parsed, name)]
    if arguments.logs is None and not outputs:
        raise UsageError(f"{command[0]} has no output folder to put logs into: name --logs DIR")
    return arguments.logs or outputs[0] / "logs"


def _check_database(parsed: argparse.Namespace, where: str) -> None:
    if wants_embedded(parsed):
        if where != "local":
            raise UsageError(
                "the embedded PostgreSQL serves one machine: name a --db or a --manifest"
            )
        return
    try:
        config = DBConfig(url=parsed.db, password=parsed.db_password)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if config.has_password:
        raise UsageError(
            "a password in the command would stand in a script: use PGPASSWORD or ~/.pgpass"
        )
