"""checksums.tsv: every committed file has its line, whatever happens, and the same bytes always."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import xxhash
from conftest import Plates, TinyEngine, read_outputs
from hypothesis import given, settings
from hypothesis import strategies as st

from fastembed import MultiCrop, NpyPerSample, Percentile, TensorCsv, Tsv, extract, staging
from fastembed.checksums import FILE_NAME, Checksums, checksum
from fastembed.staging import StagedFiles


def lines(folder) -> list[str]:
    return (folder / FILE_NAME).read_text().splitlines()


def seal(folder) -> str:
    """The line of the list itself."""
    before = (folder / FILE_NAME).read_bytes().rsplit(b"\n", 2)[0] + b"\n"
    return f"{FILE_NAME}\t{len(before)}\t{xxhash.xxh3_128(before).hexdigest()}"


def add(folder, **contents: bytes) -> None:
    sums = Checksums(folder)
    for name, content in contents.items():
        sums.note(name, content)
    sums.append(sync=True)


def test_a_line_is_name_bytes_and_xxh3(tmp_path):
    add(tmp_path, b=b"22", a=b"1")
    Checksums(tmp_path).close()
    assert lines(tmp_path) == [
        "name\tbytes\txxh3_128",
        f"a\t1\t{xxhash.xxh3_128(b'1').hexdigest()}",
        f"b\t2\t{xxhash.xxh3_128(b'22').hexdigest()}",
        seal(tmp_path),
    ]
    # By the definition of XXH3, from its own test vectors: nothing, with seed 0.
    assert checksum(b"").digest.hex() == "99aa06d3014798d86001c324468d497f"


def test_the_last_line_of_a_name_counts(tmp_path):
    add(tmp_path, a=b"old", b=b"2")
    add(tmp_path, a=b"new")
    assert Checksums(tmp_path).read().sums["a"] == checksum(b"new")
    Checksums(tmp_path).close()
    assert len(lines(tmp_path)) == 4
    assert Checksums(tmp_path).read().sums == {"a": checksum(b"new"), "b": checksum(b"2")}


@settings(max_examples=30)
@given(st.lists(st.binary(min_size=1, max_size=12).filter(lambda name: b"\0" not in name)))
def test_any_name_of_a_file_system(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("names")
    names = {os.fsdecode(name): name for name in names}
    add(folder, **names)
    Checksums(folder).close()
    listed = Checksums(folder).read()
    assert listed.damaged == []
    assert listed.sums == {name: checksum(content) for name, content in names.items()}


@pytest.mark.parametrize("cut", range(1, 37, 5))
def test_a_torn_line_is_cut_off_and_swallows_none(tmp_path, cut):
    add(tmp_path, a=b"1", b=b"2")
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:-cut])
    assert set(Checksums(tmp_path).read().sums) == {"a"}
    add(tmp_path, c=b"3")
    assert Checksums(tmp_path).read() == ({"a": checksum(b"1"), "c": checksum(b"3")}, [], "open")


def test_a_damaged_line_stays_until_it_is_dropped_on_purpose(tmp_path):
    add(tmp_path, a=b"1", b=b"2")
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes().replace(b"b\t1\t", b"b\x001\t"))
    sums = Checksums(tmp_path)
    assert len(sums.read().damaged) == 1
    sums.close()
    assert len(sums.read().damaged) == 1
    sums.remove({"a"})
    assert lines(tmp_path) == ["name\tbytes\txxh3_128", seal(tmp_path)]


def test_a_full_disk_leaves_the_list_as_it_was(tmp_path, monkeypatch):
    add(tmp_path, a=b"1")
    before = (tmp_path / FILE_NAME).read_bytes()
    original = staging.write_fully

    def full(descriptor, data):
        original(descriptor, data[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(staging, "write_fully", full)
    with pytest.raises(OSError, match="No space"):
        add(tmp_path, b=b"2")
    assert (tmp_path / FILE_NAME).read_bytes() == before


def _append(folder, start: int) -> None:
    for number in range(start, start + 40):
        add(folder, **{f"f{number:03d}": b"x" * number})
    Checksums(folder).close()


def test_many_processes_append_and_close(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append, args=(tmp_path, 40 * i)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(lines(tmp_path)) == 122
    assert lines(tmp_path)[1:-1] == sorted(lines(tmp_path)[1:-1])
    assert lines(tmp_path)[-1] == seal(tmp_path)


def test_a_seal_tells_of_lines_that_were_lost_or_altered(tmp_path):
    sums = Checksums(tmp_path)
    assert sums.read().seal == "none"
    add(tmp_path, a=b"1", b=b"2")
    assert sums.read().seal == "open"
    sums.close()
    whole = sums.path.read_bytes()
    assert sums.read().seal == "sealed"
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1
        sums.path.write_bytes(data)
        assert sums.read().seal in ("broken", "open"), position
        sums.path.write_bytes(whole[:position])
        assert sums.read().seal == "open"
        sums.path.write_bytes(whole)
    sums.path.write_bytes(whole.replace(b"a\t1", b"c\t1"))
    sums.close()  # a run that knows nothing of the damage does not hide it
    assert sums.read().seal != "sealed"
    sums.remove(set())
    assert sums.read().seal == "sealed"
    sums.path.write_bytes(whole)
    add(tmp_path, c=b"3")
    assert sums.read().seal == "open"
    sums.close()
    assert sums.read().seal == "sealed" and set(sums.read().sums) == {"a", "b", "c"}


@pytest.mark.parametrize("whole", [True, False])
def test_a_line_is_on_disk_before_its_file_has_its_name(tmp_path, monkeypatch, whole):
    """Killed before any rename, as a power cut would leave it."""
    monkeypatch.setattr(staging, "_syncs_whole", lambda descriptor: whole)
    events = []

    def watch(holder, function):
        original = getattr(holder, function)

        def watched(*arguments):
            events.append(function)
            if function == "replace":
                assert set(Checksums(tmp_path).read().sums) == {"a.npy", "b.npy"}
            return original(*arguments)

        monkeypatch.setattr(holder, function, watched)

    watch(staging, "_syncfs")
    watch(staging.os, "fsync")
    watch(staging.os, "replace")
    files = StagedFiles(tmp_path, Checksums(tmp_path))
    for name in ("a.npy", "b.npy"):
        files.write(name, name.encode())
    files.flush()
    if whole:  # no wait that was not there before
        assert events == ["_syncfs", "replace", "replace", "fsync"]
    else:
        assert events == ["fsync", "fsync", "fsync", "replace", "replace", "fsync"]


def run(plates: Plates, folder, **options):
    return extract(
        TensorCsv(plates.manifest), MultiCrop(Percentile(), n_crops=2), TinyEngine(),
        NpyPerSample(folder), Tsv(folder), **options,
    )  # fmt: skip


def test_an_extraction_lists_what_it_committed(plates, tmp_path):
    plates.fill(7)
    run(plates, tmp_path / "one")
    listed = Checksums(tmp_path / "one").read().sums
    files = {path.name: path for path in (tmp_path / "one").glob("emb_*.npy")}
    assert listed == {name: checksum(path.read_bytes()) for name, path in files.items()}
    assert len(listed) == 7
    for i in (1, 0, 2):
        run(plates, tmp_path / "three", shard=(i, 3))
    run(plates, tmp_path / "three")
    assert read_outputs(tmp_path / "three") == read_outputs(tmp_path / "one")


def test_overwrite_leaves_no_line_of_before(plates, tmp_path):
    plates.fill(5)
    run(plates, tmp_path / "out")
    plates.rows = plates.rows[:3]
    plates.add("another.npy", b"not an array")
    run(plates, tmp_path / "out", overwrite=True)
    assert len(Checksums(tmp_path / "out").read().sums) == 3
