"""``fastembed cellpose audit``: how far tiles and clinical table cover each other."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from ..options import Formatter
from .options import add_naming, naming_of


def add(steps) -> None:
    parser = steps.add_parser(
        "audit",
        help="which tiles, donors and markers there are, and who is missing",
        formatter_class=Formatter,
        description="Counts paired tiles, donors and markers, and names donors of one side only.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("--tiles", type=Path, required=True, metavar="DIR")
    parser.add_argument("--clinical", type=Path, metavar="CSV", help="a row per donor")
    parser.add_argument(
        "--donor-column", default="projid", metavar="NAME", help="of the CSV; default projid"
    )
    parser.add_argument(
        "--output", type=Path, metavar="JSON", help="such as reports/e5_coverage_audit.json"
    )
    add_naming(parser)


def run(arguments: argparse.Namespace) -> int:
    from ...cellpose.tables import write_json
    from ...cellpose.tiles import audit, find_tiles, read_clinical_donors

    clinical = (
        read_clinical_donors(arguments.clinical, arguments.donor_column)
        if arguments.clinical
        else []
    )
    found = audit(find_tiles(arguments.tiles, naming_of(arguments)), clinical)
    content = {
        "tiles": str(arguments.tiles),
        "clinical_csv": str(arguments.clinical) if arguments.clinical else None,
        **asdict(found),
    }
    if arguments.output:
        write_json(arguments.output, content)
    print(json.dumps(content, indent=2))
    return 0
