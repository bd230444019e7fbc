"""``fastembed volumes preprocess``: sampled volumes to stored features."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ...cluster import format_indices, parse_indices
from ..options import (
    Formatter,
    UsageError,
    add_numbers,
    add_run,
    add_runtime,
    add_weights,
    positive,
    run_extraction,
)

MODEL = "facebook/dinov3-vitl16-pretrain-sat493m"


def add(commands) -> None:
    parser = commands.add_parser(
        "preprocess",
        help="sample volumes, compute and store their features",
        formatter_class=Formatter,
        description=(
            "Cuts a crop out of the data sets, where --volume-index says, and stores the mean of\n"
            "its slices' features in three orientations, its labels and where they are valid.\n"
            "A volume that is finished, with the same settings, is skipped."
        ),
        epilog=(
            "examples:\n"
            "  fastembed volumes preprocess --volume-index 0 --output-dir out \\\n"
            "      --data-root /data/cellmap --organelles cell nucleus\n"
            "  fastembed volumes preprocess --volume-index 0-9 --output-dir out \\\n"
            "      --datasets datasets.yaml --organelles mito --weights random\n"
            "\n"
            "The YAML:\n"
            "  datasets:\n"
            "    - name: liver\n"
            "      raw: s3://bucket/liver.zarr/recon-1/em/fibsem-uint8\n"
            "      labels:\n"
            "        cell: s3://bucket/liver.zarr/labels/cell\n"
            "    - name: vnc                  # a folder of TIFF sections has no metadata\n"
            "      raw: {path: vnc/raw, resolution: [50, 4.6, 4.6]}     # nm, z y x\n"
            "      labels: {mito: {path: vnc/labels, resolution: [50, 4.6, 4.6], values: [191]}}\n"
            "\n"
            "exit status: 0 done; 1 stopped; 2 wrong options; 3 done, but volumes failed\n"
            "(failures-volume_*.jsonl in the output folder says which and why)."
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--volume-index",
        type=indices,
        required=True,
        metavar="LIST",
        help="which volumes, such as 7 or 0-9; the index alone decides what is drawn",
    )
    add_job(parser)


def indices(text: str) -> tuple[int, ...]:
    try:
        return parse_indices(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_job(parser: argparse.ArgumentParser) -> None:
    """All options of a volume's preparation but its index; `submit` has them too."""
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR")
    _add_data(parser.add_argument_group("data"))
    _add_crops(parser.add_argument_group("crops"))
    _add_features(parser.add_argument_group("features"))
    _add_files(parser.add_argument_group("files"))
    add_run(parser, workers=("--workers", "--num-workers"), default_workers="1: a volume each")


def _add_data(group) -> None:
    group.add_argument("--data-root", metavar="DIR", help="a tree as CellMap keeps it")
    group.add_argument(
        "--datasets", type=Path, metavar="YAML", help="places of raw and labels; see below"
    )
    group.add_argument(
        "--organelles", nargs="+", default=["cell"], metavar="NAME", help="default cell"
    )
    group.add_argument(
        "--inference-filter",
        nargs="+",
        metavar="NAME",
        help="with --data-root: labels that a model made, of these data sets",
    )
    group.add_argument(
        "--crop-filter", nargs="+", metavar="N", help="with --data-root: only these crops"
    )


def _add_crops(group) -> None:
    number = {"type": float, "metavar": "X"}
    group.add_argument(
        "--base-resolution", **number, default=128, help="edge of an output voxel, nm; default 128"
    )
    group.add_argument(
        "--min-resolution-for-raw", **number, default=32, help="of a raw voxel, nm; default 32"
    )
    group.add_argument(
        "--output-image-dim",
        type=positive,
        default=128,
        metavar="N",
        help="output voxels along each axis; default 128",
    )
    group.add_argument(
        "--min-label-fraction", **number, default=0.01, help="labelled, of what is known; 0.01"
    )
    group.add_argument(
        "--min-unique-ids", type=int, default=2, metavar="N", help="different labels; default 2"
    )
    group.add_argument(
        "--min-ground-truth-fraction", **number, default=0.05, help="known, of the crop; 0.05"
    )
    group.add_argument(
        "--no-gt-extension",
        dest="gt_extension",
        action="store_false",
        help="crops lie inside the labelled box; no mask is stored",
    )
    group.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="turn and mirror each crop; default --augment",
    )
    group.add_argument(
        "--attempts", type=positive, default=100, metavar="N", help="crops drawn; default 100"
    )


