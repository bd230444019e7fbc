"""``fastembed cellpose predict``: masks of any images."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..options import Formatter
from .options import add_predictor, add_thresholds, predictor_of, thresholds_of


def add(steps) -> None:
    parser = steps.add_parser(
        "predict",
        help="masks of images, annotated or not",
        formatter_class=Formatter,
        description=(
            "Segments the images [H, W, 3] of a folder into STEM_pred.tif: uint16, or uint32\n"
            "above 65535 objects. Masks that are there already stay; a folder with those of\n"
            "another model or other thresholds is refused."
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    add_predictor(parser, cached=False)
    add_thresholds(parser)


def run(arguments: argparse.Namespace) -> int:
    from ...cellpose.dataset import list_images
    from ...cellpose.evaluate import predict

    images = list_images(arguments.images)
    if not images:
        raise FileNotFoundError(f"--images: no TIFF, PNG or .npy in {arguments.images}")
    predictor = predictor_of(arguments, cached=False)
    done = predict(predictor, images, thresholds_of(arguments), arguments.output_dir)
    print(
        f"{done} of {len(images)} images segmented, the others were there: {arguments.output_dir}"
    )
    return 0
