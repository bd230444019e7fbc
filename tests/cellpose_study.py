"""Small studies for the tests: drawn tiles, and networks that are small or know the answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
import torch

from fastembed.cellpose.masks import label_flows
from fastembed.cellpose.network import Architecture, Pretrained, random_network

TINY = Architecture(depth=1, width=32, heads=1, mlp=64, neck=16)
MARKERS = ("gfap", "iba1")


def draw_cells(size: int, count: int, seed: int) -> np.ndarray:
    """Discs of 5 to 8 pixels that may touch, some cut by the border: int32 labels [size, size]."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    labels = np.zeros((size, size), np.int32)
    for label in range(1, count + 1):
        cy, cx = generator.integers(0, size, 2)
        inside = (y - cy) ** 2 + (x - cx) ** 2 <= generator.integers(5, 9) ** 2
        labels[inside & (labels == 0)] = label
    return labels


def noisy_flows(labels: np.ndarray, seed: int, noise: float = 1.0) -> np.ndarray:
    """What a network that is not perfect could say of a mask: float32 [3, H, W]."""
    generator = np.random.default_rng(seed)
    flows = label_flows(labels)
    said = np.stack([5 * flows[2], 5 * flows[3], 8 * flows[1] - 4])
    return (said + noise * generator.standard_normal(said.shape)).astype(np.float32)


def draw_tiles(
    folder: Path, donors: int = 5, size: int = 64, cells: int = 9
) -> dict[str, np.ndarray]:
    """Two tiles of each donor, one per marker, as a study has them; the masks by stem."""
    folder.mkdir(parents=True, exist_ok=True)
    masks = {}
    for number in range(2 * donors):
        marker, donor = MARKERS[number % 2], 100000 + number // 2
        stem = f"{marker}_{donor}_t{number}"
        labels = draw_cells(size, cells + number % 3, number)
        generator = np.random.default_rng(number)
        for channel, strength in (("dapi-b0c0", 900), (f"{marker}-b0c1", 500)):
            pixels = generator.integers(50, 100, labels.shape) + strength * (labels > 0)
            tifffile.imwrite(folder / f"{stem}_{channel}.tif", pixels.astype(np.uint16))
        np.save(folder / f"{stem}_cellbodies.npy", labels)
        masks[stem] = labels
    return masks


def tiny_model(folder: Path, seed: int = 0, size: Architecture = TINY) -> Pretrained:
    path = folder / f"tiny_{seed}"
    torch.save(random_network(size, seed).state_dict(), path)
    return Pretrained(str(path))


class Oracle:
    """A network that was told the masks: their flows and noise, by the image's pixels."""

    name, digest, precision = "oracle", "oracle", "fp32"
    device = torch.device("cpu")

    def __init__(self, examples, noise: float = 1.0) -> None:
        self.calls = 0
        self._flows = {
            e.image().tobytes(): noisy_flows(e.mask(), len(e.stem), noise) for e in examples
        }

    def settings(self) -> dict[str, object]:
        return {"model": self.digest, "precision": self.precision, "device": "cpu"}

    def flows(self, image: np.ndarray) -> np.ndarray:
        self.calls += 1
        return self._flows[image.tobytes()]
