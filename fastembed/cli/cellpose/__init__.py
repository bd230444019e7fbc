"""``fastembed cellpose ...``: the Cellpose-SAM fine-tuning study, one subcommand per step.

One file per subcommand; options.py holds what several share. Nothing of cellpose is imported
before a subcommand runs.
"""

from __future__ import annotations

from ..options import Formatter
from . import (
    audit,
    budget,
    donors,
    evaluate,
    gate,
    infer,
    lomo,
    predict,
    prepare,
    report,
    sensitivity,
    submit,
    sweep,
    train,
)

# In the order in which a study takes them.
SUBCOMMANDS = (
    prepare, audit, train, predict, evaluate, sweep, budget, gate, sensitivity, lomo, infer,
    donors, report, submit,
)  # fmt: skip


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
