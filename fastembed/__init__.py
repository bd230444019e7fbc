"""Image data sets into embedding caches, with numbers that can be trusted.

The public API, one page:

- ops: `percentile_bounds`, `percentile_quantize`, `zscore_quantize`, `crop_origins`,
  `gather_crops`, `pool_crops`; the rules `Percentile` and `ZScore`, `check_finite`;
  `decode_panoptic`, `panoptic_segments`, `panoptic_png_segments` and what the last two give,
  `Segments`; `label_statistics`, which gives `LabelStatistics`; `blend_crops`;
  `triplane_accumulate` for volumes. Most take one image or a list of images
- nouns: sources `TensorCsv`, `TensorPostgres`, `CocoPanoptic`, `ImageFolder`; recipes `MultiCrop`,
  `SegmentCrops`, `SpatialMaps`; `load_engine`, and `model_input` for a single image; sinks
  `NpyPerSample`, `NpyPerPart`, `NpzPerSample`, `MapFiles`; indexes `Tsv`, `Postgres`,
  `SegmentTsv`, `ImageTsv`, `MapTsv`; for millions of vectors
  `Zarr`, `Parquet`, `SegmentParquet` of `fastembed.store`; those of volumes in `fastembed.volumes`
- verb: `extract`, which returns a `Report`
- after it: `search` for the nearest vectors; `fastembed.convert`, `fastembed.datasets`,
  `fastembed.plots`, `fastembed.stats`; on many machines: `fastembed.cluster`
"""

from .engines import load_engine, model_input
from .indexes import ImageTsv, MapTsv, Postgres, SegmentTsv, Tsv
from .neighbours import search
from .ops import (
    LabelStatistics,
    Percentile,
    Segments,
    ZScore,
    blend_crops,
    check_finite,
    crop_origins,
    decode_panoptic,
    gather_crops,
    label_statistics,
    panoptic_png_segments,
    panoptic_segments,
    percentile_bounds,
    percentile_quantize,
    pool_crops,
    triplane_accumulate,
    zscore_quantize,
)
from .pipeline import extract
from .recipes import MultiCrop, SegmentCrops, SpatialMaps
from .report import Report
from .sinks import MapFiles, NpyPerPart, NpyPerSample, NpzPerSample
from .sources import CocoPanoptic, ImageFolder, TensorCsv, TensorPostgres

__all__ = [
    "CocoPanoptic",
    "ImageFolder",
    "ImageTsv",
    "LabelStatistics",
    "MapFiles",
    "MapTsv",
    "MultiCrop",
    "NpyPerPart",
    "NpyPerSample",
    "NpzPerSample",
    "Percentile",
    "Postgres",
    "Report",
    "SegmentCrops",
    "SegmentTsv",
    "Segments",
    "SpatialMaps",
    "TensorCsv",
    "TensorPostgres",
    "Tsv",
    "ZScore",
    "blend_crops",
    "check_finite",
    "crop_origins",
    "decode_panoptic",
    "extract",
    "gather_crops",
    "label_statistics",
    "load_engine",
    "model_input",
    "panoptic_png_segments",
    "panoptic_segments",
    "percentile_bounds",
    "percentile_quantize",
    "pool_crops",
    "search",
    "triplane_accumulate",
    "zscore_quantize",
]
