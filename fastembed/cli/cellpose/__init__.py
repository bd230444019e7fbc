"""``fastembed cellpose ...``: the Cellpose-SAM fine-tuning study, one subcommand per step.

One file per subcommand; options.py holds what several share. Nothing of cellpose is imported
before a subcommand runs.
"""

from __future__ import annotations

from ..options import Formatter
from . import audit, donors, evaluate, infer, prepare, report, train

SUBCOMMANDS = (prepare, audit, train, evaluate, infer, donors, report)


def add(commands) -> None:
    parser = commands.add_parser(
        "cellpose",
        help="the Cellpose-SAM fine-tuning study",
        formatter_class=Formatter,
        description=(
            "Repeats the Cellpose-SAM study with your tiles, masks and clinical table: every step\n"
            "a command, every number in a file. Run a step again to go on after any stop."
        ),
        epilog="fastembed cellpose STEP --help explains a step.",
    )
    steps = parser.add_subparsers(title="steps", metavar="STEP", required=True)
    for subcommand in SUBCOMMANDS:
        subcommand.add(steps)
