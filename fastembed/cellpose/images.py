"""Images and label masks on disk: read by what a file holds, not by its name."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import tifffile

from ..staging import write_bytes_atomically

SUFFIXES = (".tif", ".tiff", ".png", ".npy")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MAX_LABEL = 2**32 - 2  # the last one is what the kernel that counts pairs calls none


def read_image(path: str | Path) -> np.ndarray:
    """The pixels of a TIFF, PNG or .npy file, told apart by their first bytes.

    The study that this follows wrote TIFFs under names that end with .png; those are read.

    Returns:
        [H, W] or [H, W, C], in the file's dtype; channels in the order of the file.

    Raises:
        ValueError: another format, or damaged content.
        OSError: the file cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        if content.startswith(_TIFF):
            return tifffile.imread(io.BytesIO(content))
        if content.startswith(b"\x93NUMPY"):
            return np.load(io.BytesIO(content), allow_pickle=False)
        if content.startswith(b"\x89PNG"):
            return _decode_png(content)
    except Exception as error:  # of four decoders, each with exceptions of its own
        raise ValueError(f"{path} cannot be decoded: {error}") from error
    raise ValueError(f"{path} is neither TIFF, PNG nor .npy; it starts with {content[:4]!r}")


def _decode_png(content: bytes) -> np.ndarray:
    # Pillow would cut 16-bit RGB to 8 bits without a word.
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("damaged PNG")
    return pixels if pixels.ndim == 2 else pixels[..., [2, 1, 0, *range(3, pixels.shape[2])]]


def read_plane(path: str | Path) -> np.ndarray:
    """One channel [H, W] of unsigned integers; of an image with several, the first.

    Raises:
        ValueError: another shape, other pixels than unsigned integers, or see `read_image`.
    """
    pixels = read_image(path)
    if pixels.ndim == 3 and pixels.shape[-1] <= 4:
        pixels = np.ascontiguousarray(pixels[..., 0])
    if pixels.ndim != 2 or 0 in pixels.shape:
        raise ValueError(f"{path} must be an image [H, W]; found shape {list(pixels.shape)}")
    if pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"{path} must have uint8 or uint16 pixels; found {pixels.dtype}")
    return pixels


def read_mask(path: str | Path) -> np.ndarray:
    """A label mask: uint16 [H, W], or uint32 if a label is above 65535; 0 is background.

    Raises:
        ValueError: see `as_mask` and `read_image`.
    """
    return as_mask(read_image(path), str(path))


def as_mask(labels: np.ndarray, name: str = "mask") -> np.ndarray:
    """Holds labels against what a label mask is; uint16 [H, W], or uint32 where 16 bits end.

    Raises:
        ValueError: not [H, W]; labels that are not whole numbers, negative or above 2^32 - 1.
    """
    labels = np.squeeze(labels) if labels.ndim > 2 else labels
    if labels.ndim != 2 or 0 in labels.shape:
        raise ValueError(f"{name} must be a label mask [H, W]; found shape {list(labels.shape)}")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{name} must have integer labels; found {labels.dtype}")
    highest = int(labels.max())
    if labels.dtype.kind == "i" and (lowest := int(labels.min())) < 0:
        raise ValueError(f"{name} must have labels from 0 on; found {lowest}")
    if highest > _MAX_LABEL:
        raise ValueError(f"{name} must have labels up to {_MAX_LABEL}; found {highest}")
    return labels.astype(np.uint16 if highest < 2**16 else np.uint32, copy=False)


def write_tiff(path: Path, pixels: np.ndarray) -> None:
    """Writes a TIFF, compressed without loss: complete and on disk, or not there at all."""
    write_bytes_atomically(path, tiff_bytes(pixels))


def tiff_bytes(pixels: np.ndarray) -> bytes:
    """What `write_tiff` writes: the same bytes every time."""
    content = io.BytesIO()
    photometric = "rgb" if pixels.ndim == 3 else "minisblack"
    tifffile.imwrite(
        content, pixels, photometric=photometric, compression="zlib", metadata=None, software=False
    )
    return content.getvalue()


def check_same_shape(image: np.ndarray, mask: np.ndarray, name: str) -> None:
    """
    Raises:
        ValueError: height or width of the two differ.
    """
    if image.shape[:2] != mask.shape[:2]:
        raise ValueError(
            f"{name}: image and mask must have one shape; found {list(image.shape[:2])} and "
            f"{list(mask.shape[:2])}"
        )
