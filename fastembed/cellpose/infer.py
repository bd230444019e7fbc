"""Every tile of a study segmented once, its objects counted at all thresholds of positivity.

Not `extract`: that fills the engine's batches across samples, while a tile's masks must be those
that an evaluation finds in the same image, and cellpose cuts, batches and blends every image by
itself. So a tile goes whole through a segmenter. The contracts are the pipeline's: a settings
signature, a commit after the flush, failures by name, shards whose union is one run.
"""

from __future__ import annotations

import errno
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import commands, signature
from ..commands import Command
from ..ops import label_statistics
from ..pipeline.interrupts import Interrupts
from ..runlock import RunLock
from ..staging import no_link
from .images import as_mask, check_same_shape, read_plane
from .tile_store import FAILURES, TABLE, TileStore, as_item, label_of
from .tiles import Naming, Tile, find_tiles

if TYPE_CHECKING:  # cellpose is needed only where a network runs
    from .evaluate import Thresholds
    from .network import Network

PERCENTILES = (60, 70, 75, 80, 90)
POSITIVE = 75

_READERS = 2
# What one bad tile can raise. Anything else is the machine's or our own fault: it stops the run.
_TILE_ERRORS = (OSError, ValueError, TypeError)
_MACHINE_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)

Segmenter = Callable[[np.ndarray], np.ndarray]
"""From an image [H, W, 3] (DAPI, marker, 0; unsigned integers) to its label mask [H, W]."""


class TileFailed(RuntimeError):
    """A tile failed in a strict run."""


@dataclass
class InferReport:
    """What one run of `infer` did.

    Attributes:
        listed: tiles that fall to this shard.
        already_done: committed by an earlier run with the same settings.
        embedded: tiles segmented and committed by this run.
        failed: tiles written to the failures file.
        objects: objects in the tiles of this run.
        committed: tiles of all shards and runs in the table.
        total: tiles in the folder.
        seconds: wall time.
        table, failures_file: paths.
    """

    listed: int = 0
    already_done: int = 0
    embedded: int = 0
    failed: int = 0
    objects: int = 0
    committed: int = 0
    total: int = 0
    seconds: float = 0.0
    table: str = ""
    failures_file: str = ""
    # What progress bars ask for: tiles have unique keys, and nothing about a run is chosen.
    duplicates: int = 0
    plan: str = f"{_READERS} readers, one tile after the other"

    def __str__(self) -> str:
        rate = f" ({self.embedded / self.seconds:.2f} tiles/s)" if self.embedded else ""
        lines = [
            f"{self.embedded} tiles with {self.objects} objects, {self.already_done} already "
            f"done, {self.failed} failed in {self.seconds:.1f} s{rate}",
            f"Table:      {self.table} ({self.committed} of {self.total} tiles)",
        ]
        if self.failed:
            lines.append(f"Failures:   {self.failures_file}")
        return "\n".join(lines)


def count_positive(
    labels: np.ndarray, marker: np.ndarray, percentiles: Sequence[float] = PERCENTILES
) -> tuple[int, np.ndarray, np.ndarray]:
    """Objects, and those whose mean marker is above each percentile of the whole tile.

    Args:
        labels: [H, W] unsigned; 0 is background.
        marker: [H, W] uint8 or uint16.
        percentiles: P numbers in 0..100.

    Returns:
        (objects, thresholds float64 [P], positive int64 [P]): object mean > threshold, strictly.

    Exactness: means and thresholds are the bits of ``marker[labels == id].mean()`` and
        ``np.percentile(marker, q)``.
    """
    thresholds = np.percentile(marker, percentiles)
    means = label_statistics(labels, marker).means
    positive = (means[:, None] > thresholds).sum(axis=0)
    return len(means), thresholds, positive.astype(np.int64)


def network_segmenter(
    network: Network, thresholds: Thresholds
) -> tuple[Segmenter, dict[str, object]]:
    """A network as the segmenter of `infer`, and the settings that its masks depend on."""
    from .masks import compute_masks

    def segment(image: np.ndarray) -> np.ndarray:
        return compute_masks(
            network.flows(image),
            flow_threshold=thresholds.flow,
            cellprob_threshold=thresholds.cellprob,
            min_size=thresholds.min_size,
            device=network.device,
        )

    return segment, {**network.settings(), "thresholds": asdict(thresholds)}


