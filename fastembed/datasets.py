"""What an extraction leaves, as PyTorch datasets.

db = DBConfig(host="localhost", database="cpjump1", user="me")
connection = get_db_connection(db)
records = fetch_embeddings_and_texts(connection)
connection.close()
loader = DataLoader(EmbeddingTextDataset(records), batch_size=64, num_workers=4)
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from .database import DatabaseError, DBConfig, get_db_connection
from .indexes import EMBEDDING_TABLE

__all__ = [
    "DBConfig",
    "EmbeddingText",
    "EmbeddingTextDataset",
    "fetch_embeddings_and_texts",
    "get_db_connection",
    "read_embeddings_and_texts",
]

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
            cursor.execute("SELECT to_regclass(%s) IS NOT NULL", (name,))
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
                sql.Identifier(*name.split(".")), alias, alias
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
            ).format(text=text, table=sql.Identifier(*table.split(".")), joins=joins)
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