def _add_features(group) -> None:
    group.add_argument(
        "--model-id",
        default=MODEL,
        metavar="SPEC",
        help=f"a model of transformers, a folder, or KIND:NAME; default {MODEL}",
    )
    add_weights(group)
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of --weights random")
    group.add_argument(
        "--size",
        type=positive,
        metavar="PIXELS",
        help="slices are fed to the model at this size; default a raw crop's own",
    )
    group.add_argument(
        "--orientations", default="xy,xz,yz", metavar="LIST", help="default xy,xz,yz"
    )
    group.add_argument(
        "--upsample",
        choices=("bilinear", "nearest"),
        default="bilinear",
        help="from tokens to voxels; default bilinear",
    )
    group.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="default float16"
    )
    add_runtime(group)
    add_numbers(group)


def _add_files(group) -> None:
    group.add_argument(
        "--chunks",
        type=_sizes,
        default=(256, 64, 64, 64),
        metavar="C,D,H,W",
        help="default 256,64,64,64",
    )
    group.add_argument(
        "--shards", type=_sizes, metavar="C,D,H,W", help="zarr v3, with shards of so many voxels"
    )
    group.add_argument(
        "--compression",
        action="store_true",
        help="blosc, lz4 level 3, bit-shuffled; smaller, but slower to write and to read",
    )
    group.add_argument(
        "--layout",
        choices=("files", "ome-zarr"),
        default="files",
        help="files: an array each for features, gt and mask (default); ome-zarr: one image with "
        "labels",
    )
    group.add_argument(
        "--num-threads",
        type=positive,
        default=8,
        metavar="N",
        help="that read, and that compute and write chunks, each with one in memory; default 8",
    )


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"must look like 256,64,64,64; got {text}")
    return sizes


def run(arguments: argparse.Namespace) -> int:
    from ...engines import load_engine
    from ...volumes import (
        Form,
        Sampling,
        Stores,
        TriPlane,
        VolumeFiles,
        VolumeMetadata,
        Volumes,
    )

    if (arguments.data_root is None) == (arguments.datasets is None):
        raise UsageError("name the data by --data-root or by --datasets")
    if arguments.datasets and (arguments.inference_filter or arguments.crop_filter):
        raise UsageError("--inference-filter and --crop-filter choose from a --data-root")
    try:
        recipe = TriPlane(
            tuple(arguments.orientations.split(",")), arguments.upsample, arguments.dtype
        )
        form = Form(arguments.chunks, arguments.shards, arguments.compression, arguments.layout)
        sampling = Sampling(
            organelles=tuple(arguments.organelles),
            base_resolution=arguments.base_resolution,
            min_resolution_for_raw=arguments.min_resolution_for_raw,
            output_image_dim=arguments.output_image_dim,
            min_label_fraction=arguments.min_label_fraction,
            min_unique_ids=arguments.min_unique_ids,
            min_ground_truth_fraction=arguments.min_ground_truth_fraction,
            gt_extension=arguments.gt_extension,
            augment=arguments.augment,
            attempts=arguments.attempts,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    chosen = arguments.volume_index
    common = {"sampling": sampling, "stores": Stores(arguments.num_threads)}
    if arguments.datasets:
        source = Volumes.from_yaml(arguments.datasets, chosen, **common)
    else:
        source = Volumes.from_cellmap(
            arguments.data_root,
            chosen,
            crops=arguments.crop_filter,
            inference=arguments.inference_filter,
            **common,
        )
    engine = load_engine(
        model_spec(arguments.model_id),
        weights=arguments.weights,
        runtime=arguments.runtime,
        output="map",
        size=arguments.size or sampling.raw_dim,
        precision=arguments.precision,
        batch_size=arguments.batch_size,
        device=arguments.device,
        seed=arguments.seed,
    )
    print(f"{engine}\n{source}: {source.count()} volumes -> {arguments.output_dir}",
          file=sys.stderr)  # fmt: skip
    sink = VolumeFiles(
        arguments.output_dir,
        form,
        configuration={
            "model_id": arguments.model_id,
            "weights_id": engine.weights_id,
            "precision": engine.precision,
            **{k: v for k, v in sampling.settings().items() if k != "organelles"},
            "organelles": arguments.organelles,
            **recipe.settings(),
            "model_input_size": engine.contract.size,
        },
        voxel=arguments.base_resolution,
        threads=min(arguments.num_threads, os.cpu_count() or 1),
    )
    arguments.shard, arguments.limit = (0, 1), None
    # One volume at a time: two would take the memory of two.
    arguments.workers = arguments.workers or 1
    name = f"volume_{format_indices(chosen)}" if len(chosen) > 1 else f"volume_{chosen[0]:06d}"
    return run_extraction(arguments, source, recipe, engine, sink, VolumeMetadata(sink), name=name)


def model_spec(name: str) -> str:
    """``facebook/..`` is transformers'; a folder and KIND:NAME are what they are."""
    return name if ":" in name or Path(name).is_dir() else f"transformers:{name}"
