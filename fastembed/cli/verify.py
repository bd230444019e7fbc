"""``fastembed verify``: every output against its checksum and its index, and made good."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Set
from pathlib import Path

from tqdm import tqdm

from .options import (
    NOT_RECORDED,
    Formatter,
    UsageError,
    add_database,
    database_of,
    positive,
)
from .submit import OUTPUT_OPTIONS

EXIT_FINDINGS = 3
_SHOWN = 10  # findings of a kind


def add(commands) -> None:
    parser = commands.add_parser(
        "verify",
        help="outputs against their checksums and their index; --repair makes them good",
        formatter_class=Formatter,
        description=(
            "Reads every output in a folder and compares it with the checksum that was taken when\n"
            "it was written, and the index with the files, both ways. Knows the folders of\n"
            "multichannel, panoptic and maps in every --format, of volumes preprocess and of\n"
            "cellpose infer. --repair takes out what is broken and gives the commands again that\n"
            "made the folder (fastembed-runs.json), for these outputs only."
        ),
        epilog=(
            "examples:\n"
            "  fastembed verify cache/vis_embed\n"
            "  fastembed verify out --quick                    # index and sizes only\n"
            "  fastembed verify out --repair --dry-run         # what --repair would do\n"
            "  fastembed verify out --db postgresql://me@host/cpjump1 --repair\n"
            "\n"
            "exit status: 0 sound; 1 it cannot be checked; 2 wrong options; 3 there are findings\n"
            "(with --repair: that remain)."
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument("output_dir", type=Path, metavar="DIR", help="output folder of a job")
    group = parser.add_argument_group("how thoroughly")
    group.add_argument("--quick", action="store_true", help="index and sizes; reads no content")
    group.add_argument(
        "--sample",
        type=positive,
        metavar="N",
        help="read the content of N files (of a store: shards), evenly spread, and all sizes",
    )
    group.add_argument(
        "--threads", type=positive, default=8, metavar="N", help="files read at a time; default 8"
    )
    group = parser.add_argument_group("repair")
    group.add_argument(
        "--repair",
        action="store_true",
        help="make again what is broken; what it takes out is kept in set-aside/ until then",
    )
    group.add_argument(
        "--dry-run", action="store_true", help="with --repair: say what it would do, and do nothing"
    )
    group = parser.add_argument_group(
        "database", "Where the index is, if not in the folder. By default that of the command that "
        "made it."
    )  # fmt: skip
    add_database(group)
    parser.add_argument("--json", action="store_true", help="machine-readable, all findings")


def run(arguments: argparse.Namespace) -> int:
    from .. import commands
    from ..verify import repair, verify

    if arguments.dry_run and not arguments.repair:
        raise UsageError("--dry-run goes with --repair")
    if arguments.repair and (arguments.quick or arguments.sample):
        raise UsageError("--repair looks at everything: it goes without --quick and --sample")
    folder = arguments.output_dir.resolve()
    try:
        recorded = commands.read(folder)
    except ValueError:
        recorded = commands.Record()  # told as a finding
    database = _database(arguments, recorded)
    options = {"database": database, "threads": arguments.threads}
    if not arguments.repair or arguments.dry_run:
        with _Progress() as progress:
            verdict = verify(folder, quick=arguments.quick, sample=arguments.sample,
                             progress=progress, **options)  # fmt: skip
        print(verdict.to_json() if arguments.json else text(verdict))
        if arguments.dry_run:
            _tell_plan(verdict, recorded)
        return 0 if verdict.sound else EXIT_FINDINGS
    make = None
    if recorded.commands:
        make = _Again(folder, recorded, database)
    with _Progress() as progress:
        done = repair(folder, make, progress=progress, **options)
    if arguments.json:
        print(json.dumps({
            "before": json.loads(done.before.to_json()),
            "withdrawn": None if done.withdrawn is None else sorted(done.withdrawn),
            "after": json.loads(done.after.to_json()),
        }, indent=2, ensure_ascii=False))  # fmt: skip
    else:
        print(text(done.before))
        if not done.before.sound:
            print(f"\nafter the repair:\n{text(done.after)}")
    if not done.before.sound and make is None:
        print(
            "fastembed: no command is recorded in the folder (it was made from Python, or before "
            "commands were): what was broken is taken out, and the same extract() makes it again",
            file=sys.stderr,
        )
    return 0 if done.after.sound else EXIT_FINDINGS


def text(verdict) -> str:
    """A verdict as a person reads it."""
    lines = [
        f"{verdict.folder}: {verdict.form}, {verdict.outputs} outputs in {verdict.index}",
        f"  checked    {verdict.files:>9}  {verdict.bytes / 1e6:.1f} MB read",
        f"  verified   {verdict.verified:>9}  by their checksums",
    ]
    if verdict.unlisted:
        lines.append(f"  unlisted   {verdict.unlisted:>9}  without checksum; their form is right")
    if verdict.foreign:
        lines.append(f"  foreign    {verdict.foreign:>9}  not ours, left alone")
    lines += [f"  note: {note}" for note in verdict.notes]
    for kind, count in verdict.counts.items():
        found = [finding for finding in verdict.findings if finding.kind == kind]
        what = "" if found[0].is_damage else "  (a stopped run leaves such; no damage)"
        lines.append(f"  {kind:<10} {count:>9}{what}")
        lines += [f"      {finding}" for finding in found[:_SHOWN]]
        if count > _SHOWN:
            lines.append(f"      and {count - _SHOWN} more")
    damage = sum(finding.is_damage for finding in verdict.findings)
    if verdict.sound:
        lines.append("sound")
    elif damage:
        lines.append(f"{damage} damaged; {len(verdict.to_make)} outputs to make again (--repair)")
    else:
        lines.append("nothing is damaged; the same command again, or --repair, clears up")
    return "\n".join(lines)


def _tell_plan(verdict, recorded) -> None:
    names = sorted(verdict.to_make)
    if verdict.sound:
        return
    print(f"\n--repair would take out and make again {len(names)} outputs", file=sys.stderr)
    for name in names[:_SHOWN]:
        print(f"  {name}", file=sys.stderr)
    for command in reversed(recorded.commands):
        words = " ".join(command.within(Path(verdict.folder)))
        print(f"by, in {command.cwd}:\n  fastembed {words}", file=sys.stderr)
    if not recorded.commands:
        print("by the same extract(): no command is recorded", file=sys.stderr)


def _database(arguments: argparse.Namespace, recorded):
    """The one that was given, or else that of the newest command which named one."""
    arguments.manifest = True  # without options there is no database of our own
    if given := database_of(arguments):
        return given
    folder = arguments.output_dir.resolve()
    for command in reversed(recorded.commands):
        if command.argv[:1] == ("multichannel",):
            return database_of(_parse(command.within(folder)))
    return None


def _parse(words: list[str]) -> argparse.Namespace:
    from . import build_parser

    return build_parser().parse_args(words)


class _Again:
    """Gives the recorded commands again, the newest first, until all is made."""

    def __init__(self, folder: Path, recorded, database) -> None:
        self.folder, self.recorded, self.database = folder, recorded, database

    def __call__(self, names: Set[str] | None) -> None:
        from ..verify import committed

        for command in reversed(self.recorded.commands):
            left = None if names is None else names - committed(self.folder, self.database)
            if left is not None and not left:
                return
            self._give(command, left)

    def _give(self, command, names: Set[str] | None) -> None:
        words = command.within(self.folder)
        if self.folder != Path(self.recorded.folder) and words == list(command.argv):
            raise ValueError(
                f"{self.folder} was made as {self.recorded.folder}, and the command does not say "
                f"how that is named: fastembed {' '.join(words)}"
            )
        if words[:2] == ["volumes", "preprocess"]:
            words += ["--volume-index", _indices(names)]
        print(f"fastembed: again: fastembed {' '.join(words)}", file=sys.stderr)
        # Its report would be in the way of a program that reads ours.
        with contextlib.chdir(command.cwd), contextlib.redirect_stdout(sys.stderr):
            arguments = _parse(words)
            _check(arguments, self.folder)
            arguments.only = names
            arguments.run(arguments)


def _check(arguments: argparse.Namespace, folder: Path) -> None:
    """Raises ValueError where a record would have something written elsewhere: it comes with the
    folder, and the folder may come from anyone."""
    actions = arguments.parser._actions if hasattr(arguments, "parser") else ()
    named = [getattr(arguments, action.dest) for action in actions if action.dest in OUTPUT_OPTIONS]
    if {path.resolve() for path in named if isinstance(path, Path)} != {folder}:
        raise ValueError(f"the record of {folder} has a command that does not write there")
    for action in actions:
        value = getattr(arguments, action.dest, action.default)
        if action.dest in NOT_RECORDED - {"volume_index"} and value != action.default:
            raise ValueError(f"{folder}: {action.option_strings[-1]} is nothing that we record")


def _indices(names: Set[str]) -> str:
    from ..cluster import format_indices

    return format_indices(sorted(int(name.removeprefix("volume_")) for name in names))


class _Progress:
    """Files checked, as a bar."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None or done < self._bar.n:
            self.__exit__()
            self._bar = tqdm(total=total, unit="part", file=sys.stderr, desc="verify",
                             disable=None)  # fmt: skip
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
