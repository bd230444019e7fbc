"""Figures of a segmentation study, drawn with matplotlib from the rows of its tables.

Each takes plain numbers and gives a `matplotlib.figure.Figure`; `save` writes it as PNG and PDF.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..staging import write_bytes_atomically

try:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("figures need matplotlib: pip install 'fastembed-vision[plots]'") from error

# Okabe and Ito's colours, which those who see fewer colours tell apart; the first is the house's.
COLOURS = ("#005ea2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DPI = 160
INK, QUIET = "#20242b", "#747a84"
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e2e5ea",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # letters stay letters
}


def save(figure: Figure, path: Path) -> None:
    """`path` with .png and .pdf: the same bytes for the same numbers."""
    for suffix, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None})):
        content = io.BytesIO()
        with rc_context(_STYLE):
            figure.savefig(content, format=suffix[1:], dpi=DPI, metadata=metadata)
        write_bytes_atomically(path.with_suffix(suffix), content.getvalue())


def bars(
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    intervals: Mapping[str, Sequence[tuple[float | None, float | None]]] | None = None,
    *,
    title: str,
    ylabel: str,
    top: float | None = 1.0,
) -> Figure:
    """A cluster of bars per group, one bar per series, with its value and its interval.

    Args:
        series: a number for each group; NaN is a bar that is not there.
        intervals: (low, high) of each, (None, None) where there is none.
    """
    with rc_context(_STYLE):
        width = max(5.0, 1.2 + 0.42 * len(groups) * (len(series) + 0.8))
        figure = Figure(figsize=(min(width, 11), 3.4), layout="constrained")
        axes = figure.add_subplot()
        step = 0.84 / max(len(series), 1)
        for i, (name, values) in enumerate(series.items()):
            values = np.asarray(values, dtype=float)
            at = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * step
            axes.bar(at, values, 0.9 * step, color=COLOURS[i % len(COLOURS)], label=name)
            tops = values.copy()
            for j, (low, high) in enumerate((intervals or {}).get(name, [])):
                if low is not None and high is not None and np.isfinite(values[j]):
                    axes.plot([at[j]] * 2, [low, high], color=INK, lw=1, solid_capstyle="butt")
                    tops[j] = max(tops[j], high)
            for x, y, value in zip(at, tops, values, strict=True):
                if np.isfinite(value):
                    axes.annotate(
                        f"{value:.2f}", (x, y), (0, 2), textcoords="offset points",
                        ha="center", va="bottom", fontsize=7, color=QUIET,
                    )  # fmt: skip
        axes.set_xticks(np.arange(len(groups)), groups)
        axes.set_xlim(-0.6, len(groups) - 0.4)
        axes.grid(axis="x", visible=False)
        axes.set_ylim(0, None if top is None else 1.08 * top)
        axes.set(title=title, ylabel=ylabel)
        if len(series) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0)
    return figure


def heatmaps(
    panels: Mapping[str, np.ndarray],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    xlabel: str = "",
    ylabel: str = "",
    diverging: bool = False,
    marked: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    mark: str = "frame",
) -> Figure:
    """Tables of numbers as colours, one panel each, on one scale, with the numbers in them.

    Args:
        panels: [rows, columns] by title; NaN is an empty cell.
        diverging: colours around 0, to 0.5 at least on either side, so that little looks little;
            else from the lowest to the highest.
        marked: cells (row, column) that stand out in each panel.
        mark: "frame", or "star" after the number.
    """
    with rc_context({**_STYLE, "axes.grid": False}):
        across = min(len(panels), 2 if len(columns) > 3 else 3)
        down = -(-len(panels) // across)
        cell = 0.62
        size = (
            max(4.2, across * (1.1 + cell * len(columns)) + 0.9),
            down * (0.95 + 0.34 * len(rows)) + 0.5,
        )
        figure = Figure(figsize=size, layout="constrained")
        every = np.concatenate([np.ravel(panel) for panel in panels.values()])
        finite = every[np.isfinite(every)]
        if diverging:
            limit = max(0.5, np.abs(finite).max(initial=0))
            low, high, colours = -limit, limit, "RdBu_r"
        else:
            low, high, colours = finite.min(initial=1), finite.max(initial=0), "Blues"
            if low >= high:  # all alike: no colour means more than another
                low, high = min(0, low), max(1, high)
        grid = figure.subplots(down, across, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (name, panel) in zip(grid.flat, panels.items(), strict=False):
            image = axes.imshow(
                np.ma.masked_invalid(panel), cmap=colours, vmin=low, vmax=high, aspect="auto"
            )
            stands_out = set((marked or {}).get(name, ()))
            for (i, j), value in np.ndenumerate(panel):
                if not np.isfinite(value):
                    axes.text(j, i, "-", ha="center", va="center", color=QUIET)
                    continue
                share = abs(value) / limit if diverging else (value - low) / max(high - low, 1e-12)
                star = "*" if mark == "star" and (i, j) in stands_out else ""
                axes.text(
                    j, i, f"{value:.2f}{star}", ha="center", va="center", fontsize=7.5,
                    color="white" if share > 0.62 else INK,
                    fontweight="bold" if (i, j) in stands_out else "normal",
                )  # fmt: skip
            if mark == "frame":
                for i, j in stands_out:
                    axes.add_patch(_frame(i, j))
            axes.set_xticks(range(len(columns)), columns, rotation=30 if _long(columns) else 0,
                            ha="right" if _long(columns) else "center")  # fmt: skip
            axes.set_yticks(range(len(rows)), rows)
            axes.tick_params(length=0)
            axes.set(title=name, xlabel=xlabel, ylabel=ylabel)
            for spine in axes.spines.values():
                spine.set_visible(False)
        figure.colorbar(image, ax=list(grid.flat), shrink=0.85, pad=0.02, aspect=25)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    return figure


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    ylim: tuple[float | None, float | None] = (0, None),
    log: bool = False,
    zero: bool = False,
) -> Figure:
    """Lines of (x, y) by name, and points of single measurements under the same names."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for i, (name, (x, y)) in enumerate(series.items()):
            colour = COLOURS[i % len(COLOURS)]
            style = "-" if i < len(COLOURS) else "--"
            axes.plot(x, y, f"o{style}", color=colour, ms=4, lw=1.6, label=name)
            if points and name in points:
                axes.plot(*points[name], "o", color=colour, ms=3.5, alpha=0.35, mew=0)
        ticks = sorted({x for xs, _ in series.values() for x in xs})
        if log and ticks and ticks[0] > 0:
            axes.set_xscale("log")
        if 1 < len(ticks) <= 8:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        if zero:
            axes.axhline(0, color=QUIET, lw=0.8)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel, ylim=ylim)
        if len(series) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0)
    return figure


