"""``fastembed export``: a model as a folder that ONNX Runtime or TensorRT runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import SPECS, Formatter, UsageError, add_channels, add_numbers, add_weights, positive


def add(commands) -> None:
    parser = commands.add_parser(
        "export",
        help="a model as a folder that ONNX Runtime or TensorRT runs",
        formatter_class=Formatter,
        description=(
            "Writes a model as an ONNX graph, with its input contract and all versions in\n"
            "fastembed.json beside it, and loads it once. With --runtime tensorrt it also builds\n"
            "the engine of this GPU; without a GPU, on another one or with another version that\n"
            "happens at the first load. The folder is a model in itself: load_engine(DIR)\n"
            "needs neither the weights nor timm or transformers."
        ),
        epilog=(
            "examples:\n"
            "  fastembed export dinov3:vitl16 --weights dinov3_vitl16_pretrain_lvd1689m.pth \\\n"
            "      --runtime onnx --out vitl16_onnx\n"
            "  fastembed export transformers:google/siglip-base-patch16-224 \\\n"
            "      --output pooled,map --runtime tensorrt --precision fp16 --out siglip_trt"
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "spec",
        metavar="KIND:NAME",
        help=SPECS,
    )
    parser.add_argument(
        "--runtime", required=True, choices=("onnx", "tensorrt"), help="what is to run the model"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder for the model; a new one, or one with the same model in it",
    )
    group = parser.add_argument_group("model")
    add_weights(group)
    group.add_argument(
        "--output",
        type=_outputs,
        default=["cls"],
        metavar="LIST",
        help="cls, pooled, tokens, map, processed, or cls@K, tokens@K, map@K after block K; "
        "several by commas, in one pass; default cls",
    )
    group.add_argument(
        "--size",
        type=_size,
        metavar="PIXELS|HxW",
        help="side of the input, or height x width, such as 448 or 224x448; by default the "
        "model's own",
    )
    group.add_argument(
        "--channels", type=positive, default=3, metavar="N", help="source channels; default 3"
    )
    add_channels(group, normalize_default="model")
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of --weights random; default 0"
    )
    group = parser.add_argument_group("numbers")
    group.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help="images per model call, unless load_engine is told another; default 16 on a CPU, "
        "128 on a GPU",
    )
    add_numbers(group)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from ..engines.load import export_engine, load_engine

    if Path(arguments.spec).is_dir():
        raise UsageError(f"{arguments.spec} is a folder; export takes a model as KIND:NAME")
    names = ("runtime", "weights", "precision", "output", "size", "channels", "channel_mode",
             "channel_pool", "normalize", "batch_size", "seed")  # fmt: skip
    options = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.runtime == "tensorrt" and not torch.cuda.is_available():
        if arguments.precision == "auto":
            raise UsageError("no CUDA device here to choose for: name --precision fp16 or bf16")
        folder = export_engine(arguments.spec, arguments.out, **options)
        print(f"{folder.description.spec}, {folder.description.precision} for tensorrt")
        _show(folder.description.outputs, arguments.out)
        print("no CUDA device here: the engine is built at the first load on one")
        return 0
    engine = load_engine(arguments.spec, **options, device=arguments.device, folder=arguments.out)
    print(engine)
    _show(engine.outputs, arguments.out)
    return 0


def _show(outputs: dict[str, tuple[int, ...]], folder: Path) -> None:
    for name, shape in outputs.items():
        print(f"  {name}: {' x '.join(map(str, shape))} float32 per image")
    print(f"{folder}:")
    for file in sorted(folder.iterdir()):
        print(f"  {file.stat().st_size / 1e6:10.2f} MB  {file.name}")


def _outputs(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _size(text: str) -> int | tuple[int, int]:
    """'448' or '224x448' (height x width)."""
    try:
        sides = [int(side) for side in text.lower().split("x")]
    except ValueError:
        sides = []
    if not 1 <= len(sides) <= 2 or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"must look like 448 or 224x448; got {text}")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])
