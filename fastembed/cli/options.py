"""What several commands share: options, their types, and the extraction that they ask for."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ..database import DEFAULT_DATABASE, DBConfig, embedded

if TYPE_CHECKING:
    from ..commands import Command

EXIT_FAILURES = 3

# Of one run, or secret: not part of the command that `fastembed verify --repair` gives again.
NOT_RECORDED = frozenset((
    "help", "shard", "limit", "overwrite", "strict", "allow_failures", "report", "profile",
    "volume_index", "db_password", "db_retries",
))  # fmt: skip


class UsageError(ValueError):
    """Options that contradict each other or the contract."""


class Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=96)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {text}")
    return number


def whole(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0; got {text}")
    return number


def threads(text: str) -> int:
    """A number of threads; 0, as PyTorch's loaders take it, is one."""
    return 1 if text == "0" else positive(text)


def channels(text: str) -> tuple[int, ...]:
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


def shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    try:
        shard = int(part), int(parts)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must look like 0/3; got {text}") from None
    if not 0 <= shard[0] < shard[1]:
        raise argparse.ArgumentTypeError(f"must be I/N with 0 <= I < N; got {text}")
    return shard


def add_database(group: argparse._ArgumentGroup) -> None:
    """--db and its parts, under the names that existing command lines use."""
    group.add_argument("--db", metavar="URL", help="libpq URL or key=value string, or 'embedded'")
    group.add_argument("--db-host", metavar="HOST")
    group.add_argument("--db-port", type=int, metavar="PORT")
    group.add_argument("--db-name", metavar="NAME", help=f"default {DEFAULT_DATABASE}")
    group.add_argument("--db-user", metavar="USER")
    group.add_argument(
        "--db-password",
        metavar="PASSWORD",
        help="other users can see it in the process list: PGPASSWORD or ~/.pgpass are better",
    )
    group.add_argument(
        "--db-retries",
        type=whole,
        default=8,
        metavar="N",
        help="how often to try again where the server is away, with growing pauses; default 8, "
        "about two minutes",
    )


def database_of(arguments: argparse.Namespace) -> DBConfig | None:
    """The database that the options name; None where a manifest does without."""
    named = _server_is_named(arguments)
    if wants_embedded(arguments):
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
        retries=arguments.db_retries,
    )


def wants_embedded(arguments: argparse.Namespace) -> bool:
    """Whether the options of `add_database` mean a PostgreSQL of our own, on this machine."""
    if arguments.db:
        return arguments.db == "embedded"
    return not (_server_is_named(arguments) or arguments.manifest)


def _server_is_named(arguments: argparse.Namespace) -> bool:
    flags = (arguments.db_host, arguments.db_port, arguments.db_user, arguments.db_password)
    return any(flag is not None for flag in flags)


SPECS = (
    "dinov3:vitl16, dinov2:vitb14_reg, openclip:NAME, openai:NAME, transformers:ID or folder, "
    "timm:NAME"
)


def add_weights(group) -> None:
    """What every command that loads a model has."""
    group.add_argument(
        "--weights",
        "--pretrained-weights",
        metavar="PATH|random",
        help="weights file, folder or DCP checkpoint; the hub's by default where the kind has "
        "one; 'random' for plumbing and speed only",
    )


def add_runtime(group) -> None:
    group.add_argument(
        "--runtime",
        choices=("torch", "onnx", "tensorrt"),
        help="what computes the model; default torch, or what an exported folder is for",
    )


def add_numbers(group) -> None:
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="auto: the fastest that the runtime and the device keep the numbers in; default auto",
    )
    group.add_argument("--device", metavar="DEVICE", help="cuda if there is one, else cpu")


def add_channels(group, normalize_default: str | None) -> None:
    """How N channels meet a model that was trained on three."""
    group.add_argument(
        "--channel-mode",
        choices=("inflate", "replicate"),
        default="inflate",
        help="inflate: extra channels get the mean RGB kernel (default); "
        "replicate: each channel is an RGB image of its own",
    )
    group.add_argument(
        "--channel-pool",
        choices=("mean", "concat"),
        default="mean",
        help="with replicate: how the channels' vectors meet; default mean",
    )
    exception = "" if normalize_default else " (default with --config-file, as the CPJUMP1 script)"
    group.add_argument(
        "--normalize",
        choices=("model", "none"),
        default=normalize_default,
        help=f"model: its own mean and std (default); none: 0..1 input{exception}",
    )


def both(name: str) -> tuple[str, ...]:
    """An option with underscores, as its users have it, and with hyphens."""
    return name, name.replace("_", "-")


