"""What a folder of volumes holds: which are finished, how they went, whether they are sound."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from .chunks import ChunkedArray
from .files import (
    array_paths,
    checksum,
    finished,
    metadata_path,
    read_metadata,
    units,
    volume_name,
)

_TIMES = ("feature_extraction_seconds", "tensorstore_write_seconds", "total_seconds")


@dataclass
class Findings:
    """What `check` found; `well` says whether all is as it should be.

    Attributes:
        completed: indices of the finished volumes.
        missing: of those that were expected, the indices that are not finished.
        broken: by index, what is wrong with a finished volume.
        verified: indices whose chunks were read and compared.
        timing: mean, min, max and total seconds, by stage.
        storage_gb: total, mean per volume, and by kind of array.
        sources: how many volumes come from each source.
        configurations: each set of settings that was used, and by how many volumes.
        errors: of volumes that are not finished, the last error in their job's log.
    """

    folder: str
    completed: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    broken: dict[int, list[str]] = field(default_factory=dict)
    verified: list[int] = field(default_factory=list)
    timing: dict[str, dict[str, float]] = field(default_factory=dict)
    storage_gb: dict[str, float] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    configurations: list[dict] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)

    @property
    def well(self) -> bool:
        return bool(self.completed) and not self.missing and not self.broken

    def to_json(self) -> str:
        return json.dumps({"well": self.well, **asdict(self)}, indent=2)


def check(
    folder: str | Path,
    expected: Iterable[int] | None = None,
    *,
    verify: Sequence[int] | int | None = None,
    threads: int = 8,
    last_error: Callable[[Path], str | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Findings:
    """Looks through a folder of ``fastembed volumes preprocess``.

    Args:
        folder: the output folder.
        expected: indices that should be there; by default all from 0 to the largest there is.
        verify: read all chunks of these volumes, as far as they are finished, or of so many
            spread evenly over the finished ones, and compare them with the checksums of when
            they were written.
        threads: chunks that are read at a time.
        last_error: finds the last error in a job's log.
        progress: called with (chunks verified, chunks in all).

    Raises:
        OSError: the folder cannot be read.
    """
    folder = Path(folder).resolve()
    findings = Findings(str(folder))
    names = sorted(finished(folder))
    metadata: dict[int, dict] = {}
    for name in names:
        index = int(name.removeprefix("volume_"))
        findings.completed.append(index)
        try:
            metadata[index] = read_metadata(folder, name)
        except ValueError as error:
            findings.broken[index] = [str(error)]
            continue
        if lost := _lost_arrays(folder, metadata[index]):
            findings.broken[index] = lost
    findings.completed.sort()
    if expected is None:
        expected = range(max(findings.completed, default=-1) + 1)
    findings.missing = sorted(set(expected) - set(findings.completed))
    _summarise(findings, list(metadata.values()))
    for index in findings.missing:
        log = folder / "logs" / f"{volume_name(index)}.err"
        if last_error is not None and log.exists() and (error := last_error(log)):
            findings.errors[index] = error
    sound = [index for index in findings.completed if index not in findings.broken]
    for index in _chosen(verify, findings, sound):
        findings.verified.append(index)
    _verify(folder, findings, metadata, threads, progress)
    return findings


def set_aside(folder: str | Path, index: int) -> None:
    """Lets a damaged volume count as not finished: the next run makes it anew."""
    path = metadata_path(Path(folder), volume_name(index))
    path.replace(path.with_name(f"{path.name}.damaged"))


def _chosen(
    verify: Sequence[int] | int | None, findings: Findings, sound: Sequence[int]
) -> Sequence[int]:
    if verify is None:
        return []
    if isinstance(verify, int):
        count = min(verify, len(sound))
        return [sound[i * len(sound) // count] for i in range(count)]
    return sorted(set(verify) & set(sound))


def _lost_arrays(folder: Path, metadata: dict) -> list[str]:
    """Arrays that the metadata name and the folder lacks."""
    layout = metadata["configuration"].get("layout", "files")
    paths = array_paths(folder, metadata["volume_name"], layout)
    return [
        f"{kind}: there is no {paths[kind].relative_to(folder)}"
        for kind in metadata["paths"]
        if not any((paths[kind] / name).exists() for name in (".zarray", "zarr.json"))
    ]


def _summarise(findings: Findings, metadata: list[dict]) -> None:
    for stage in _TIMES:
        seconds = [m["timing"][stage] for m in metadata]
        if seconds:
            findings.timing[stage] = {
                "mean": statistics.fmean(seconds),
                "median": statistics.median(seconds),
                "min": min(seconds),
                "max": max(seconds),
                "total": sum(seconds),
            }
    for kind in ("features_gb", "gt_gb", "mask_gb", "total_gb"):
        findings.storage_gb[kind] = sum(m["storage"].get(kind, 0.0) for m in metadata)
    if metadata:
        findings.storage_gb["per_volume_gb"] = findings.storage_gb["total_gb"] / len(metadata)
    sources = Counter(
        m.get("source_dataset", {}).get("paths", {}).get("raw", "?") for m in metadata
    )
    findings.sources = dict(sources.most_common())
    texts = Counter(json.dumps(m["configuration"], sort_keys=True) for m in metadata)
    findings.configurations = [
        {"volumes": count, **json.loads(text)} for text, count in texts.most_common()
    ]


def _verify(
    folder: Path,
    findings: Findings,
    metadata: dict[int, dict],
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    total = sum(len(sums) for i in findings.verified for sums in metadata[i]["checksums"].values())
    done = 0
    # Chunks one after the other: each is read by all threads, so memory holds only one.
    with ThreadPoolExecutor(threads) as pool:
        for index in findings.verified:
            faults: list[str] = []
            for kind, key, fault in _faults(folder, metadata[index], pool, threads):
                done += 1
                if fault:
                    faults.append(f"{kind} chunk {key}: {fault}")
                if progress is not None:
                    progress(done, total)
            if faults:
                findings.broken[index] = faults


def _faults(folder: Path, metadata: dict, pool: ThreadPoolExecutor, threads: int):
    """(kind, chunk, what is wrong with it or "") of every chunk that was written."""
    configuration = metadata["configuration"]
    paths = array_paths(folder, metadata["volume_name"], configuration.get("layout", "files"))
    for kind, checksums in metadata["checksums"].items():
        try:
            array = ChunkedArray(paths[kind], threads)
        except (OSError, ValueError) as error:
            for key in checksums:
                yield kind, key, str(error)
            continue
        unit = array.shape
        if kind == "features":
            unit = configuration["shards"] or configuration["chunks"]
        for key, block in units(array.shape, unit):
            values = np.empty([part.stop - part.start for part in block], array.dtype)
            try:
                for future in array.read_into(values, block, pool):
                    future.result()
                fault = "" if checksum(values) == checksums.get(key) else "its checksum differs"
            except (OSError, ValueError) as error:
                fault = str(error)
            yield kind, key, fault
