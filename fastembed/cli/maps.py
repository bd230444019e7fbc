"""``fastembed maps``: a folder of images to spatial feature maps of CLIP or DINO."""

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
    run_extraction,
    shard,
)


def add(commands) -> None:
    parser = commands.add_parser(
        "maps",
        help="images to spatial CLIP or DINO feature maps",
        formatter_class=Formatter,
        description=(
            "Encodes every image of a folder as a map of its patches' features, with the mask of\n"
            "its alpha channel. Run the same command again to go on after any stop."
        ),
        epilog=(
            "output, for photo.jpg:\n"
            "  photo.npy         the map, [D, g, g]: (1024, 16, 16) for ViT-L/14 at 224\n"
            "  photo_layer3.npy  with --layers 3, in the same pass\n"
            "  photo_mask.npy    uint8 [g, g]: 1 where any pixel of the patch has alpha > 0\n"
            "  photo.json        with --save_meta: sizes, shapes, model, preprocessing\n"
            "  maps.tsv          which images are done\n"
            "Of images that would share a file (a.jpg and a.png, a.png and a_mask.png) the first\n"
            "keeps its name; the others get their extension in it (a_png), and the run says so.\n"
            "\n"
            "examples:\n"
            "  fastembed maps --model ViT-L/14 --input images --output clip_features\n"
            "  fastembed maps --model facebook/dinov2-large --input images --recursive \\\n"
            "      --output dino_features --layers 11,17 --fp16 --save_meta\n"
            "\n"
            "exit status: 0 done; 1 stopped; 2 wrong options; 3 done, but images failed\n"
            "(failures.jsonl in the output says which and why)."
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--input",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder of images: png jpg jpeg webp bmp tif tiff, of 8 or 16 bits per channel",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder for maps, masks, index, settings and failures, of one --input",
    )
    parser.add_argument(
        *both("--save_meta"), action="store_true", help="write a JSON file beside each map"
    )

    group = parser.add_argument_group("images")
    group.add_argument(
        "--recursive", action="store_true", help="sub-folders too; the output has the same ones"
    )
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N images")
    group.add_argument(
        "--shard",
        type=shard,
        default=(0, 1),
        metavar="I/N",
        help="only part I (from 0) of N; the parts together give the same bytes as one run",
    )
    group.add_argument(
        "--resize",
        choices=("center-crop", "squash", "letterbox"),
        default="center-crop",
        help="how an image meets the square input. center-crop (default): shorter side to --size, "
        "then the centre; squash: all of it, out of shape; letterbox: all of it, on black that is "
        "masked out",
    )

    group = parser.add_argument_group("model and maps")
    group.add_argument(
        "--model",
        default="ViT-L/14",
        metavar="NAME",
        help="ViT-L/14 (default), ViT-L/14@336px, ViT-B/16, ViT-B/32: OpenAI's CLIP; "
        "facebook/dinov2-*, facebook/dinov3-*; or any KIND:NAME, such as timm:NAME; or a folder "
        "that `fastembed export` made with --output map",
    )
    add_weights(group)
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of --weights random; default 0"
    )
    group.add_argument(
        "--size",
        type=positive,
        metavar="PIXELS",
        help="side of the model's input, a multiple of its patches; default the model's own, 224 "
        "for most. Another size gives another grid: the positions are resampled",
    )
    group.add_argument(
        "--layers",
        type=_layers,
        default=(),
        metavar="LIST",
        help="beside the final map those after these blocks, without a norm: 0 is the first, -1 "
        "the last; -1 stands in the file's name as it is given",
    )
    group.add_argument(
        *both("--spatial_mode"),
        choices=("last", "processed"),
        default="last",
        help="last (default): CLIP's tokens before the final norm, DINO's after it; processed: "
        "CLIP's normed, projected into the space of its embeddings, of unit length",
    )
    group.add_argument(
        "--upsample",
        type=positive,
        default=1,
        metavar="FACTOR",
        help="enlarge the maps bilinearly, the mask with them; default 1",
    )
    group.add_argument("--fp16", action="store_true", help="store maps as float16, not float32")
    add_runtime(group)
    add_numbers(group)
    add_run(parser, both("--batch_size"), (*both("--num_workers"), "--workers"))


def run(arguments: argparse.Namespace) -> int:
    from ..engines import load_engine
    from ..indexes import MapTsv
    from ..recipes import SpatialMaps
    from ..sinks import MapFiles
    from ..sources import ImageFolder

    if arguments.overwrite and arguments.shard[1] > 1:
        raise UsageError("--overwrite removes the outputs of all shards: run it without --shard")
    spec = spec_of(arguments.model)
    recipe = SpatialMaps(
        arguments.resize, arguments.upsample, "float16" if arguments.fp16 else "float32"
    )
    # Before the model: a path that is wrong shows at once.
    source = ImageFolder(arguments.input, recursive=arguments.recursive)
    _tell(source)
    if source.count() == 0:
        raise ValueError(f"{source} has no images; see --recursive for its sub-folders")
    engine = load_engine(
        spec,
        weights=arguments.weights,
        runtime=arguments.runtime,
        output=[
            "map" if arguments.spatial_mode == "last" else "processed",
            *(f"map@{block}" for block in arguments.layers),
        ],
        size=arguments.size,
        precision=arguments.precision,
        batch_size=arguments.batch_size,
        device=arguments.device,
        seed=arguments.seed,
    )
    meta = {"model": engine.spec, **engine.facts, "precision": engine.precision}
    sink = MapFiles(arguments.output, engine.outputs, meta if arguments.save_meta else None)
    print(f"{engine}\n{source}: {source.count()} images -> {arguments.output}", file=sys.stderr)
    return run_extraction(
        arguments, source, recipe, engine, sink, MapTsv(arguments.output, source.paths)
    )


def spec_of(model: str) -> str:
    """KIND:NAME of a name as the CLIP and DINO scripts have it; others as they are.

    Raises UsageError naming those that there are.
    """
    from ..engines.models.huggingface import KNOWN
    from ..engines.models.openclip import OPENAI

    if model in OPENAI:
        return f"openai:{model}"
    if model.startswith(("facebook/dinov2-", "facebook/dinov3-")):
        return f"transformers:{model}"
    if ":" in model or Path(model).is_dir():
        return model
    names = [*OPENAI, *(name for name in KNOWN if name.startswith("facebook/"))]
    raise UsageError(
        f"--model must be KIND:NAME, a folder, or one of {', '.join(names)}; got {model!r}"
    )


def _tell(source) -> None:
    """What of the folder is not as its names say."""
    lines = [
        f"{source.paths[name]} -> {name}.npy; its own name is taken" for name in source.renamed
    ]
    if len(lines) > 10:
        lines[10:] = [f".. and {len(lines) - 10} more images whose name is taken"]
    if source.other_files:
        lines.append(f"{source.other_files} files of another kind are left alone")
    if source.linked_folders:
        lines.append(
            f"{len(source.linked_folders)} linked folders are not entered: "
            + ", ".join(source.linked_folders[:3])
        )
    for line in lines:
        print(f"fastembed: {line}", file=sys.stderr)


def _layers(text: str) -> tuple[int, ...]:
    try:
        layers = tuple(int(part) for part in text.split(","))
    except ValueError:
        layers = ()
    if not layers or len(set(layers)) != len(layers):
        raise argparse.ArgumentTypeError(f"must look like 3,7,-1, each once; got {text}")
    return layers
