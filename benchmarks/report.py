"""Writes a benchmark CSV into the README, as a table between its two markers.

python benchmarks/report.py benchmarks/results/NAME.csv
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- benchmark -->", "<!-- /benchmark -->"


def table(rows: list[dict[str, str]]) -> str:
    """Markdown, one line per contender of every stage; ops have their own CSV rows."""
    copy = next(row for row in rows if row["group"] == "copy probe")
    lines = [
        f"{copy['device']}; {copy['versions']}; {copy['date']}. Kernels on one thread, medians;",
        f"a memory copy in the same process moved {copy['gb_per_s']} GB/s, read plus written.",
        "",
        "| stage | way | input | ms | GB/s | img/s | times faster |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    stages = [r for r in rows if not r["group"].startswith(("op ", "copy"))]
    order = list(dict.fromkeys(row["group"] for row in stages))
    stages.sort(key=lambda row: (order.index(row["group"]), row["dtype"]))
    for row in stages:
        lines.append(
            f"| {row['group']} | {row['contender']} | {row['dtype'] or row['shape']} "
            f"| {float(row['p50_ms']):.2f} | {row['gb_per_s']} | {row['images_per_s']} "
            f"| {row['ratio']} |"
        )
    return "\n".join(lines)


def main(path: str) -> None:
    with open(path, newline="") as stream:
        rows = list(csv.DictReader(stream))
    text = README.read_text()
    before, rest = text.split(START)
    _, after = rest.split(END)
    README.write_text(f"{before}{START}\n{table(rows)}\n{END}{after}")


if __name__ == "__main__":
    main(sys.argv[1])
