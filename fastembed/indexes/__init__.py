"""Which samples are done: a sample is done when its row is committed here.

`Tsv` and `Postgres` hold ``image_embeddings``: the embedding's path and the sample's text_id;
`SegmentTsv` and `ImageTsv` the segments of photos; `MapTsv` images and their maps. No index holds
a path twice.
"""

from .postgres import Postgres
from .tsv import EMBEDDING_TABLE, ImageTsv, MapTsv, SegmentTsv, Tsv

__all__ = ["EMBEDDING_TABLE", "ImageTsv", "MapTsv", "Postgres", "SegmentTsv", "Tsv"]
