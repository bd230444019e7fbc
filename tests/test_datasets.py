"""What an extraction leaves, read back as PyTorch datasets."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastembed.database import DatabaseError
from fastembed.datasets import (
    DBConfig,
    EmbeddingTextDataset,
    fetch_embeddings_and_texts,
    get_db_connection,
    read_embeddings_and_texts,
)


@pytest.fixture
def records(tmp_path):
    pairs = []
    for i in range(23):
        path = tmp_path / f"e {i} ü.npy"
        np.save(path, np.full(6, i, dtype=np.float32))
        pairs.append((str(path), f"text {i}"))
    return pairs


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_with_four_workers_yields_every_pair(records, context):
    loader = DataLoader(
        EmbeddingTextDataset(records), batch_size=4, shuffle=True, num_workers=4,
        multiprocessing_context=context, pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    seen = {}
    for vectors, texts in loader:
        assert vectors.dtype == torch.float32 and vectors.shape[1:] == (6,)
        seen.update({text: vector[0].item() for vector, text in zip(vectors, texts, strict=True)})
    assert seen == {f"text {i}": float(i) for i in range(23)}


def test_vectors_of_other_shapes(tmp_path):
    cases = {"row": np.ones((1, 5)), "half": np.ones(5, np.float16)}
    for name, array in cases.items():
        np.save(tmp_path / f"{name}.npy", array)
        vector, text = EmbeddingTextDataset([(str(tmp_path / f"{name}.npy"), "t")])[0]
        assert vector.dtype == torch.float32 and vector.shape == (5,) and text == "t"
    for array in (np.ones((2, 5)), np.ones((1, 2, 3)), np.ones(0)):
        np.save(tmp_path / "bad.npy", array)
        with pytest.raises(ValueError, match="must hold one vector"):
            EmbeddingTextDataset([(str(tmp_path / "bad.npy"), "t")])[0]


def fill(connection, *statements: str) -> None:
    statements = (
        "CREATE TABLE image_embeddings"
        "(id SERIAL PRIMARY KEY, embedding_path TEXT, text_id INTEGER)",
        "INSERT INTO image_embeddings(embedding_path, text_id) "
        "VALUES ('b.npy', 2), ('a.npy', 1), ('c.npy', 3)",
        *statements,
    )
    with connection, connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)


@pytest.mark.parametrize("table", ["texts", "prompts"])
def test_either_text_table(connection, table):
    fill(
        connection,
        f"CREATE TABLE {table}(text_id INTEGER PRIMARY KEY, text TEXT)",
        f"INSERT INTO {table} VALUES (1, 'eins'), (2, 'zwei')",
    )
    records = fetch_embeddings_and_texts(connection)
    assert [tuple(record) for record in records] == [("b.npy", "zwei"), ("a.npy", "eins")]


def test_both_text_tables(connection):
    fill(
        connection,
        "CREATE TABLE texts(text_id INTEGER PRIMARY KEY, text TEXT)",
        "CREATE TABLE prompts(text_id INTEGER PRIMARY KEY, text TEXT)",
        "INSERT INTO texts VALUES (1, 'from texts')",
        "INSERT INTO prompts VALUES (1, 'hidden'), (3, 'from prompts')",
    )
    assert [tuple(r) for r in fetch_embeddings_and_texts(connection)] == [
        ("a.npy", "from texts"),
        ("c.npy", "from prompts"),
    ]


def test_missing_tables_are_named(connection):
    with pytest.raises(DatabaseError, match="no table image_embeddings"):
        fetch_embeddings_and_texts(connection)
    fill(connection)
    with pytest.raises(DatabaseError, match="looked for texts, prompts"):
        fetch_embeddings_and_texts(connection)


def test_without_a_database(tmp_path):
    (tmp_path / "image_embeddings.tsv").write_text(
        "embedding_path\ttext_id\ttensor_path\nemb_a.npy\t1\t/a.npy\nemb_b.npy\t5\t/b.npy\n"
    )
    with (tmp_path / "m.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(
            [("tensor_path", "text_id", "text"), ("/a.npy", 1, "one, two"), ("/x", 2, "three")]
        )
    expected = [(str(tmp_path / "emb_a.npy"), "one, two")]
    for texts in (tmp_path / "m.csv", {1: "one, two"}):
        assert [tuple(r) for r in read_embeddings_and_texts(tmp_path, texts)] == expected


def test_errors_never_show_the_password(postgres_folder, database):
    secret = "s3cr3t-pässword"
    config = DBConfig(host="127.0.0.1", port=1, database="d", user="u", password=secret)
    with pytest.raises(
        DatabaseError, match=r"cannot connect to PostgreSQL u@127\.0\.0\.1:1/d"
    ) as e:
        get_db_connection(config)
    url = f"postgresql://u:{secret}@127.0.0.1:1/d"
    with pytest.raises(DatabaseError) as f:
        get_db_connection(DBConfig(url=url))
    for text in (str(e.value), repr(e.value), repr(config), str(config), str(f.value)):
        assert secret not in text
    assert repr(DBConfig(url=url)) == repr(DBConfig())
