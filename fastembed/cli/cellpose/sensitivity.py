"""``fastembed cellpose sensitivity``: the study's proxy for the density of prompts."""

from __future__ import annotations

import argparse

from ..options import Formatter, positive
from .options import (
    add_data,
    add_output,
    add_predictor,
    add_split,
    examples_of,
    numbers,
    predictor_of,
)


def add(steps) -> None:
    parser = steps.add_parser(
        "sensitivity",
        help="results by flow threshold on a sample, the study's proxy for prompt density",
        formatter_class=Formatter,
        description=(
            "Evaluates a sample of images per marker at the flow thresholds that stand for\n"
            "prompts per side: up to 16 0.6, up to 32 0.4, above 0.2. Leaves reports/microsam."
        ),
    )
    parser.set_defaults(run=run)
    add_data(parser)
    add_output(parser, "gets reports/microsam and cache/NAME")
    add_split(parser, "test")
    add_predictor(parser, cached=True)
    group = parser.add_argument_group("sample")
    group.add_argument(
        "--points-per-side", type=numbers, default=(16, 32, 64), metavar="LIST",
        help="default 16,32,64",
    )  # fmt: skip
    group.add_argument(
        "--num-tiles", type=positive, default=10, metavar="N", help="images per marker; default 10"
    )
    group.add_argument("--seed", type=int, default=2024, metavar="N", help="default 2024")


def run(arguments: argparse.Namespace) -> int:
    from ...cellpose.sweep import sensitivity

    rows = sensitivity(
        predictor_of(arguments, cached=True),
        examples_of(arguments, arguments.split),
        arguments.output_dir,
        points_per_side=[round(number) for number in arguments.points_per_side],
        num_tiles=arguments.num_tiles,
        seed=arguments.seed,
    )
    for row in rows:
        print(f"{row['pps']:>4} {row['group']:>10}  ap50 {row['ap50']:.4f}  f1 {row['f1']:.4f}")
    return 0
