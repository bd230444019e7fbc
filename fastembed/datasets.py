"""What an extraction leaves, as PyTorch datasets and tensors.

db = DBConfig(host="localhost", database="cpjump1", user="me")
connection = get_db_connection(db)
records = fetch_embeddings_and_texts(connection)
connection.close()
loader = DataLoader(EmbeddingTextDataset(records), batch_size=64, num_workers=4)

features = PanopticFeatures("cache/vis_embed")
vector = features["000000142238", 3937500]

store = EmbeddingStore("out")  # of either job, any --format
vectors = store[store.keys()[:3]]

map, mask = FeatureMaps("features")["photo"]

for features, gt, mask in create_preprocessed_dataloader("preprocessed_volumes", batch_size=4):
    ...
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from .caches import EmbeddingStore
from .database import DatabaseError, DBConfig, get_db_connection, identifier
from .indexes import EMBEDDING_TABLE, MapTsv
from .neighbours import search

__all__ = [
    "DBConfig",
    "EmbeddingStore",
    "EmbeddingText",
    "EmbeddingTextDataset",
    "FeatureMaps",
    "MapAndMask",
    "PanopticFeatures",
    "PreprocessedDINOv3Dataset",  # noqa: F822
    "create_preprocessed_dataloader",  # noqa: F822
    "fetch_embeddings_and_texts",
    "get_db_connection",
    "read_embeddings_and_texts",
]

_OF_VOLUMES = ("PreprocessedDINOv3Dataset", "create_preprocessed_dataloader")


def __getattr__(name: str):
    # Their packages are an extra, and not needed for the rest.
    if name in _OF_VOLUMES:
        from . import volumes

        return getattr(volumes, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


TEXT_TABLES = ("texts", "prompts")


@dataclass(frozen=True, slots=True)
class EmbeddingText:
    """Path of an embedding and the text it belongs to."""

    embedding_path: str
    text: str

    def __iter__(self) -> Iterator[str]:
        return iter((self.embedding_path, self.text))


class EmbeddingTextDataset(Dataset):
    """Pairs (float32 tensor [D], str), one per record, in the records' order.

    Holds paths and texts only, no connection and no open file: it works in forked and in
    spawned DataLoader workers.

    Args:
        records: of `fetch_embeddings_and_texts` or `read_embeddings_and_texts`, or any
            sequence of pairs (embedding_path, text).
    """

    def __init__(self, records: Sequence[EmbeddingText | tuple[str, str]]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        """The pair at `index`.

        Raises:
            ValueError: the file is not one vector; (1, D) counts as one.
            OSError: the file is gone.
        """
        path, text = self.records[index]
        vector = np.load(path, allow_pickle=False)
        if vector.size == 0 or vector.ndim > 2 or (vector.ndim == 2 and len(vector) != 1):
            raise ValueError(f"{path} must hold one vector [D]; it has shape {list(vector.shape)}")
        return torch.from_numpy(vector.reshape(-1).astype(np.float32, copy=False)), text


def fetch_embeddings_and_texts(
    connection, table: str = EMBEDDING_TABLE, text_tables: Sequence[str] = TEXT_TABLES
) -> list[EmbeddingText]:
    """Every embedding that has a text, ordered by its row's id.

    Args:
        connection: of `get_db_connection`; it is left open, outside any transaction.
        table: (id, embedding_path, text_id).
        text_tables: (text_id, text) each; those that exist are used, an earlier one wins.

    Raises:
        DatabaseError: none of the text tables exists, or no embeddings table.
    """
    from psycopg2 import sql

    with connection, connection.cursor() as cursor:
        there = []
        for name in (table, *text_tables):
            cursor.execute(
                "SELECT to_regclass(%s) IS NOT NULL", (identifier(name).as_string(cursor),)
            )
            if cursor.fetchone()[0]:
                there.append(name)
        if table not in there:
            raise DatabaseError(f"there is no table {table}: has an extraction run here?")
        texts = [name for name in text_tables if name in there]
        if not texts:
            raise DatabaseError(f"there is no text table; looked for {', '.join(text_tables)}")
        aliases = [sql.Identifier(f"t{i}") for i in range(len(texts))]
        joins = sql.SQL(" ").join(
            sql.SQL("LEFT JOIN {} {} ON {}.text_id = e.text_id").format(
                identifier(name), alias, alias
            )
            for name, alias in zip(texts, aliases, strict=True)
        )
        text = sql.SQL("coalesce({})").format(
            sql.SQL(", ").join(sql.SQL("{}.text").format(alias) for alias in aliases)
        )
        cursor.execute(
            sql.SQL(
                "SELECT e.embedding_path, {text} FROM {table} e {joins} "
                "WHERE {text} IS NOT NULL ORDER BY e.id"
            ).format(text=text, table=identifier(table), joins=joins)
        )
        return [EmbeddingText(path, value) for path, value in cursor]


def read_embeddings_and_texts(
    output_dir: str | Path, texts: str | Path | Mapping[int, str]
) -> list[EmbeddingText]:
    """The same records without a database, from an output folder's ``image_embeddings.tsv``.

    Args:
        output_dir: of ``fastembed multichannel --manifest``.
        texts: text by text_id; or a CSV file with columns text_id and text, which may be the
            manifest itself.
    """
    folder = Path(output_dir)
    if not isinstance(texts, Mapping):
        with Path(texts).open(encoding="utf-8-sig", newline="") as stream:
            texts = {int(row["text_id"]): row["text"] for row in csv.DictReader(stream)}
    with (folder / f"{EMBEDDING_TABLE}.tsv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, dialect="excel-tab"))
    return [
        EmbeddingText(str(folder / row["embedding_path"]), texts[int(row["text_id"])])
        for row in rows
        if int(row["text_id"]) in texts
    ]


class PanopticFeatures(Mapping[tuple[str, int], torch.Tensor]):
    """The embeddings that ``fastembed panoptic`` leaves: float16 [D] by (image_id, segment_id).

    Keys are in the order of the index. Vectors are read when they are asked for; it works in
    DataLoader workers, as the `EmbeddingStore` under it.

    Args:
        cache_dir: of any --format; of npz all files are opened once, for the segments' ids.

    Raises:
        FileNotFoundError: there is no cache. ValueError: there are two, or one of no segments.
    """

    def __init__(self, cache_dir: str | Path) -> None:
        self.folder = Path(cache_dir)
        self._store = EmbeddingStore(cache_dir)
        try:
            self._store.column("segment_id")
        except KeyError:
            raise ValueError(f"{self.folder} holds no cache of `fastembed panoptic`") from None

    def __len__(self) -> int:
        """Number of segments."""
        return len(self._store)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self._keys)

    def __getitem__(self, key: tuple[str, int]) -> torch.Tensor:
        """The vector of a segment, float16 [D].

        Raises:
            KeyError: the cache does not hold it. OSError: its file is gone.
        """
        return self._store[self._store.row(key)]

    def matrix(self) -> torch.Tensor:
        """All vectors in the order of the keys, of unit length: float32 [N, D]. Read at the
        first call, and kept."""
        return self._matrix

    def nearest(
        self, image_id: str, segment_id: int, k: int = 10
    ) -> list[tuple[tuple[str, int], float]]:
        """The k segments most like one, that one left out: (key, cosine), best first.

        Exact; of equal cosines the order is that of the keys. See `fastembed.search`, which needs
        no memory for the vectors; this reads them at the first call, and keeps them.

        Raises:
            KeyError: the cache does not hold the segment. ValueError: k < 1.
        """
        own = self._store.row((image_id, segment_id))
        found = search(self._vectors, self._vectors[own], k, leave_out=[own])
        return [
            (self._keys[row], cosine)
            for row, cosine in zip(found.rows[0].tolist(), found.cosines[0].tolist(), strict=True)
            if row >= 0
        ]

    @functools.cached_property
    def _keys(self) -> list[tuple[str, int]]:
        return self._store.keys()

    @functools.cached_property
    def _matrix(self) -> torch.Tensor:
        # The norm of what was rounded to float16 is 1 to about 1e-3 only.
        return torch.nn.functional.normalize(self._vectors.float())

    @functools.cached_property
    def _vectors(self) -> torch.Tensor:
        return self._store.as_torch()


class MapAndMask(NamedTuple):
    """An image's features, float32 or float16 [D, g, g'], and its mask, uint8 [g, g']."""

    map: torch.Tensor
    mask: torch.Tensor


class FeatureMaps(Mapping[str, MapAndMask]):
    """The feature maps that ``fastembed maps`` leaves, by name.

    Names are in the order of the index; an image's path is in `sources`. Files are read when they
    are asked for, and none stays open: it works in DataLoader workers.

    Args:
        output: the folder with ``maps.tsv``.

    Raises:
        FileNotFoundError: there is no such index.
    """

    def __init__(self, output: str | Path) -> None:
        self.folder = Path(output)
        with (self.folder / MapTsv.file_name).open(encoding="utf-8", newline="") as stream:
            rows = csv.DictReader(stream, dialect="excel-tab")
            self.sources = {row["name"]: row["source"] for row in rows}

    def __len__(self) -> int:
        """Number of images."""
        return len(self.sources)

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __getitem__(self, name: str) -> MapAndMask:
        """Map and mask of an image.

        Raises:
            KeyError: the folder does not hold it. OSError: a file is gone.
        """
        return MapAndMask(self._load(name, ""), self._load(name, "_mask"))

    def layer(self, name: str, block: int) -> torch.Tensor:
        """The map of one of ``--layers``, [D, g, g'], by the number that was given there.

        Raises:
            KeyError: the folder does not hold the image. OSError: there is no map of that layer.
        """
        return self._load(name, f"_layer{block}")

    def _load(self, name: str, suffix: str) -> torch.Tensor:
        if name not in self.sources:
            raise KeyError(name)
        return torch.from_numpy(np.load(self.folder / f"{name}{suffix}.npy", allow_pickle=False))
