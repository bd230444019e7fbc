"""One table for tests and benchmarks: each op with its inputs, oracle, tolerance and bytes.

Oracles are plain NumPy and never call the library. A test compares every backend with the
oracle; a benchmark times a backend only on inputs where that comparison holds.
"""

from .cases import (
    CASES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    INTENSITIES,
    MEAN,
    STD,
    Case,
    as_numpy,
    label_rows,
    on_device,
    segment_rows,
)
from .inputs import colours_of, label_map, microscopy, panoptic_map, scene, segments_of
from .oracles import (
    oracle_blend_crops,
    oracle_blended_crop,
    oracle_bounds,
    oracle_crops,
    oracle_labels,
    oracle_panoptic,
    oracle_percentile_levels,
    oracle_pool,
    oracle_ramp,
    oracle_resize,
    oracle_segments,
    oracle_triplane,
    oracle_zscore_levels,
    round_to_bfloat16,
)

__all__ = [
    "CASES",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "INTENSITIES",
    "MEAN",
    "STD",
    "Case",
    "as_numpy",
    "colours_of",
    "label_map",
    "label_rows",
    "microscopy",
    "on_device",
    "oracle_blend_crops",
    "oracle_blended_crop",
    "oracle_bounds",
    "oracle_crops",
    "oracle_labels",
    "oracle_panoptic",
    "oracle_percentile_levels",
    "oracle_pool",
    "oracle_ramp",
    "oracle_resize",
    "oracle_segments",
    "oracle_triplane",
    "oracle_zscore_levels",
    "panoptic_map",
    "round_to_bfloat16",
    "scene",
    "segment_rows",
    "segments_of",
]
