"""``--format zarr``: nothing that was committed is lost, and bytes depend on the keys alone."""

from __future__ import annotations

import base64
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyEngine, read_outputs
from test_panoptic_job import LABELS, Coco, RgbEngine, failures
from torch.utils.data import DataLoader

pytest.importorskip("pyarrow", reason="pyarrow is not installed (extras zarr, volumes)")
pytest.importorskip("tensorstore", reason="tensorstore is not installed (extras zarr, volumes)")

import pyarrow.parquet as pq

from fastembed import (
    MultiCrop,
    NpyPerSample,
    Percentile,
    SegmentCrops,
    TensorCsv,
    Tsv,
    cli,
    commands,
    extract,
)
from fastembed.datasets import EmbeddingStore, PanopticFeatures
from fastembed.records import Embedded, Item
from fastembed.signature import SignatureMismatch
from fastembed.store import Parquet, SegmentParquet, Zarr, journal

RECIPE = MultiCrop(Percentile(), n_crops=3)
NAMES = {"embeddings.zarr", "index.parquet"}


VECTORS = np.random.default_rng(0).standard_normal((3 * 4096, 6))


def vector(number: int, dtype: str = "float32") -> np.ndarray:
    return VECTORS[number].astype(dtype)


def embedded(number: int, dtype: str = "float32") -> Embedded:
    item = Item(f"k{number}", f"a/{number:06d}.npy", f"emb_{number}", {"text_id": number % 5})
    return Embedded(item, vector(number, dtype)[None])


def commit(index: Parquet, numbers, **form) -> None:
    samples = [embedded(number, **form) for number in numbers]
    for sample in samples:
        index.sink.write(sample)
    index.sink.flush()
    index.commit([sample.item for sample in samples])


def opened(folder: Path) -> Parquet:
    index = Parquet(Zarr(folder))
    index.sink.open()
    return index


def fill(folder: Path, *groups, **form) -> None:
    """One run that commits these groups."""
    index = opened(folder)
    for group in groups:
        commit(index, group, **form)
    index.close()


