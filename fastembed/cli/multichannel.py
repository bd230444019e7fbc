"""``fastembed multichannel``: N-channel microscopy tensors to DINO embeddings."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..ops import Percentile, ZScore
from ..ops.crops import CROP_MODES, POOL_MODES
from .options import (
    SPECS,
    Formatter,
    UsageError,
    add_channels,
    add_database,
    add_numbers,
    add_run,
    add_runtime,
    add_weights,
    channels,
    database_of,
    positive,
    remove_other_formats,
    run_extraction,
    shard,
)


def add(commands) -> None:
    parser = commands.add_parser(
        "multichannel",
        help="N-channel microscopy tensors to DINO embeddings",
        formatter_class=Formatter,
        description=(
            "Embeds N-channel .npy tensors [C, H, W] that a PostgreSQL table or a CSV file\n"
            "lists: 8-bit quantisation, several crops, a DINOv2/v3 model, pooling over the\n"
            "crops. Leaves one .npy per sample and one row (embedding_path, text_id).\n"
            "Run the same command again to go on after any stop; done samples are skipped."
        ),
        epilog=(
            "examples:\n"
            "  fastembed multichannel --manifest tensors.csv --output-dir out \\\n"
            "      --model dinov3:vitl16 --weights dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth\n"
            "  fastembed multichannel --db postgresql://me@host/cpjump1 --output-dir out \\\n"
            "      --quant-method global --global-mean stats.json --global-std stats.json \\\n"
            "      --config-file cpjump1_vitl16.yaml --pretrained-weights teacher.pth\n"
            "\n"
            "exit status: 0 done; 1 stopped; 2 wrong options; 3 done, but samples failed\n"
            "(failures.jsonl in the output folder says which and why)."
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--output-dir",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder for emb_<sha1>.npy, settings and failures",
    )
    parser.add_argument(
        "--format",
        choices=("npy", "zarr"),
        default="npy",
        help="npy: a file per sample (default); zarr: embeddings.zarr and index.parquet, for "
        "millions of samples; a database is then only read",
    )

    group = parser.add_argument_group(
        "samples",
        "From --manifest, or from the table cpjump1_dinov3_tensors(tensor_path, text_id). The\n"
        "index is the database if one is named, else image_embeddings.tsv in the output folder.\n"
        "With neither option a PostgreSQL of our own starts in DIR_postgres.",
    )
    group.add_argument(
        "--manifest",
        type=Path,
        metavar="CSV",
        help="CSV with columns tensor_path and text_id; no database needed",
    )
    add_database(group)
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N rows")
    group.add_argument(
        "--shard",
        type=shard,
        default=(0, 1),
        metavar="I/N",
        help="only part I (from 0) of N; the parts together give the same bytes as one run",
    )

    group = parser.add_argument_group("quantisation to 8 bits")
    group.add_argument(
        "--channels",
        type=channels,
        default=(0, 1, 2, 3, 4),
        metavar="LIST",
        help="channels of the tensors, such as 0-4 or 0,2,5; default 0-4",
    )
    group.add_argument(
        "--quant-method",
        choices=("cellclip", "global"),
        default="cellclip",
        help="cellclip: clip each channel at two of its percentiles (default); "
        "global: z-score with given mean and std",
    )
    group.add_argument(
        "--cellclip-low", type=float, default=1.0, metavar="PERCENT", help="default 1.0"
    )
    group.add_argument(
        "--cellclip-high", type=float, default=99.0, metavar="PERCENT", help="default 99.0"
    )
    group.add_argument(
        "--global-mean",
        metavar="LIST|JSON",
        help="one value per channel: comma-separated, or a JSON file with a list or a key 'mean'",
    )
    group.add_argument("--global-std", metavar="LIST|JSON", help="likewise, key 'std'")
    group.add_argument(
        "--global-clamp-z",
        type=float,
        default=3.0,
        metavar="Z",
        help="clip at ±Z standard deviations; default 3.0",
    )

    group = parser.add_argument_group("crops")
    group.add_argument(
        "--img-size",
        type=positive,
        default=224,
        metavar="PIXELS",
        help="side of a crop and of the model's input; default 224",
    )
    group.add_argument(
        "--n-crops",
        type=positive,
        metavar="N",
        help="crops per sample; default 4, or 1 with --crops center",
    )
    group.add_argument(
        "--crops",
        choices=CROP_MODES,
        default="random",
        help="random: seeded per sample (default); grid; center",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    group.add_argument(
        "--aggregation",
        choices=POOL_MODES,
        default="avg",
        help="pooling over the crops; default avg",
    )

    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="KIND:NAME",
        help=f"{SPECS}; or a folder that `fastembed export` made",
    )
    group.add_argument(
        "--config-file", metavar="YAML", help="DINO training configuration, instead of --model"
    )
    add_weights(group)
    add_channels(group, normalize_default=None)
    group.add_argument(
        "--output",
        choices=("cls", "pooled"),
        default="cls",
        help="cls: class token after the final norm (default); pooled: the model's own embedding",
    )
    add_runtime(group)
    add_numbers(group)
    add_run(parser)


def run(arguments: argparse.Namespace) -> int:
    from ..caches import holds_store
    from ..engines import load_engine
    from ..indexes import Postgres, Tsv
    from ..recipes import MultiCrop
    from ..sinks import NpyPerSample
    from ..sources import TensorCsv, TensorPostgres

    if (arguments.model is None) == (arguments.config_file is None):
        raise UsageError("give either --model or --config-file")
    if arguments.overwrite and arguments.shard[1] > 1:
        raise UsageError("--overwrite removes the outputs of all shards: run it without --shard")
    center = arguments.crops == "center"
    try:
        recipe = MultiCrop(
            quantize=_quantisation(arguments),
            channels=arguments.channels,
            n_crops=arguments.n_crops or (1 if center else 4),
            crops=arguments.crops,
            seed=arguments.seed,
            pool=arguments.aggregation,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error

    database = database_of(arguments)
    source = TensorCsv(arguments.manifest) if arguments.manifest else TensorPostgres(database)
    output = arguments.output_dir
    forms = {
        "npy": (
            NpyPerSample(output),
            Tsv(output) if database is None else Postgres(database, output),
        )
    }
    if arguments.format == "zarr" or (arguments.overwrite and holds_store(output)):
        from ..store import Parquet, Zarr

        store = Zarr(output)
        forms["zarr"] = store, Parquet(store)
    sink, index = forms.pop(arguments.format)
    rows = source.count()  # before the model: a database that is down shows at once
    if rows == 0:
        raise ValueError(f"{source} lists no samples")

    engine = load_engine(
        arguments.model or f"dinov3:{arguments.config_file}",
        weights=arguments.weights,
        runtime=arguments.runtime,
        output=arguments.output,
        precision=arguments.precision,
        size=arguments.img_size,
        channels=len(arguments.channels),
        channel_mode=arguments.channel_mode,
        channel_pool=arguments.channel_pool,
        normalize=arguments.normalize or ("none" if arguments.config_file else "model"),
        batch_size=arguments.batch_size,
        device=arguments.device,
    )
    print(f"{engine}\n{source}: {rows} rows -> {output}", file=sys.stderr)
    if arguments.overwrite:
        remove_other_formats(forms.values())
    return run_extraction(arguments, source, recipe, engine, sink, index)


def _quantisation(arguments: argparse.Namespace) -> Percentile | ZScore:
    if arguments.quant_method == "cellclip":
        return Percentile(arguments.cellclip_low, arguments.cellclip_high)
    if not (arguments.global_mean and arguments.global_std):
        raise ValueError("--quant-method global needs --global-mean and --global-std")
    return ZScore(
        _numbers(arguments.global_mean, "mean"),
        _numbers(arguments.global_std, "std"),
        arguments.global_clamp_z,
    )


def _numbers(text: str, key: str) -> tuple[float, ...]:
    """A comma-separated list, or a JSON file that holds a list, alone or under `key`."""
    try:
        if Path(text).is_file():
            values = json.loads(Path(text).read_text())
            values = values[key] if isinstance(values, dict) else values
        else:
            values = text.split(",")
        return tuple(float(value) for value in values)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"--global-{key} must be comma-separated numbers or a JSON file with a list or a "
            f"key {key!r}; got {text!r}"
        ) from error
