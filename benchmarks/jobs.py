"""Whole jobs, each in two ways: ours, and a script's with the model's own library.

A job is a class with the methods of `Panoptic`; test_jobs.py measures every one in `JOBS`.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import coco
import numpy as np
import torch
from PIL import Image, JpegImagePlugin

from fastembed import (
    CocoPanoptic,
    ImageFolder,
    MapFiles,
    MapTsv,
    NpyPerPart,
    SegmentCrops,
    SegmentTsv,
    SpatialMaps,
    extract,
    load_engine,
)
from fastembed.engines import InputContract, Resize
from fastembed.engines.upstream import Upstream, _processor
from fastembed.npy import PixelBuffer
from fastembed.report import Report

_DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL = Path(os.environ.get("FASTEMBED_DATA", _DEFAULT)) / "coco_panoptic"


class Panoptic:
    """COCO's segments to SigLIP vectors, beside what the COCO panoptic script does per mask.

    Of that script left out is that it squashes every photo to 640 x 640 first: it would cost it
    time, and give other crops.
    """

    spec = "openclip:timm/ViT-B-16-SigLIP"
    unit = "segment"
    tolerance = 0.0  # of the model input
    CONTRACT = InputContract(
        224, 224, 3, (0, 1, 2), (0.5,) * 3, (0.5,) * 3, Resize("pillow-bicubic"), torch.float32
    )

    def __init__(self, folder: Path, images: int, real: bool) -> None:
        """Writes the data set: of one real photo in variations, or of generated ones."""
        self.folder = folder
        if real:
            photo = Image.open(REAL / "val2017" / "000000142238.jpg")
            image = np.asarray(photo)
            ids = decode_ids(REAL / "panoptic_val2017" / "000000142238.png")
            sampling = JpegImagePlugin.get_sampling(photo)
            coco.write(
                folder / "coco", coco.varied(image, ids, images),
                qtables=photo.quantization, subsampling=sampling,
            )  # fmt: skip
        else:
            coco.write(folder / "coco", coco.generated(images))
        self.source = CocoPanoptic(folder / "coco", coco.SPLIT)
        self.items = list(self.source.items())
        self.images = len(self.items)
        self.units = sum(len(item.parts) for item in self.items)
        self._buffer = PixelBuffer()

    # From files to model input ----------------------------------------------------------

    def plain_inputs(self, prepare) -> torch.Tensor:
        """All segments' input by NumPy, Pillow and the library's own transform."""
        rows = [prepare(crop) for item in self.items for _, crop in self._plain_crops(item)]
        return torch.stack(rows)

    def our_inputs(self, out: torch.Tensor) -> torch.Tensor:
        """The same into `out`, as the pipeline's readers do it."""
        recipe, at = SegmentCrops(), 0
        for item in self.items:
            photo = self.source.read(item, 3, self._buffer)
            inputs = recipe.prepare(photo, item.key, self.CONTRACT)
            inputs.fill(0, out[at : at + len(inputs)])
            at += len(inputs)
        return out

    def _plain_crops(self, item):
        """(segment id, blended crop) in the order of the ids."""
        image = Image.open(self.source.folder / item.path).convert("RGB")
        rgb = np.asarray(image) / 255
        ids = decode_ids(self.source.maps / item.fields["map"])
        for segment in sorted(item.parts):
            mask = ids == segment
            alpha = np.where(mask, np.float32(1), np.float32(0.3))[..., None]
            blended = rgb * alpha + (1 - alpha) * 0.5
            y, x = np.nonzero(mask)
            pad_y = int(0.1 * (y.max() - y.min() + 1))
            pad_x = int(0.1 * (x.max() - x.min() + 1))
            top, left = max(0, y.min() - pad_y), max(0, x.min() - pad_x)
            crop = blended[top : y.max() + 1 + pad_y, left : x.max() + 1 + pad_x]
            yield segment, Image.fromarray((crop * 255).astype(np.uint8))

    # From files to files ----------------------------------------------------------------

    @torch.inference_mode()
    def plain_run(self, folder: Path, model: Upstream) -> None:
        """A photo's segments per model call, at most 32, in the library's own float32."""
        for item in self.items:
            crops = list(self._plain_crops(item))
            batch = torch.stack([model.prepare(crop) for _, crop in crops])
            vectors = torch.cat([model.embed(part) for part in batch.split(32)])
            vectors = torch.nn.functional.normalize(vectors, dim=-1).half().numpy()
            for (segment, _), vector in zip(crops, vectors, strict=True):
                np.save(folder / f"{item.part_name(segment)}.npy", vector)

    def engine(self, weights: Path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_engine(self.spec, weights=weights, output="pooled", device="cpu")

    def our_run(self, folder: Path, engine) -> Report:
        return extract(
            self.source, SegmentCrops(), engine, NpyPerPart(folder), SegmentTsv(folder), workers=2
        )


class Maps:
    """Photos to DINOv2 feature maps, beside what the script of spatial maps does.

    That script: the processor squashes to 224 x 224, one photo per model call in float32, a map
    and a mask per photo. Its OpenCV resize before that is left out: it would cost it time.
    """

    spec = "transformers:facebook/dinov2-small"
    unit = "image"
    tolerance = 1e-6  # the same levels; the library scales and normalises in one step
    CONTRACT = InputContract(
        224, 224, 3, (0, 1, 2), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225),
        Resize("torch-uint8-bicubic"), torch.float32,
    )  # fmt: skip

    def __init__(self, folder: Path, images: int, real: bool) -> None:
        photos = Panoptic(folder, 16 * images, real)
        self.source = ImageFolder(photos.folder / "coco" / coco.SPLIT)
        self.items = list(self.source.items())
        self.images = self.units = len(self.items)
        self._buffer = PixelBuffer()
        processor = _processor("facebook/dinov2-small", "dinov2", 224)
        processor.size, processor.do_center_crop = {"height": 224, "width": 224}, False
        self._prepare = lambda image: processor(image, return_tensors="pt")["pixel_values"][0]

    def plain_inputs(self, prepare) -> torch.Tensor:
        return torch.stack([self._prepare(self._open(item)) for item in self.items])

    def our_inputs(self, out: torch.Tensor) -> torch.Tensor:
        recipe = SpatialMaps("squash")
        for row, item in enumerate(self.items):
            picture = self.source.read(item, 3, self._buffer)
            recipe.prepare(picture, item.key, self.CONTRACT).fill(0, out[row : row + 1])
        return out

    def _open(self, item) -> Image.Image:
        return Image.open(self.source.folder / item.path).convert("RGB")

    @torch.inference_mode()
    def plain_run(self, folder: Path, model: Upstream) -> None:
        for item in self.items:
            image = self._open(item)
            alpha = torch.from_numpy(np.asarray(image.convert("RGBA"))[..., 3])
            tokens = model.module(pixel_values=self._prepare(image)[None]).last_hidden_state
            grid = tokens[0, 1:].T.unflatten(1, (16, 16)).contiguous()
            mask = torch.nn.functional.adaptive_max_pool2d((alpha > 0)[None].float(), (16, 16))
            np.save(folder / f"{item.name}.npy", grid.numpy())
            np.save(folder / f"{item.name}_mask.npy", mask[0].byte().numpy())

    def engine(self, weights: Path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_engine(self.spec, weights=weights, output="map", size=224, device="cpu")

    def our_run(self, folder: Path, engine) -> Report:
        return extract(
            self.source, SpatialMaps("squash"), engine, MapFiles(folder), MapTsv(folder), workers=2
        )


def decode_ids(png: Path) -> np.ndarray:
    """panopticapi's way: R + 256 G + 65536 B."""
    colour = np.asarray(Image.open(png).convert("RGB")).astype(np.int32)
    return colour[..., 0] + 256 * colour[..., 1] + 65536 * colour[..., 2]


JOBS = {"panoptic": Panoptic, "maps": Maps}
