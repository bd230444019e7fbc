"""Where a section's numbers come from and where its tables and figures go."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ..tables import read_tsv, write_tsv
from .page import Section, Table


class Writer:
    """Reads a study's folder, writes a report's, and fills one section after the other."""

    def __init__(self, study: Path, output: Path, plots) -> None:
        self.study, self.output, self.plots = study, output, plots
        self.section: Section
        for name in ("figures", "tables"):
            (output / name).mkdir(parents=True, exist_ok=True)

    def run(self, name: str, title: str, question: str, build: Callable) -> Section:
        self.section = Section(name, title, question)
        try:
            build(self)
        except (ValueError, KeyError, TypeError) as error:  # of a file that is not what it says
            text = str(error) if isinstance(error, ValueError) else repr(error)
            self.section.missing.append(f"the rest cannot be shown: {text}")
        return self.section

    def find(self, pattern: str, made_by: str) -> list[Path]:
        """Files of the study; where there are none, that they are missing is noted."""
        found = sorted(path for path in self.study.glob(pattern) if path.is_file())
        if not found:
            self.section.missing.append(f"{pattern} (fastembed cellpose {made_by} makes it)")
        return found

    def tsv(self, pattern: str, made_by: str) -> list[dict[str, str]]:
        """Rows of all such files, one after the other."""
        return [row for path in self.find(pattern, made_by) for row in self._rows(path)]

    def _rows(self, path: Path) -> list[dict[str, str]]:
        rows = read_tsv(path)
        if not rows:
            self.section.missing.append(f"{path.relative_to(self.study)} has no rows")
        return rows

    def json(self, path: Path) -> dict:
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path.relative_to(self.study)} is damaged: {error}") from error

    def table(
        self,
        name: str,
        caption: str,
        rows: list[dict],
        columns: Sequence[str] = (),
        shown: list[dict] | None = None,
    ) -> None:
        """A TSV of all columns; the page has `columns` of them, or of `shown` instead."""
        if rows:
            write_tsv(self.output / "tables" / f"{name}.tsv", rows)
            self.section.tables.append(Table(name, caption, shown or rows, tuple(columns)))

    def figure(self, name: str, caption: str, figure) -> None:
        self.plots.save(figure, self.output / "figures" / name)
        self.section.figures.append((name, caption))
