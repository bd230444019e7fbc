"""Photographs, in whatever form cameras and scrapers left them, as RGB."""

from __future__ import annotations

import os
import struct

import numpy as np
from PIL import Image

# Of these Pillow's conversion to RGB keeps 8 bits as they are. 16-bit grey it would clip at 255.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


def read_rgb(path: str | os.PathLike) -> np.ndarray:
    """A photograph as its file has it: [H, W, 3] uint8, read-only.

    Grey, palette and CMYK become RGB as Pillow's ``convert`` has it; alpha is dropped. EXIF
    rotation is left alone: COCO's masks, too, are those of the image as it is stored.

    Raises:
        ValueError: damaged, or of more than 8 bits per channel; the message says what was found.
        OSError: truncated, no image, or not readable.

    Exactness: the pixels of Pillow, whose JPEG decoder is libjpeg-turbo.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in _MODES:
                raise ValueError(
                    f"expected a photo of 8 bits per channel; found {image.format} of mode "
                    f"{image.mode}"
                )
            return np.asarray(image.convert("RGB"))
    # Pillow's words for damage; the first is also what it calls an image too large to trust.
    except (Image.DecompressionBombError, SyntaxError, EOFError, struct.error) as error:
        raise ValueError(f"not a readable photo: {error}") from error
