"""``fastembed cellpose lomo``: leave one marker out."""

from __future__ import annotations

import argparse
from dataclasses import replace

from ..options import Formatter, UsageError, shard
from .options import (
    add_data,
    add_network,
    add_output,
    add_thresholds,
    add_training,
    names,
    pretrained_of,
    show_epoch,
    thresholds_of,
    training_of,
)


def add(steps) -> None:
    parser = steps.add_parser(
        "lomo",
        help="train without one marker, evaluate on it; each marker in turn",
        formatter_class=Formatter,
        description=(
            "For every marker: trains on the others and evaluates on it alone. The seed is SEED\n"
            "plus the number of the marker in alphabetical order. Leaves\n"
            "reports/e6_lomo_MARKER.tsv, checkpoints/lomo_excl_MARKER and\n"
            "predictions/lomo_excl_MARKER/test_heldout."
        ),
    )
    parser.set_defaults(run=run)
    add_data(parser)
    add_output(parser, "gets checkpoints, predictions and reports")
    parser.add_argument(
        "--heldout-markers", type=names, metavar="LIST", help="only these; default all of test"
    )
    parser.add_argument(
        "--shard", type=shard, default=(0, 1), metavar="I/N", help="only marker I, I + N, .. from 0"
    )
    add_network(parser, precision="fp32")
    add_training(parser, epochs=40, epoch_images=72, test_images=24)
    add_thresholds(parser)


def run(arguments: argparse.Namespace) -> int:
    from ...cellpose.dataset import list_examples
    from ...cellpose.experiment import leave_one_marker_out

    splits = [list_examples(arguments.data, split) for split in ("train", "val", "test")]
    markers = sorted({example.marker for example in splits[2]})
    asked = arguments.heldout_markers or markers
    if strangers := sorted(set(asked) - set(markers)):
        raise UsageError(f"no test image of marker {', '.join(strangers)}; found {markers}")
    settings = training_of(arguments)
    part, parts = arguments.shard
    for marker in list(asked)[part::parts]:
        row = leave_one_marker_out(
            pretrained_of(arguments),
            marker,
            *splits,
            arguments.output_dir,
            replace(settings, seed=settings.seed + markers.index(marker)),
            thresholds_of(arguments),
            show_epoch,
        )
        print(
            f"without {marker}: ap50 {row['ap50']:.4f}, f1 {row['f1']:.4f} on "
            f"{row['n_test_images']} images of it"
        )
    return 0
