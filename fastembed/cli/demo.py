"""``fastembed demo``: the multichannel job, data and database included, on cells drawn here."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from ..database import DEFAULT_DATABASE, embedded, identifier
from ..datasets import EmbeddingTextDataset, fetch_embeddings_and_texts, get_db_connection
from ..sources import TENSOR_TABLE
from .options import Formatter, positive

SIZE = 540
PROMPTS = (
    "U2OS cells treated with DMSO",
    "U2OS cells treated with an actin inhibitor",
    "U2OS cells treated with a tubulin inhibitor",
)


def add(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="the multichannel job on generated cells, with an embedded PostgreSQL",
        formatter_class=Formatter,
        description=(
            "Draws small 8-channel plates of cells, lists them in a PostgreSQL that it starts,\n"
            "embeds them with a DINOv3 ViT-S of random weights and reads them back as a\n"
            "dataset. For a look at the plumbing: random weights mean nothing."
        ),
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo_out"), metavar="DIR", help="default demo_out"
    )
    parser.add_argument("--samples", type=positive, default=12, metavar="N", help="default 12")
    parser.set_defaults(run=run)


def draw_plate(seed: int, size: int = SIZE, cells: int = 60) -> np.ndarray:
    """Cells on a dark background, [8, size, size] uint16: five stains, three brightfields.

    Each stain lights another part of a cell: the nucleus, a ring around it, or all of it.
    """
    rng = np.random.default_rng(seed)
    reach = 40
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
    image = np.zeros((8, size + 2 * reach, size + 2 * reach), dtype=np.float32)
    for top, left in rng.integers(0, size, (cells, 2)):
        stretch, angle, radius = rng.uniform(0.7, 1.4), rng.uniform(0, np.pi), rng.uniform(9, 15)
        u = (x * np.cos(angle) + y * np.sin(angle)) * stretch
        distance = np.hypot(u, (y * np.cos(angle) - x * np.sin(angle)) / stretch) / radius
        body, nucleus = np.exp(-(distance**2) / 2), np.exp(-((distance * 2) ** 4))
        ring = np.exp(-((distance - 1) ** 2) * 8)
        window = image[:, top : top + 2 * reach + 1, left : left + 2 * reach + 1]
        for channel, part in enumerate((body, ring, body * ring, body - nucleus * 0.5, nucleus)):
            window[channel] += rng.uniform(1500, 6000) * np.maximum(part, 0)
        window[5:] -= 900 * ring
    image = image[:, reach:-reach, reach:-reach]
    image[:5] += 300
    image[5:] += 20_000
    return np.clip(rng.poisson(np.maximum(image, 0)), 0, 65_535).astype(np.uint16)


def run(options: argparse.Namespace) -> int:
    """Makes everything under the folder; returns the exit status of the extraction."""
    from . import build_parser

    folder, samples = options.out.resolve(), options.samples
    tensors, output = folder / "tensors", folder / "embeddings"
    tensors.mkdir(parents=True, exist_ok=True)
    print(f"1. Drawing {samples} plates of 8 x {SIZE} x {SIZE} uint16 into {tensors}")
    rows = []
    for i in range(samples):
        path = tensors / f"plate_{i:03d}.npy"
        np.save(path, draw_plate(seed=i))
        rows.append((str(path), i % len(PROMPTS)))

    # Where `--db embedded` of the same output folder finds it too.
    postgres = folder / "embeddings_postgres"
    print(f"2. Starting PostgreSQL in {postgres} and filling its tables")
    database = embedded(postgres)
    from psycopg2 import sql  # an extra, as the server is

    connection = get_db_connection(database)
    with connection, connection.cursor() as cursor:

        def execute(statement: str, rows=((),)) -> None:
            cursor.executemany(sql.SQL(statement).format(identifier(TENSOR_TABLE)), rows)

        execute("CREATE TABLE IF NOT EXISTS {}(tensor_path TEXT, text_id INTEGER)")
        execute("CREATE TABLE IF NOT EXISTS prompts(text_id INTEGER PRIMARY KEY, text TEXT)")
        execute("TRUNCATE {}, prompts")
        execute("INSERT INTO {} VALUES (%s, %s)", rows)
        execute("INSERT INTO prompts VALUES (%s, %s)", list(enumerate(PROMPTS)))

    command = [
        "multichannel", "--db", "embedded", "--db-name", DEFAULT_DATABASE,
        "--output-dir", str(output), "--model", "dinov3:vits16", "--weights", "random",
    ]  # fmt: skip
    print("3. fastembed " + " ".join(command))
    arguments = build_parser().parse_args(command)
    status = arguments.run(arguments)
    if status:
        return status

    records = fetch_embeddings_and_texts(connection)
    connection.close()
    dataset = EmbeddingTextDataset(records)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=2)
    pairs = sum(len(texts) for _, texts in loader)
    vector, text = dataset[0]
    print(f"4. The dataset gives {pairs} pairs; the first: {list(vector.shape)} float32, {text!r}")
    print(f"\nAll of it lies in {folder}. Run it again: nothing is computed twice.")
    print("The weights were RANDOM: these embeddings mean nothing.")
    return 0
