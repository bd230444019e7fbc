"""``fastembed convert``: a cache in another form."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Formatter, UsageError, add_database, both, database_of

_DATABASE = ("db", "db_host", "db_port", "db_name", "db_user", "db_password")


def add(commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="a cache as npy, npz, zarr, parquet or safetensors",
        formatter_class=Formatter,
        description=(
            "Writes a cache of fastembed multichannel or panoptic anew, in another form. npy, npz\n"
            "and zarr have the bytes that the job would have left with that --format, and the job\n"
            "goes on there. parquet is one file for pandas, polars, Hugging Face datasets and the\n"
            "like; safetensors is one tensor, with its index as parquet. No number is changed.\n"
            "The new folder is there whole or not at all."
        ),
        epilog=(
            "examples:\n"
            "  fastembed convert cache/vis_embed features --format parquet\n"
            "  fastembed convert out out_zarr --format zarr\n"
            "  fastembed convert cache/npy cache/zarr --format zarr --data_path coco\n"
            "  fastembed convert out new --format npy --db postgresql://me@host/cpjump1\n"
            "\n"
            "npy of segments holds no labels, a database no paths of tensors, and only npz knows\n"
            "which segments were chosen: where the new form needs them, name the data set."
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument("output_dir", type=Path, metavar="SRC", help="folder of the cache")
    parser.add_argument("target", type=Path, metavar="DST", help="the new folder")
    parser.add_argument(
        "--format",
        required=True,
        choices=("npy", "npz", "zarr", "parquet", "safetensors"),
        help="of the new folder",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace DST, if it is a cache and nothing else"
    )
    add_database(
        parser.add_argument_group("database", "Where the index of SRC is, if it is no file of SRC.")
    )
    group = parser.add_argument_group("the data set, for what SRC does not hold")
    group.add_argument(
        "--manifest", type=Path, metavar="CSV", help="of fastembed multichannel: paths of tensors"
    )
    add_coco(group)


def add_coco(group) -> None:
    """The data set and the choice of a panoptic cache, as `fastembed panoptic` takes them."""
    from .panoptic import names

    group.add_argument(
        *both("--data_path"),
        type=Path,
        metavar="DIR",
        help="of fastembed panoptic: labels; for npz with the choice that was made, by the options "
        "below",
    )
    group.add_argument("--split", default="train2017", help="default train2017")
    group.add_argument("--classes", type=names, default=(), metavar="LIST")
    group.add_argument(*both("--min_area"), type=int, default=0, metavar="PIXELS")
    group.add_argument(*both("--include_crowd"), action="store_true")


def run(arguments: argparse.Namespace) -> int:
    from ..convert import convert

    if arguments.manifest and arguments.data_path:
        raise UsageError("--manifest is for samples, --data_path for segments: give one")
    database = index_database(arguments)
    done = convert(
        arguments.output_dir,
        arguments.target,
        arguments.format,
        source=_source(arguments, database),
        database=database,
        overwrite=arguments.overwrite,
    )
    print(f"{arguments.target}: {done.rows} vectors of {done.dim} {done.dtype}")
    for name in done.lost:
        print(f"  {arguments.format} has no place for {name}: it is left out")
    for name in done.missing:
        print(f"  {arguments.output_dir} holds no {name}: the new index has none either")
    return 0


def index_database(arguments: argparse.Namespace):
    """The database that the options name; None without any of them."""
    if all(getattr(arguments, name) is None for name in _DATABASE):
        return None
    manifest, arguments.manifest = getattr(arguments, "manifest", None), None
    database = database_of(arguments)
    arguments.manifest = manifest
    return database


def _source(arguments: argparse.Namespace, database):
    from ..sources import CocoPanoptic, TensorCsv, TensorPostgres

    if arguments.data_path:
        return CocoPanoptic(
            arguments.data_path,
            arguments.split,
            classes=arguments.classes,
            min_area=arguments.min_area,
            include_crowd=arguments.include_crowd,
        )
    if arguments.manifest:
        return TensorCsv(arguments.manifest)
    return None if database is None else TensorPostgres(database)
