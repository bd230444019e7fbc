"""The command line: each command parses, builds the nouns of the Python API and calls it."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from .database import DEFAULT_DATABASE, DatabaseError, DBConfig, embedded
from .ops import Percentile, ZScore
from .ops.crops import CROP_MODES, POOL_MODES

EXIT_ERROR, EXIT_USAGE, EXIT_FAILURES = 1, 2, 3


class Terminated(BaseException):
    """SIGTERM arrived."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status.

    0: all done. 1: the run stopped (database, disk, model). 2: the options make no sense.
    3: done, but samples failed (see failures.jsonl). 130, 143: interrupted, terminated.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    warnings.showwarning = _show_warning
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return arguments.run(arguments)
    except UsageError as error:
        return _complain(error, EXIT_USAGE)
    except (DatabaseError, OSError, ImportError, ValueError, RuntimeError) as error:
        return _complain(error, EXIT_ERROR)
    except KeyboardInterrupt:
        return _complain(_INTERRUPTED, 130)
    except Terminated:
        return _complain(_INTERRUPTED, 143)


_INTERRUPTED = "interrupted; what is committed stays: the same command goes on from there"


class UsageError(ValueError):
    """Options that contradict each other or the contract."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastembed",
        description="Image data sets into embedding caches, with numbers that can be trusted.",
        epilog="fastembed COMMAND --help explains a command.",
        formatter_class=_Formatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_multichannel(commands)
    _add_demo(commands)
    _add_info(commands)
    return parser


# fastembed multichannel --------------------------------------------------------------------


def _add_multichannel(commands) -> None:
    parser = commands.add_parser(
        "multichannel",
        help="N-channel microscopy tensors to DINO embeddings",
        formatter_class=_Formatter,
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
    parser.set_defaults(run=_multichannel)
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR",
                        help="folder for emb_<sha1>.npy, settings and failures")  # fmt: skip

    group = parser.add_argument_group(
        "samples",
        "From --manifest, or from the table cpjump1_dinov3_tensors(tensor_path, text_id). The\n"
        "index is the database if one is named, else image_embeddings.tsv in the output folder.\n"
        "With neither option a PostgreSQL of our own starts in DIR_postgres.",
    )
    group.add_argument("--manifest", type=Path, metavar="CSV",
                       help="CSV with columns tensor_path and text_id; no database needed")  # fmt: skip
    group.add_argument("--db", metavar="URL",
                       help="libpq URL or key=value string, or 'embedded'")  # fmt: skip
    group.add_argument("--db-host", metavar="HOST")
    group.add_argument("--db-port", type=int, metavar="PORT")
    group.add_argument("--db-name", metavar="NAME", help=f"default {DEFAULT_DATABASE}")
    group.add_argument("--db-user", metavar="USER")
    group.add_argument("--db-password", metavar="PASSWORD",
                       help="other users can see it in the process list: PGPASSWORD or "
                            "~/.pgpass are better")  # fmt: skip
    group.add_argument("--limit", type=_positive, metavar="N", help="only the first N rows")
    group.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N",
                       help="only part I (from 0) of N; the parts together give the same bytes "
                            "as one run")  # fmt: skip

    group = parser.add_argument_group("quantisation to 8 bits")
    group.add_argument("--channels", type=_channels, default=(0, 1, 2, 3, 4), metavar="LIST",
                       help="channels of the tensors, such as 0-4 or 0,2,5; default 0-4")  # fmt: skip
    group.add_argument("--quant-method", choices=("cellclip", "global"), default="cellclip",
                       help="cellclip: clip each channel at two of its percentiles (default); "
                            "global: z-score with given mean and std")  # fmt: skip
    group.add_argument("--cellclip-low", type=float, default=1.0, metavar="PERCENT",
                       help="default 1.0")  # fmt: skip
    group.add_argument("--cellclip-high", type=float, default=99.0, metavar="PERCENT",
                       help="default 99.0")  # fmt: skip
    group.add_argument("--global-mean", metavar="LIST|JSON",
                       help="one value per channel: comma-separated, or a JSON file with a list "
                            "or a key 'mean'")  # fmt: skip
    group.add_argument("--global-std", metavar="LIST|JSON", help="likewise, key 'std'")
    group.add_argument("--global-clamp-z", type=float, default=3.0, metavar="Z",
                       help="clip at ±Z standard deviations; default 3.0")  # fmt: skip

    group = parser.add_argument_group("crops")
    group.add_argument("--img-size", type=_positive, default=224, metavar="PIXELS",
                       help="side of a crop and of the model's input; default 224")  # fmt: skip
    group.add_argument("--n-crops", type=_positive, metavar="N",
                       help="crops per sample; default 4, or 1 with --crops center")  # fmt: skip
    group.add_argument("--crops", choices=CROP_MODES, default="random",
                       help="random: seeded per sample (default); grid; center")  # fmt: skip
    group.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    group.add_argument("--aggregation", choices=POOL_MODES, default="avg",
                       help="pooling over the crops; default avg")  # fmt: skip

    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="KIND:NAME",
                       help="dinov3:vitl16, dinov2:vitb14_reg, transformers:ID or folder, "
                            "timm:NAME")  # fmt: skip
    group.add_argument("--config-file", metavar="YAML",
                       help="DINO training configuration, instead of --model")  # fmt: skip
    group.add_argument("--weights", "--pretrained-weights", metavar="PATH|random",
                       help="weights file or folder; the hub's by default where the kind has "
                            "one; 'random' for plumbing and speed only")  # fmt: skip
    group.add_argument("--channel-mode", choices=("inflate", "replicate"), default="inflate",
                       help="inflate: extra channels get the mean RGB kernel (default); "
                            "replicate: each channel is an RGB image of its own")  # fmt: skip
    group.add_argument("--channel-pool", choices=("mean", "concat"), default="mean",
                       help="with replicate: how the channels' vectors meet; default mean")  # fmt: skip
    group.add_argument("--normalize", choices=("model", "none"),
                       help="model: its own mean and std (default); none: 0..1 input (default "
                            "with --config-file, as the CPJUMP1 script has it)")  # fmt: skip
    group.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                       help="auto: bf16 where the device has it natively; default auto")  # fmt: skip
    group.add_argument("--device", metavar="DEVICE", help="cuda if there is one, else cpu")

    group = parser.add_argument_group("run")
    group.add_argument("--batch-size", type=_positive, metavar="N",
                       help="crops per model call; part of the settings, since bits can depend "
                            "on it; default 16 on a CPU, 128 on a GPU")  # fmt: skip
    group.add_argument("--workers", type=_positive, metavar="N",
                       help="reader threads; default one per core, at most 8")  # fmt: skip
    group.add_argument("--format", choices=("npy",), default="npy", help="default npy")
    group.add_argument("--strict", action="store_true",
                       help="stop at the first sample that fails")  # fmt: skip
    group.add_argument("--allow-failures", action="store_true",
                       help="exit with 0 although samples failed")  # fmt: skip
    group.add_argument("--overwrite", action="store_true",
                       help="remove what the output folder holds and start afresh")  # fmt: skip
    group.add_argument("--report", type=Path, metavar="JSON",
                       help="write counts, times, settings and versions there")  # fmt: skip


def _multichannel(arguments: argparse.Namespace) -> int:
    from .engines import load_engine
    from .indexes import Postgres, Tsv
    from .pipeline import SampleFailed, extract
    from .progress import Progress
    from .recipes import MultiCrop
    from .sinks import NpyPerSample
    from .sources import TensorCsv, TensorPostgres

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

    database = _database(arguments)
    source = TensorCsv(arguments.manifest) if arguments.manifest else TensorPostgres(database)
    output = arguments.output_dir
    index = Tsv(output) if database is None else Postgres(database, output)
    rows = source.count()  # before the model: a database that is down shows at once
    if rows == 0:
        raise ValueError(f"{source} lists no samples")

    engine = load_engine(
        arguments.model or f"dinov3:{arguments.config_file}",
        weights=arguments.weights,
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
    with Progress() as progress:
        try:
            report = extract(
                source,
                recipe,
                engine,
                NpyPerSample(output),
                index,
                workers=arguments.workers,
                shard=arguments.shard,
                limit=arguments.limit,
                strict=arguments.strict,
                overwrite=arguments.overwrite,
                progress=progress,
            )
        except SampleFailed as error:
            return _complain(error, EXIT_FAILURES)
    print(report)
    if arguments.report:
        report.save(arguments.report)
    return EXIT_FAILURES if report.failed and not arguments.allow_failures else 0


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


def _database(arguments: argparse.Namespace) -> DBConfig | None:
    """The database that the options name; None where a manifest does without."""
    flags = (arguments.db_host, arguments.db_port, arguments.db_user, arguments.db_password)
    named = any(flag is not None for flag in flags)
    if arguments.db == "embedded" or not (arguments.db or named or arguments.manifest):
        if named:
            raise UsageError("--db embedded takes no host, port, user or password")
        folder = arguments.output_dir.resolve()
        return embedded(
            folder.with_name(f"{folder.name}_postgres"), arguments.db_name or DEFAULT_DATABASE
        )
    if not (arguments.db or named or arguments.db_name):
        return None
    return DBConfig(
        host=arguments.db_host,
        port=arguments.db_port,
        database=arguments.db_name or (None if arguments.db else DEFAULT_DATABASE),
        user=arguments.db_user,
        password=arguments.db_password,
        url=arguments.db,
    )


# fastembed demo, fastembed info -------------------------------------------------------------


def _add_demo(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="the multichannel job on generated cells, with an embedded PostgreSQL",
        formatter_class=_Formatter,
        description=(
            "Draws small 8-channel plates of cells, lists them in a PostgreSQL that it starts,\n"
            "embeds them with a DINOv3 ViT-S of random weights and reads them back as a\n"
            "dataset. For a look at the plumbing: random weights mean nothing."
        ),
    )
    parser.add_argument("--out", type=Path, default=Path("demo_out"), metavar="DIR",
                        help="default demo_out")  # fmt: skip
    parser.add_argument("--samples", type=_positive, default=12, metavar="N", help="default 12")
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import run

    return run(arguments.out, arguments.samples)


def _add_info(commands) -> None:
    parser = commands.add_parser(
        "info",
        help="versions, and which backend runs which op here",
        formatter_class=_Formatter,
        description="Prints versions, and for each op which backends can run here and why not.",
    )
    parser.set_defaults(run=_info)


def _info(_: argparse.Namespace) -> int:
    from . import info

    info.main()
    return 0


# Parsing -----------------------------------------------------------------------------------


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=96)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {text}")
    return number


def _channels(text: str) -> tuple[int, ...]:
    """'0-4' or '0,2,5-7' as numbers."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            numbers += range(int(first), int(last or first) + 1)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must look like 0-4 or 0,2,5; got {text}") from None
    if not numbers or len(set(numbers)) != len(numbers):
        raise argparse.ArgumentTypeError(f"must name each channel once; got {text}")
    return tuple(numbers)


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    try:
        shard = int(part), int(parts)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must look like 0/3; got {text}") from None
    if not 0 <= shard[0] < shard[1]:
        raise argparse.ArgumentTypeError(f"must be I/N with 0 <= I < N; got {text}")
    return shard


def _version() -> str:
    from importlib.metadata import version

    return f"fastembed-vision {version('fastembed-vision')}"


def _complain(error: object, status: int) -> int:
    print(f"fastembed: {error}", file=sys.stderr)
    return status


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"fastembed: warning: {message}", file=sys.stderr)


def _terminate(*_: object) -> None:
    raise Terminated


if __name__ == "__main__":
    sys.exit(main())
