"""Where samples come from: they list items and read one item's pixels."""

from .images import ImageFolder
from .panoptic import CocoPanoptic
from .tensors import TENSOR_TABLE, TensorCsv, TensorPostgres, TensorTable

__all__ = [
    "TENSOR_TABLE",
    "CocoPanoptic",
    "ImageFolder",
    "TensorCsv",
    "TensorPostgres",
    "TensorTable",
]
