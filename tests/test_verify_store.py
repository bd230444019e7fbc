"""verify and repair of a sharded store: no damaged chunk is ever taken over for a good one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorstore", reason="tensorstore is not installed")
pytest.importorskip("pyarrow", reason="pyarrow is not installed")

from test_store import commit, fill, opened, stored, tree
from test_verify import flip, kinds

from fastembed import signature
from fastembed.datasets import EmbeddingStore
from fastembed.runlock import RunLock
from fastembed.store import shards
from fastembed.verify import findings, repair, verify

COUNT = 100


@pytest.fixture
def small(monkeypatch) -> None:
    """Seven shards of 16 rows, in chunks of 8."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 16)
    monkeypatch.setattr(shards, "CHUNK_ROWS", 8)


@pytest.fixture
def whole(small, tmp_path) -> Path:
    folder = tmp_path / "whole"
    signature.claim(folder, {"output": {"form": "zarr", "dtype": "float32"}})
    fill(folder, range(COUNT))
    assert verify(folder).sound
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out", symlinks=True))


def again(folder: Path, names: set[str] | None) -> None:
    """What an extraction does with `only`: the samples of these names."""
    with RunLock(folder):
        numbers = range(COUNT)
        index = opened(folder)
        done = {int(name.removeprefix("emb_")) for name in index.open()}
        wanted = numbers if names is None else [int(name.removeprefix("emb_")) for name in names]
        commit(index, sorted(set(wanted) - done))
        index.close()


def shard(folder: Path, number: int) -> Path:
    return folder / "embeddings.zarr" / "c" / str(number) / "0"


def row_of(chunk: int) -> int:
    """A byte of a shard that a chunk holds; 6 float32 a row, 8 rows and a checksum a chunk."""
    return chunk * (8 * 24 + 4) + 17


def swap(folder: Path) -> None:
    one, two = shard(folder, 1), shard(folder, 4)
    one.rename(folder / "between")
    two.rename(one)
    (folder / "between").rename(two)


DAMAGES = {
    "one chunk": (lambda f: flip(shard(f, 2), row_of(1)), 8),
    "chunks of two shards": (
        lambda f: [flip(shard(f, n), row_of(c)) for n, c in ((0, 0), (5, 1))], 16),
    "a checksum": (lambda f: flip(shard(f, 3), row_of(1) - 18), 8),
    "the last chunk": (lambda f: flip(shard(f, 6), 0), 4),
    "a shard's index": (lambda f: flip(shard(f, 1), -9), 16),
    "a truncated shard": (lambda f: os.truncate(shard(f, 1), 99), 16),
    "a lost shard": (lambda f: shard(f, 4).unlink(), 16),
    "all shards": (lambda f: [shard(f, n).unlink() for n in range(7)], COUNT),
    "two shards swapped": (swap, 32),
    "a fingerprint": (lambda f: flip(f / "embeddings.zarr" / "../shards.crc"), 4),
    "fingerprints lost": (lambda f: os.truncate(f / "embeddings.zarr" / "../shards.crc", 20), 68),
    "the array's metadata": (lambda f: flip(f / "embeddings.zarr" / "zarr.json", 20), 0),
    "no metadata": (lambda f: (f / "embeddings.zarr" / "zarr.json").unlink(), 0),
    "the index": (lambda f: flip(f / "index.parquet", 700), None),
    "a truncated index": (lambda f: os.truncate(f / "index.parquet", 700), None),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_made_good(whole, folder, damage):
    do, expected = DAMAGES[damage]
    do(folder)
    before = tree(folder)
    verdict = verify(folder)
    assert not verdict.sound and tree(folder) == before
    asked = []

    def make(names):
        asked.append(names)
        again(folder, names)

    done = repair(folder, make)
    assert done.after.sound, done.after.findings
    assert tree(folder) == tree(whole)
    if expected is None:
        assert asked == [None]
    else:
        assert sum(map(len, asked)) == expected


def test_what_a_repair_takes_out_is_not_read_meanwhile(folder):
    """Between withdrawal and the run there are the other vectors, each of which is right."""
    flip(shard(folder, 2), row_of(0))
    repair(folder)
    there = stored(folder)
    assert len(there) == COUNT - 8
    again(folder, None)
    assert stored(folder) == set(range(COUNT))


def test_unchanged_shards_are_linked_not_copied(folder):
    inode = shard(folder, 0).stat().st_ino
    flip(shard(folder, 5), row_of(1))
    repair(folder, lambda names: again(folder, names))
    assert shard(folder, 0).stat().st_ino == inode


def test_what_a_killed_run_left(folder, whole):
    """Logs that are not merged, a merge that stopped half-way, a commit that was damaged."""
    index = opened(folder)
    commit(index, range(COUNT, COUNT + 5))
    commit(index, range(COUNT + 5, COUNT + 9))
    index.sink.lock.alone().__enter__()  # the run is gone
    (folder / ".store-building").mkdir()
    (folder / "store-0123456789abcdef").mkdir()
    verdict = verify(folder)
    assert verdict.counts == {findings.UNMERGED: 1, findings.TEMPORARY: 2}
    assert not any(finding.is_damage for finding in verdict.findings)
    assert verdict.outputs == COUNT + 9
    log = next(folder.glob("staged-*.log"))
    flip(log, -3)
    assert findings.DAMAGED in kinds(verify(folder))
    asked = []
    done = repair(folder, asked.append)
    assert done.after.sound and asked == [None]  # which they were only the source knows
    assert len(EmbeddingStore(folder)) == COUNT + 5
    assert not np.isnan(EmbeddingStore(folder).as_numpy()).any()


def test_a_copy_that_followed_links_is_checked_without_its_index_digest(whole, tmp_path):
    copy = Path(shutil.copytree(whole, tmp_path / "copy", symlinks=False))
    shutil.rmtree(next(copy.glob("store-*")))
    verdict = verify(copy)
    assert verdict.sound and "copy that followed links" in verdict.notes[0]
    flip(shard(copy, 1), row_of(1))
    assert kinds(verify(copy)) == {findings.DAMAGED}
