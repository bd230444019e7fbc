"""``fastembed volumes``: 3D volumes to tri-plane features, and all that goes with it."""

from __future__ import annotations

from ..options import Formatter
from . import bench, check, preprocess, submit


def add(commands) -> None:
    parser = commands.add_parser(
        "volumes",
        help="3D volumes to DINOv3 features in zarr, with submission, checking and a loader",
        formatter_class=Formatter,
        description=(
            "Crops of 3D volumes, sliced along three axes, through a 2D model; the mean of what\n"
            "it says of each voxel is stored for training."
        ),
        epilog=(
            "in training:\n"
            "  from fastembed.datasets import create_preprocessed_dataloader\n"
            "  loader = create_preprocessed_dataloader('preprocessed_volumes', batch_size=4)\n"
            "  for features, gt, mask in loader: ...\n"
            "\n"
            "fastembed volumes COMMAND --help explains a command."
        ),
    )
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (preprocess, submit, check, bench):
        command.add(actions)
