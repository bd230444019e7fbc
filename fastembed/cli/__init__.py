"""The command line: each command parses, builds the nouns of the Python API and calls it.

One file per command; options.py holds what several share.
"""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from ..database import DatabaseError
from ..redaction import hide_arguments, redact
from . import (
    cellpose,
    convert,
    demo,
    export,
    maps,
    multichannel,
    panoptic,
    parity,
    search,
    show,
    submit,
    verify,
    volumes,
)
from .options import Formatter, UsageError

EXIT_ERROR, EXIT_USAGE = 1, 2
_INTERRUPTED = "interrupted; what is committed stays: the same command goes on from there"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # It repeats what it does not understand, such as half of a key=value string.
        super().error(redact(message))


class Terminated(BaseException):
    """SIGTERM arrived."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status.

    0: all done. 1: the run stopped (database, disk, model). 2: the options make no sense.
    3: done, but samples failed (see failures.jsonl). 130, 143: interrupted, terminated.
    """
    if argv is None:
        hide_arguments(sys.argv[1:])
    parser = build_parser()
    arguments = parser.parse_args(argv)
    warnings.showwarning = _show_warning
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return arguments.run(arguments)
    except UsageError as error:
        return _complain(error, EXIT_USAGE)
    except (DatabaseError, OSError, ImportError, ValueError, RuntimeError) as error:
        return _complain(error, EXIT_ERROR)
    except KeyboardInterrupt:
        return _complain(_INTERRUPTED, 130)
    except Terminated:
        return _complain(_INTERRUPTED, 143)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="fastembed",
        description="Image data sets into embedding caches, with numbers that can be trusted.",
        epilog="fastembed COMMAND --help explains a command.",
        formatter_class=Formatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"fastembed-vision {version('fastembed-vision')}"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    multichannel.add(commands)
    panoptic.add(commands)
    maps.add(commands)
    volumes.add(commands)
    cellpose.add(commands)
    convert.add(commands)
    export.add(commands)
    parity.add(commands)
    search.add(commands)
    show.add(commands)
    verify.add(commands)
    submit.add(commands)
    demo.add(commands)
    _add_info(commands)
    return parser


def _add_info(commands) -> None:
    parser = commands.add_parser(
        "info",
        help="versions, and which backend runs which op here",
        formatter_class=Formatter,
        description="Prints versions, and for each op which backends can run here and why not.",
    )
    parser.set_defaults(run=_info)


def _info(_: argparse.Namespace) -> int:
    from .. import info

    info.main()
    return 0


def _complain(error: object, status: int) -> int:
    print(f"fastembed: {error}", file=sys.stderr)
    return status


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"fastembed: warning: {message}", file=sys.stderr)


def _terminate(*_: object) -> None:
    raise Terminated
