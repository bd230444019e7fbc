"""``fastembed cellpose budget``: how much annotation is enough."""

from __future__ import annotations

import argparse

from ..options import Formatter, UsageError, positive, shard
from .options import (
    add_data,
    add_marker_choice,
    add_network,
    add_output,
    add_thresholds,
    add_training,
    examples_of,
    numbers,
    pretrained_of,
    show_epoch,
    thresholds_of,
    training_of,
)


def add(steps) -> None:
    parser = steps.add_parser(
        "budget",
        help="train on few images, several times each, and evaluate",
        formatter_class=Formatter,
        description=(
            "Trains on budgets of images per marker, drawn anew for each repeat with the seed\n"
            "SEED + 1000 BUDGET + REPEAT, and evaluates each network. Leaves in logs/EXP a folder\n"
            "per run, records.tsv (with the true number of images) and summary.json."
        ),
        epilog="A finished run is not run again, a stopped one goes on.",
    )
    parser.set_defaults(run=run)
    add_data(parser)
    add_output(parser, "gets logs/EXP")
    add_marker_choice(parser)
    group = parser.add_argument_group("budgets")
    group.add_argument(
        "--budgets", type=numbers, default=(2, 5, 10, 20, 30), metavar="LIST",
        help="images per marker; default 2,5,10,20,30",
    )  # fmt: skip
    group.add_argument("--repeats", type=positive, default=5, metavar="N", help="default 5")
    group.add_argument("--eval-split", choices=("val", "test"), default="val", help="default val")
    group.add_argument(
        "--exp-name", default="budget_curve", metavar="EXP", help="default budget_curve"
    )
    group.add_argument(
        "--keep-models", action=argparse.BooleanOptionalAction, default=True,
        help="1.2 GB each for Cellpose-SAM; default --keep-models",
    )  # fmt: skip
    group.add_argument(
        "--shard", type=shard, default=(0, 1), metavar="I/N", help="only run I, I + N, .. from 0"
    )
    add_network(parser, precision="fp32")
    add_training(parser, epochs=6, epoch_images=24, test_images=12)
    add_thresholds(parser)


def run(arguments: argparse.Namespace) -> int:
    from ...cellpose.experiment import budget_curve

    budgets = [round(budget) for budget in arguments.budgets]
    if min(budgets) < 1:
        raise UsageError(f"--budgets must be at least 1; got {min(budgets)}")
    folder = arguments.output_dir / "logs" / arguments.exp_name
    records = budget_curve(
        pretrained_of(arguments),
        examples_of(arguments, "train"),
        examples_of(arguments, "val"),
        examples_of(arguments, arguments.eval_split),
        folder,
        eval_split=arguments.eval_split,
        budgets=budgets,
        repeats=arguments.repeats,
        settings=training_of(arguments),
        thresholds=thresholds_of(arguments),
        shard=arguments.shard,
        keep_models=arguments.keep_models,
        progress=show_epoch,
    )
    for record in records:
        print(
            f"budget {record['budget']:>3} repeat {record['repeat']}: "
            f"{record['train_n']:>3} images, ap50 {record['overall_ap50']:.4f}, "
            f"f1 {record['overall_f1']:.4f}"
        )
    print(folder / "records.tsv")
    return 0
