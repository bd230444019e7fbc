"""Volumes to disk and back, beside plain writes and reads of the same bytes."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastembed.records import Item
from fastembed.volumes import Form, VolumeFiles, VolumeMetadata, create_preprocessed_dataloader
from fastembed.volumes.bench import drop_cache
from fastembed.volumes.recipe import Rest, VolumeFeatures

CHANNELS, SIDE, TOKENS = 256, 128, 32
SHAPE = (CHANNELS, SIDE, SIDE, SIDE)
BYTES = 2 * CHANNELS * SIDE**3
LABEL = "x".join(map(str, SHAPE))
THREADS = os.cpu_count() or 1


@pytest.fixture(scope="module")
def result() -> VolumeFeatures:
    """A volume as the pipeline hands it to the sink: three planes of tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((SIDE, CHANNELS, TOKENS, TOKENS), dtype=np.float32)
    labels = rng.integers(0, 2, (SIDE,) * 3).astype(np.uint8)
    rest = Rest(labels, labels, {}, (4 * SIDE,) * 3, 0.0)
    planes = {"xy": tokens, "xz": tokens, "yz": tokens}
    return VolumeFeatures(Item("volume_000000", "", "volume_000000"), planes, "bilinear",
                          torch.float16, rest, 0.0)  # fmt: skip


@pytest.fixture(scope="module")
def stored(result, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("volumes")
    sink = VolumeFiles(folder, Form(), threads=THREADS)
    sink.open()
    sink.write(result)
    VolumeMetadata(sink).commit([result.item])
    return folder


@pytest.mark.parametrize("contender", ["plain sequential write, fsync", "from tokens to zarr"])
def test_write(row, result, tmp_path, contender):
    """Ours computes what it writes; the plain write has it in memory, in one buffer."""
    buffer = np.ones(16 << 20, np.uint8)

    def plain():
        with open(tmp_path / "plain", "wb", buffering=0) as stream:
            for _ in range(BYTES // len(buffer)):
                stream.write(buffer)
            os.fsync(stream.fileno())

    sink = VolumeFiles(tmp_path, Form(), threads=THREADS)
    sink.open()

    def ours():
        sink.write(result)
        sink.put_in_place(result.item.name)

    run = plain if contender.startswith("plain") else ours
    benchmark = row(
        "volume to disk, synced", contender, dtype="float16", shape=LABEL, nbytes=BYTES,
        baseline=run is plain,
    )  # fmt: skip
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


def plain_read(folder: Path) -> SimpleNamespace:
    files = sorted(f for f in (folder / "volume_000000_features.zarr").iterdir()
                   if not f.name.startswith("."))  # fmt: skip
    buffer = np.zeros(max(f.stat().st_size for f in files), np.uint8)

    def read():
        for file in files:
            with open(file, "rb", buffering=0) as stream:
                stream.readinto(buffer)

    return SimpleNamespace(read=read, files=files)


@pytest.mark.parametrize("cache", ["warm", "cold"])
@pytest.mark.parametrize(
    "contender", ["plain sequential read", "loader", "zarr-python", "np.memmap, copied"]
)
def test_load(row, stored, tmp_path_factory, contender, cache):
    """A batch of one volume; the plain read goes into memory that is there already."""
    import zarr

    plain = plain_read(stored)
    dataset = create_preprocessed_dataloader(stored, 1, num_threads=THREADS).dataset
    array = zarr.open(stored / "volume_000000_features.zarr", mode="r")
    whole = stored / "whole.npy"
    if contender.startswith("np") and not whole.exists():
        np.save(whole, np.asarray(array))
    run = {
        "plain sequential read": plain.read,
        "loader": lambda: dataset.fetch([0])(),
        "zarr-python": lambda: torch.from_numpy(np.asarray(array)),
        "np.memmap, copied": lambda: torch.from_numpy(np.array(np.load(whole, mmap_mode="r"))),
    }[contender]
    files = [whole] if contender.startswith("np") else plain.files
    if contender == "loader":
        assert (run()[0][0].numpy() == np.asarray(array)).all()

    def setup():
        if cache == "cold" and (why := drop_cache(files)):
            pytest.skip(why)

    benchmark = row(
        f"volume from disk, {cache}", contender, dtype="float16", shape=LABEL, nbytes=BYTES,
        baseline=contender.startswith("plain"), exactness="bits",
    )  # fmt: skip
    benchmark.pedantic(run, setup=setup, rounds=5, warmup_rounds=1 if cache == "warm" else 0)
