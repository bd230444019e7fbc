"""What several steps of the study share: options, and the nouns that they mean."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..options import UsageError, positive


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder that `fastembed cellpose prepare` made: train_cells, val_cells, test_cells",
    )


def add_output(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--output-dir", type=Path, required=True, metavar="DIR", help=f"the study's folder: {what}"
    )


def add_naming(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--markers",
        type=names,
        metavar="LIST",
        help="markers, by commas: folders or words of a file's name; "
        "default gfap,iba1,neun,olig2,pecam",
    )
    parser.add_argument(
        "--donor-pattern",
        metavar="REGEX",
        help="its first match in a path is the donor; default 6 to 12 digits",
    )


def naming_of(arguments: argparse.Namespace):
    from ...cellpose.tiles import Naming

    default = Naming()
    return Naming(arguments.markers or default.markers, arguments.donor_pattern or default.donor)


def add_network(parser: argparse.ArgumentParser, precision: str = "bf16") -> None:
    group = parser.add_argument_group("network")
    group.add_argument(
        "--model",
        default="cpsam",
        metavar="NAME|FILE",
        help="cpsam (fetched once by cellpose), a file that training left, or random, "
        "random:2x64 for plumbing only; default cpsam",
    )
    group.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        default=precision,
        help=f"default {precision}",
    )
    group.add_argument("--device", metavar="DEVICE", help="cuda if there is one, else cpu")
    group.add_argument(
        "--zero-dapi", action="store_true", help="set channel 0 to 0: what the marker alone gives"
    )


def network_of(arguments: argparse.Namespace):
    from ...cellpose.network import load_network

    network = load_network(arguments.model, device=arguments.device, precision=arguments.precision)
    if network.device.type == "cpu":
        print("no GPU: the network runs on the CPU", file=sys.stderr)
    return network


def pretrained_of(arguments: argparse.Namespace):
    from ...cellpose.network import Pretrained

    return Pretrained(arguments.model, arguments.device, arguments.precision)


def add_predictor(parser: argparse.ArgumentParser, cached: bool) -> None:
    """`add_network`, and where its flows are kept."""
    add_network(parser)
    group = parser.add_argument_group("flows")
    group.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder that keeps flows, float16, for every other step with this network"
        + ("; default cache/NAME in the output folder" if cached else "; default none"),
    )
    group.add_argument(
        "--cache-dtype",
        choices=("float16", "float32"),
        default="float16",
        help="float32: masks are exactly cellpose's; default float16",
    )
    group.add_argument(
        "--name", metavar="NAME", help="the model's name in file names; default that of its file"
    )


def predictor_of(arguments: argparse.Namespace, cached: bool):
    from ...cellpose.evaluate import Predictor

    cache = arguments.cache
    if cache is None and cached:
        suffix = "_zero_dapi" if arguments.zero_dapi else ""
        cache = arguments.output_dir / "cache" / (name_of(arguments) + suffix)
    return Predictor(
        network_of(arguments),
        cache,
        cache_dtype=arguments.cache_dtype,
        zero_dapi=arguments.zero_dapi,
        announce=_announce,
    )


def name_of(arguments: argparse.Namespace) -> str:
    name = arguments.name or Path(arguments.model).name.replace(":", "_")
    if "/" in name or name.startswith("."):
        raise UsageError(f"--name must be a plain name; got {name!r}")
    return name


def add_split(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--split", choices=("train", "val", "test"), default=default, help=f"default {default}"
    )
    add_marker_choice(parser)


def add_marker_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--include-markers", type=names, metavar="LIST", help="only these markers, by commas"
    )
    parser.add_argument(
        "--exclude-markers", type=names, default=(), metavar="LIST", help="not these markers"
    )


def examples_of(arguments: argparse.Namespace, split: str):
    from ...cellpose.dataset import list_examples

    return list_examples(
        arguments.data, split, arguments.include_markers, arguments.exclude_markers
    )


def add_thresholds(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("masks")
    group.add_argument(
        "--flow-threshold", type=float, default=0.4, metavar="T",
        help="masks with a larger flow error are dropped; 0 keeps all; default 0.4",
    )  # fmt: skip
    group.add_argument(
        "--cellprob-threshold", type=float, default=0.0, metavar="T",
        help="pixels above it belong to cells; default 0",
    )  # fmt: skip
    group.add_argument(
        "--min-size", type=int, default=15, metavar="PIXELS",
        help="smaller masks are dropped; default 15",
    )  # fmt: skip


def thresholds_of(arguments: argparse.Namespace):
    from ...cellpose.evaluate import Thresholds

    return Thresholds(arguments.flow_threshold, arguments.cellprob_threshold, arguments.min_size)


def add_training(
    parser: argparse.ArgumentParser, *, epochs: int, epoch_images: int | None = None,
    test_images: int | None = None,
) -> None:  # fmt: skip
    group = parser.add_argument_group("training")
    group.add_argument(
        "--epochs", type=positive, default=epochs, metavar="N", help=f"default {epochs}"
    )
    group.add_argument("--lr", type=float, default=1e-4, metavar="RATE", help="default 1e-4")
    group.add_argument("--weight-decay", type=float, default=0.1, metavar="W", help="default 0.1")
    group.add_argument(
        "--batch-size", "--batch", type=positive, default=2, metavar="N", help="default 2"
    )
    for name, default in (("nimg-per-epoch", epoch_images), ("nimg-test-per-epoch", test_images)):
        group.add_argument(
            f"--{name}", type=positive, default=default, metavar="N",
            help=f"images drawn per epoch; default {default or 'each once'}",
        )  # fmt: skip
    group.add_argument(
        "--min-train-masks", type=int, default=5, metavar="N",
        help="training images with fewer objects are left out, and named; default 5",
    )  # fmt: skip
    group.add_argument(
        "--scale-range", type=float, default=0.5, metavar="S",
        help="augmentation resizes by 1 - S/2 to 1 + S/2; cellpose always rotates, flips and "
        "crops too; default 0.5",
    )  # fmt: skip
    group.add_argument(
        "--rescale", action="store_true", help="resize images to one mean diameter first"
    )
    group.add_argument("--seed", type=int, default=2024, metavar="N", help="default 2024")
    group.add_argument(
        "--checkpoint-every", type=positive, default=10, metavar="N",
        help="epochs between checkpoints to resume from; default 10",
    )  # fmt: skip


def training_of(arguments: argparse.Namespace):
    from ...cellpose.train import TrainSettings

    try:
        return TrainSettings(
            epochs=arguments.epochs,
            learning_rate=arguments.lr,
            weight_decay=arguments.weight_decay,
            batch_size=arguments.batch_size,
            nimg_per_epoch=arguments.nimg_per_epoch,
            nimg_test_per_epoch=arguments.nimg_test_per_epoch,
            min_train_masks=arguments.min_train_masks,
            scale_range=arguments.scale_range,
            rescale=arguments.rescale,
            seed=arguments.seed,
            zero_dapi=arguments.zero_dapi,
            checkpoint_every=arguments.checkpoint_every,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def show_epoch(epoch) -> None:
    test = "" if epoch.test_loss is None else f", test {epoch.test_loss:.4f}"
    print(f"epoch {epoch.epoch}: loss {epoch.train_loss:.4f}{test}", file=sys.stderr, flush=True)


def show_metrics(name: str, metrics: dict) -> None:
    """The table of a ``metrics.json``: overall, then each marker."""
    print(f"{name:>12}    ap50    ap75    ap90       P       R      F1  images")
    for group, row in metrics.items():
        if isinstance(row, dict) and "ap50" in row:
            numbers = [row[key] for key in ("ap50", "ap75", "ap90", "precision", "recall", "f1")]
            print(f"{group:>12}" + "".join(f"{n:8.4f}" for n in numbers) + f"{row['n_images']:8d}")
    if metrics["both_empty"]:
        print(f"both masks empty, counted as perfect: {', '.join(metrics['both_empty'])}")


def names(text: str) -> tuple[str, ...]:
    found = tuple(name.strip().lower() for name in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"must look like gfap,iba1; got {text!r}")
    return found


def numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must look like 0.2,0.4; got {text!r}") from None


def _announce(seconds: float, count: int) -> None:
    left = seconds * (count - 1)
    print(
        f"the first image took {seconds:.1f} s on the CPU: about {left / 60:.1f} min for the other "
        f"{count - 1}",
        file=sys.stderr,
    )
