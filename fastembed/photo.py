"""Photographs, in whatever form cameras and scrapers left them, as RGB."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from stat import S_ISREG

import numpy as np
from PIL import Image

from . import deep
from .records import Picture

# Of these Pillow's conversion to RGB keeps 8 bits as they are. 16-bit grey it would clip at 255.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_PHOTOMETRIC = 262
_SUBFILE_TYPE = 254  # bit 0: a reduced copy of another page
_REDUCED = 1


def read_rgb(path: str | os.PathLike) -> np.ndarray:
    """A photograph as its file has it: [H, W, 3] uint8, read-only.

    Grey, palette and CMYK become RGB as Pillow's ``convert`` has it; alpha is dropped. EXIF
    rotation is left alone: COCO's masks, too, are those of the image as it is stored.

    Raises:
        ValueError: damaged, or of more than 8 bits per channel; the message says what was found.
        OSError: truncated, no image, or not readable.

    Exactness: the pixels of Pillow, whose JPEG decoder is libjpeg-turbo.
    """
    with _readable(), Image.open(path) as image:
        _check_mode(image)
        # `convert` would copy an image that is RGB already.
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def read_picture(path: str | os.PathLike) -> Picture:
    """An image of 8 or 16 bits per channel and its alpha channel, if it has one.

    Grey, palette and CMYK become RGB as Pillow's ``convert`` has it. 16 bits v become 8 as v / 257,
    that is v * 255 / 65535, rounded to the nearest (there are no ties). The transparent colour of a
    PNG or of a palette is alpha; the fourth channel of a TIFF is, where the file says so. EXIF
    rotation is left alone; the orientation of a TIFF, which is part of the format, is obeyed.

    Raises:
        ValueError: damaged; of another kind of pixels, such as float; several images in one file
            (TIFF pages that are reduced copies of another do not count, nor what cameras add to a
            JPEG); 16 bits that Pillow does not read while the extra ``images`` is not installed.
        OSError: truncated, no image, or not readable.
    """
    if not S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    with _readable(), open(path, "rb") as stream:
        start = stream.read(26)
        if deep.is_png16(start):
            return _with_alpha(deep.read_png16(path))
        try:
            image = Image.open(stream)
        except Image.UnidentifiedImageError:
            if not deep.is_tiff(start):
                raise
            return _with_alpha(deep.read_tiff16(path))
        with image:
            page = _only_page(image)
            if _is_grey16(image):
                return _with_alpha(_grey16(image))
            if image.format == "TIFF" and deep.is_tiff16(image.tag_v2):
                return _with_alpha(deep.read_tiff16(path, page))
            _check_mode(image)
            if not image.has_transparency_data:
                return Picture(np.asarray(image if image.mode == "RGB" else image.convert("RGB")))
            return _with_alpha(np.asarray(image.convert("RGBA")))


def _is_grey16(image: Image.Image) -> bool:
    """Whether Pillow has all of 16 bits: black is 0, and older ones call it I in a PNG."""
    if image.format == "PNG":
        return image.mode in ("I", "I;16")
    return image.mode.startswith("I;16") and image.tag_v2.get(_PHOTOMETRIC) == 1


def _grey16(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    levels, transparent = deep.to_8_bits(pixels), image.info.get("transparency")
    if transparent is None:
        return levels
    return np.dstack([levels, (pixels != transparent) * np.uint8(255)])


def _with_alpha(pixels: np.ndarray) -> Picture:
    """Of [H, W] or [H, W, 1..4] uint8: grey or RGB, then alpha."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    count = pixels.shape[2]
    colour, alpha = (pixels[..., :-1], pixels[..., -1]) if count in (2, 4) else (pixels, None)
    if alpha is not None and (alpha == 255).all():
        alpha = None
    return Picture(np.broadcast_to(colour, (*colour.shape[:2], 3)), alpha)


def _only_page(image: Image.Image) -> int:
    """The page that is the image, which is made the current one."""
    count = getattr(image, "n_frames", 1)
    if image.format == "MPO" or count == 1:  # a JPEG with previews or gain maps behind the photo
        return 0
    pages = list(range(count))
    if image.format == "TIFF":
        pages = [page for page in pages if not _subfile_type(image, page) & _REDUCED]
    if len(pages) != 1:
        raise ValueError(f"expected one image; found {len(pages)} in this {image.format} file")
    image.seek(pages[0])
    return pages[0]


def _subfile_type(image: Image.Image, page: int) -> int:
    image.seek(page)
    return image.tag_v2.get(_SUBFILE_TYPE, 0)


def _check_mode(image: Image.Image) -> None:
    if image.mode not in _MODES:
        raise ValueError(
            f"expected a photo of 8 bits per channel; found {image.format} of mode {image.mode}"
        )


@contextmanager
def _readable() -> Iterator[None]:
    """ValueError for Pillow's words for damage; the first is also what it calls an image too large
    to trust."""
    try:
        yield
    except (Image.DecompressionBombError, SyntaxError, EOFError, struct.error) as error:
        raise ValueError(f"not a readable photo: {error}") from error
