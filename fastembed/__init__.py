"""Image data sets into embedding caches, with numbers that can be trusted.

The public API, one page:

- ops: `percentile_bounds`, `percentile_quantize`, `zscore_quantize`, `crop_origins`,
  `gather_crops`, `pool_crops`; the rules `Percentile` and `ZScore`
- nouns: sources `TensorCsv`, `TensorPostgres`; recipe `MultiCrop`; `load_engine`; sink
  `NpyPerSample`; indexes `Tsv`, `Postgres`
- verb: `extract`, which returns a `Report`
- after it: `fastembed.datasets`
"""

from .engines import load_engine
from .indexes import Postgres, Tsv
from .ops import (
    Percentile,
    ZScore,
    crop_origins,
    gather_crops,
    percentile_bounds,
    percentile_quantize,
    pool_crops,
    zscore_quantize,
)
from .pipeline import extract
from .recipes import MultiCrop
from .report import Report
from .sinks import NpyPerSample
from .sources import TensorCsv, TensorPostgres

__all__ = [
    "MultiCrop",
    "NpyPerSample",
    "Percentile",
    "Postgres",
    "Report",
    "TensorCsv",
    "TensorPostgres",
    "Tsv",
    "ZScore",
    "crop_origins",
    "extract",
    "gather_crops",
    "load_engine",
    "percentile_bounds",
    "percentile_quantize",
    "pool_crops",
    "zscore_quantize",
]