def tree(folder: Path) -> dict[str, bytes | str]:
    """All that is in a folder but its lock and its records of failures and commands: content, or
    target of a link."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if (path.is_symlink() or path.is_file())
        and not path.name.endswith(".lock")
        and path.name != commands.FILE_NAME
    }


def stored(folder: Path, **form) -> set[int]:
    """The numbers whose vectors a store holds, each of which is right."""
    if not (folder / "embeddings.zarr").exists():
        return set()
    store = EmbeddingStore(folder)
    numbers = [int(key.removeprefix("emb_")) for key in store.keys()]
    expected = np.stack([vector(number, **form) for number in numbers])
    np.testing.assert_array_equal(store.as_numpy(), expected)
    return set(numbers)


# Files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_others_read_it_without_us(tmp_path, dtype):
    zarr = pytest.importorskip("zarr")
    import tensorstore

    count = 4096 + 100
    fill(tmp_path, range(count), dtype=dtype)
    table = pq.read_table(tmp_path / "index.parquet")
    assert table.column_names == ["name", "tensor_path", "text_id", "row"]
    assert table["row"].to_pylist() == list(range(count))
    assert table["tensor_path"].to_pylist() == [f"a/{i:06d}.npy" for i in range(count)]
    expected = np.stack([vector(i, dtype=dtype) for i in range(count)])
    array = zarr.open_array(tmp_path / "embeddings.zarr", mode="r")
    assert (array.shape, array.dtype, array.shards) == ((count, 6), dtype, (4096, 6))
    assert array.chunks == (64, 6) and array.metadata.zarr_format == 3
    np.testing.assert_array_equal(array[:], expected)
    spec = {"driver": "zarr3", "kvstore": f"file://{tmp_path}/embeddings.zarr/"}
    np.testing.assert_array_equal(tensorstore.open(spec).result().read().result(), expected)
    assert len(list((tmp_path / "embeddings.zarr" / "c").iterdir())) == 2
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {
        *NAMES, (tmp_path / "embeddings.zarr").resolve().parent.name,
    }  # fmt: skip


def test_a_flipped_bit_is_an_error_in_zarr_not_a_number(tmp_path):
    zarr = pytest.importorskip("zarr")
    fill(tmp_path, range(300))
    shard = tmp_path / "embeddings.zarr" / "c" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"(?i)crc|checksum"):
        zarr.open_array(tmp_path / "embeddings.zarr", mode="r")[:]
    with pytest.raises(ValueError, match="damaged"):
        content[-20] ^= 1  # the shard's own index
        shard.write_bytes(content)
        EmbeddingStore(tmp_path)
    shard.write_bytes(content[:-7])
    with pytest.raises(ValueError, match="must have"):
        EmbeddingStore(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError):
        EmbeddingStore(tmp_path)


def test_bytes_are_a_function_of_the_keys(tmp_path):
    count = 2 * 4096 + 50
    fill(tmp_path / "one", range(count))
    whole = tree(tmp_path / "one")
    mixed = np.random.default_rng(0).permutation(count)
    fill(tmp_path / "mixed", *np.array_split(mixed, 9))
    assert tree(tmp_path / "mixed") == whole
    for part in np.array_split(mixed, 3):
        fill(tmp_path / "three", part, part[:70])  # some of them twice
    assert tree(tmp_path / "three") == whole
    fill(tmp_path / "three", mixed[:5])
    assert tree(tmp_path / "three") == whole
    opened(tmp_path / "three").close()
    assert tree(tmp_path / "three") == whole


def test_shards_that_stay_are_linked(tmp_path):
    def inodes():
        shards = (tmp_path / "embeddings.zarr" / "c").glob("*/0")
        return {int(shard.parent.name): shard.stat().st_ino for shard in shards}

    fill(tmp_path, range(10, 2 * 4096 + 100))
    before = inodes()
    fill(tmp_path, range(2 * 4096 + 100, 3 * 4096))
    after = inodes()
    assert [before[i] == after[i] for i in range(3)] == [True, True, False]
    fill(tmp_path, range(5))
    assert not set(after.values()) & set(inodes().values())
    assert stored(tmp_path) == {*range(5), *range(10, 3 * 4096)}


def test_rows_can_be_dropped(tmp_path):
    fill(tmp_path / "out", range(100))
    index = opened(tmp_path / "out")
    commit(index, range(100, 120))
    index.remove({f"emb_{i}" for i in range(10, 110)})
    assert index.open() == {f"emb_{i}" for i in (*range(10), *range(110, 120))}
    commit(index, [50])
    index.close()
    fill(tmp_path / "whole", [*range(10), 50, *range(110, 120)])
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    index = opened(tmp_path / "out")
    index.remove(index.open())
    index.close()
    assert tree(tmp_path / "out") == {} and not list((tmp_path / "out").glob("store-*"))
    with pytest.raises(FileNotFoundError, match="no run ended there"):
        EmbeddingStore(tmp_path / "out")


def test_what_is_not_ours_stays(tmp_path):
    fill(tmp_path, range(3))
    mine = ["store-mine/x", "staged-1.log", "staged.log", "store-123/embeddings.zarr", "a.zarr"]
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
    index = opened(tmp_path)
    index.remove(index.open())
    index.close()
    fill(tmp_path, range(4))
    assert all((tmp_path / name).read_bytes() == b"mine" for name in mine)
    shutil.copytree(tmp_path, tmp_path / "copy")  # follows links
    assert stored(tmp_path / "copy") == set(range(4))
    before = tree(tmp_path / "copy")
    with pytest.raises(FileExistsError, match="another output folder"):
        opened(tmp_path / "copy")
    assert tree(tmp_path / "copy") == before


# Faults -----------------------------------------------------------------------------------


def test_the_last_run_to_leave_merges(tmp_path):
    first, second = opened(tmp_path), opened(tmp_path)
    commit(first, range(10))
    commit(second, range(10, 30))
    first.close()
    with pytest.raises(FileNotFoundError, match="committed, not merged"):
        EmbeddingStore(tmp_path)
    with pytest.raises(OSError, match="another run is writing"):
        opened(tmp_path).remove({"emb_1"})
    second.close()
    assert stored(tmp_path) == set(range(30)) and not journal.paths(tmp_path)
    third = opened(tmp_path)
    commit(third, [77])
    with pytest.warns(UserWarning, match="committed, not merged.*as before it"):
        assert len(EmbeddingStore(tmp_path)) == 30
    third.close()
    assert stored(tmp_path) == {*range(30), 77}


def test_a_torn_or_damaged_record_is_not_there(tmp_path):
    """Whatever is cut off or flipped: a record is there whole or not at all, and is made again."""
    fill(tmp_path / "whole", range(12))
    index = opened(tmp_path / "log")
    ends = []
    for i in range(0, 12, 4):
        commit(index, range(i, i + 4))
        ends.append(journal.paths(tmp_path / "log")[0].stat().st_size)
    [log] = journal.paths(tmp_path / "log")
    content = log.read_bytes()
    draw = np.random.default_rng(1)

    def committed(changed: bytes) -> set[int]:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / log.name).write_bytes(changed)
        index = opened(folder)
        names = {int(name.removeprefix("emb_")) for name in index.open()}
        index.close()
        assert stored(folder) == names
        fill(folder, sorted(set(range(12)) - names))
        assert tree(folder) == tree(tmp_path / "whole")
        return names

    for size in (*ends[:-1], 0, 7, 31, ends[0] - 1, *draw.integers(0, len(content), 6)):
        assert committed(content[:size]) == set(range(4 * sum(end <= size for end in ends)))
    for at in (0, 13, 40, ends[0] - 1, *draw.integers(ends[0], ends[1], 6)):
        flipped = bytearray(content)
        flipped[at] ^= 16
        lost = set(range(4)) if at < ends[0] else set(range(4, 8))
        there = committed(bytes(flipped))
        # Where sizes are damaged, what follows cannot be found.
        assert not there & lost and there | lost <= set(range(12))
    tail = ends[1] + 100  # zeros, as a file system may leave them after a power cut
    assert committed(content[:tail] + bytes(len(content) - tail)) == set(range(8))


# Of samples 0, 1 and 2, as the first version of the records had them: with zlib's CRC-32.
FIRST_LOG = (
    "c-l)#%}q*8F)$R2SJIbYU|=}G!~h1&5Q^bH5J)gGFbIHoTnu~+Yz(Xn96%NjFtWhKd4MDfRNMy421)}lNSp&mg5"
    ")@WY!Rp&I}oSk<R_LG8v)H@U`Q#cEJ%gg+W^E4P<3;F_5)2~0@<Sg6=Q(vFG;N^iO);{o6i9h;ebdng7jX2=o10"
    "ylR?tQ4c3=eoL>}QkXVwzZ~~}K0O%?XpugC`t`&g#2~#hK&P&Wqg|Jz`d{FpsFhcyr0QRpKG=zA-rZF(HFo42!0"
    "s{<i0r@=eu$sdF30r0c1mIx64HVF5ekg5#rp^FOT>z9;fzlOd>S25dBr#?*cQFvbhXGc&Z&BR|Om6W8Ai@wt7{S"
    "%^pxF;|XQI9V80h5{R6^N?NNghz8`)k)D9wbFenE83eg?aGH}-vdKPlVazk1Dfp(5x0ze+ppDqk+Me^y*%|4-dy"
    "f9TJJ`(O3R@6U79wDmhHa^MYD!anAz`THM~TJP@<;odLtY2iKqed=Wq"
)


def test_logs_of_the_first_version_are_read(tmp_path):
    content = zlib.decompress(base64.b85decode(FIRST_LOG))
    log = tmp_path / f"staged-{'0' * 32}.log"
    log.write_bytes(content)
    index = opened(tmp_path)
    assert index.open() == {f"emb_{i}" for i in range(3)}
    commit(index, [3])
    index.close()
    fill(tmp_path / "whole", range(4))
    assert tree(tmp_path / "whole").items() <= tree(tmp_path).items()
    assert EmbeddingStore(tmp_path).keys() == [f"emb_{i}" for i in range(4)]
    log.write_bytes(content[:-1] + b"x")
    assert len(journal.Log(log)) == 0


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path, monkeypatch):
    index = opened(tmp_path)
    commit(index, range(5))
    [log] = journal.paths(tmp_path)
    before = log.read_bytes()
    write = os.write

    def full(descriptor, data):
        if len(data) < 100:
            return write(descriptor, data)
        write(descriptor, data[:50])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            commit(index, range(5, 40))
    assert log.read_bytes() == before
    commit(index, range(40, 44))
    index.close()
    assert stored(tmp_path) == {*range(5), *range(40, 44)}


# A process of its own, which forks: a child for each moment, without the threads of this one.
TORTURE = """
import gc, json, os, resource, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_store import commit, fill, opened, stored, tree
from fastembed import staging
from fastembed.store import shards