def forest(
    names: Sequence[str],
    series: Mapping[str, Sequence[tuple[float, float | None, float | None]]],
    *,
    title: str,
    xlabel: str,
) -> Figure:
    """(value, low, high) of every name, a row each, series beside each other in the row."""
    with rc_context(_STYLE):
        height = 1.0 + 0.13 * len(names) * (1 + len(series))
        figure = Figure(figsize=(6.4, max(2.6, height)), layout="constrained")
        axes = figure.add_subplot()
        step = 0.6 / max(len(series), 1)
        for i, (label, values) in enumerate(series.items()):
            colour = COLOURS[i % len(COLOURS)]
            at = np.arange(len(names)) + (i - (len(series) - 1) / 2) * step
            axes.plot([value for value, _, _ in values], at, "o", color=colour, ms=4, label=label)
            for y, (_, low, high) in zip(at, values, strict=True):
                if low is not None and high is not None:
                    axes.plot([low, high], [y, y], color=colour, lw=1.2)
        axes.axvline(0, color=QUIET, lw=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(-1.02, 1.02)
        axes.set(title=title, xlabel=xlabel)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0)
    return figure


def pairs(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
) -> Figure:
    """(x, y) of every test, a colour per name, with the diagonal where both are alike."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 3.8), layout="constrained")
        axes = figure.add_subplot()
        every = np.concatenate([np.ravel(part) for xy in points.values() for part in xy])
        low, high = min(0, every.min(initial=0)), 1.05 * every.max(initial=0) or 1
        axes.plot([low, high], [low, high], color=QUIET, lw=0.8)
        for i, (name, (x, y)) in enumerate(points.items()):
            axes.plot(x, y, "o", color=COLOURS[i % len(COLOURS)], ms=4, alpha=0.75, label=name)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel, xlim=(low, high), ylim=(low, high))
        axes.set_box_aspect(1)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0)
    return figure


def _frame(row: int, column: int):
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=COLOURS[1], lw=2)


def _long(names: Sequence[str]) -> bool:
    return max((len(name) for name in names), default=0) > 7
