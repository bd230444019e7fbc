"""``fastembed volumes check``: what a folder of volumes holds, and whether it is sound."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tqdm import tqdm

from ...cluster import format_indices, last_error
from ..options import Formatter, UsageError, positive
from .preprocess import indices

EXIT_UNWELL = 3
_SHOWN = 10


def add(commands) -> None:
    parser = commands.add_parser(
        "check",
        help="which volumes are finished, which missing or damaged",
        formatter_class=Formatter,
        description=(
            "Reports on an output folder: finished and missing volumes, times, storage, sources,\n"
            "settings, the last errors of jobs; with --verify reads chunks and compares them with\n"
            "the checksums that were taken when they were written."
        ),
        epilog=(
            "examples:\n"
            "  fastembed volumes check --output-dir out --num-volumes 100\n"
            "  fastembed volumes check --output-dir out --verify --sample-size 5\n"
            "  fastembed volumes check --output-dir out --watch\n"
            "\n"
            "exit status: 0 all is well; 3 volumes are missing or damaged, or there are none"
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR")
    group = parser.add_argument_group("which volumes should be there")
    group.add_argument(
        "--num-volumes",
        type=positive,
        metavar="N",
        help="so many from --start-index; default: from 0 to the last that is there",
    )
    group.add_argument("--start-index", type=int, default=0, metavar="N")
    group.add_argument("--indices", type=indices, metavar="LIST", help="or these: 3,7,20-40")
    group = parser.add_argument_group("verification")
    group.add_argument("--verify", action="store_true", help="read chunks; by default all of them")
    group.add_argument(
        "--sample-size", type=positive, metavar="N", help="of so many volumes, evenly spread"
    )
    group.add_argument(
        "--verify-indices", type=int, nargs="+", metavar="N", help="of these volumes"
    )
    group.add_argument("--num-threads", type=positive, default=8, metavar="N", help="default 8")
    group = parser.add_argument_group("report")
    group.add_argument("--json", action="store_true", help="machine-readable")
    group.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=10.0,
        metavar="SECONDS",
        help="again and again until all are there; default every 10 s",
    )


def run(arguments: argparse.Namespace) -> int:
    from ...volumes.check import check

    if (arguments.sample_size or arguments.verify_indices) and not arguments.verify:
        raise UsageError("--sample-size and --verify-indices go with --verify")
    if arguments.num_volumes and arguments.indices:
        raise UsageError("name the volumes by --num-volumes or by --indices")
    expected = arguments.indices
    if arguments.num_volumes:
        start = arguments.start_index
        expected = range(start, start + arguments.num_volumes)
    verify = None
    if arguments.verify:
        verify = arguments.verify_indices or arguments.sample_size or sys.maxsize
    while True:
        with _Progress() as progress:
            findings = check(
                arguments.output_dir,
                expected,
                verify=verify,
                threads=arguments.num_threads,
                last_error=last_error,
                progress=progress,
            )
        if arguments.watch and sys.stdout.isatty() and not arguments.json:
            print("\x1b[H\x1b[2J", end="")
        print(findings.to_json() if arguments.json else text(findings), flush=True)
        if not arguments.watch or not findings.missing:
            return 0 if findings.well else EXIT_UNWELL
        time.sleep(arguments.watch)


def text(findings) -> str:
    """The report as a person reads it."""
    done, missing, broken = findings.completed, findings.missing, findings.broken
    lines = [
        f"{findings.folder}",
        f"completed  {len(done):>6}  {format_indices(done)}",
        f"missing    {len(missing):>6}  {format_indices(missing)}",
        f"damaged    {len(broken):>6}  {format_indices(broken)}",
    ]
    if findings.verified:
        sound = len([index for index in findings.verified if index not in broken])
        lines.append(f"verified   {len(findings.verified):>6}  {sound} sound")
    if findings.timing:
        lines += ["", f"{'seconds':<28}{'mean':>9}{'median':>9}{'min':>9}{'max':>9}{'total':>11}"]
        for stage, t in findings.timing.items():
            name = stage.removesuffix("_seconds").replace("_", " ")
            lines.append(
                f"  {name:<26}{t['mean']:>9.2f}{t['median']:>9.2f}{t['min']:>9.2f}"
                f"{t['max']:>9.2f}{t['total']:>11.1f}"
            )
        gb = findings.storage_gb
        lines += [
            "",
            f"storage    {gb['total_gb']:.3f} GB, {gb['per_volume_gb']:.3f} per volume "
            f"(features {gb['features_gb']:.3f}, gt {gb['gt_gb']:.3f}, mask {gb['mask_gb']:.3f})",
            "",
            "sources",
        ]
        lines += [f"  {count:>5}  {source}" for source, count in findings.sources.items()]
        for configuration in findings.configurations:
            settings = dict(configuration)
            lines += ["", f"settings of {settings.pop('volumes')} volumes"]
            lines += [f"  {name:<28}{_value(value)}" for name, value in settings.items()]
    for heading, found in (("damage", broken), ("last errors of jobs", findings.errors)):
        if found:
            lines += ["", heading]
            lines += [f"  {i}: {_first(what)}" for i, what in list(found.items())[:_SHOWN]]
            if len(found) > _SHOWN:
                lines.append(f"  and {len(found) - _SHOWN} more")
    lines += ["", "all is well" if findings.well else "not all is well"]
    return "\n".join(lines)


def _value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _first(what: str | list[str]) -> str:
    if isinstance(what, str):
        return what
    return what[0] + (f" (and {len(what) - 1} more)" if len(what) > 1 else "")


class _Progress:
    """Chunks verified, as a bar; none where nothing is."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, unit="chunk", file=sys.stderr, desc="verify")
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
