"""Every picture the library makes.

Those of what an extraction left are drawn with Pillow alone, pixel by pixel where the data are: the
same folder gives the same bytes. Curves and bars of the Cellpose study (`losses`, `study`) are
matplotlib's.
"""

from .maps import feature_sheet, holds_maps
from .photos import FIT_RULES
from .segments import is_panoptic_cache, neighbour_sheet
from .sheet import save_pages

__all__ = [
    "FIT_RULES",
    "feature_sheet",
    "holds_maps",
    "is_panoptic_cache",
    "neighbour_sheet",
    "save_pages",
]
