"""``fastembed volumes submit``: prepares many volumes, one task each."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from ...cluster import INDEX, TaskArray, active, format_indices
from ..options import Formatter, UsageError, positive, words
from ..scheduling import add_scheduler, run_submission, show_failures
from .preprocess import add_job, indices


def add(commands) -> None:
    parser = commands.add_parser(
        "submit",
        help="prepare many volumes on Slurm, LSF, a Dask cluster or here",
        formatter_class=Formatter,
        description=(
            "Submits `fastembed volumes preprocess` for each index: as a job array of Slurm or\n"
            "LSF, on workers of Dask, or as processes of this machine. Logs are in logs/ of the\n"
            "output folder."
        ),
        epilog=(
            "examples:\n"
            "  fastembed volumes submit --num-volumes 100 --gpu --memory-gb 64 --walltime 2:00 \\\n"
            "      --output-dir out --data-root /data/cellmap --organelles cell nucleus\n"
            "  fastembed volumes submit --indices 3,7,20-40 --scheduler lsf --queue gpu ...\n"
            "  fastembed volumes submit --num-volumes 100 --missing ...    # what is left of them\n"
            "  fastembed volumes submit --num-volumes 100 --cluster slurm --cluster-workers 8 ...\n"
            "\n"
            "exit status: 0 submitted, or with local and --cluster all done; 1 the scheduler\n"
            "refused; 2 wrong options; 3 tasks of local or --cluster failed"
        ),
    )
    parser.set_defaults(run=run)
    group = parser.add_argument_group("volumes")
    group.add_argument("--num-volumes", type=positive, metavar="N", help="how many indices")
    group.add_argument(
        "--start-index", type=int, default=0, metavar="N", help="the first of them; default 0"
    )
    group.add_argument(
        "--indices", type=indices, metavar="LIST", help="or these, such as 3,7,20-40"
    )
    group.add_argument(
        "--missing",
        action="store_true",
        help="only those of them that are not finished, or whose files are damaged, and that no "
        "scheduler has queued or running",
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="with --missing: read every chunk to find damage, not only missing files",
    )
    add_job(parser)
    add_scheduler(
        parser,
        processors=16,
        memory_gb=64,
        walltime="2:00",
        gpu=True,
        workers=("--cluster-workers",),  # --workers are the threads of a task
    )
    # What is not an option of `preprocess` is told from what is by the parser's own groups.
    job = argparse.ArgumentParser(add_help=False)
    add_job(job)
    parser.set_defaults(job_actions=job._actions)


def run(arguments: argparse.Namespace) -> int:
    if (arguments.num_volumes is None) == (arguments.indices is None):
        raise UsageError("name the volumes by --num-volumes or by --indices")
    if arguments.verify and not arguments.missing:
        raise UsageError("--verify goes with --missing")
    if arguments.overwrite:
        raise UsageError("--overwrite removes the outputs of all volumes: run preprocess with it")
    start = arguments.start_index
    chosen = arguments.indices or tuple(range(start, start + arguments.num_volumes))
    tasks = TaskArray(
        name="volumes",
        command=[sys.executable, "-m", "fastembed.cli", "volumes", "preprocess",
                 "--volume-index", INDEX, *words(arguments, arguments.job_actions)],
        indices=chosen,
        logs=arguments.output_dir / "logs",
        pattern="volume_%06d",
    )  # fmt: skip
    if arguments.missing:
        left = _missing(arguments, tasks)
        if not left:
            return 0
        tasks = dataclasses.replace(tasks, indices=left)
    return run_submission(tasks, arguments)


def _missing(arguments: argparse.Namespace, tasks: TaskArray) -> tuple[int, ...]:
    """Which volumes to submit again; damaged ones are set aside, so that they are made anew."""
    from ...volumes.check import check, set_aside

    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    findings = check(folder, tasks.indices, verify=tasks.indices if arguments.verify else None)
    broken = sorted(set(findings.broken) & set(tasks.indices))
    held = active(tasks)
    left = tuple(i for i in sorted({*findings.missing, *broken}) if i not in held)
    print(
        f"{len(left)} of {len(tasks.indices)} volumes to submit again"
        + (f", {len(broken)} of them damaged ({format_indices(broken)})" if broken else "")
        + (f"; {len(held)} still queued or running" if held else ""),
        file=sys.stderr,
    )
    show_failures(tasks, left)
    if not arguments.dry_run:
        for index in set(broken) & set(left):
            set_aside(folder, index)
    return left
