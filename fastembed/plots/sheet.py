"""A contact sheet: cells of tiles and captions in a grid, on as many pages as it takes."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..staging import write_bytes_atomically

TILE = 224
LARGEST = 4000  # pixels a side of a page
_SMALLEST = 980  # pixels of width, for the lines below the title

INK, QUIET, ACCENT = (32, 36, 43), (116, 122, 132), (0, 94, 162)
PAPER, DARK, LIGHT, EMPTY = (255, 255, 255), (26, 28, 33), (226, 229, 234), (244, 245, 247)

_MARGIN, _GAP, _SPACE = 32, 4, 24  # around the sheet, between tiles, between cells
_TITLE, _TEXT = 28, 18  # heights of type
_LINE = 24  # from line to line of a caption


@dataclass(frozen=True)
class Cell:
    """Tiles side by side, and lines of (text, colour) below them.

    Attributes:
        framed: an accent around the tiles.
    """

    tiles: Sequence[Image.Image]
    lines: Sequence[tuple[str, tuple[int, int, int]]]
    framed: bool = False


@dataclass(frozen=True)
class Layout:
    """The grid of a sheet: where everything goes, in pixels.

    Attributes:
        tiles: tiles of a cell.
        lines: lines of a caption.
        columns: cells of a row.
        notes: lines below the title.
    """

    tiles: int
    lines: int
    columns: int
    notes: int

    @property
    def cell_width(self) -> int:
        return self.tiles * (TILE + _GAP) - _GAP

    @property
    def cell_height(self) -> int:
        return TILE + 6 + self.lines * _LINE

    @property
    def top(self) -> int:
        """Of the first row."""
        return _MARGIN + _TITLE + 10 + self.notes * _LINE + _SPACE

    @property
    def width(self) -> int:
        cells = self.columns * (self.cell_width + _SPACE) - _SPACE
        return max(_SMALLEST, 2 * _MARGIN + cells)

    @property
    def rows(self) -> int:
        """Of a full page."""
        return (LARGEST - self.top - _MARGIN + _SPACE) // (self.cell_height + _SPACE)

    def height(self, rows: int) -> int:
        return self.top + rows * (self.cell_height + _SPACE) - _SPACE + _MARGIN

    def place(self, number: int, tile: int = 0) -> tuple[int, int]:
        """(left, top) of a tile of the cell `number` of a page."""
        row, column = divmod(number, self.columns)
        left = _MARGIN + column * (self.cell_width + _SPACE) + tile * (TILE + _GAP)
        return left, self.top + row * (self.cell_height + _SPACE)


def balanced_columns(count: int, tiles: int) -> int:
    """Columns that make a sheet of `count` cells about as wide as high, and no page too wide."""
    width = tiles * (TILE + _GAP) + _SPACE
    most = max(1, (LARGEST - 2 * _MARGIN) // width)
    return min(most, max(1, math.ceil(math.sqrt(1.3 * count * (TILE + 2 * _SPACE) / width))))


def pages(
    title: str,
    notes: Sequence[str],
    cells: Iterable[Cell],
    count: int,
    layout: Layout,
    font: str | Path | None = None,
) -> Iterator[Image.Image]:
    """The sheet, RGB, no side above 4000 pixels; one page is in memory at a time.

    Args:
        cells: `count` of them, row by row.
        font: a TrueType or OpenType file for names that Pillow's own font has no letters for.
    """
    large, small = (_typeface(font, size) for size in (_TITLE, _TEXT))
    cells, full = iter(cells), layout.rows * layout.columns
    total = max(1, math.ceil(count / full))
    for page in range(total):
        some = list(islice(cells, full))
        sheet = Image.new("RGB", (layout.width, layout.height(-(-len(some) // layout.columns))))
        sheet.paste(PAPER, (0, 0, *sheet.size))
        draw = ImageDraw.Draw(sheet)
        room = layout.width - 2 * _MARGIN
        ending = f", page {page + 1} of {total}" if total > 1 else ""
        draw.text((_MARGIN, _MARGIN - 6), shortened(title + ending, large, room), INK, large)
        for i, note in enumerate(notes):
            position = _MARGIN, _MARGIN + _TITLE + 10 + i * _LINE
            draw.text(position, shortened(note, small, room), QUIET, small)
        for number, cell in enumerate(some):
            _draw(sheet, draw, layout, number, cell, small)
        yield sheet


def model_name(engine: dict) -> str:
    """What a title says of the model, off the engine's settings; nothing where there are none."""
    random = str(engine.get("weights_id", "")).startswith("random")
    return engine.get("spec", "") + " with RANDOM weights" * random


def tile_of(pixels: np.ndarray | Image.Image, smooth: bool = False) -> Image.Image:
    """An image as large as a tile allows, its aspect kept, centred on a tile of paper.

    Args:
        pixels: [h, w, 3] uint8, or an RGB image.
        smooth: bilinear; else each pixel stays a block of one colour.
    """
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    size = tile_size(image.height, image.width)
    if image.size != size:
        filter = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
        image = image.resize(size, filter)
    if size == (TILE, TILE):
        return image
    tile = Image.new("RGB", (TILE, TILE), PAPER)
    tile.paste(image, ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
    return tile


def tile_size(height: int, width: int) -> tuple[int, int]:
    """(width, height) of an image of this shape in a tile."""
    longer = max(height, width)
    return max(1, round(TILE * width / longer)), max(1, round(TILE * height / longer))


def save_pages(sheets: Iterable[Image.Image], path: str | Path) -> list[Path]:
    """Writes pages as PNG: the first at `path`, then ``<stem>-2.png``, ``<stem>-3.png``, ...

    Raises:
        ValueError: `path` is no .png.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"a sheet is a .png file; got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for number, sheet in enumerate(sheets, 1):
        content = io.BytesIO()
        sheet.save(content, "PNG")
        target = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        write_bytes_atomically(target, content.getvalue())
        written.append(target)
    return written


def shortened(text: str, font: ImageFont.ImageFont, room: int) -> str:
    """`text` in one line of `room` pixels, cut in its middle where it is longer."""
    text = text.replace("\n", " ")
    if font.getlength(text) <= room:
        return text
    kept = len(text)
    while kept > 1 and font.getlength(_cut(text, kept)) > room:
        kept -= 1
    return _cut(text, kept)


def _cut(text: str, kept: int) -> str:
    return f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"


def _draw(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    layout: Layout,
    number: int,
    cell: Cell,
    font: ImageFont.ImageFont,
) -> None:
    left, top = layout.place(number)
    if cell.framed:
        frame = left - 5, top - 5, left + layout.cell_width + 4, top + TILE + 4
        draw.rectangle(frame, outline=ACCENT, width=3)
    for i, tile in enumerate(cell.tiles):
        sheet.paste(tile, layout.place(number, i))
    for i, (text, colour) in enumerate(cell.lines):
        line = shortened(text, font, layout.cell_width)
        draw.text((left, top + TILE + 6 + i * _LINE), line, colour, font)


def _typeface(font: str | Path | None, size: int) -> ImageFont.ImageFont:
    if font is None:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(str(font), size)
    except OSError as error:
        raise OSError(f"font must be a TrueType or OpenType file; {font}: {error}") from error