def infer(
    tiles: str | Path,
    output: str | Path,
    segment: Segmenter,
    *,
    model: str,
    settings: Mapping[str, object],
    percentiles: Sequence[float] = PERCENTILES,
    positive: float = POSITIVE,
    naming: Naming | None = None,
    zero_dapi: bool = False,
    keep_masks: bool = False,
    shard: tuple[int, int] = (0, 1),
    limit: int | None = None,
    strict: bool = False,
    overwrite: bool = False,
    progress: Callable[[InferReport, int], None] | None = None,
    only: Set[str] | None = None,
    command: Command | None = None,
) -> InferReport:
    """Segments the tiles that are not committed yet and rebuilds ``tile_counts.tsv`` from all.

    SIGINT and SIGTERM end it after the tile in hand; a second one at once.

    A tile is done when its record, ``tiles/<name>.json``, is on disk, after its mask. The table
    is made anew from the records whenever a run ends, however it ends: it can be deleted, and
    one run leaves the bytes that any shards leave.

    Its columns: model; tile_key, tile_c0, tile_c1 (paths inside `tiles`); c2_fallback (1 where
    the marker is channel c2); donor, marker ("unknown" where the path does not say);
    n_total_cells; n_marker_positive (at `positive`); area_px; total_density_mpx and
    pos_density_mpx (per 1e6 pixels); ratio, empty without objects; and for every percentile q
    n_marker_positive_q<q> and threshold_q<q>, the marker's value at that percentile of the tile.

    Args:
        tiles: folder of channel files; see `find_tiles`.
        output: folder of one model's results.
        segment: the model; called from this thread, one tile after the other.
        model: its name in the table, such as "baseline".
        settings: JSON-ready, all that its masks depend on; part of the folder's signature.
        percentiles: of a tile's marker; an object is positive above one, strictly.
        positive: the one of `percentiles` that n_marker_positive stands for.
        naming: how marker and donor stand in a path.
        zero_dapi: feed 0 for DAPI, as a marker-only model was trained.
        keep_masks: keep ``pred_masks/<name>.tif``, uint16 or, above 65,535 objects, uint32. A
            committed tile without its mask is made again.
        shard: (i, n): only the tiles whose key falls to part i of n.
        limit: only the first tiles.
        strict: stop at the first tile that fails.
        overwrite: remove what the output folder holds and start afresh.
        progress: called with (report so far, tiles of this shard) after each tile.
        only: names of tiles' records: of what is not committed, make these and nothing else, as
            after damage. The summary stays as it is.
        command: gives this call again; it is recorded beside the settings, for
            ``fastembed verify --repair``.

    Returns:
        `InferReport`. A tile that cannot be read or segmented is counted in `failed` and stands
        with its reason in ``failures.jsonl``.

    Raises:
        ValueError: no tiles; percentiles out of range, twice, or without `positive`.
        FolderBusy: another run is segmenting the same tiles into this folder.
        SignatureMismatch: the folder holds results of other settings.
        TileFailed: a tile failed and `strict` was asked for.
        OSError: the disk failed; what was committed stays.
    """
    output, naming = Path(output), naming or Naming()
    percentiles = _as_percentiles(percentiles, positive)
    part, parts = shard
    if not 0 <= part < parts:
        raise ValueError(f"shard must be i/n with 0 <= i < n; got {part}/{parts}")
    if overwrite and parts > 1:
        raise ValueError("overwrite removes the outputs of all shards: run it once without shard")
    every = find_tiles(tiles, naming).tiles[:limit]
    if not every:
        raise ValueError(f"tiles: no pairs of channels c0 and c1, or c0 and c2, in {tiles}")
    suffix = "" if only is None else "-repair"
    suffix += "" if parts == 1 else f"-{part}-of-{parts}"
    stopping = threading.Event()
    with RunLock(output, shard), Interrupts(stopping.set):
        store = TileStore(output, keep_masks)
        if overwrite:
            store.remove_all()
        signature.claim(
            output,
            {
                "job": "cellpose infer",
                "model": model,
                "segmenter": dict(settings),
                "percentiles": percentiles,
                "positive": positive,
                "zero_dapi": zero_dapi,
            },
        )
        if command is not None:
            commands.record(output.resolve(), command)
        report = InferReport(
            total=len(every),
            table=str(output / TABLE),
            failures_file=str(output / f"{FAILURES}{suffix}.jsonl"),
        )
        Path(report.failures_file).unlink(missing_ok=True)
        done = store.open()
        mine = [tile for tile in every if as_item(tile).in_shard(part, parts)]
        todo = [tile for tile in mine if as_item(tile).name not in done]
        if only is not None:
            todo = [tile for tile in todo if as_item(tile).name in only]
        report.listed, report.already_done = len(mine), len(mine) - len(todo)

        start = time.perf_counter()
        try:
            for tile, reading in _ahead(_read, todo, _READERS):
                if stopping.is_set():
                    break
                try:
                    image, marker = reading.result()
                    if zero_dapi:
                        image[..., 0] = 0
                    labels = as_mask(np.asarray(segment(image)), "the segmenter's mask")
                    check_same_shape(image, labels, tile.key)
                    counts = count_positive(labels, marker, percentiles)
                except _TILE_ERRORS as error:
                    if isinstance(error, OSError) and error.errno in _MACHINE_ERRNOS:
                        raise
                    _fail(report, tile, error)
                    if strict:
                        raise TileFailed(f"{tile.key}: {_reason(error)}") from error
                else:
                    store.commit(tile, Path(tiles), labels, percentiles, counts)
                    report.embedded += 1
                    report.objects += counts[0]
                if progress is not None:
                    progress(report, report.listed)
        finally:
            report.seconds = time.perf_counter() - start
            keys = [tile.key for tile in every] if only is None else None
            report.committed = store.rebuild(model, positive, keys)
    return report


