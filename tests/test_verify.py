"""Whatever is done to an output folder: verify says so, and a repair gives every byte back."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import test_maps_job
import test_panoptic_job
from conftest import Plates, TinyEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastembed import MultiCrop, NpyPerSample, Percentile, SegmentCrops, TensorCsv, Tsv, extract
from fastembed.commands import FILE_NAME as RUNS
from fastembed.commands import Command
from fastembed.verify import findings, repair, verify

COMMAND = Command(("multichannel", "--manifest=tensors.csv", "--output-dir={folder}"), "/", "0")


@dataclasses.dataclass
class Job:
    """An extraction that can be given again, and what it left."""

    whole: Path
    run: Callable

    def copy(self, to: Path) -> Path:
        shutil.rmtree(to, ignore_errors=True)
        return Path(shutil.copytree(self.whole, to, symlinks=True))

    def repair(self, folder: Path, **options):
        return repair(
            folder, lambda names: self.run(folder, only=names, command=COMMAND), **options
        )


def samples(folder: Path) -> Callable:
    (folder / "tensors").mkdir(parents=True)
    plates = Plates(folder / "tensors").fill(7)

    def run(out, **options):
        return extract(TensorCsv(plates.manifest), MultiCrop(Percentile(), n_crops=2),
                       TinyEngine(), NpyPerSample(out), Tsv(out), **options)  # fmt: skip

    return run


def photos(form: str) -> Callable:
    def build(folder: Path) -> Callable:
        coco = test_panoptic_job.Coco(folder / "coco").fill(5)
        return lambda out, **options: coco.run(out, form, **options)

    return build


def maps(folder: Path) -> Callable:
    images = test_maps_job.fill(folder / "in", 4)
    test_maps_job.save(images / "sub" / "photo_001.png", 9)

    def run(out, **options):
        engine = test_maps_job.MapEngine(outputs=("map", "map@3"))
        return test_maps_job.run(
            images, out, engine, recursive=True, meta={"model": "tiny"}, **options
        )

    return run


def stored_samples(folder: Path) -> Callable:
    pytest.importorskip("tensorstore", reason="tensorstore is not installed")
    from fastembed.store import Parquet, Zarr

    (folder / "tensors").mkdir(parents=True)
    plates = Plates(folder / "tensors").fill(12, size=40)

    def run(out, **options):
        sink = Zarr(out)
        return extract(TensorCsv(plates.manifest), MultiCrop(Percentile(), n_crops=1),
                       TinyEngine(), sink, Parquet(sink), **options)  # fmt: skip

    return run


def stored_segments(folder: Path) -> Callable:
    pytest.importorskip("tensorstore", reason="tensorstore is not installed")
    from fastembed.store import SegmentParquet, Zarr

    coco = test_panoptic_job.Coco(folder / "coco").fill(6)

    def run(out, **options):
        sink = Zarr(out)
        return extract(coco.source(), SegmentCrops(), test_panoptic_job.RgbEngine(), sink,
                       SegmentParquet(sink), **options)  # fmt: skip

    return run


FILES = {"samples": samples, "segments": photos("npy"), "photos": photos("npz"), "maps": maps}
STORES = {"stored samples": stored_samples, "stored segments": stored_segments}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Callable[[str], Job]:
    made: dict[str, Job] = {}

    def job(kind: str) -> Job:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind.replace(" ", "-"))
            run = {**FILES, **STORES}[kind](folder)
            run(folder / "whole", command=COMMAND)
            made[kind] = Job(folder / "whole", run)
        return made[kind]

    return job


def tree(folder: Path) -> dict[str, bytes | str]:
    """All that is in a folder but locks and failures: content, or target of a link."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        for path in folder.rglob("*")
        if (path.is_symlink() or path.is_file())
        and not path.name.endswith((".lock", ".jsonl"))
        and path.name != RUNS
    }


def kinds(verdict) -> set[str]:
    return set(verdict.counts)


def outputs(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in (".npy", ".npz"))


def index_of(folder: Path) -> Path:
    return next(p for p in folder.glob("*.tsv") if p.name != "checksums.tsv")


@pytest.mark.parametrize("kind", [*FILES, *STORES])
def test_a_finished_run_is_sound(jobs, kind):
    before = tree(jobs(kind).whole)
    verdict = verify(jobs(kind).whole)
    assert verdict.sound and verdict.outputs and verdict.notes == []
    assert verdict.files == verdict.verified and verdict.unlisted == verdict.foreign == 0
    assert verdict.bytes
    assert verify(jobs(kind).whole, quick=True).bytes == 0
    assert tree(jobs(kind).whole) == before


def flip(path: Path, position: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def swap(folder: Path) -> None:
    first, second = outputs(folder)[:2]
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)


def drop_row(folder: Path) -> None:
    lines = index_of(folder).read_bytes().splitlines(keepends=True)
    index_of(folder).write_bytes(b"".join(lines[:2] + lines[3:]))


