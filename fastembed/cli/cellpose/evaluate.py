"""``fastembed cellpose evaluate``: masks and metrics of one model on one split."""

from __future__ import annotations

import argparse

from ..options import Formatter
from .options import (
    add_data,
    add_output,
    add_predictor,
    add_split,
    add_thresholds,
    examples_of,
    name_of,
    predictor_of,
    show_metrics,
    thresholds_of,
)


def add(steps) -> None:
    parser = steps.add_parser(
        "evaluate",
        help="masks and metrics of one model on one split",
        formatter_class=Formatter,
        description=(
            "Segments the images of a split and compares with their masks. Leaves in\n"
            "predictions/NAME/SPLIT: STEM_pred.tif, and metrics.json with AP at 0.5, 0.75 and 0.9\n"
            "(mean over images), pooled precision, recall and F1, overall, per marker, per image."
        ),
    )
    parser.set_defaults(run=run)
    add_data(parser)
    add_output(parser, "gets predictions/NAME/SPLIT")
    add_split(parser, "test")
    add_predictor(parser, cached=False)
    add_thresholds(parser)


def run(arguments: argparse.Namespace) -> int:
    from ...cellpose.evaluate import evaluate

    name = name_of(arguments)
    examples = examples_of(arguments, arguments.split)
    folder = arguments.output_dir / "predictions" / name / arguments.split
    metrics = evaluate(
        predictor_of(arguments, cached=False), examples, thresholds_of(arguments), folder
    )
    show_metrics(name, metrics)
    print(folder / "metrics.json")
    return 0
