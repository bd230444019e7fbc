"""``fastembed cellpose gate``: drops objects by intensity and area, limits chosen on val."""

from __future__ import annotations

import argparse

from ..options import Formatter
from .options import (
    add_data,
    add_marker_choice,
    add_output,
    add_predictor,
    add_thresholds,
    examples_of,
    name_of,
    numbers,
    predictor_of,
    thresholds_of,
)


def add(steps) -> None:
    parser = steps.add_parser(
        "gate",
        help="choose limits of intensity and area on val, apply them to test",
        formatter_class=Formatter,
        description=(
            "Keeps objects whose mean marker lies within two quantiles of the image and whose\n"
            "area is large enough. Scores a grid of limits on val, the best of it on test, once.\n"
            "Leaves reports/e3_gating_*_NAME*.tsv and predictions/NAME/test/gated."
        ),
    )
    parser.set_defaults(run=run)
    add_data(parser)
    add_output(parser, "gets reports, predictions/NAME/test/gated and cache/NAME")
    add_marker_choice(parser)
    add_predictor(parser, cached=True)
    add_thresholds(parser)
    group = parser.add_argument_group("grid")
    for name, default in (
        ("q-low", (0.0, 0.02, 0.05)),
        ("q-high", (1.0, 0.98, 0.95)),
        ("min-area", (50.0, 60.0, 80.0)),
    ):
        shown = ",".join(f"{number:g}" for number in default)
        group.add_argument(
            f"--{name}", type=numbers, default=default, metavar="LIST", help=f"default {shown}"
        )


def run(arguments: argparse.Namespace) -> int:
    from ...cellpose.gate import gate

    final = gate(
        predictor_of(arguments, cached=True),
        examples_of(arguments, "val"),
        examples_of(arguments, "test"),
        arguments.output_dir,
        name_of(arguments),
        q_low=arguments.q_low,
        q_high=arguments.q_high,
        min_area=[round(area) for area in arguments.min_area],
        thresholds=thresholds_of(arguments),
    )
    for name, value in final.items():
        print(f"{name}: {value}")
    return 0
