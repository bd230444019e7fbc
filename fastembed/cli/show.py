"""``fastembed show``: a look at a cache, as a contact sheet."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Formatter, UsageError, both, positive

# Options that make sense for one kind of cache only, by the names argparse gives them.
_OF_MAPS = ("images", "layer", "per_image", "foreground", "smooth", "resize")
_OF_PANOPTIC = ("data_path", "split", "like", "k")


def add(commands) -> None:
    parser = commands.add_parser(
        "show",
        help="a contact sheet of feature maps, or of a panoptic cache",
        formatter_class=Formatter,
        description=(
            "Draws what an extraction left, as PNG.\n"
            "Feature maps: each photo, its patch features as colours (their three principal\n"
            "components, fitted over all images of the sheet) and its mask.\n"
            "A panoptic cache: segments, each beside those most like it."
        ),
        epilog=(
            "examples:\n"
            "  fastembed show features\n"
            "  fastembed show features --images photos --foreground --smooth --limit 60\n"
            "  fastembed show cache/vis_embed --data_path coco --split val2017\n"
            "  fastembed show cache/vis_embed --data_path coco --like 000000142238 3937500\n"
            "\n"
            "A sheet of more than 4000 pixels goes on in sheet-2.png, sheet-3.png, .."
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument("folder", type=Path, metavar="DIR", help="feature maps, or a cache")
    parser.add_argument(
        "--out", type=Path, default=Path("sheet.png"), metavar="PNG", help="default sheet.png"
    )
    parser.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help="at most N images, evenly chosen; default 24. Of a panoptic cache: rows; default 8",
    )
    parser.add_argument(
        "--font", type=Path, metavar="FILE", help="of the captions; for names beyond Latin letters"
    )

    group = parser.add_argument_group("feature maps")
    group.add_argument(
        "--images", type=Path, metavar="DIR", help="where the photos are now; default as recorded"
    )
    group.add_argument(
        "--layer", type=int, metavar="K", help="the maps of this layer, <name>_layer<K>.npy"
    )
    group.add_argument(
        *both("--per_image"), action="store_true", help="components of each image by itself"
    )
    group.add_argument(
        "--foreground",
        action="store_true",
        help="only the patches of the foreground: those on the side of the first component that "
        "has less of the images' borders",
    )
    group.add_argument(
        "--smooth", action="store_true", help="interpolate between patches; default squares"
    )
    group.add_argument(
        "--resize",
        choices=("squash", "center-crop", "letterbox"),
        help="how the photos were fitted; default as recorded, else center-crop",
    )

    group = parser.add_argument_group("panoptic cache")
    group.add_argument(
        *both("--data_path"), type=Path, metavar="DIR", help="COCO's folder, for the crops"
    )
    group.add_argument("--split", help="default train2017")
    group.add_argument(
        "--like",
        nargs=2,
        action="append",
        metavar=("IMAGE_ID", "SEGMENT_ID"),
        help="show the neighbours of this segment; may be given several times",
    )
    group.add_argument("--k", type=positive, metavar="N", help="neighbours; default 8")


def run(arguments: argparse.Namespace) -> int:
    from .. import plots

    folder = arguments.folder
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if arguments.out.suffix.lower() != ".png":
        raise UsageError(f"--out must be a .png file; got {arguments.out}")
    if plots.is_panoptic_cache(folder):
        _refuse(arguments, _OF_MAPS, "feature maps")
        sheets = _neighbours(arguments)
    elif plots.holds_maps(folder):
        _refuse(arguments, _OF_PANOPTIC, "a panoptic cache")
        sheets = plots.feature_sheet(
            folder,
            limit=arguments.limit or 24,
            font=arguments.font,
            **{name: getattr(arguments, name) for name in _OF_MAPS},
        )
    else:
        raise ValueError(
            f"{folder} holds nothing that show can draw: it draws folders of feature maps "
            "(<name>.npy [C, h, w], of fastembed maps) and panoptic caches (inst2feat.tsv or "
            "image_index.tsv, of fastembed panoptic)"
        )
    for path in plots.save_pages(sheets, arguments.out):
        print(path)
    return 0


def _neighbours(arguments: argparse.Namespace):
    from .. import plots

    if arguments.data_path is None:
        raise UsageError("the sheet of a panoptic cache needs --data_path, COCO's folder")
    try:
        like = [(image, int(segment)) for image, segment in arguments.like or ()]
    except ValueError:
        raise UsageError(f"--like takes an image id and a number; got {arguments.like}") from None
    return plots.neighbour_sheet(
        arguments.folder,
        arguments.data_path,
        arguments.split or "train2017",
        like=like,
        limit=arguments.limit or 8,
        k=arguments.k or 8,
        font=arguments.font,
    )


def _refuse(arguments: argparse.Namespace, names: tuple[str, ...], kind: str) -> None:
    given = [name for name in names if getattr(arguments, name) not in (None, False)]
    if given:
        option = "--" + given[0].replace("_", "-")
        raise UsageError(f"{option} is for {kind}; {arguments.folder} is none")
