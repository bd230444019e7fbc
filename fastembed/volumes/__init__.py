"""3D volumes: where they are, what a sample of them is."""

try:
    import tensorstore  # noqa: F401
    import tifffile  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"fastembed.volumes needs {error.name}: pip install 'fastembed-vision[volumes]'"
    ) from error

from .layout import DataSet, Place, find_cellmap, read_datasets, with_organelles
from .record import Volume
from .sampling import Sampling, sample_volume
from .source import Volumes
from .stores import Level, Pyramid, Stores

__all__ = [
    "DataSet",
    "Level",
    "Place",
    "Pyramid",
    "Sampling",
    "Stores",
    "Volume",
    "Volumes",
    "find_cellmap",
    "read_datasets",
    "sample_volume",
    "with_organelles",
]
