"""3D volumes: where they are, what a sample of them is."""

try:
    import tensorstore  # noqa: F401
    import tifffile  # noqa: F401
    import xxhash  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"fastembed.volumes needs {error.name}: pip install 'fastembed-vision[volumes]'"
    ) from error

from .check import Findings, check
from .files import Form
from .layout import DataSet, Place, find_cellmap, read_datasets, with_organelles
from .loader import PreprocessedDINOv3Dataset, create_preprocessed_dataloader
from .recipe import TriPlane
from .record import Volume
from .sampling import Sampling, sample_volume
from .sink import VolumeFiles, VolumeMetadata
from .source import Volumes
from .stores import Level, Pyramid, Stores

__all__ = [
    "DataSet",
    "Findings",
    "Form",
    "Level",
    "Place",
    "PreprocessedDINOv3Dataset",
    "Pyramid",
    "Sampling",
    "Stores",
    "TriPlane",
    "Volume",
    "VolumeFiles",
    "VolumeMetadata",
    "Volumes",
    "check",
    "create_preprocessed_dataloader",
    "find_cellmap",
    "read_datasets",
    "sample_volume",
    "with_organelles",
]