shards.SHARD_ROWS, shards.CHUNK_ROWS = 256, 16

def forked(run, *arguments):
    # The exit status of a process that does this.
    process = os.fork()
    if process == 0:
        try:
            run(*arguments)
        except BaseException as error:
            print(f"{{run.__name__}}: {{error!r}}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

def work(folder, acknowledged):
    index = opened(folder)
    for group in (range(0, 450, 3), range(1, 450, 3), range(2, 450, 3)):
        commit(index, group)
        with open(acknowledged, "a") as stream:
            stream.write(" ".join(map(str, group)) + " ")
    index.close()

def killed(at, folder, acknowledged):
    # Every file that is opened, renamed, linked, removed, synced or written is a moment to die.
    moments = 0
    def moment(half_done=lambda: None):
        nonlocal moments
        moments += 1
        if moments == at:
            half_done()
            os.kill(os.getpid(), signal.SIGKILL)
    def audit(event, arguments):
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link",
                     "os.symlink", "os.truncate") and str(arguments[0]).startswith(str(folder)):
            moment()
    def wrapped(function):
        def call(*arguments):
            moment()
            return function(*arguments)
        return call
    def write(descriptor, data):
        moment(lambda: os.write(descriptor, data[: len(data) // 2]))
        whole(descriptor, data)
    whole, staging.write_fully = staging.write_fully, write
    os.fsync, os.fdatasync = wrapped(os.fsync), wrapped(os.fdatasync)
    sys.addaudithook(audit)
    work(folder, acknowledged)

def again(folder, acknowledged, old):
    before, names = stored(folder), opened(folder).open()
    done = set(map(int, Path(acknowledged).read_text().split()))
    assert before >= set(old), "the old store is gone"
    assert not before - set(old) or before == set(everything), "half a store is visible"
    assert {{f"emb_{{i}}" for i in done}} <= names, "a committed sample is lost"
    fill(folder, sorted(i for i in everything if f"emb_{{i}}" not in names))
    assert tree(folder) == tree(root / "whole"), sorted(tree(folder))

def no_space_for_a_commit(folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))
    work(folder, root / "ack")

def no_space_for_the_merge(folder):
    last = opened(folder)
    for start in range(0, 450, 50):
        fill(folder, range(start, start + 50))
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000))
    last.close()

