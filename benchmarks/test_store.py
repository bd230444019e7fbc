"""Vectors to the disk: a file each, one after another, or the store; and back.

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


def test_photos(measure, vectors):
    """Sink and index as the pipeline calls them: samples of 16 vectors, 256 to a commit."""
    parts = dict.fromkeys(range(16), 0)
    samples = [
        Embedded(Item(str(i), "", f"{i:012d}", parts=parts), part)
        for i, part in enumerate(vectors.reshape(-1, 16, DIM))
    ]

    def write(folder):
        write_samples(SegmentParquet(Zarr(folder)), samples)

    measure("store, photos of 16, commits of 256", write, vectors)


def test_samples(measure, vectors):
    samples = [
        Embedded(Item(str(i), f"{i}.npy", f"emb_{i:040d}", {"text_id": i}), vector[None])
        for i, vector in enumerate(vectors)
    ]
    measure(
        "store, samples, commits of 256",
        lambda folder: write_samples(Parquet(Zarr(folder)), samples), vectors,
    )  # fmt: skip


def write_samples(index: Parquet, samples: list[Embedded]) -> None:
    index.sink.open()
    index.open()
    for start in range(0, len(samples), 256):
        group = samples[start : start + 256]
        for sample in group:
            index.sink.write(sample)
        index.commit([sample.item for sample in group])
    index.close()


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
