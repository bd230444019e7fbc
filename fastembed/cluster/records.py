"""What submissions leave for later ones: which tasks are held, which are missing."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .schedulers import SCHEDULERS
from .tasks import TaskArray, parse_indices

# Submissions that last as long as the process that submitted, which holds a lock.
_ATTENDED = {"local": "process here", "dask": "dask"}


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
    for script, record in records(tasks):
        # Most submissions have ended, all with a status: for those nobody needs to be asked.
        open_ = {
            number: index
            for number, index in enumerate(parse_indices(record.indices), start=1)
            if not _ended(tasks, index, script.stem)
        }
        if not open_:
            continue
        if record.scheduler in _ATTENDED:
            if record.is_locked(script):
                who = f"{_ATTENDED[record.scheduler]}, {script.stem}"
                held |= dict.fromkeys(open_.values(), who)
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
class Record:
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


def records(tasks: TaskArray) -> Iterator[tuple[Path, Record]]:
    for path in sorted(tasks.logs.glob(f"{tasks.name}_*.json")):
        if not re.fullmatch(rf"{re.escape(tasks.name)}_\d+", path.stem):
            continue
        try:
            parts = json.loads(path.read_text())
            parts["arrays"] = [tuple(array) for array in parts["arrays"]]
            yield path.with_suffix(".sh"), Record(**parts)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not the record of a submission") from error


def free_stem(tasks: TaskArray) -> str:
    number = 1
    while (tasks.logs / f"{tasks.name}_{number:03d}.sh").exists():
        number += 1
    return f"{tasks.name}_{number:03d}"
