"""The one verb, `extract`, and the machine under it.

- `extract`: settings, locks and what is done already; then one `run`
- `run`: the threads: readers -> ring -> engine -> backlog -> writer
- `ring`, `backlog`: the two queues, one of batches in preallocated memory, one bounded by bytes
- `clock`, `trace`: where the time goes
- `interrupts`: Ctrl-C and SIGTERM put away what is in hand first
"""

from .extract import SampleFailed, extract, remove_outputs

__all__ = ["SampleFailed", "extract", "remove_outputs"]
