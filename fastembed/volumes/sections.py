"""A stack of 2D sections as one lazily readable array: a folder of files, or one TIFF."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorstore as ts
import tifffile
from PIL import Image

SUFFIXES = (".tif", ".tiff", ".png")


def section_files(folder: Path) -> list[Path]:
    """The folder's sections in the order that a person counts: z2 before z10."""
    files = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    ]
    return sorted(files, key=lambda path: _natural(path.name))


def open_sections(path: Path, context: ts.Context) -> ts.TensorStore:
    """[z, y, x] of a folder's sections or of a TIFF's pages; a section is decoded when it is read.

    Raises:
        ValueError: no section, or one that is not a 2D grey image.
        OSError: a file cannot be read.
    """
    if path.is_dir():
        files = section_files(path)
        if not files:
            raise ValueError(f"{path} has no sections: no file {', '.join(SUFFIXES)}")
        count, read = len(files), lambda z: _read_section(files[z])
    else:
        count = _count_pages(path)
        read = lambda z: _read_page(path, z)  # noqa: E731
    first = read(0)
    return ts.virtual_chunked(
        _reader(read, first.shape, first.dtype, path),
        dtype=ts.dtype(first.dtype.newbyteorder("=").name),
        shape=[count, *first.shape],
        chunk_layout=ts.ChunkLayout(read_chunk_shape=[1, *first.shape]),
        context=context,
    )


def _reader(
    read: Callable[[int], np.ndarray], shape: tuple[int, ...], dtype: np.dtype, path: Path
) -> Callable:
    def fill(domain: ts.IndexDomain, out: np.ndarray, parameters: object) -> None:
        (z0, z1), (y0, y1), (x0, x1) = ((d.inclusive_min, d.exclusive_max) for d in domain)
        for z in range(z0, z1):
            section = read(z)
            if section.shape != shape or section.dtype != dtype:
                raise ValueError(
                    f"{path}: section {z} must be {dtype} {list(shape)} like the first; "
                    f"it is {section.dtype} {list(section.shape)}"
                )
            out[z - z0] = section[y0:y1, x0:x1]

    return fill


def _read_section(path: Path) -> np.ndarray:
    if path.suffix.lower() == ".png":
        try:
            with Image.open(path) as image:
                return _grey(np.asarray(image), path)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"{path} is not a readable PNG: {error}") from error
    return _read_page(path, 0)


def _read_page(path: Path, page: int) -> np.ndarray:
    try:
        with tifffile.TiffFile(path) as tiff:
            return _grey(tiff.pages[page].asarray(), path)
    except OSError:
        raise
    except Exception as error:  # a damaged file raises anything from struct.error to KeyError
        raise ValueError(f"{path} is not a readable TIFF: {error}") from error


def _count_pages(path: Path) -> int:
    try:
        with tifffile.TiffFile(path) as tiff:
            count = len(tiff.pages)
            if tiff.series and int(np.prod(tiff.series[0].shape[:-2])) > count:
                raise ValueError("it has more planes than pages (ImageJ's form above 4 GB)")
            return count
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a readable TIFF: {error}") from error


def _grey(section: np.ndarray, path: Path) -> np.ndarray:
    if section.ndim != 2:
        raise ValueError(f"{path} must be one 2D grey section; it is {list(section.shape)}")
    return section


def _natural(name: str) -> list[tuple[int, int | str]]:
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]