def add_row(folder: Path) -> None:
    """Of an output that there never was."""
    rows = {
        "image_embeddings.tsv": "emb_73d8e4b8aae2b32ae8a83ab2f8b5d4ab8b8f7a07.npy\t7\tgone.npy\n",
        "inst2feat.tsv": "99\t7\t99_7.npy\n",
        "image_index.tsv": "99\t99.npz\t2\n",
        "maps.tsv": "gone\tgone.png\t3x4x4\tfloat32\n",
    }
    with index_of(folder).open("a") as stream:
        stream.write(rows[index_of(folder).name])


def repeat_row(folder: Path) -> None:
    lines = index_of(folder).read_bytes().splitlines(keepends=True)
    index_of(folder).write_bytes(b"".join(lines + lines[2:3]))


def first_line(folder: Path) -> int:
    """Where the first line of the list of checksums ends."""
    data = (folder / "checksums.tsv").read_bytes()
    return data.index(b"\n", data.index(b"\n") + 1)


DAMAGES = {
    "a flipped bit": (lambda f: flip(outputs(f)[1]), {findings.DAMAGED}),
    "a truncated file": (lambda f: os.truncate(outputs(f)[1], 100), {findings.DAMAGED}),
    "an empty file": (lambda f: os.truncate(outputs(f)[1], 0), {findings.DAMAGED}),
    "a lost file": (lambda f: outputs(f)[1].unlink(), {findings.MISSING}),
    "two files swapped": (swap, {findings.DAMAGED}),
    "a lost row": (drop_row, {findings.ORPHAN}),
    "a foreign row": (add_row, {findings.MISSING, findings.ROW}),
    "a row twice": (repeat_row, {findings.ROW}),
    "a torn row": (lambda f: os.truncate(index_of(f), index_of(f).stat().st_size - 5),
                   {findings.OPEN, findings.ORPHAN}),
    "no index": (lambda f: index_of(f).unlink(), {findings.ROW, findings.ORPHAN}),
    "no settings": (lambda f: (f / "fastembed.json").unlink(), {findings.SETTINGS}),
    "other settings": (lambda f: flip(f / "fastembed.json", 40), {findings.SETTINGS}),
    "a damaged seal": (lambda f: flip(f / "checksums.tsv"), None),
    "a damaged checksum": (lambda f: flip(f / "checksums.tsv", first_line(f) - 3), None),
    "a damaged line": (lambda f: flip(f / "checksums.tsv", first_line(f) - 33),
                       {findings.LIST, findings.ORPHAN}),
    "lines lost": (lambda f: os.truncate(f / "checksums.tsv", first_line(f) + 1), None),
    "a temporary file": (lambda f: (f / ".x.npy.tmp").write_bytes(b"1"), {findings.TEMPORARY}),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", FILES)
def test_damage_is_found_and_made_good(jobs, tmp_path, kind, damage):
    job = jobs(kind)
    folder = job.copy(tmp_path / "out")
    do, expected = DAMAGES[damage]
    do(folder)
    damaged = tree(folder)
    verdict = verify(folder)
    assert not verdict.sound
    if expected is not None:
        assert kinds(verdict) and kinds(verdict) <= expected
    assert tree(folder) == damaged
    done = job.repair(folder)
    assert done.after.sound, done.after.findings
    assert tree(folder) == tree(job.whole)


def test_what_nothing_makes_again_is_kept_out_of_the_way(jobs, tmp_path):
    job = jobs("samples")
    folder = job.copy(tmp_path / "out")
    stray = f"emb_{'0' * 40}.npy"
    shutil.copy(outputs(folder)[0], folder / stray)
    done = job.repair(folder)
    assert done.before.counts == {findings.ORPHAN: 1} and done.after.sound
    assert (folder / "set-aside" / stray).exists() and "set aside" in done.after.notes[0]
    shutil.rmtree(folder / "set-aside")
    assert tree(folder) == tree(job.whole)


@pytest.mark.parametrize("kind", [*FILES, *STORES])
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32), hits=st.integers(1, 3), cut=st.booleans())
def test_any_byte_anywhere(jobs, tmp_path, kind, seed, hits, cut):
    """Bytes of any files of the folder, changed or cut off."""
    job = jobs(kind)
    folder = job.copy(tmp_path / "out")
    draw = random.Random(seed)
    files = sorted(tree(folder))
    for name in draw.sample(files, hits):
        path = folder / name
        if path.is_symlink():
            continue
        data = bytearray(path.read_bytes())
        position = draw.randrange(len(data))
        if cut:
            del data[position:]
        else:
            data[position] ^= draw.randrange(1, 256)
        path.write_bytes(data)
    if tree(folder) == tree(job.whole):
        return
    assert not verify(folder).sound
    done = job.repair(folder)
    assert done.after.sound, done.after.findings
    assert tree(folder) == tree(job.whole)
