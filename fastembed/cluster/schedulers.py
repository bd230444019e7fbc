"""Slurm and LSF: their options for `Resources`, their limits, and which tasks they still hold.

Sources: sbatch(1), squeue(1), scontrol(1) of Slurm; the command reference of IBM Spectrum LSF
10.1 (bsub, bjobs, bparams).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Sequence

from .resources import Resources
from .tasks import TaskArray


class Slurm:
    """Job arrays of `sbatch`."""

    name = "slurm"
    number = "$1 + SLURM_ARRAY_TASK_ID"
    job = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    reserved = ("-a", "--array", "-o", "--output", "-e", "--error", "-J", "--job-name", "--wrap")

    @staticmethod
    def largest_array() -> int:
        """Tasks that one array may have, numbered from 1; 1000 where nobody can be asked."""
        shown = _ask(["scontrol", "show", "config"])
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown or "", re.MULTILINE)
        return max(int(found[1]) if found else 1001, 2) - 1

    @staticmethod
    def command(
        tasks: TaskArray, resources: Resources, stem: str, first: int, count: int, after: str | None
    ) -> list[str]:
        """The line that submits `count` tasks after the first `first`, once job `after` ended."""
        limit = f"%{resources.running_limit}" if resources.running_limit else ""
        options = [
            f"--job-name={tasks.name}",
            f"--array=1-{count}{limit}",
            f"--output={tasks.scheduler_log(stem, '%A_%a')}",
            f"--chdir={tasks.cwd}",
            *Slurm.options(resources),
        ]
        if after:
            options.append(f"--dependency=afterany:{after}")
        script = str(tasks.logs / f"{stem}.sh")
        return ["sbatch", "--parsable", *options, *resources.options, script, str(first)]

    @staticmethod
    def worker_command(tasks: TaskArray, resources: Resources, stem: str) -> list[str]:
        """The line that submits one worker, a script that it reads from its standard input."""
        return [
            "sbatch",
            "--parsable",
            f"--job-name={tasks.name}-worker",
            f"--output={tasks.scheduler_log(stem, 'worker_%j')}",
            f"--chdir={tasks.cwd}",
            *Slurm.options(resources),
            *resources.options,
        ]

    @staticmethod
    def options(resources: Resources) -> list[str]:
        """What a task or a worker needs."""
        options = ["--nodes=1", "--ntasks=1", f"--cpus-per-task={resources.processors}"]
        if resources.megabytes:
            options.append(f"--mem={resources.megabytes}M")  # of the node, so of the task
        if resources.seconds:
            minutes, seconds = divmod(resources.seconds, 60)
            # All three parts: Slurm reads 2:00 as two minutes.
            options.append(f"--time={minutes // 60}:{minutes % 60:02d}:{seconds:02d}")
        if resources.gpus:
            options.append(f"--gres=gpu:{resources.gpus}")
        if resources.queue:
            options.append(f"--partition={resources.queue}")
        if resources.project:
            options.append(f"--account={resources.project}")
        return options

    @staticmethod
    def job_id(output: str) -> str:
        """The job in what the command printed: ``ID`` or ``ID;CLUSTER``."""
        found = re.search(r"^(\d+)(?:;\S+)?$", output, re.MULTILINE)
        if not found:
            raise OSError(f"sbatch named no job; it said {output!r}")
        return found[1]

    @staticmethod
    def held() -> set[tuple[str, int]]:
        """(job, number of the task) of all this user's tasks that are queued or running.

        The number is 0 for a job that is no array.
        """
        lines = _run(["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%F %K"])
        pairs = (line.split() for line in lines.splitlines())
        return {
            (pair[0], int(pair[1]) if pair[1].isdigit() else 0) for pair in pairs if len(pair) == 2
        }


class Lsf:
    """Job arrays of `bsub`."""

    name = "lsf"
    number = "$1 + LSB_JOBINDEX"
    job = "${LSB_JOBID}_$LSB_JOBINDEX"
    reserved = ("-J", "-o", "-oo", "-e", "-eo", "-I", "-Ip", "-Is", "-K", "-pack")

    @staticmethod
    def largest_array() -> int:
        """The largest index of an array; 1000 where nobody can be asked."""
        shown = _ask(["bparams", "-a"])
        found = re.search(r"MAX_JOB_ARRAY_SIZE\s*=\s*(\d+)", shown or "")
        return int(found[1]) if found else 1000

    @staticmethod
    def command(
        tasks: TaskArray, resources: Resources, stem: str, first: int, count: int, after: str | None
    ) -> list[str]:
        """The line that submits `count` tasks after the first `first`, once job `after` ended."""
        limit = f"%{resources.running_limit}" if resources.running_limit else ""
        options = [
            "-J", f"{tasks.name}[1-{count}]{limit}",
            "-oo", str(tasks.scheduler_log(stem, "%J_%I")),
            *Lsf.options(resources),
        ]  # fmt: skip
        if after:
            options += ["-w", f"numended({after},*)"]
        # LSF hands the command to a shell, so the path is quoted inside it.
        script = shlex.join(["/bin/bash", str(tasks.logs / f"{stem}.sh"), str(first)])
        return ["bsub", *options, *resources.options, script]

    @staticmethod
    def worker_command(tasks: TaskArray, resources: Resources, stem: str) -> list[str]:
        """The line that submits one worker, a script that it reads from its standard input."""
        return [
            "bsub",
            "-J", f"{tasks.name}-worker",
            "-oo", str(tasks.scheduler_log(stem, "worker_%J")),
            *Lsf.options(resources),
            *resources.options,
        ]  # fmt: skip

    @staticmethod
    def options(resources: Resources) -> list[str]:
        """What a task or a worker needs."""
        options = ["-n", str(resources.processors), "-R", "span[hosts=1]"]
        if resources.megabytes:
            # With units, since LSF_UNIT_FOR_LIMITS decides what a bare number means; and /job,
            # since a bare reservation can be meant per host or per slot.
            memory = f"{resources.megabytes}MB"
            options += ["-R", f"rusage[mem={memory}/job]", "-M", memory]
        if resources.seconds:
            minutes = -(-resources.seconds // 60)
            options += ["-W", f"{minutes // 60}:{minutes % 60:02d}"]
        if resources.gpus:
            number = str(resources.gpus)
            options += ["-gpu", f"num={number}" if number.isdigit() else number]
        if resources.queue:
            options += ["-q", resources.queue]
        if resources.project:
            options += ["-P", resources.project]
        return options

    @staticmethod
    def job_id(output: str) -> str:
        """The job in what the command printed: ``Job <ID> is submitted to ...``."""
        found = re.search(r"^Job <(\d+)> is submitted", output, re.MULTILINE)
        if not found:
            raise OSError(f"bsub named no job; it said {output!r}")
        return found[1]

    @staticmethod
    def held() -> set[tuple[str, int]]:
        """(job, number of the task) of all this user's tasks that are queued or running.

        The number is 0 for a job that is no array.
        """
        lines = _run(
            ["bjobs", "-noheader", "-o", "jobid jobindex"], nothing="No unfinished job found"
        )
        return {(job, int(index)) for job, index in map(str.split, lines.splitlines())}


SCHEDULERS = {"slurm": Slurm, "lsf": Lsf}


def submit_job(command: Sequence[str], script: str = "") -> str:
    """Runs sbatch or bsub, with `script` on its standard input; returns what it printed.

    Raises:
        OSError: it is not there, or refuses; with what it says.
    """
    return _run(command, script=script)


def _run(command: Sequence[str], nothing: str | None = None, script: str = "") -> str:
    """Runs a program of the scheduler; `nothing` is its complaint when there is nothing to list."""
    try:
        done = subprocess.run(
            command, input=script, capture_output=True, text=True, errors="replace"
        )
    except FileNotFoundError:
        raise FileNotFoundError(f"{command[0]} is not on the PATH of this machine") from None
    if nothing and nothing in done.stderr:
        return ""
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()) or "nothing"
        raise OSError(f"{command[0]} failed with status {done.returncode}, saying: {said}")
    return done.stdout


def _ask(command: Sequence[str]) -> str | None:
    """What a program of the scheduler says, None where it is missing or has nobody to ask."""
    try:
        return _run(command)
    except OSError:
        return None
