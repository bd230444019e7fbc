"""``fastembed cellpose prepare``: annotations and tiles to a data set that is split by donor."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..options import EXIT_FAILURES, Formatter
from .options import add_naming, naming_of, numbers

_SHOWN = 10


def add(steps) -> None:
    parser = steps.add_parser(
        "prepare",
        help="annotations and tiles to images and masks, split by donor",
        formatter_class=Formatter,
        description=(
            "Writes images [DAPI, marker, 0] and label masks as TIFFs into train_cells, val_cells\n"
            "and test_cells, with all images of a donor in one of them; donor_splits.yaml says\n"
            "which, prepare.json counts everything and names what was left out."
        ),
        epilog="exit status: 0 done; 1 stopped; 2 wrong options; 3 done, some masks left out",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--tiles",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of channel files: x_b0c0.tif with x_b0c1.tif, else x_b0c2.tif; or x.tif with "
        "x_marker.tif",
    )
    parser.add_argument(
        "--masks",
        type=Path,
        metavar="DIR",
        help="folder of x_cellbodies.npy, .tif or .png; default that of the tiles",
    )
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--fractions",
        type=numbers,
        default=(0.6, 0.2, 0.2),
        metavar="LIST",
        help="shares of donors in train, val and test; default 0.6,0.2,0.2",
    )
    parser.add_argument("--seed", type=int, default=2024, metavar="N", help="default 2024")
    parser.add_argument(
        "--splits", type=Path, metavar="YAML", help="a donor_splits.yaml to follow instead"
    )
    add_naming(parser)


def run(arguments: argparse.Namespace) -> int:
    from ...cellpose.dataset import prepare

    report = prepare(
        arguments.tiles,
        arguments.output_dir,
        masks=arguments.masks,
        naming=naming_of(arguments),
        fractions=arguments.fractions,
        seed=arguments.seed,
        splits=arguments.splits,
    )
    print(
        f"{report.masks} masks: " + ", ".join(f"{n} {name}" for name, n in report.written.items())
    )
    for name, title in (
        ("image_missing", "masks without DAPI image"),
        ("marker_missing", "masks without marker image"),
        ("donor_unknown", "masks without donor in their path"),
        ("marker_unknown", "masks without marker in their path"),
        ("unpaired_tiles", "channel files without partner"),
        ("tiles_without_mask", "tiles without mask"),
        ("fallback", "images with c2 for want of c1"),
        ("empty_masks", "masks without objects"),
    ):
        members = getattr(report, name)
        if members:
            more = f" and {len(members) - _SHOWN} more" if len(members) > _SHOWN else ""
            print(f"{len(members)} {title}: {', '.join(members[:_SHOWN])}{more}")
    return EXIT_FAILURES if report.left_out else 0
