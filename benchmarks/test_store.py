"""Vectors to the disk: a file each, one after another, or the store; and back, converted, searched.

The store's figures are whole runs: commits with their syncs, merge, removal of the logs. What
np.save leaves is not synced, which favours it.
"""

from __future__ import annotations

import itertools
import os
import shutil

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra zarr)")
pytest.importorskip("tensorstore", reason="tensorstore is not installed (extra zarr)")

import pyarrow as pa
import torch

from fastembed import search, signature
from fastembed.convert import convert
from fastembed.datasets import EmbeddingStore
from fastembed.records import Embedded, Item
from fastembed.store import Parquet, SegmentParquet, Zarr, journal, shards
from fastembed.store.merge import merge

COUNT, DIM = 32_768, 1024
GROUP = "vectors to the disk"
READ = "2,000 random rows"


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((COUNT, DIM)).astype(np.float16)


@pytest.fixture
def measure(row, tmp_path):
    """Runs a writer a few times, each into an empty folder."""
    folders = itertools.count()

    def run(contender, write, vectors, **options):
        def setup():
            for old in tmp_path.iterdir():
                shutil.rmtree(old)
            folder = tmp_path / str(next(folders))
            folder.mkdir()
            os.sync()  # what others wrote is not waited for within the measurement
            return (folder,), {}

        benchmark = row(
            GROUP, contender, dtype="float16", shape=f"{COUNT}x{DIM}", nbytes=vectors.nbytes,
            images=COUNT, **options,
        )  # fmt: skip
        benchmark.pedantic(write, setup=setup, rounds=5)

    return run


def test_np_save(measure, vectors):
    def write(folder):
        for i, vector in enumerate(vectors):
            np.save(folder / f"{i}.npy", vector)

    measure("np.save, a file each, no sync", write, vectors, baseline=True)


@pytest.mark.parametrize("sync", [False, True])
def test_sequential(measure, vectors, sync):
    def write(folder):
        with (folder / "all").open("wb", buffering=0) as stream:
            for block in vectors.reshape(-1, 1 << 19):
                stream.write(block)
            if sync:
                os.fsync(stream.fileno())

    measure(f"one file, 1 MiB writes, {'synced' if sync else 'no sync'}", write, vectors)


def test_blocks(measure, vectors):
    names = pa.array([f"emb_{i:040d}" for i in np.random.default_rng(1).permutation(COUNT)])
    rows = pa.table({"name": names.cast(pa.large_string())})

    def write(folder):
        log = journal.LogWriter(folder)
        for start in range(0, COUNT, 4096):
            log.append(rows.slice(start, 4096), vectors[start : start + 4096])
        log.close()
        merge(folder, ())

    measure("store, commits of 4,096", write, vectors)


def test_array_alone(measure, vectors):
    """What a merge writes, with its syncs: the floor of anything that writes vectors once."""

    def write(folder):
        def fill(number, rows):
            start = number * shards.SHARD_ROWS
            rows[:] = vectors[start : start + len(rows)]

        shards.write(folder / "a.zarr", vectors.shape, vectors.dtype, {}, fill)
        for path in folder.rglob("*"):
            journal.sync(path)

    measure("sharded zarr in one go, synced", write, vectors)


def photos(vectors) -> list[Embedded]:
    """Samples of 16 vectors."""
    parts = dict.fromkeys(range(16), 0)
    return [
        Embedded(Item(str(i), "", f"{i:012d}", parts=parts), part)
        for i, part in enumerate(vectors.reshape(-1, 16, DIM))
    ]


def samples(vectors) -> list[Embedded]:
    return [
        Embedded(Item(str(i), f"{i}.npy", f"emb_{i:040d}", {"text_id": i}), vector[None])
        for i, vector in enumerate(vectors)
    ]


# At full speed the pipeline commits when half of its backlog is full: 32 MiB of float32 features.
AT_FULL_SPEED = (32 << 20) // (4 * DIM)


@pytest.mark.parametrize("rows", [256, AT_FULL_SPEED])
@pytest.mark.parametrize("kind", ["photos of 16", "samples"])
def test_runs(measure, vectors, kind, rows):
    """Sink and index as the pipeline calls them."""
    made, index = (samples, Parquet) if kind == "samples" else (photos, SegmentParquet)
    embedded = made(vectors)
    size = rows // len(embedded[0])
    measure(
        f"store, {kind}, commits of {rows} vectors",
        lambda folder: write_samples(index(Zarr(folder)), embedded, size), vectors,
    )  # fmt: skip


def write_samples(index: Parquet, samples: list[Embedded], size: int) -> None:
    index.sink.open()
    index.open()
    for start in range(0, len(samples), size):
        group = samples[start : start + size]
        for sample in group:
            index.sink.write(sample)
        index.commit([sample.item for sample in group])
    index.close()


CONVERT = "32,768 vectors of a zarr store to"


@pytest.fixture
def store(tmp_path, vectors):
    """What a job leaves, its settings too."""
    folder = tmp_path / "store"
    signature.claim(folder, {"output": {"form": "zarr", "dtype": "float16"}})
    write_samples(Parquet(Zarr(folder)), samples(vectors), COUNT)
    return folder


