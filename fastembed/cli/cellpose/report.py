"""``fastembed cellpose report``: tables, figures and a page of what the study has so far."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..options import Formatter


def add(steps) -> None:
    parser = steps.add_parser(
        "report",
        help="tables, figures and one HTML page of what is on disk",
        formatter_class=Formatter,
        description=(
            "Gathers what the steps left in the study's folder. Leaves in report: index.html, a\n"
            "page with all of it; tables/*.tsv; figures/*.png and *.pdf. Parts that are not there\n"
            "are named as missing, on the page and here."
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--output-dir", type=Path, required=True, metavar="DIR", help="the study's folder"
    )
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help="write there; default report in the study's folder"
    )


def run(arguments: argparse.Namespace) -> int:
    from ...cellpose.report import report

    target = arguments.to or arguments.output_dir / "report"
    for section in report(arguments.output_dir, target):
        print(f"{section.title:<24} {section.state}")
        for text in section.missing:
            print(f"fastembed: {section.title}: missing: {text}", file=sys.stderr)
    print(target / "index.html")
    return 0
