"""``fastembed panoptic``: the segments of COCO panoptic photos to SigLIP embeddings."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .options import (
    Formatter,
    UsageError,
    add_numbers,
    add_run,
    add_runtime,
    add_weights,
    both,
    positive,
    remove_other_formats,
    run_extraction,
    shard,
)


def add(commands) -> None:
    parser = commands.add_parser(
        "panoptic",
        help="COCO panoptic segments to SigLIP embeddings",
        formatter_class=Formatter,
        description=(
            "Embeds every segment of a panoptic data set of COCO's format: cut out of its photo,\n"
            "the background faded to grey, through SigLIP (or any image model), to unit length,\n"
            "as float16. Run the same command again to go on after any stop."
        ),
        epilog=(
            "examples:\n"
            "  fastembed panoptic --data_path coco --cache_dir cache/vis_embed --device cuda\n"
            "  fastembed panoptic --data_path coco --split val2017 --classes person,17 \\\n"
            "      --min-area 100 --format npz --cache_dir people\n"
            "\n"
            "exit status: 0 done; 1 stopped; 2 wrong options; 3 done, but photos failed\n"
            "(failures.jsonl in the cache says which and why)."
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        *both("--data_path"),
        required=True,
        type=Path,
        metavar="DIR",
        help="COCO's folder: SPLIT/, and panoptic_SPLIT/ and panoptic_SPLIT.json there or in "
        "annotations/",
    )
    parser.add_argument(
        *both("--cache_dir"),
        type=Path,
        default=Path("cache/vis_embed"),
        metavar="DIR",
        help="folder for embeddings, index, settings and failures; default cache/vis_embed",
    )
    parser.add_argument(
        "--format",
        choices=("npy", "npz", "zarr"),
        default="npy",
        help="npy: a file per segment and inst2feat.tsv (default); npz: a file per photo and "
        "image_index.tsv; zarr: embeddings.zarr and index.parquet, for millions of segments",
    )

    group = parser.add_argument_group("segments")
    group.add_argument("--split", default="train2017", help="default train2017")
    group.add_argument(
        "--classes",
        type=names,
        default=(),
        metavar="LIST",
        help="only these categories, ids or names, by commas",
    )
    group.add_argument(
        *both("--min_area"),
        type=int,
        default=0,
        metavar="PIXELS",
        help="only segments whose listed area is at least this",
    )
    group.add_argument(
        *both("--include_crowd"), action="store_true", help="also segments marked as crowds"
    )
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N photos")
    group.add_argument(
        "--shard",
        type=shard,
        default=(0, 1),
        metavar="I/N",
        help="only part I (from 0) of N; the parts together give the same bytes as one run",
    )
    group.add_argument(
        *both("--bg_alpha"),
        type=float,
        default=0.3,
        metavar="A",
        help="what remains of the background, 0 to 1; default 0.3",
    )
    group.add_argument(
        *both("--pad_ratio"),
        type=float,
        default=0.1,
        metavar="R",
        help="growth of a segment's box per side, in its extents; default 0.1",
    )

    group = parser.add_argument_group("model")
    group.add_argument(
        *both("--embedder_spec"),
        default="openclip:timm/ViT-B-16-SigLIP",
        metavar="KIND:NAME",
        help="openclip:NAME, openai:NAME, transformers:ID or folder, ..; or a folder that "
        "`fastembed export` made with --output pooled; default openclip:timm/ViT-B-16-SigLIP",
    )
    add_weights(group)
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of --weights random; default 0"
    )
    add_runtime(group)
    add_numbers(group)
    add_run(parser, both("--batch_size"), (*both("--num_workers"), "--workers"))


def run(arguments: argparse.Namespace) -> int:
    from ..caches import holds_store
    from ..engines import load_engine
    from ..indexes import ImageTsv, SegmentTsv
    from ..recipes import SegmentCrops
    from ..sinks import NpyPerPart, NpzPerSample
    from ..sources import CocoPanoptic

    if arguments.overwrite and arguments.shard[1] > 1:
        raise UsageError("--overwrite removes the outputs of all shards: run it without --shard")
    try:
        recipe = SegmentCrops(arguments.bg_alpha, arguments.pad_ratio)
    except ValueError as error:
        raise UsageError(str(error)) from error
    source = CocoPanoptic(  # before the model: a path that is wrong shows at once
        arguments.data_path,
        arguments.split,
        classes=arguments.classes,
        min_area=arguments.min_area,
        include_crowd=arguments.include_crowd,
    )
    if source.count() == 0:
        raise ValueError(f"{source} lists no such segments")
    output = arguments.cache_dir
    forms = {
        "npy": (NpyPerPart(output), SegmentTsv(output)),
        "npz": (NpzPerSample(output), ImageTsv(output)),
    }
    if arguments.format == "zarr" or (arguments.overwrite and holds_store(output)):
        from ..store import SegmentParquet, Zarr

        store = Zarr(output)
        forms["zarr"] = store, SegmentParquet(store)
    sink, index = forms.pop(arguments.format)

    engine = load_engine(
        arguments.embedder_spec,
        weights=arguments.weights,
        runtime=arguments.runtime,
        output="pooled",
        precision=arguments.precision,
        batch_size=arguments.batch_size,
        device=arguments.device,
        seed=arguments.seed,
    )
    print(f"{engine}\n{source}: {source.count()} photos -> {output}", file=sys.stderr)
    if arguments.overwrite:
        remove_other_formats(forms.values())
    return run_extraction(arguments, source, recipe, engine, sink, index)


def names(text: str) -> tuple[str, ...]:
    """'person,17' as names."""
    found = tuple(name.strip() for name in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"must look like person,17; got {text!r}")
    return found
