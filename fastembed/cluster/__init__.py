"""Arrays of tasks on Slurm, on LSF or in processes here; one code for every command.

A `TaskArray` says what to run and where its logs lie, `Resources` what each task needs, `submit`
hands both to a scheduler. A task leaves its exit status beside its logs, so that `missing` knows
what to submit again.
"""

from .resources import Resources
from .submission import Submission, active, missing, submit
from .tasks import INDEX, TaskArray, TaskStatus, format_indices, last_error, parse_indices

__all__ = [
    "INDEX",
    "Resources",
    "Submission",
    "TaskArray",
    "TaskStatus",
    "active",
    "format_indices",
    "last_error",
    "missing",
    "parse_indices",
    "submit",
]
