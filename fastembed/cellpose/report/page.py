"""Sections of tables and figures as one HTML page that needs nothing from elsewhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

DPI = 160  # of `plots.study`
_LONG = 24  # rows from which a table is folded


@dataclass(frozen=True)
class Table:
    """Rows under a caption; `name` is that of its TSV, where all columns are."""

    name: str
    caption: str
    rows: list[dict]
    columns: tuple[str, ...] = ()


@dataclass
class Section:
    """One experiment: its question, what answers it, and what is not there to answer it."""

    name: str
    title: str
    question: str
    tables: list[Table] = field(default_factory=list)
    figures: list[tuple[str, str]] = field(default_factory=list)  # (file stem, caption)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        if not self.tables and not self.figures:
            return "missing"
        return "in part" if self.missing else "complete"


def render(title: str, subtitle: str, sections: Sequence[Section], figures: Path) -> str:
    """The page; figures are read from ``<figures>/<stem>.png`` and stand in it as data."""
    overview = "".join(
        f'<li><a href="#{section.name}">{_escape(section.title)}</a> '
        f'<span class="{section.state.replace(" ", "-")}">{section.state}</span></li>'
        for section in sections
    )
    body = "".join(_section(section, figures) for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escape(title)}</title><style>{_CSS}</style></head><body><main>"
        f'<h1>{_escape(title)}</h1><p class="quiet">{_escape(subtitle)}</p>'
        f"<nav><ul>{overview}</ul></nav>{body}</main></body></html>\n"
    )


def _section(section: Section, figures: Path) -> str:
    parts = [
        f'<section id="{section.name}"><h2>{_escape(section.title)}</h2>'
        f"<p>{_escape(section.question)}</p>"
    ]
    parts += [f'<p class="missing-note">Missing: {_escape(text)}</p>' for text in section.missing]
    parts += [f'<p class="note">{_escape(text)}</p>' for text in section.notes]
    for stem, caption in section.figures:
        content = (figures / f"{stem}.png").read_bytes()
        data = base64.b64encode(content).decode()
        # As large as the PDF, so that letters are of one size in all figures.
        width = int.from_bytes(content[16:20], "big") * 96 // DPI
        parts.append(
            f'<figure><img alt="{_escape(caption)}" width="{width}" '
            f'src="data:image/png;base64,{data}">'
            f"<figcaption>{_escape(caption)} <span class='quiet'>figures/{_escape(stem)}.pdf"
            "</span></figcaption></figure>"
        )
    parts += [_table(table) for table in section.tables]
    return "".join(parts) + "</section>"


def _table(table: Table) -> str:
    columns = table.columns or tuple(table.rows[0])
    cells = [_column([row.get(name, "") for row in table.rows]) for name in columns]
    numeric = [kind for kind, _ in cells]
    head = "".join(
        f"<th{kind}>{_escape(name)}</th>" for name, kind in zip(columns, numeric, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{_escape(t)}</td>" for kind, t in zip(numeric, row, strict=True))
        + "</tr>"
        for row in zip(*(texts for _, texts in cells), strict=True)
    )
    grid = (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
    file = f"<span class='quiet'>tables/{_escape(table.name)}.tsv</span>"
    caption = f"{_escape(table.caption)} {file}"
    if len(table.rows) < _LONG:
        return f'<p class="caption">{caption}</p>{grid}'
    return f"<details><summary>{caption} ({len(table.rows)} rows)</summary>{grid}</details>"


def _column(values: Sequence[object]) -> tuple[str, list[str]]:
    """Attributes of a column's cells, and their texts: numbers right, with as many decimals."""
    texts = [str(value) for value in values]
    there = [text for text in texts if text]
    try:
        numbers = [float(text) for text in there]
    except ValueError:
        return "", texts
    if not there:
        return "", texts
    decimals = max(len(text.partition(".")[2]) for text in there)
    if decimals > 2 or any("e" in text for text in there):
        shown = {
            text: _number(number, min(decimals, 4))
            for text, number in zip(there, numbers, strict=True)
        }
        texts = [shown.get(text, text) for text in texts]
    return ' class="number"', texts


def _number(number: float, decimals: int) -> str:
    return f"{number:.2e}" if number != 0 and abs(number) < 1e-4 else f"{number:.{decimals}f}"


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


_CSS = """
:root{color-scheme:light}
body{margin:0;background:#fff;color:#20242b;font:15px/1.55 system-ui,-apple-system,"Segoe UI",
"DejaVu Sans",sans-serif}
main{max-width:1020px;margin:0 auto;padding:32px 24px 80px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:20px;margin:0 0 4px}
section{border-top:1px solid #e2e5ea;margin-top:40px;padding-top:24px}
nav ul{list-style:none;padding:0;margin:20px 0 0;display:grid;gap:4px 24px;
grid-template-columns:repeat(auto-fill,minmax(300px,1fr))}
a{color:#005ea2;text-decoration:none}a:hover{text-decoration:underline}
nav span{font-size:12px;padding:1px 7px;border-radius:9px;margin-left:4px}
.complete{background:#e3f3ea;color:#0b6b3a}.in-part{background:#fdf1dc;color:#8a5a00}
.missing{background:#f4f5f7;color:#747a84}
.quiet{color:#747a84;font-size:13px}.note{margin:4px 0;font-size:14px}
.missing-note{background:#fdf1dc;border-left:3px solid #e69f00;padding:6px 12px;margin:8px 0;
font-size:14px}
figure{margin:20px 0}img{max-width:100%;height:auto;display:block}
figcaption,.caption{font-size:14px;margin:8px 0 6px}.caption{margin-top:22px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:4px 10px;text-align:left;border-bottom:1px solid #e2e5ea;white-space:nowrap}
th{color:#747a84;font-weight:600;border-bottom-color:#b9bec7}
td{vertical-align:top}th.number,td.number{text-align:right}
details{margin:16px 0}summary{cursor:pointer;font-size:14px}
@media print{main{max-width:none}details{display:block}}
"""
