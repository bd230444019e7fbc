"""Folders of ``fastembed volumes preprocess``: its own check, with every chunk read."""

from __future__ import annotations

import sys
from pathlib import Path

from ..volumes.check import check, set_aside
from ..volumes.files import METADATA, finished, metadata_path, read_metadata, volume_name
from .cache import Effort, Progress
from .findings import DAMAGED, TEMPORARY, Verdict


class VolumesOf:
    """Volumes: their metadata are the index, and have the checksums of all chunks."""

    form = "volumes"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check(self, effort: Effort, progress: Progress | None) -> Verdict:
        """Looks; changes nothing."""
        verify = None if effort.quick else effort.sample or sys.maxsize
        found = check(self.folder, verify=verify, threads=effort.threads, progress=progress)
        verdict = Verdict(
            str(self.folder), self.form, f"{self.folder}/volume_*{METADATA}", len(found.completed)
        )
        for index in found.verified:
            metadata = read_metadata(self.folder, volume_name(index))
            verdict.verified += sum(map(len, metadata["checksums"].values()))
            verdict.bytes += round(metadata["storage"]["total_gb"] * 1e9)
        verdict.files = verdict.verified
        for index, faults in sorted(found.broken.items()):
            name = volume_name(index)
            for fault in faults:
                verdict.add(DAMAGED, name, fault, [name])
            if index in found.verified:
                verdict.verified -= len(faults)
        if found.missing:
            verdict.notes.append(f"not finished, of 0 to the last there is: {found.missing}")
        for path in sorted(self.folder.glob(f".volume_*{METADATA}.written")):
            verdict.add(TEMPORARY, path.name, "written, and not put in place")
        return verdict

    def withdraw(self, verdict: Verdict) -> set[str]:
        """Lets the damaged volumes count as not finished."""
        for name in verdict.to_make:
            set_aside(self.folder, int(name.removeprefix("volume_")))
        for finding in verdict.findings:
            if finding.kind == TEMPORARY:
                (self.folder / finding.name).unlink(missing_ok=True)
        return verdict.to_make

    def committed(self) -> set[str]:
        """Names of the volumes that are finished."""
        return finished(self.folder)

    def tidy(self) -> None:
        """Deletes the metadata of damaged volumes that have been made again."""
        for name in finished(self.folder):
            path = metadata_path(self.folder, name)
            path.with_name(f"{path.name}.damaged").unlink(missing_ok=True)
