"""Images of 16 bits per channel, of which Pillow has all bits only of grey: by imagecodecs and
tifffile."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from types import ModuleType

import numpy as np

from .png import SIGNATURE

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BITS, _SAMPLE_FORMAT = 258, 339
# What Pillow itself takes as one image's size before it calls it an attack.
_MOST_PIXELS = 2 * 89_478_485


def is_png16(start: bytes) -> bool:
    """Whether a file that starts so is a PNG of 16 bits per channel, and not grey without alpha."""
    return start.startswith(SIGNATURE) and start[24:25] == b"\x10" and start[25:26] != b"\0"


def is_tiff(start: bytes) -> bool:
    return start.startswith(_TIFF)


def is_tiff16(tags: Mapping[int, object]) -> bool:
    """Whether a page with these tags has 16-bit samples, of whatever kind."""
    bits = tags.get(_BITS, (1,))
    return 16 in (bits if isinstance(bits, tuple) else (bits,))


def read_png16(path: str | os.PathLike) -> np.ndarray:
    """A PNG of 16 bits per channel: [H, W, 2..4] uint8, grey or RGB, then alpha."""
    with open(path, "rb") as stream:
        content = stream.read()
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    _check_size(height, width)
    codecs = _package("imagecodecs", "PNG")
    try:
        return to_8_bits(codecs.png_decode(content))
    except RuntimeError as error:
        raise ValueError(f"not a readable photo: {error}") from error


def read_tiff16(path: str | os.PathLike, page: int | None = None) -> np.ndarray:
    """A TIFF page of 16 bits per channel: [H, W, 1..4] uint8, grey or RGB, then alpha.

    Without `page` the only one that is no reduced copy of another.

    Raises:
        ValueError: damaged, several pages, other samples or channels, or a package is missing.
    """
    tifffile = _package("tifffile", "TIFF")
    try:
        with tifffile.TiffFile(path) as tiff:
            if page is None:
                pages = [i for i, one in enumerate(tiff.pages) if not one.is_reduced]
                if len(pages) != 1:
                    raise ValueError(f"expected one image; found {len(pages)} in this TIFF file")
                page = pages[0]
            found = tiff.pages[page]
            _check_size(found.imagelength, found.imagewidth)
            if found.dtype != np.uint16:
                raise ValueError(f"expected 8 or 16 bits per channel; found {found.dtype} pixels")
            return _as_stored(found)
    except (OSError, ValueError, MemoryError):
        raise
    except Exception as error:  # the codecs have an exception each
        raise ValueError(f"not a readable photo: {type(error).__name__}: {error}") from error


def to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """v * 255 / 65535 of uint16, to the nearest."""
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _as_stored(page) -> np.ndarray:
    pixels = page.asarray()
    if page.planarconfig == 2 and pixels.ndim == 3:
        pixels = np.moveaxis(pixels, 0, -1)
    colours = {"MINISBLACK": 1, "MINISWHITE": 1, "RGB": 3}.get(page.photometric.name, 0)
    count = pixels.shape[2] if pixels.ndim == 3 else 1
    if not colours or count < colours or pixels.ndim not in (2, 3):
        raise ValueError(
            f"expected 16-bit grey or RGB; found {page.photometric.name} {list(pixels.shape)}"
        )
    alpha = page.extrasamples[0] if count > colours else 0  # 1: multiplied in already; 2: not
    pixels = pixels.reshape(*pixels.shape[:2], count)[..., : colours + (alpha in (1, 2))]
    orientation = page.tags.get(274)
    if orientation is not None and orientation.value != 1:
        pixels = _upright(pixels, orientation.value)
    if page.photometric.name == "MINISWHITE":
        pixels = pixels.copy()
        pixels[..., 0] = 65535 - pixels[..., 0]
    levels = to_8_bits(pixels)
    if alpha == 1:
        opacity = np.maximum(pixels[..., -1:].astype(np.float64), 1) / 65535
        colour = np.minimum(pixels[..., :-1] / opacity, 65535).round().astype(np.uint16)
        levels[..., :-1] = to_8_bits(colour)
    return levels


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What TIFF's orientation 2..8 says of rows and columns, undone."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    return pixels[
        :: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1
    ]


def _check_size(height: int, width: int) -> None:
    if height * width > _MOST_PIXELS:
        raise ValueError(f"not a readable photo: {height} x {width} pixels are too many")


def _package(name: str, kind: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"16 bits per channel in a {kind} need {name}: pip install 'fastembed-vision[images]'"
        ) from error