gc.freeze()  # else each child copies this process's memory
root = Path({root!r})
old = range(10, 20)
everything = range(450)
assert forked(fill, root / "whole", everything) == 0
assert forked(fill, root / "old", old) == 0
at, counts = 0, dict(killed=0, full=0)
while True:
    at += {step}
    folder, acknowledged = root / f"at-{{at}}", root / f"ack-{{at}}"
    acknowledged.touch()
    before = old if at % 2 else ()
    if before:
        shutil.copytree(root / "old", folder, symlinks=True)
    else:
        folder.mkdir()
    status = forked(killed, at, folder, acknowledged)
    if status == 0:
        break
    assert status == -signal.SIGKILL, status
    counts["killed"] += 1
    assert forked(again, folder, acknowledged, before) == 0, f"killed at moment {{at}}"
    shutil.rmtree(folder)
for run in (no_space_for_a_commit, no_space_for_the_merge):
    folder = root / run.__name__
    shutil.copytree(root / "old", folder, symlinks=True)
    assert forked(run, folder) == 1
    assert stored(folder) == set(old)
    (root / "ack").write_text("")
    assert forked(again, folder, root / "ack", old) == 0
    counts["full"] += 1
print(json.dumps(counts))
"""


def test_killed_at_every_step_and_out_of_space(tmp_path):
    step = int(os.environ.get("FASTEMBED_TORTURE_STEP", "3"))  # 1: each moment there is
    script = TORTURE.format(tests=str(Path(__file__).parent), root=str(tmp_path), step=step)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["killed"] >= 45 // step and counts["full"] == 2
    for where in ("a_commit", "the_merge"):
        assert f"no_space_for_{where}: OSError" in done.stderr


# Jobs -------------------------------------------------------------------------------------


def run_panoptic(coco: Coco, out: Path, engine=None, chosen=None, **options):
    sink = Zarr(out)
    return extract(
        coco.source(**(chosen or {})), SegmentCrops(), engine or RgbEngine(), sink,
        SegmentParquet(sink), **options,
    )  # fmt: skip


def run_multichannel(plates, out: Path, engine=None, recipe=RECIPE, **options):
    sink = Zarr(out)
    return extract(
        TensorCsv(plates.manifest), recipe, engine or TinyEngine(), sink, Parquet(sink), **options
    )


@pytest.fixture
def coco(tmp_path) -> Coco:
    return Coco(tmp_path / "coco")


def test_panoptic_holds_what_npy_holds(coco, tmp_path):
    coco.fill(9)
    coco.run(tmp_path / "npy")
    run_panoptic(coco, tmp_path / "zarr")
    npy, zarr = PanopticFeatures(tmp_path / "npy"), PanopticFeatures(tmp_path / "zarr")
    assert set(npy) == set(zarr) and len(npy) == len(zarr) > 30
    assert all(torch.equal(npy[key], zarr[key]) for key in npy)
    assert all(zarr[key].dtype == torch.float16 for key in zarr)
    rows = dict(zip(zarr, zarr.matrix(), strict=True))
    assert all(torch.equal(rows[key], row) for key, row in zip(npy, npy.matrix(), strict=True))
    own = next(iter(zarr))
    theirs, ours = npy.nearest(*own, k=5), zarr.nearest(*own, k=5)
    assert [key for key, _ in ours] == [key for key, _ in theirs]
    np.testing.assert_allclose([c for _, c in ours], [c for _, c in theirs], atol=1e-6)
    with pytest.raises(KeyError):
        zarr["000000000001", 5]
    table = pq.read_table(tmp_path / "zarr" / "index.parquet").to_pylist()
    listed = {
        (f"{a['image_id']:012d}", s["id"]): LABELS[s["category_id"]]
        for a in coco.annotations
        for s in a["segments_info"]
    }
    assert {(row["image_id"], row["segment_id"]): row["label"] for row in table} == listed
    assert [(row["image_id"], row["segment_id"]) for row in table] == sorted(listed)


def test_multichannel_holds_what_npy_holds(plates, tmp_path):
    plates.fill(9)
    plates.add("bad.npy", b"")
    report = run_multichannel(plates, tmp_path / "zarr")
    assert (report.embedded, report.failed) == (9, 1)
    [record] = failures(tmp_path / "zarr")
    assert "empty" in record["reason"] and record["path"].endswith("bad.npy")
    source = TensorCsv(plates.manifest)
    extract(source, RECIPE, TinyEngine(), NpyPerSample(tmp_path / "npy"), Tsv(tmp_path / "npy"))
    store, files = EmbeddingStore(tmp_path / "zarr"), EmbeddingStore(tmp_path / "npy")
    assert set(store.keys()) == set(files.keys()) and len(store) == 9
    for key in store.keys():
        assert torch.equal(store[key], files[key]) and store[key].dtype == torch.float32
        np.testing.assert_array_equal(store[key], np.load(tmp_path / "npy" / f"{key}.npy"))
    texts = {item.name: (item.path, item.fields["text_id"]) for item in source.items()}
    columns = (store.keys(), store.column("tensor_path"), store.column("text_id"))
    for name, path, text in zip(*columns, strict=True):
        assert texts[name] == (path, text)


def test_shards_and_resume_give_the_bytes_of_one_run(coco, plates, tmp_path):
    coco.fill(12)
    plates.fill(12)
    for kind, run, data in (("p", run_panoptic, coco), ("m", run_multichannel, plates)):
        run(data, tmp_path / kind / "one")
        for i in (2, 0, 1):
            run(data, tmp_path / kind / "three", shard=(i, 3))
        assert tree(tmp_path / kind / "three") == tree(tmp_path / kind / "one")
        engine = (RgbEngine if kind == "p" else TinyEngine)()
        calls = engine.calls
        again = run(data, tmp_path / kind / "three", engine)
        assert (again.embedded, again.already_done, engine.calls) == (0, 12, calls)
        assert tree(tmp_path / kind / "three") == tree(tmp_path / kind / "one")


def test_parts_are_done_by_themselves(coco, tmp_path):
    coco.fill(6)
    first = run_panoptic(coco, tmp_path / "out", chosen={"classes": ["person"]})
    engine = RgbEngine()
    second = run_panoptic(coco, tmp_path / "out", engine)
    assert sum(len(batch) for batch in engine.fed) == second.vectors  # none of them twice
    assert first.vectors > 0 and second.vectors > 0
    run_panoptic(coco, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_listed_segment_without_a_pixel_is_recorded(coco, tmp_path):
    coco.add(1, listed=lambda rows: [*rows, {**rows[0], "id": 4711}]).add(2).add(3, photo=b"")
    report = run_panoptic(coco, tmp_path / "out")
    assert (report.embedded, report.failed, report.vectors) == (1, 2, 8)
    reasons = sorted(record["reason"] for record in failures(tmp_path / "out"))
    assert reasons[1] == "listed, but not in the file: [4711]"
    assert len(PanopticFeatures(tmp_path / "out")) == 8


def test_other_settings_are_refused_and_overwrite_starts_afresh(plates, tmp_path):
    plates.fill(4)
    run_multichannel(plates, tmp_path / "out")
    before = tree(tmp_path / "out")
    other = MultiCrop(Percentile(), n_crops=2)
    with pytest.raises(SignatureMismatch, match=r"recipe\.n_crops: 3 there, 2 now"):
        run_multichannel(plates, tmp_path / "out", recipe=other)
    assert tree(tmp_path / "out") == before
    (tmp_path / "out" / "notes.npy").write_bytes(b"mine")
    del plates.rows[0]
    run_multichannel(plates, tmp_path / "out", recipe=other, overwrite=True)
    run_multichannel(plates, tmp_path / "new", recipe=other)
    after = tree(tmp_path / "out")
    assert after.pop("notes.npy") == b"mine" and after == tree(tmp_path / "new")


CLI = """
import sys
sys.path.insert(0, {tests!r})
from fastembed import cli, engines
from conftest import TinyEngine
from test_panoptic_job import RgbEngine
engines.load_engine = lambda *a, **k: RgbEngine(wait={wait}) if {rgb} else TinyEngine()
sys.exit(cli.main(sys.argv[1:]))
"""


def start(arguments: list[str], wait: float = 0) -> subprocess.Popen:
    script = CLI.format(tests=str(Path(__file__).parent), wait=wait, rgb=arguments[0] == "panoptic")
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture
def tiny_models(monkeypatch):
    def load(spec, **options):
        return RgbEngine() if "SigLIP" in spec else TinyEngine()

    monkeypatch.setattr("fastembed.engines.load_engine", load)


def test_kill_minus_nine_and_again(coco, tmp_path, tiny_models):
    """The command as a user types it, killed after commits; readers see no part of them."""
    coco.fill(40)
    out = tmp_path / "killed"
    command = [
        "panoptic", "--data_path", str(coco.folder), "--split", "val2017", "--format", "zarr",
        "--cache_dir",
    ]  # fmt: skip

    def committed() -> int:
        return sum(len(journal.Log(path)) for path in journal.paths(out)) if out.exists() else 0

    process = start([*command, str(out)], wait=0.1)
    deadline = time.monotonic() + 60
    while committed() < 10:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 10 <= committed() < 180
    with pytest.raises(FileNotFoundError, match="the same command again ends it"):
        PanopticFeatures(out)
    assert cli.main([*command, str(out)]) == 0
    assert cli.main([*command, str(tmp_path / "whole")]) == 0
    assert tree(out) == tree(tmp_path / "whole") and len(PanopticFeatures(out)) == 180


def test_shards_at_once(plates, tmp_path, tiny_models):
    plates.fill(30)
    command = [
        "multichannel", "--manifest", str(plates.manifest), "--model", "dinov2:vits14", "--format",
        "zarr", "--output-dir",
    ]  # fmt: skip
    together = [start([*command, str(tmp_path / "two"), "--shard", f"{i}/2"]) for i in range(2)]
    assert [process.wait(timeout=100) for process in together] == [0, 0]
    assert cli.main([*command, str(tmp_path / "one")]) == 0
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    assert len(EmbeddingStore(tmp_path / "two")) == 30


def test_formats_replace_each_other_with_overwrite_only(
    coco, plates, tmp_path, tiny_models, capsys
):
    coco.fill(3)
    plates.fill(3)
    jobs = {
        "panoptic": ["--data_path", str(coco.folder), "--split", "val2017", "--cache_dir"],
        "multichannel": ["--manifest", str(plates.manifest), "--model", "x", "--output-dir"],
    }
    for job, options in jobs.items():
        out = tmp_path / job
        command = [job, *options, str(out), "--format"]
        assert cli.main([*command, "zarr"]) == 0
        zarr = tree(out)
        assert cli.main([*command, "npy"]) == 1
        assert "output.form: 'zarr' there, 'npy' now" in capsys.readouterr().err
        assert cli.main([*command, "npy", "--overwrite"]) == 0
        assert not NAMES & set(tree(out)) and not list(out.glob("store-*"))
        assert len([name for name in read_outputs(out) if name.endswith(".npy")]) >= 3
        vectors = EmbeddingStore(out)
        assert cli.main([*command, "zarr", "--overwrite"]) == 0
        assert tree(out) == zarr
        with pytest.raises(OSError, match="No such file"):
            vectors[0]
        # What a killed run left goes, too.
        index = opened(out)
        commit(index, [1])
        del index  # and its lock, as a kill does
        assert cli.main([*command, "npy", "--overwrite"]) == 0
        assert not journal.paths(out) and not list(out.glob("store-*"))


# Reading ----------------------------------------------------------------------------------


def test_rows_keys_and_slices(tmp_path):
    count = 4096 + 300
    fill(tmp_path, np.random.default_rng(0).permutation(count), dtype="float16")
    store = EmbeddingStore(tmp_path)
    whole = torch.from_numpy(np.stack([vector(i, dtype="float16") for i in range(count)]))
    assert len(store) == count and store.keys()[5] == "emb_5"
    assert torch.equal(store.as_torch(), whole) and store.as_numpy().dtype == np.float16
    assert torch.equal(store[7], whole[7]) and torch.equal(store[-1], whole[-1])
    assert torch.equal(store["emb_4100"], whole[4100]) and store["emb_4100"].shape == (6,)
    for part in (slice(None), slice(4090, 4100), slice(None, None, -70), slice(-5, None), slice(0)):
        rows = list(range(count))[part]
        assert torch.equal(store[part], whole[rows])
    rows = [4200, 3, 4095, -1, 3, 4096]
    for form in (rows, np.array(rows), torch.tensor(rows)):
        assert torch.equal(store[form], whole[rows])
    assert torch.equal(store[["emb_9", "emb_4222", "emb_9"]], whole[[9, 4222, 9]])
    assert store[[]].shape == (0, 6)
    copy = store[3]
    copy.zero_()
    assert torch.equal(store[3], whole[3])
    assert store.column("text_id").tolist() == [i % 5 for i in range(count)]
    for where in (count, -count - 1, [0, count]):
        with pytest.raises(IndexError, match="rows must be in 0"):
            store[where]
    for where in ("emb_x", ["emb_1", "emb_x"], ("a", 5)):
        with pytest.raises(KeyError):
            store[where]
    with pytest.raises(TypeError, match="rows must be integers"):
        store[[0.5]]
    with pytest.raises(KeyError, match="no_such"):
        store.column("no_such")


def test_every_format_is_read_alike(coco, tmp_path):
    coco.fill(4)
    for form in ("npy", "npz"):
        coco.run(tmp_path / form, form)
    run_panoptic(coco, tmp_path / "zarr")
    stores = {form: EmbeddingStore(tmp_path / form) for form in ("npy", "npz", "zarr")}
    keys = stores["zarr"].keys()
    expected = stores["zarr"].as_torch()
    for store in stores.values():
        assert sorted(store.keys()) == sorted(keys)
        assert torch.equal(store[keys], expected)
        assert torch.equal(store[keys[3]], expected[3])
        assert torch.equal(store[store.row(keys[3])], expected[3])
        assert store[:0].shape == (0, 48)
        names = dict(zip(store.keys(), store.column("name"), strict=True))
        assert names[keys[0]] == "{}_{}".format(*keys[0])
    assert dict(zip(stores["npz"].keys(), stores["npz"].column("label"), strict=True)) == dict(
        zip(keys, stores["zarr"].column("label"), strict=True)
    )
    shutil.copy(tmp_path / "npy" / "inst2feat.tsv", tmp_path / "zarr")
    with pytest.raises(ValueError, match="holds 2 caches"):
        EmbeddingStore(tmp_path / "zarr")
    fill(tmp_path / "samples", range(3))
    with pytest.raises(ValueError, match="no cache of `fastembed panoptic`"):
        PanopticFeatures(tmp_path / "samples")


def test_an_open_store_stays_what_it_was(tmp_path):
    fill(tmp_path, range(100, 5000))
    store = EmbeddingStore(tmp_path)
    pickled = pickle.dumps(store)
    assert torch.equal(pickle.loads(pickled)["emb_4999"], torch.from_numpy(vector(4999)))
    fill(tmp_path, range(100))
    expected = np.stack([vector(i) for i in range(100, 5000)])
    np.testing.assert_array_equal(store.as_numpy(), expected)
    assert store.keys()[0] == "emb_100" and store.row("emb_4999") == 4899
    assert stored(tmp_path) == set(range(5000))
    with pytest.raises(FileNotFoundError, match="store-"):
        pickle.loads(pickled)  # another store's rows would not be those that were meant


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_workers_read_it(tmp_path, context):
    """Also where this process has merged and read by key."""
    fill(tmp_path, range(4200))
    store = EmbeddingStore(tmp_path)
    assert store.row("emb_17") == 17
    loader = DataLoader(
        store, batch_size=300, shuffle=True, num_workers=2, multiprocessing_context=context
    )
    batches = torch.cat(list(loader))
    assert len(batches) == 4200
    expected = {vector(i).tobytes() for i in range(4200)}
    assert {row.numpy().tobytes() for row in batches} == expected
