"""``fastembed cellpose infer``: the objects of every tile, counted."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..options import EXIT_FAILURES, Formatter, command_of, positive, shard
from .options import (
    add_naming,
    add_network,
    add_output,
    add_thresholds,
    name_of,
    naming_of,
    network_of,
    thresholds_of,
)

FOLDER = Path("downstream", "full_inference")


def add(commands) -> None:
    parser = commands.add_parser(
        "infer",
        help="segment every tile once; count objects at all percentiles",
        formatter_class=Formatter,
        description=(
            "Segments all tiles (pairs of channels c0 and c1, or c2 where there is no c1) with\n"
            "one model, and counts objects whose mean marker is above percentiles of their tile:\n"
            "all percentiles from one inference. A tile is done when its record is on disk; run\n"
            "the same command again to go on after any stop. tile_counts.tsv is made anew from\n"
            "the records at the end of every run."
        ),
        epilog=(
            "examples:\n"
            "  fastembed cellpose infer --tiles rosmap --output-dir study --name baseline\n"
            "  fastembed cellpose infer --tiles rosmap --output-dir study --name finetuned \\\n"
            "      --model study/checkpoints/generic_cpsam/models/generic_cpsam --shard 0/8\n"
            "\n"
            "exit status: 0 done; 1 stopped; 2 wrong options; 3 done, but tiles failed\n"
            "(failures.jsonl in the output folder says which and why)."
        ),
    )
    parser.set_defaults(run=run, parser=parser, only=None)
    parser.add_argument("--tiles", required=True, type=Path, metavar="DIR", help="channel files")
    add_naming(parser)
    add_output(parser, "gets downstream/full_inference/NAME")
    add_network(parser)
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="the model's name in the table, such as baseline or finetuned; default that of its "
        "file",
    )
    add_thresholds(parser)
    group = parser.add_argument_group("counts")
    group.add_argument(
        "--percentiles",
        type=float,
        nargs="+",
        default=[60, 70, 75, 80, 90],
        metavar="Q",
        help="of a tile's marker; an object whose mean is above one is positive at it; "
        "default 60 70 75 80 90",
    )
    group.add_argument(
        "--positive",
        type=float,
        default=75,
        metavar="Q",
        help="the one that n_marker_positive and ratio stand for; default 75",
    )
    group.add_argument(
        "--save-masks", action="store_true", help="keep pred_masks/<tile>.tif, compressed"
    )
    group = parser.add_argument_group("run")
    group.add_argument("--shard", type=shard, default=(0, 1), metavar="I/N", help="part I of N")
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N tiles")
    group.add_argument("--strict", action="store_true", help="stop at the first tile that fails")
    group.add_argument(
        "--allow-failures", action="store_true", help="exit with 0 although tiles failed"
    )
    group.add_argument(
        "--overwrite", action="store_true", help="remove what the output folder holds, start afresh"
    )


def run(arguments: argparse.Namespace) -> int:
    from ...cellpose.infer import TileFailed, infer, network_segmenter
    from ...progress import Progress

    name = name_of(arguments)
    folder = arguments.output_dir / FOLDER / name
    segment, settings = network_segmenter(network_of(arguments), thresholds_of(arguments))
    with Progress() as progress:
        try:
            report = infer(
                arguments.tiles,
                folder,
                segment,
                model=name,
                settings=settings,
                percentiles=arguments.percentiles,
                positive=arguments.positive,
                naming=naming_of(arguments),
                zero_dapi=arguments.zero_dapi,
                keep_masks=arguments.save_masks,
                shard=arguments.shard,
                limit=arguments.limit,
                strict=arguments.strict,
                overwrite=arguments.overwrite,
                progress=progress,
                only=arguments.only,
                command=command_of(arguments, folder.resolve()),
            )
        except TileFailed as error:
            print(f"fastembed: {error}", file=sys.stderr)
            return EXIT_FAILURES
    print(report)
    return EXIT_FAILURES if report.failed and not arguments.allow_failures else 0
