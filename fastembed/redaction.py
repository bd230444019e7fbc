"""Passwords stay out of what is shown, recorded and listed: texts, command lines, `ps`.

Nothing here knows a database; `DBConfig.redact` adds what one configuration knows. It is the last
of three rules, after two that need no search: what is composed for a reader never has a secret in
it, and a string whose password cannot be told from the rest is refused unseen.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote, quote_plus

MASK = "***"
PASSWORD_OPTION = "--db-password"
# The shortest that argparse still takes for it.
_SHORTEST = len("--db-pa")

_QUOTED = r"'(?:[^'\\]|\\.)*'?|\"(?:[^\"\\]|\\.)*\"?"
_PATTERNS = (
    # scheme://user:password@host. To the last @: one that was not encoded may be the password's.
    (re.compile(r"(://[^:/@\s]*:)\S*@"), rf"\1{MASK}@"),
    # password=x, sslpassword = 'a b', PGPASSWORD="x", "password": "x", --db-password x
    (
        re.compile(
            rf"(?i)(\b\w*passw(?:or)?d['\"]?(?:\s*[=:]\s*|\s+(?=['\"])))({_QUOTED}|[^\s&]+)"
        ),
        rf"\1{MASK}",
    ),
    # And what is almost spelt so.
    (re.compile(rf"(?i)(--[\w-]*(?:pas|pw)\w*(?:=|\s+))({_QUOTED}|\S+)"), rf"\1{MASK}"),
)
# Of an argument by itself it is known where it ends: a space may be the password's too.
_URL = re.compile(r"(://[^:/@\s]*:).*@", re.DOTALL)


def redact(text: str, secrets: Iterable[str | None] = ()) -> str:
    """`text` without `secrets`, in any form that a URL or a key=value string gives them, and
    without what stands where passwords do."""
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        escaped = secret.replace("\\", "\\\\").replace("'", "\\'")
        forms = {secret, escaped, repr(secret)[1:-1], quote(secret), quote(secret, safe="")}
        for form in sorted(forms | {quote_plus(secret)}, key=len, reverse=True):
            text = text.replace(form, MASK)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line's arguments without passwords: what a log or a record may have."""
    shown: list[str] = []
    follows = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if follows:
            shown.append(MASK)
            follows = False
        elif _is_password_option(name):
            shown.append(f"{name}={MASK}" if equals else name)
            follows = not equals
        else:
            shown.append(redact(_URL.sub(rf"\1{MASK}@", argument)))
    return shown


def hide_arguments(arguments: Sequence[str]) -> None:
    """Overwrites passwords in this process's own command line, which `ps` shows to everyone.

    From here on; what looked before has seen them. Where there is no /proc, or it shows another
    command line than `arguments` at its end, nothing is touched.
    """
    shown = redact_arguments(arguments)
    if shown == list(arguments):
        return
    try:
        whole = Path("/proc/self/cmdline").read_bytes()
        # The fields after the name of the program, which is in brackets and may have any text.
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        start, end = int(fields[45]), int(fields[46])  # arg_start, arg_end of proc(5)
    except (OSError, ValueError, IndexError):
        return
    tail = b"".join(argument.encode(errors="surrogateescape") + b"\0" for argument in arguments)
    if not (0 < start < end and end - start == len(whole) and whole.endswith(tail)):
        return
    position = end - len(tail)
    for argument, replacement in zip(arguments, shown, strict=True):
        length = len(argument.encode(errors="surrogateescape"))
        if argument != replacement:
            # Of the same length: the memory is the kernel's list of all arguments.
            content = replacement.encode(errors="surrogateescape")[:length].ljust(length, b"*")
            ctypes.memmove(position, content, length)
        position += length + 1


def _is_password_option(name: str) -> bool:
    return len(name) >= _SHORTEST and PASSWORD_OPTION.startswith(name)
