"""`extract`: settings, locks and what is done already; then one run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack
from pathlib import Path

from .. import checksums, commands, signature
from ..commands import Command
from ..engines.engine import Engine
from ..nouns import Index, Recipe, Sink, Source
from ..records import Item
from ..report import Report, versions
from ..runlock import RunLock
from .autotune import tune
from .interrupts import Interrupts
from .run import Run, SampleFailed
from .trace import Trace

__all__ = ["SampleFailed", "extract", "remove_outputs"]


def extract(
    source: Source,
    recipe: Recipe,
    engine: Engine,
    sink: Sink,
    index: Index,
    *,
    workers: int | None = None,
    slots: int | None = None,
    shard: tuple[int, int] = (0, 1),
    limit: int | None = None,
    strict: bool = False,
    overwrite: bool = False,
    name: str = "",
    progress: Callable[[Report, int], None] | None = None,
    profile: str | Path | None = None,
    only: Set[str] | None = None,
    command: Command | None = None,
) -> Report:
    """Embeds every sample of `source` that `index` does not hold yet.

    Args:
        source: lists and reads samples, such as `sources.TensorCsv`.
        recipe: such as `recipes.MultiCrop`, for a vector per sample, `recipes.SegmentCrops`, for
            one per segment, or `recipes.SpatialMaps`, for maps.
        engine: of `load_engine`.
        sink: such as `sinks.NpyPerSample`.
        index: such as `indexes.Tsv` or `indexes.Postgres`.
        workers: reader threads; by default as many as a short probe finds are needed.
        slots: batches in preallocated memory, at the engine, ready or being filled; by default by
            the same probe.
        shard: (i, n): only the samples whose key falls to part i of n. The union of the n
            runs is byte-identical to one run.
        limit: only the first rows of the source.
        strict: stop at the first sample that fails.
        overwrite: remove what the output folder holds and start afresh.
        name: of this run, where several with different samples share an output folder; their
            failures stand in ``failures-<name>.jsonl``.
        progress: called with (report so far, samples in all) at the start and now and then, from
            one thread at a time.
        profile: file for a trace of every thread, which chrome://tracing and ui.perfetto.dev show.
        only: names of outputs: of what `index` does not hold, make these and nothing else, as
            after damage. Their failures stand in ``failures-repair.jsonl``.
        command: gives this call again; it is recorded beside the settings, for
            ``fastembed verify --repair``.

    The probe (see `pipeline.autotune`) also chooses the batch size where `load_engine` was given
    none, among those that give the same bits. `report.plan` says what was chosen and why. None of
    the three changes an output.

    SIGINT and SIGTERM end the run after the batch in hand, with all that is complete committed;
    then they do what they always do (KeyboardInterrupt for SIGINT). A second one does so at once.

    Returns:
        The `Report`. A sample that cannot be read or embedded is no error: it is counted in
        `report.failed` and stands with its reason in ``failures.jsonl``.

    Raises:
        FolderBusy: another run is making the same samples in this folder.
        SignatureMismatch: the output folder holds embeddings made with other settings.
        SampleFailed: a sample failed and `strict` was asked for.
        DatabaseError, OSError: the index or the disk failed; what was committed stays, and
            the same call goes on from there.
    """
    part, parts = shard
    if not 0 <= part < parts:
        raise ValueError(f"shard must be i/n with 0 <= i < n; got {part}/{parts}")
    if overwrite and parts > 1:
        raise ValueError("overwrite removes the outputs of all shards: run it once without shard")
    settings = {
        "recipe": recipe.settings(),
        "engine": engine.settings(),
        "output": {"form": sink.form, "dtype": recipe.dtype},
    }
    if sink.holds_parts:
        settings["selection"] = source.selection()
    suffix = f"-{name}" if name else ""
    suffix += "" if only is None else "-repair"
    suffix += "" if parts == 1 else f"-{part}-of-{parts}"

    with ExitStack() as stack:
        stack.enter_context(RunLock(sink.folder, shard, name))
        if overwrite:
            remove_outputs(sink, index)
        signature.claim(sink.folder, settings)
        if command is not None:
            commands.record(sink.folder, command)
        done: Set[str] = sink.open()
        done &= index.open()
        total = source.count() if limit is None else min(limit, source.count())
        total = -(-total // parts)
        left = max(0, total - len(done))
        if only is not None:
            done = _AllBut(only - done)
            left = len(done.names)

        def todo() -> Iterator[Item]:
            """What is to be done, as far as the list can tell; for the probe."""
            for item in itertools.islice(source.items(), limit):
                if item.in_shard(part, parts) and not item.defect:
                    if (rest := sink.todo(item, done)) is not None:
                        yield rest

        plan = tune(source, recipe, engine, todo, left, workers, slots)
        report = Report(
            workers=plan.workers,
            plan=str(plan),
            unit=recipe.unit,
            output=str(sink.folder),
            index=str(index),
            failures_file=str(sink.folder / f"failures{suffix}.jsonl"),
            settings=settings,
            versions=versions(),
        )
        if progress is not None:
            progress(report, total)
        run = Run(
            source,
            recipe,
            plan.engine,
            sink,
            index,
            report,
            slots=plan.slots,
            strict=strict,
            progress=progress,
            total=total,
            trace=stack.enter_context(Trace(profile)) if profile else None,
        )
        with Interrupts(run.stop):
            run.go(itertools.islice(source.items(), limit), done, shard)
    return report


def remove_outputs(sink, index) -> None:
    """Leaves nothing of what extractions through this sink and index left."""
    names = index.open() | sink.open()
    # Rows first: a row without its file would be worse than a file without its row.
    index.remove(names)
    for name in names:
        sink.remove(name)
    for name in (checksums.FILE_NAME, commands.FILE_NAME, signature.FILE_NAME):
        (sink.folder / name).unlink(missing_ok=True)


class _AllBut(Set):
    """Every name but some, to ask whether one is in it."""

    def __init__(self, names: Set[str]) -> None:
        self.names = names

    def __contains__(self, name: object) -> bool:
        return name not in self.names

    def __iter__(self) -> Iterator[str]:
        raise TypeError("all names but some cannot be listed")

    def __len__(self) -> int:
        raise TypeError("all names but some cannot be counted")