@pytest.mark.parametrize("form", ["zarr", "parquet", "safetensors", "npy"])
def test_convert(row, store, tmp_path, vectors, form):
    """All of it synced; against a plain copy of the store's files, which is not."""
    benchmark = row(
        CONVERT, form, dtype="float16", shape=f"{COUNT}x{DIM}", nbytes=vectors.nbytes, images=COUNT
    )
    benchmark.pedantic(
        lambda: convert(store, tmp_path / "new", form, overwrite=True), rounds=3, warmup_rounds=1
    )


def test_copy(row, store, tmp_path, vectors):
    benchmark = row(
        CONVERT, "shutil.copytree, no sync", dtype="float16", shape=f"{COUNT}x{DIM}",
        nbytes=vectors.nbytes, images=COUNT, baseline=True,
    )  # fmt: skip

    def copy():
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        shutil.copytree(store, tmp_path / "new", symlinks=True)

    benchmark.pedantic(copy, rounds=3, warmup_rounds=1)


NEAREST = "10 nearest of 200,000 x 768 in float16"


@pytest.fixture(scope="module")
def many() -> torch.Tensor:
    return torch.randn(200_000, 768, generator=torch.Generator().manual_seed(0)).half()


@pytest.mark.parametrize("queries", [1, 32])
def test_search(row, many, queries):
    asked = torch.randn(queries, 768, generator=torch.Generator().manual_seed(1))
    found = search(many[:2000], asked)
    exact = torch.nn.functional.normalize(many[:2000].double()) @ asked.double().T
    assert (exact.topk(10, dim=0).indices.T.numpy() == found.rows).all()
    benchmark = row(
        f"{NEAREST}, {queries} queries", "search", dtype="float16", nbytes=many.nbytes,
        images=queries, exactness="as float64",
    )  # fmt: skip
    benchmark(lambda: search(many, asked))


@pytest.mark.parametrize("queries", [1, 32])
@pytest.mark.parametrize("product", ["float16", "float32"])
def test_search_by_torch(row, many, queries, product):
    """Vectors in memory, norms not looked at; float16 products come back rounded to float16."""
    asked = torch.randn(queries, 768, generator=torch.Generator().manual_seed(1)).T.contiguous()
    half = product == "float16"
    asked = asked.half() if half else asked
    benchmark = row(
        f"{NEAREST}, {queries} queries", f"(X @ q).topk by torch in {product}", dtype="float16",
        nbytes=many.nbytes, images=queries, baseline=half,
    )  # fmt: skip
    benchmark(lambda: ((many if half else many.float()) @ asked).topk(10, dim=0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, vectors):
    files, store = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("store")
    for i, vector in enumerate(vectors):
        np.save(files / f"{i}.npy", vector)
    log = journal.LogWriter(store)
    log.append(pa.table({"name": pa.array([f"{i:06d}" for i in range(COUNT)])}), vectors)
    log.close()
    merge(store, ())
    return files, store


def test_read(row, folders, vectors):
    rows = np.random.default_rng(2).integers(0, COUNT, 2000)
    store = EmbeddingStore(folders[1])
    np.testing.assert_array_equal(store[rows], vectors[rows])
    benchmark = row(
        READ, "store[rows]", dtype="float16", images=2000, nbytes=2000 * 2 * DIM,
        exactness="bit-exact",
    )  # fmt: skip
    benchmark(lambda: store[rows])


def test_read_one_by_one(row, folders):
    rows = np.random.default_rng(2).integers(0, COUNT, 2000).tolist()
    store = EmbeddingStore(folders[1])
    benchmark = row(READ, "store[row]", dtype="float16", images=2000, nbytes=2000 * 2 * DIM)
    benchmark(lambda: [store[i] for i in rows])


def test_read_keys(row, folders):
    rows = np.random.default_rng(2).integers(0, COUNT, 2000)
    keys = [f"{i:06d}" for i in rows]
    store = EmbeddingStore(folders[1])
    benchmark = row(READ, "store[keys]", dtype="float16", images=2000, nbytes=2000 * 2 * DIM)
    benchmark(lambda: store[keys])


def test_read_files(row, folders):
    rows = np.random.default_rng(2).integers(0, COUNT, 2000)
    benchmark = row(
        READ, "np.load, a file each", dtype="float16", images=2000, nbytes=2000 * 2 * DIM,
        baseline=True,
    )  # fmt: skip
    benchmark(lambda: [np.load(folders[0] / f"{i}.npy") for i in rows])


def test_read_tensorstore(row, folders):
    import tensorstore

    rows = np.random.default_rng(2).integers(0, COUNT, 2000)
    path = folders[1] / "embeddings.zarr"
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    array = tensorstore.open(spec).result()
    benchmark = row(READ, "TensorStore, one call", dtype="float16", images=2000,
                    nbytes=2000 * 2 * DIM)  # fmt: skip
    benchmark(lambda: array[rows].read().result())