def add_run(
    parser: argparse.ArgumentParser,
    batch_size: tuple[str, ...] = ("--batch-size",),
    workers: tuple[str, ...] = ("--workers",),
    default_workers: str = "what a probe at the start finds enough",
) -> None:
    """What every extraction has: batches, workers, failures, report; two under several names."""
    parser.set_defaults(parser=parser, only=None)
    group = parser.add_argument_group("run")
    group.add_argument(
        *batch_size,
        dest="batch_size",
        type=positive,
        metavar="N",
        help="crops or images per model call; part of the settings, since bits can depend "
        "on it; default 16 on a CPU, 128 on a GPU, or more where a probe at the start finds that "
        "faster and the bits the same",
    )
    group.add_argument(
        *workers,
        dest="workers",
        type=threads,
        metavar="N",
        help=f"reader threads; default {default_workers}",
    )
    group.add_argument(
        "--slots",
        type=positive,
        metavar="N",
        help="batches in memory, at the engine, ready or being filled; default by the same probe",
    )
    group.add_argument("--strict", action="store_true", help="stop at the first sample that fails")
    group.add_argument(
        "--allow-failures", action="store_true", help="exit with 0 although samples failed"
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="remove what the output folder holds and start afresh",
    )
    group.add_argument(
        "--report",
        type=Path,
        metavar="JSON",
        help="write counts, times, settings and versions there",
    )
    group.add_argument(
        "--profile",
        type=Path,
        metavar="JSON",
        help="write what every thread did when, for chrome://tracing or ui.perfetto.dev",
    )


def words(arguments: argparse.Namespace, actions: Iterable[argparse.Action]) -> list[str]:
    """The options that differ from their defaults, as they were given."""
    words: list[str] = []
    for action in actions:
        value = getattr(arguments, action.dest, action.default)
        if value == action.default:
            continue
        if isinstance(action, argparse.BooleanOptionalAction):
            words.append(action.option_strings[0 if value else 1])
        elif action.nargs == 0:
            words.append(action.option_strings[0])
        elif action.nargs == "+":
            words += [action.option_strings[0], *map(str, value)]
        elif isinstance(value, tuple):
            words.append(f"{action.option_strings[0]}={','.join(map(str, value))}")
        else:
            # One word, so that a value may begin with a dash.
            words.append(f"{action.option_strings[0]}={value}")
    return words


def command_of(arguments: argparse.Namespace, folder: Path) -> Command:
    """What makes the outputs in `folder` again: the options as they were given, without those of
    one run, and without passwords."""
    from ..commands import FOLDER, Command

    given = argparse.Namespace(**vars(arguments))
    actions = []
    for action in arguments.parser._actions:
        value = getattr(arguments, action.dest, None)
        if action.dest in NOT_RECORDED:
            continue
        if isinstance(value, Path) and value.resolve() == folder:
            # Also where it is the default: the folder may be moved.
            setattr(given, action.dest, FOLDER)
        elif isinstance(value, str):
            setattr(given, action.dest, _without_password(value, action.dest == "db"))
        actions.append(action)
    return Command(
        (*arguments.parser.prog.split()[1:], *words(given, actions)),
        os.getcwd(),
        version("fastembed-vision"),
    )


def _without_password(value: str, is_database: bool) -> str:
    if is_database and value != "embedded":
        from psycopg2.extensions import make_dsn, parse_dsn

        parts = parse_dsn(value)
        shown = {name: text for name, text in parts.items() if "password" not in name}
        return value if shown == parts else make_dsn(**shown)
    return re.sub(r"(://[^:/@\s]*):[^/\s]*@", r"\1@", value)


def remove_other_formats(forms: Iterable[tuple]) -> None:
    """Leaves nothing of what runs with another --format left; for --overwrite.

    Args:
        forms: sink and index of each other format.
    """
    from ..indexes import Tsv
    from ..pipeline import remove_outputs
    from ..runlock import RunLock

    for sink, index in forms:
        if index.exists():
            with RunLock(sink.folder):
                remove_outputs(sink, index)
                if isinstance(index, Tsv):
                    index.path.unlink()


def run_extraction(
    arguments: argparse.Namespace, source, recipe, engine, sink, index, name: str = ""
) -> int:
    """`extract` with the options of `add_run`, --shard and --limit; returns the exit status."""
    from ..pipeline import SampleFailed, extract
    from ..progress import Progress

    with Progress() as progress:
        try:
            report = extract(
                source,
                recipe,
                engine,
                sink,
                index,
                workers=arguments.workers,
                slots=arguments.slots,
                shard=arguments.shard,
                limit=arguments.limit,
                strict=arguments.strict,
                overwrite=arguments.overwrite,
                name=name,
                progress=progress,
                profile=arguments.profile,
                only=arguments.only,
                command=command_of(arguments, sink.folder),
            )
        except SampleFailed as error:
            print(f"fastembed: {error}", file=sys.stderr)
            return EXIT_FAILURES
    print(report)
    if arguments.report:
        report.save(arguments.report)
    return EXIT_FAILURES if report.failed and not arguments.allow_failures else 0