def rebuild(output: str | Path) -> int:
    """Makes ``tile_counts.tsv`` anew from the committed tiles of a folder; returns their number.

    Raises:
        OSError: the folder is none of `infer`'s.
        ValueError: a damaged record, by name.
    """
    output = Path(output)
    settings = json.loads((output / signature.FILE_NAME).read_text())["settings"]
    return TileStore(output, keep_masks=False).rebuild(
        settings["model"], settings["positive"], None
    )


def _as_percentiles(percentiles: Sequence[float], positive: float) -> list[float]:
    percentiles = [float(percentile) for percentile in percentiles]
    if not all(0 <= percentile <= 100 for percentile in percentiles):
        raise ValueError(f"percentiles must be in 0..100; got {percentiles}")
    names = [label_of(percentile) for percentile in percentiles]
    if len(set(names)) != len(names):
        raise ValueError(f"percentiles must be named once each; got {percentiles}")
    if label_of(positive) not in names:
        raise ValueError(f"positive must be one of percentiles {percentiles}; got {positive}")
    return percentiles


def _read(tile: Tile) -> tuple[np.ndarray, np.ndarray]:
    """[H, W, 3] and the marker [H, W]."""
    dapi, marker = read_plane(tile.dapi), read_plane(tile.image)
    if dapi.shape != marker.shape or dapi.dtype != marker.dtype:
        raise ValueError(
            f"DAPI and marker must be alike; found {dapi.dtype} {list(dapi.shape)} and "
            f"{marker.dtype} {list(marker.shape)}"
        )
    return np.stack([dapi, marker, np.zeros_like(dapi)], axis=-1), marker


def _ahead(
    function: Callable[[Tile], object], tiles: Iterable[Tile], workers: int
) -> Iterator[tuple[Tile, Future]]:
    """Each tile with its result to come, `workers` of them under way."""
    waiting: deque[tuple[Tile, Future]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="read") as pool:
        for tile in tiles:
            waiting.append((tile, pool.submit(function, tile)))
            if len(waiting) > workers:
                yield waiting.popleft()
        yield from waiting


def _fail(report: InferReport, tile: Tile, error: Exception) -> None:
    report.failed += 1
    record = {"key": tile.key, "path": str(tile.dapi), "reason": _reason(error)}
    with open(report.failures_file, "a", encoding="utf-8", opener=no_link) as stream:
        stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
