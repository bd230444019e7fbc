"""The ops: one file per family, with contract, checks, plain reference and dispatch."""

from .crops import crop_origins, gather_crops, pool_crops
from .labels import LabelStatistics, label_statistics
from .masks import blend_crops
from .panoptic import Segments, decode_panoptic, panoptic_png_segments, panoptic_segments
from .quantize import (
    Percentile,
    ZScore,
    check_finite,
    percentile_bounds,
    percentile_quantize,
    zscore_quantize,
)
from .volumes import triplane_accumulate

__all__ = [
    "LabelStatistics",
    "Percentile",
    "Segments",
    "ZScore",
    "blend_crops",
    "check_finite",
    "crop_origins",
    "decode_panoptic",
    "gather_crops",
    "label_statistics",
    "panoptic_png_segments",
    "panoptic_segments",
    "percentile_bounds",
    "percentile_quantize",
    "pool_crops",
    "triplane_accumulate",
    "zscore_quantize",
]
