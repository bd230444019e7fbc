"""What to run for each index, and what the tasks left behind."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

INDEX = "{index}"
"""Stands for the task's index inside an argument of `TaskArray.command`."""

MAX_INDICES = 1_000_000
_TAIL_BYTES = 65_536
_EXCEPTION = re.compile(
    r"fastembed: (?!warning)|"
    r"(?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Failed)\b"
)
# What Slurm and LSF say of a task that they ended, and bash of a command that was killed.
_SCHEDULER = re.compile(
    r"(slurmstepd\S*: error: .*|.*oom.kill.*|.*\bTERM_[A-Z_]+:.*|.*line \d+: .*\b(?:Killed|Aborted|"
    r"Segmentation fault|Bus error|Terminated)\b.*)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class TaskStatus:
    """What a task wrote down of itself.

    Args:
        state: exit status; None while it runs, and for ever if it was killed with its shell.
        command: digest of the command that ran.
        submission: name of the script that ran it.
        job: the scheduler's name for it, such as ``12_7``.
        host: where it ran.
        time: when this was written, ISO 8601.
    """

    state: int | None
    command: str
    submission: str
    job: str
    host: str
    time: str


@dataclass(frozen=True)
class TaskArray:
    """One command for many indices.

    Task `i` leaves ``<logs>/<pattern % i>.out`` and ``.err`` (its output), ``.status`` (its exit
    status, `status`) and, in ``<logs>/scheduler``, what the scheduler had to say.

    Args:
        name: of the job, its script and its records; letters, digits, ``. _ -``.
        command: program and arguments, where `INDEX` stands for the index. Never a shell string:
            nothing in it is interpreted.
        indices: not negative, each once.
        logs: folder for scripts, records and logs; made when needed.
        pattern: file name of a task's logs, with one ``%d`` such as ``volume_%06d``.
        cwd: where the command runs; by default here.

    Raises:
        TypeError, ValueError: names the argument and its rule.
    """

    name: str
    command: Sequence[str]
    indices: Sequence[int]
    logs: Path
    pattern: str = "task_%06d"
    cwd: Path = field(default_factory=Path.cwd)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", self.name) or self.name.startswith(("-", ".")):
            raise ValueError(f"name must be of letters, digits, . _ and -; got {self.name!r}")
        if not re.fullmatch(r"[\w.-]*%(?:0\d+)?d[\w.-]*", self.pattern, re.ASCII):
            raise ValueError(f"pattern must be a name with one %d or %06d; got {self.pattern!r}")
        if isinstance(self.command, str) or not self.command:
            raise TypeError(f"command must be a list of arguments; got {self.command!r}")
        for argument in self.command:
            if not isinstance(argument, str) or "\0" in argument:
                raise TypeError(f"command must be of text without NUL; got {argument!r}")
        if not self.indices:
            raise ValueError("indices must not be empty")
        if min(self.indices) < 0 or len(set(self.indices)) != len(self.indices):
            raise ValueError("indices must not be negative, and each must come once")
        object.__setattr__(self, "indices", tuple(sorted(self.indices)))
        object.__setattr__(self, "logs", Path(os.path.abspath(self.logs)))
        object.__setattr__(self, "cwd", Path(os.path.abspath(self.cwd)))

    @property
    def digest(self) -> str:
        """Of the command and where it runs; equal for all indices."""
        text = json.dumps([str(self.cwd), *self.command])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def log(self, index: int, suffix: str) -> Path:
        """A task's file; `suffix` is ``out``, ``err`` or ``status``."""
        return self.logs / f"{self.pattern % index}.{suffix}"

    def status(self, index: int) -> TaskStatus | None:
        """What the task wrote down, None if it never started."""
        try:
            text = self.log(index, "status").read_text()
        except FileNotFoundError:
            return None
        parts = dict(line.partition("=")[::2] for line in text.splitlines())
        try:
            state = parts.pop("status")
            return TaskStatus(None if state == "running" else int(state), **parts)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.log(index, 'status')} is not a task's status") from error

    def finished(self, index: int) -> bool:
        """Whether this very command ran to its end and exited with 0."""
        status = self.status(index)
        return status is not None and status.state == 0 and status.command == self.digest

    def failure(self, index: int) -> str:
        """Why a task is not finished, in one line: its end, the scheduler's word, its own."""
        status = self.status(index)
        if status is None:
            return "not started"
        if status.state is None:
            reasons = [f"no exit status: killed with its shell, or still running, on {status.host}"]
        elif status.state > 128 and status.state - 128 in iter(signal.Signals):
            reasons = [f"killed by {signal.Signals(status.state - 128).name}"]
        elif status.state:
            reasons = [f"exit status {status.state}"]
        else:
            return "finished" if self.finished(index) else "finished, but with another command"
        scheduler = self.scheduler_log(status.submission, status.job)
        reasons += [_scheduler_reason(scheduler), last_error(self.log(index, "err"))]
        return "; ".join(filter(None, reasons))

    def scheduler_log(self, submission: str, job: str) -> Path:
        """What the scheduler said of a task, its out-of-memory and time-limit messages included."""
        return self.logs / "scheduler" / f"{submission}_{job}.log"


def parse_indices(text: str) -> tuple[int, ...]:
    """``3,7,20-40`` as numbers, in that order.

    Raises:
        ValueError: names the part that is no index or range, goes backwards or comes twice.
    """
    numbers: dict[int, None] = {}
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        ends = [first, last] if dash else [first]
        if not all(end.isascii() and end.isdigit() for end in ends):
            raise ValueError(f"indices must look like 3,7,20-40; got {part!r} in {text!r}")
        low, high = int(ends[0]), int(ends[-1])
        if high < low:
            raise ValueError(f"an index range must go upwards; got {part.strip()!r}")
        if len(numbers) + high - low + 1 > MAX_INDICES:
            raise ValueError(f"at most {MAX_INDICES} indices; {part.strip()!r} would pass that")
        for number in range(low, high + 1):
            if number in numbers:
                raise ValueError(f"index {number} comes twice in {text!r}")
            numbers[number] = None
    return tuple(numbers)


def format_indices(indices: Iterable[int], comma: str = ",", span: str = "{}-{}") -> str:
    """The inverse of `parse_indices`, sorted; `span` is how a range is written."""
    parts = []
    for _, run in itertools.groupby(enumerate(sorted(indices)), key=lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in run]
        whole = len(numbers) > 2
        parts += [span.format(numbers[0], numbers[-1])] if whole else map(str, numbers)
    return comma.join(parts)


def last_error(log: Path, lines: int = 3) -> str | None:
    """The error at the end of a log: a Python exception's message, else the last lines.

    Progress bars that overwrite their line count as the text that remained. Returns None where
    the log is missing or empty.
    """
    text = _tail(log)
    # What a carriage return overwrote was never meant to stay.
    shown = [line.rstrip("\r").rpartition("\r")[2].strip() for line in text.split("\n")]
    shown = [line for line in shown if line]
    if not shown:
        return None
    for at in range(len(shown) - 1, -1, -1):
        if _EXCEPTION.match(shown[at]):
            return " ".join(shown[at : at + lines])
    return " ".join(shown[-lines:])


def _scheduler_reason(log: Path) -> str | None:
    found = [line.strip() for line in _tail(log).splitlines() if _SCHEDULER.fullmatch(line.strip())]
    return " ".join(list(dict.fromkeys(found))[:2]) or None  # said twice, at times


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _TAIL_BYTES))
            return stream.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
