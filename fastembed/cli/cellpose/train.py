"""``fastembed cellpose train``: fine-tunes a network with cellpose's own training."""

from __future__ import annotations

import argparse

from ..options import Formatter
from .options import (
    add_data,
    add_marker_choice,
    add_network,
    add_output,
    add_training,
    examples_of,
    network_of,
    show_epoch,
    training_of,
)


def add(steps) -> None:
    parser = steps.add_parser(
        "train",
        help="fine-tune a network on the train split",
        formatter_class=Formatter,
        description=(
            "Trains with cellpose.train.train_seg on train, with val for the test loss. Leaves in\n"
            "checkpoints/NAME: models/NAME (last) and models/NAME_best (lowest test loss),\n"
            "losses.tsv, losses.png and train.json, which names images that were left out."
        ),
        epilog=(
            "After a stop the same command goes on from the last checkpoint: weights, optimizer,\n"
            "random state and epoch, so that the end is that of a training without stop."
        ),
    )
    parser.set_defaults(run=run)
    add_data(parser)
    add_output(parser, "gets checkpoints/NAME")
    parser.add_argument(
        "--name", default="generic_cpsam", metavar="NAME", help="default generic_cpsam"
    )
    add_marker_choice(parser)
    add_network(parser, precision="fp32")
    add_training(parser, epochs=80)


def run(arguments: argparse.Namespace) -> int:
    from ...cellpose.train import train

    settings = training_of(arguments)
    examples, test = examples_of(arguments, "train"), examples_of(arguments, "val")
    trained = train(
        network_of(arguments),
        examples,
        test,
        arguments.output_dir / "checkpoints" / arguments.name,
        arguments.name,
        settings,
        show_epoch,
    )
    if trained.dropped:
        found = ", ".join(f"{stem} ({count})" for stem, count in trained.dropped.items())
        print(f"{len(trained.dropped)} images have too few objects and were left out: {found}")
    best = "" if trained.best is None else f"\nbest:   {trained.best} (epoch {trained.best_epoch})"
    print(f"{len(trained.used)} images\nlast:   {trained.last}{best}")
    return 0
