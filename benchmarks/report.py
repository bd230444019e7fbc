"""Writes a benchmark CSV into the README, as a table between its two markers and as a plot.

python benchmarks/report.py benchmarks/results/NAME.csv    (needs the extra `plots`)
"""

from __future__ import annotations

import csv
import itertools
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- benchmark -->", "<!-- /benchmark -->"


# Rows that are for whoever works on a kernel: they stay in the CSV.
_DETAILS = (
    "reference", "numba torch", "native torch", "native,", "Pillow, rgb2id", "engine fp32",
    "engine torch fp32",
)  # fmt: skip


def stages(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows that the README shows: the pipeline's stages in order, the crops, the models; of
    each the plain way, the fastest that is not ours, and the fastest that is."""
    rows = [
        row
        for row in rows
        if not row["group"].startswith(("op ", "copy", "percentile_quantize in"))
        and not row["group"].endswith("prepared input")
        and not row["contender"].startswith(_DETAILS)
    ]
    order = list(dict.fromkeys(row["group"] for row in rows))
    order.sort(key=lambda group: (":" in group, group.startswith(("crop", "panoptic"))))
    rows.sort(key=lambda row: (order.index(row["group"]), row["dtype"] if ":" not in row["group"]
                               else ""))  # fmt: skip
    kept = []
    for _, stage in itertools.groupby(rows, key=_stage):
        stage = list(stage)
        plain = [row for row in stage if row["ratio"] and float(row["ratio"]) == 1]
        rivals = [row for row in stage if not _is_ours(row["contender"]) and row not in plain]
        ours = [row for row in stage if _is_ours(row["contender"])]
        kept += plain + _fastest(rivals) + _fastest(ours)
    return kept


def _stage(row: dict[str, str]) -> tuple[str, str]:
    """Whose rows are compared: of one group, and of one kind of input where it has several."""
    models = ":" in row["group"]
    return row["group"], "" if models else row["dtype"]


def _fastest(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [min(rows, key=lambda row: float(row["p50_ms"]))] if rows else []


def table(rows: list[dict[str, str]], picture: Path) -> str:
    """Markdown: the plot, then one line per stage."""
    copy = next(row for row in rows if row["group"] == "copy probe")
    lines = [
        f"![times faster than the plain way]({picture.relative_to(README.parent)})",
        "",
        f"{copy['device']}; {copy['versions']}; {copy['date']}. Kernels on one thread, medians;",
        f"a memory copy in the same process moved {copy['gb_per_s']} GB/s, read plus written.",
        "",
        "| stage | input | plain way, ms | best other, ms | ours, ms | times faster |",
        "|---|---|---|---|---|---:|",
    ]
    for (group, _), stage in itertools.groupby(stages(rows), key=_stage):
        plain, *others, ours = stage
        cells = [_cell(plain), *map(_cell, others or [None]), _cell(ours)]
        kind = ours["dtype"] or ours["shape"]
        lines.append(f"| {group} | {kind} | {' | '.join(cells)} | {ours['ratio']} |")
    return "\n".join(lines)


def _cell(row: dict[str, str] | None) -> str:
    return f"{row['contender']}: {float(row['p50_ms']):.3g}" if row else ""


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Bars: how many times faster each contender is than the plain way of its stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in stages(rows) if row["ratio"] and float(row["ratio"]) != 1]
    labels = [
        f"{row['group']}, {row['dtype'] or row['shape']}: {row['contender']}" for row in shown
    ]
    ratios = [float(row["ratio"]) for row in shown]
    figure, axes = pyplot.subplots(figsize=(10, 0.3 * len(shown) + 1.2), layout="constrained")
    colours = ["#2a6fbb" if _is_ours(row["contender"]) else "#9a9a9a" for row in shown]
    bars = axes.barh(labels, [ratio - 1 for ratio in ratios], left=1, color=colours)
    axes.bar_label(bars, [f"{ratio:.3g}x" for ratio in ratios], padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.15, y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("times faster than the plain way; grey: not ours")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _is_ours(contender: str) -> bool:
    ours = (
        "numba",
        "native",
        "reference",
        "recipe",
        "engine",
        "read_channels",
        "write",
        "NpyPerPart",
    )
    return contender.startswith(ours)


def main(path: str) -> None:
    source = Path(path).resolve()
    with source.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    picture = source.with_suffix(".png")
    plot(rows, picture)
    before, rest = README.read_text().split(START)
    _, after = rest.split(END)
    README.write_text(f"{before}{START}\n{table(rows, picture)}\n{END}{after}")


if __name__ == "__main__":
    main(sys.argv[1])
