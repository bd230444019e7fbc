"""What a task needs, in one set of units for all schedulers."""

from __future__ import annotations

import re
from dataclasses import dataclass

_WALLTIME = re.compile(r"(?:(?P<d>\d+)-)?(?P<h>\d+):(?P<m>[0-5]\d)(?::(?P<s>[0-5]\d))?")


@dataclass(frozen=True)
class Resources:
    """What each task of an array needs, and where it may run.

    Args:
        processors: cores of one machine; also `OMP_NUM_THREADS` of the task.
        memory_gb: memory of a whole task, in GiB; None is the scheduler's default.
        walltime: time limit: minutes, ``H:MM``, ``H:MM:SS`` or ``D-HH:MM:SS``. ``2:00`` is two
            hours for every scheduler (Slurm on its own would read two minutes).
        queue: LSF queue or Slurm partition.
        gpus: GPUs of a task, or the scheduler's own request: ``a100:2`` (Slurm), ``num=1:gmem=24G``
            (LSF).
        project: LSF project or Slurm account.
        running_limit: tasks that may run at the same time.
        options: further arguments of sbatch or bsub, passed on as they are.

    Raises:
        TypeError, ValueError: a value that no scheduler could mean.
    """

    processors: int = 1
    memory_gb: float | None = None
    walltime: str | int | None = None
    queue: str | None = None
    gpus: int | str | None = None
    project: str | None = None
    running_limit: int | None = None
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("processors", "running_limit"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name} must be a whole number; got {value!r}")
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if self.memory_gb is not None and not 0 < self.memory_gb < 1e6:
            raise ValueError(f"memory_gb must be above 0, in GiB; got {self.memory_gb}")
        if isinstance(self.gpus, int) and self.gpus < 0:
            raise ValueError(f"gpus must not be negative; got {self.gpus}")
        if isinstance(self.options, str):
            raise TypeError(f"options must be a list of arguments; got {self.options!r}")
        if self.seconds == 0:
            raise ValueError(f"walltime must be above 0; got {self.walltime!r}")

    @property
    def seconds(self) -> int | None:
        """The time limit in seconds."""
        if self.walltime is None:
            return None
        text = str(self.walltime).strip()
        if text.isascii() and text.isdigit():
            return 60 * int(text)
        found = _WALLTIME.fullmatch(text)
        if not found:
            raise ValueError(
                f"walltime must be minutes, H:MM, H:MM:SS or D-HH:MM:SS; got {self.walltime!r}"
            )
        parts = {name: int(value or 0) for name, value in found.groupdict().items()}
        return ((parts["d"] * 24 + parts["h"]) * 60 + parts["m"]) * 60 + parts["s"]

    @property
    def megabytes(self) -> int | None:
        """The memory in MiB, rounded up."""
        return None if self.memory_gb is None else -int(-self.memory_gb * 1024 // 1)
