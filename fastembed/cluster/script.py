"""The script that every scheduler runs once per task."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from .tasks import INDEX, TaskArray, format_indices

_BODY = r"""
log={logs}/$(printf '{pattern}' "$index")

# What `--missing` reads. Renamed into place, so that it is never half written.
record() {{
    printf '%s\n' "status=$1" command={digest} submission={stem} "job=$job" \
        "host=$HOSTNAME" "time=$(date +%Y-%m-%dT%H:%M:%S%z)" >"$log.status.part"
    mv -f -- "$log.status.part" "$log.status"
}}

record running
printf 'index %s on %s: %s.{{out,err,status}}\n' "$index" "$HOSTNAME" "$log"

cd {cwd}
export OMP_NUM_THREADS={processors}

# A scheduler that stops a task signals all its processes. This one stays until the command has
# ended, to write down how.
trap : TERM INT USR1 USR2 XCPU
status=0
{command} \
    </dev/null >"$log.out" 2>"$log.err" || status=$?
record "$status"
exit "$status"
"""


def render(
    tasks: TaskArray,
    stem: str,
    processors: int,
    number: str,
    job: str,
    commands: Sequence[Sequence[str]],
) -> str:
    """The text of the script.

    Args:
        number: shell expression for the number of a task, from 1.
        job: shell expression for the scheduler's name of a task.
        commands: what submits the script, for the reader.
    """
    order = format_indices(tasks.indices, comma=" ", span="{{{}..{}}}")
    head = [
        "#!/bin/bash",
        f"# {tasks.name}: {len(tasks.indices)} tasks, submitted by fastembed with",
        *(f"#   {_comment(command)}" for command in commands),
        "set -euo pipefail",
        "",
        *_wrapped("indices=(", order, ")"),
        f"index=${{indices[{number} - 1]}}",
        f"job={job}",
    ]
    body = _BODY.format(
        logs=shlex.quote(str(tasks.logs)),
        pattern=tasks.pattern,
        digest=tasks.digest,
        stem=stem,
        cwd=shlex.quote(str(tasks.cwd)),
        processors=processors,
        command=" ".join(map(_quoted, tasks.command)),
    )
    return "\n".join(head) + body


def _quoted(argument: str) -> str:
    """For the shell: every part as it is, but the index's value for `INDEX`."""
    if not argument:
        return "''"
    parts = re.split(f"({re.escape(INDEX)})", argument)
    return "".join('"$index"' if part == INDEX else shlex.quote(part) for part in parts if part)


def _comment(command: Sequence[str]) -> str:
    """On one line: a newline in an argument would end the comment and start a command."""
    return shlex.join(command).replace("\r", "\\r").replace("\n", "\\n")


def _wrapped(start: str, words: str, end: str, width: int = 96) -> list[str]:
    lines = [start]
    for word in words.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("   ")
        lines[-1] += word if lines[-1].endswith("(") else f" {word}"
    lines[-1] += end
    return lines
