"""Statistics of donors: rank correlation, false discovery rate, resampling, paired tests.

Donors are the sample, tiles and images are parts of a donor. Every function takes NumPy arrays,
or what becomes them, gives the same bits on every run for the same seed, and says in its
result what it left out and why; nothing is dropped in silence. Needs SciPy, for two
distribution functions and ranks: ``pip install fastembed-vision[stats]``.
"""

from .bootstrap import (
    Bootstrap,
    Interval,
    SpearmanBootstrap,
    bootstrap,
    confidence_interval,
    mean_ap,
    pooled_f1,
    rank_correlation,
    spearman_bootstrap,
)
from .correlation import EXACT_LIMIT, Spearman, spearman
from .fdr import fdr_bh
from .paired import PairedTest, paired_test
from .resample import GENERATORS, donor_sums, resample_donors, resample_tiles

__all__ = [
    "EXACT_LIMIT",
    "GENERATORS",
    "Bootstrap",
    "Interval",
    "PairedTest",
    "Spearman",
    "SpearmanBootstrap",
    "bootstrap",
    "confidence_interval",
    "donor_sums",
    "fdr_bh",
    "mean_ap",
    "paired_test",
    "pooled_f1",
    "rank_correlation",
    "resample_donors",
    "resample_tiles",
    "spearman",
    "spearman_bootstrap",
]
