"""TSV and JSON files, whole or not there: a killed run leaves no half of one."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from ..staging import write_bytes_atomically


def write_tsv(path: Path, rows: Sequence[dict]) -> None:
    """One line per row, under the keys of all of them in order of appearance.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError(f"{path}: a table needs at least one row")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomically(path, tsv_bytes(rows))


def tsv_bytes(rows: Sequence[dict]) -> bytes:
    """What `write_tsv` writes."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def read_tsv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
