"""``fastembed cellpose sweep``: thresholds chosen on val, applied to test once."""

from __future__ import annotations

import argparse

from ..options import Formatter
from .options import (
    add_data,
    add_marker_choice,
    add_output,
    add_predictor,
    examples_of,
    name_of,
    numbers,
    predictor_of,
)


def add(steps) -> None:
    parser = steps.add_parser(
        "sweep",
        help="choose flow and cell probability thresholds on val, apply them to test",
        formatter_class=Formatter,
        description=(
            "Scores a grid of thresholds on val from one network pass per image, kept in a cache,\n"
            "and the best of it on test, once. Leaves reports/e1_threshold_sweep_NAME_val.tsv,\n"
            "reports/e1_threshold_selected_test.tsv and predictions/NAME_thsel/test."
        ),
        epilog="Of equal points the first wins; flow thresholds are the outer loop.",
    )
    parser.set_defaults(run=run)
    add_data(parser)
    add_output(parser, "gets reports, predictions/NAME_thsel and cache/NAME")
    add_marker_choice(parser)
    add_predictor(parser, cached=True)
    group = parser.add_argument_group("grid")
    group.add_argument(
        "--flow-thresholds", type=numbers, default=(0.2, 0.4, 0.6), metavar="LIST",
        help="default 0.2,0.4,0.6",
    )  # fmt: skip
    group.add_argument(
        "--cellprob-thresholds", type=numbers, default=(-1.0, -0.5, 0.0, 0.5, 1.0), metavar="LIST",
        help="default -1,-0.5,0,0.5,1; write --cellprob-thresholds=-1,0",
    )  # fmt: skip
    group.add_argument("--min-size", type=int, default=15, metavar="PIXELS", help="default 15")
    group.add_argument("--select-metric", choices=("f1", "ap50"), default="f1", help="default f1")


def run(arguments: argparse.Namespace) -> int:
    from ...cellpose.sweep import sweep

    selected = sweep(
        predictor_of(arguments, cached=True),
        examples_of(arguments, "val"),
        examples_of(arguments, "test"),
        arguments.output_dir,
        name_of(arguments),
        flow_thresholds=arguments.flow_thresholds,
        cellprob_thresholds=arguments.cellprob_thresholds,
        min_size=arguments.min_size,
        by=arguments.select_metric,
    )
    for name, value in selected.items():
        print(f"{name}: {value}")
    return 0
