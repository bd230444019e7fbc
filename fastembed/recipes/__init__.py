"""Preprocessing with a name and a JSON form: from an image to the planes of a model, and from its
features to what is written."""

from .maps import SpatialMaps
from .multicrop import MultiCrop
from .segments import SegmentCrops

__all__ = ["MultiCrop", "SegmentCrops", "SpatialMaps"]
