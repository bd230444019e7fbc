"""Folders of ``fastembed cellpose infer``: a record per tile, its mask, and tables of them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import tifffile

from ..cellpose.infer import rebuild
from ..cellpose.tables import tsv_bytes
from ..cellpose.tile_store import MASKS, RECORDS, SUMMARY, TABLE, TileStore
from ..checksums import Checksum
from .cache import Effort, Progress, set_aside
from .files import Fault, FileCache, Form, Row
from .findings import MISSHAPEN, STALE, TEMPORARY, Verdict


class TilesOf(FileCache):
    """The records are the index: a tile is done when its record is there.

    Args:
        folder: of one model's results.
        settings: of the folder; empty where they are damaged.
    """

    form = "cellpose infer"
    deep = True

    def __init__(self, folder: Path, settings: dict) -> None:
        super().__init__(folder, None)
        self.settings = settings

    def check(self, effort: Effort, progress: Progress | None) -> Verdict:
        """Looks; changes nothing."""
        verdict = super().check(effort, progress)
        verdict.index = f"{self.folder / RECORDS}/*.json"
        self._tell_table(verdict)
        self._tell_summary(verdict)
        return verdict

    def _tell_table(self, verdict: Verdict) -> None:
        if not self.settings:
            return
        try:
            rows = TileStore(self.folder, keep_masks=False).table(
                self.settings["model"], self.settings["positive"]
            )
        except ValueError:  # a damaged record, which has a finding
            return
        path = self.folder / TABLE
        if (path.read_bytes() if path.exists() else b"") != (tsv_bytes(rows) if rows else b""):
            verdict.add(STALE, TABLE, "it is not the table of the records")

    def _tell_summary(self, verdict: Verdict) -> None:
        try:
            committed = json.loads((self.folder / SUMMARY).read_bytes())["n_committed"]
            fault = "" if committed == len(self._rows) else f"it tells of {committed} tiles"
        except (OSError, ValueError, KeyError, TypeError) as error:
            fault = f"it cannot be read ({type(error).__name__})"
        if fault:
            verdict.add(STALE, SUMMARY, f"{fault}; the next run over all tiles makes it anew")

    def _read_rows(self, verdict: Verdict) -> dict[str, Row]:
        self._rows = {name: (name,) for name in self.committed()}
        return self._rows

    def name_of(self, row: Row) -> str:
        return row[0]

    def fault_of_row(self, row: Row) -> str:
        return ""

    def files_of(self, name: str, listed: Mapping[str, Checksum]) -> list[str]:
        # Masks are kept where a run was asked to.
        mask = f"{MASKS}/{name}.tif"
        return [f"{RECORDS}/{name}.json", *([mask] if mask in listed else [])]

    def owner_of(self, file: str, there: set[str], listed: Mapping[str, Checksum]) -> str | None:
        path = Path(file)
        if (path.parent.as_posix(), path.suffix) in ((RECORDS, ".json"), (MASKS, ".tif")):
            return path.stem
        return None

    def look(self, file: str, content: bytes, trusted: bool) -> Form:
        if trusted:
            return ()
        if file.endswith(".json"):
            record = json.loads(content)
            if not isinstance(record, dict) or "n_total_cells" not in record:
                raise ValueError("it is not the record of a tile")
            return ()
        try:
            mask = tifffile.imread(io.BytesIO(content))
        except Exception as error:  # tifffile raises whatever its codecs do
            raise ValueError(f"not a readable TIFF: {error}") from error
        if mask.ndim != 2 or mask.dtype.kind != "u":
            raise ValueError(Fault(MISSHAPEN, f"it is {mask.dtype} {list(mask.shape)}, no mask"))
        return ()

    def _is_apart(self, file: str) -> bool:
        return file in (TABLE, SUMMARY) or super()._is_apart(file)

    # Repairing -------------------------------------------------------------------------

    def withdraw(self, verdict: Verdict) -> set[str]:
        """Records first: a record without its mask would be worse than a mask without a record."""
        for name in sorted(verdict.to_make):
            set_aside(self.folder, f"{RECORDS}/{name}.json")
            set_aside(self.folder, f"{MASKS}/{name}.tif")
        for finding in verdict.findings:
            if finding.kind == TEMPORARY:
                (self.folder / finding.name).unlink(missing_ok=True)
        return verdict.to_make

    def committed(self) -> set[str]:
        """Names of the tiles that have a record."""
        paths = (self.folder / RECORDS).glob("*.json")
        return {path.stem for path in paths if not path.name.startswith(".")}

    def tidy(self) -> None:
        """Makes the table anew, drops what was set aside and is there again."""
        super().tidy()
        if self.settings:
            rebuild(self.folder)
