"""Arrays of tasks on Slurm, on LSF, on a cluster of Dask or in processes here, for every command.

A `TaskArray` says what to run and where its logs lie, `Resources` what each task needs, `submit`
hands both to a scheduler, or to the workers of an `Elastic`. A task leaves its exit status beside
its logs, so that `missing` knows what to submit again.
"""

from .progress import Standing
from .records import active, missing
from .resources import Resources
from .submission import Submission, submit
from .tasks import INDEX, TaskArray, TaskStatus, format_indices, last_error, parse_indices
from .workers import Elastic

__all__ = [
    "INDEX",
    "Elastic",
    "Resources",
    "Standing",
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
