"""``fastembed convert``: what a job would have left, to the byte, and what others read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyEngine
from test_panoptic_job import Coco, RgbEngine

pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra zarr)")


import pyarrow.parquet as pq
from test_store import (
    RECIPE,
    commit,
    opened,
    run_multichannel,
    run_panoptic,
    tree,
)

from fastembed import (
    NpyPerSample,
    Postgres,
    TensorCsv,
    Tsv,
    cli,
    extract,
)
from fastembed.convert import FORMS, convert
from fastembed.datasets import EmbeddingStore, PanopticFeatures

OTHERS = ("parquet", "safetensors")


def files(folder: Path) -> dict:
    """What is in a folder but the records of failures."""
    return {name: content for name, content in tree(folder).items() if "failures" not in name}


def run_npy(plates, out: Path, index=Tsv):
    source = TensorCsv(plates.manifest)
    return extract(source, RECIPE, TinyEngine(), NpyPerSample(out), index(out))


def run_segments(coco: Coco, out: Path, form: str, **options):
    if form == "zarr":
        return run_panoptic(coco, out, **options)
    return coco.run(out, form, **options)


@pytest.fixture
def samples(plates, tmp_path) -> dict[str, Path]:
    """A multichannel cache by the form that the job left it in."""
    plates.fill(9)
    run_npy(plates, tmp_path / "npy")
    run_multichannel(plates, tmp_path / "zarr")
    return {form: tmp_path / form for form in ("npy", "zarr")}


@pytest.fixture
def coco(tmp_path) -> Coco:
    return Coco(tmp_path / "coco").fill(6)


@pytest.fixture
def segments(coco, tmp_path) -> dict[str, Path]:
    """A panoptic cache by the form that the job left it in."""
    for form in ("npy", "npz", "zarr"):
        run_segments(coco, tmp_path / form, form)
    return {form: tmp_path / form for form in ("npy", "npz", "zarr")}


def test_samples_have_the_bytes_of_the_job(samples, plates, tmp_path):
    for there, folder in samples.items():
        for form, expected in samples.items():
            direct = tmp_path / f"{there}-{form}"
            done = convert(folder, direct, form)
            assert (done.rows, done.dim, done.dtype) == (9, 80, "float32")
            assert done.lost == done.missing == ()
            assert files(direct) == files(expected)
            for other in OTHERS:
                between = tmp_path / f"{there}-{other}"
                convert(folder, between, other, overwrite=True)
                convert(between, tmp_path / f"{there}-{other}-{form}", form)
                assert files(tmp_path / f"{there}-{other}-{form}") == files(expected)
    for other in OTHERS:
        assert files(tmp_path / f"npy-{other}") == files(tmp_path / f"zarr-{other}")
    engine = TinyEngine()
    again = run_multichannel(plates, tmp_path / "npy-zarr", engine)
    assert (again.embedded, again.already_done, engine.calls) == (0, 9, 0)
    again = run_npy(plates, tmp_path / "zarr-npy")
    assert (again.embedded, again.already_done) == (0, 9)
    for form in samples:
        assert files(tmp_path / f"zarr-{form}") == files(samples[form])


def test_segments_have_the_bytes_of_the_job(segments, coco, tmp_path):
    for there, folder in segments.items():
        for form, expected in segments.items():
            for between in (None, *OTHERS):
                source = folder
                if between is not None:
                    source = tmp_path / f"{there}-{between}"
                    convert(folder, source, between, overwrite=True)
                target = tmp_path / f"{there}-{between}-{form}"
                # npy holds no labels, and only npz says which segments were chosen.
                listed = there == "npy" or form == "npz" != there
                done = convert(source, target, form, source=coco.source() if listed else None)
                assert files(target) == files(expected)
                assert done.lost == (("label",) if form == "npy" and not listed else ())
    for form in segments:
        engine = RgbEngine()
        target = tmp_path / f"npy-parquet-{form}"
        again = run_segments(coco, target, form, engine=engine)
        assert (again.embedded, again.already_done, engine.fed) == (0, 6, [])
        assert files(target) == files(segments[form])


def test_nothing_is_made_up(segments, coco, tmp_path):
    for form in ("zarr", "npz"):
        with pytest.raises(ValueError, match=r"label, which .* \(npy\) does not hold|chosen"):
            convert(segments["npy"], tmp_path / "new", form)
    with pytest.raises(ValueError, match="records which segments were chosen"):
        convert(segments["zarr"], tmp_path / "new", "npz")
    done = convert(segments["npy"], tmp_path / "parquet", "parquet")
    assert done.missing == ("label",)
    assert pq.read_schema(tmp_path / "parquet" / "embeddings.parquet").names == [
        "name", "image_id", "segment_id", "embedding",
    ]  # fmt: skip
    other = Coco(tmp_path / "other").add(77).source()
    with pytest.raises(ValueError, match=r"does not list .* of the cache, such as 000000000001_"):
        convert(segments["npy"], tmp_path / "new", "zarr", source=other)
    assert not (tmp_path / "new").exists()


def test_the_choice_of_segments(coco, tmp_path):
    people = {"classes": ["person"]}
    coco.run(tmp_path / "npz", "npz", chosen=people)
    run_panoptic(coco, tmp_path / "zarr", chosen=people)
    source = coco.source(**people)
    convert(tmp_path / "zarr", tmp_path / "new", "npz", source=source)
    assert files(tmp_path / "new") == files(tmp_path / "npz")
    with pytest.raises(ValueError, match=r"lacks .* segments of photo 000000000001 that source"):
        convert(tmp_path / "zarr", tmp_path / "new", "npz", source=coco.source(), overwrite=True)
    with pytest.raises(ValueError, match=r"source chooses .*; .* was made of"):
        convert(tmp_path / "npz", tmp_path / "new", "npz", source=coco.source(), overwrite=True)
    run_panoptic(coco, tmp_path / "zarr")
    with pytest.raises(ValueError, match="that source does not choose"):
        convert(tmp_path / "zarr", tmp_path / "new", "npz", source=source, overwrite=True)
    assert files(tmp_path / "new") == files(tmp_path / "npz")


def test_a_listed_segment_without_a_pixel_is_no_lack(tmp_path):
    coco = Coco(tmp_path / "coco").add(1, listed=lambda rows: [*rows, {**rows[0], "id": 4711}])
    coco.add(2).add(3, photo=b"")
    coco.run(tmp_path / "npz", "npz")
    run_panoptic(coco, tmp_path / "zarr")
    convert(tmp_path / "zarr", tmp_path / "new", "npz", source=coco.source())
    assert files(tmp_path / "new") == files(tmp_path / "npz")


def test_blocks_change_nothing(segments, coco, tmp_path, monkeypatch):
    for form in FORMS:
        convert(segments["npz"], tmp_path / f"whole-{form}", form)
    asked = []
    whole = EmbeddingStore.__getitem__
    monkeypatch.setattr(
        EmbeddingStore, "__getitem__", lambda store, rows: asked.append(rows) or whole(store, rows)
    )
    monkeypatch.setattr("fastembed.convert._BLOCK_BYTES", 5 * 96)
    monkeypatch.setattr("fastembed.convert._ROW_GROUP_BYTES", 5 * 96)
    for form in FORMS:
        convert(segments["npz"], tmp_path / f"small-{form}", form)
        if form != "parquet":  # whose row groups are of this size
            assert files(tmp_path / f"small-{form}") == files(tmp_path / f"whole-{form}")
    sizes = [len(rows) for rows in asked if isinstance(rows, np.ndarray)]
    assert len(sizes) > 20 and max(sizes) < 5 + 6  # a photo that begins in a block ends in it
    small, large = (EmbeddingStore(tmp_path / f"{s}-parquet") for s in ("small", "whole"))
    assert small._cache._index.num_row_groups > large._cache._index.num_row_groups
    assert torch.equal(small.as_torch(), large.as_torch()) and small.keys() == large.keys()


# Other readers ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["samples", "segments"])
def test_others_read_parquet(kind, request, tmp_path):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    folder = request.getfixturevalue(kind)["zarr"]
    store = EmbeddingStore(folder)
    convert(folder, tmp_path / "out", "parquet")
    path = tmp_path / "out" / "embeddings.parquet"
    frame = pandas.read_parquet(path)
    np.testing.assert_array_equal(np.stack(frame["embedding"]), store.as_numpy())
    assert np.stack(frame["embedding"]).dtype == store.as_numpy().dtype
    for name in store.columns:
        assert frame[name].tolist() == store.column(name).tolist()
    settings = json.loads(pq.read_schema(path).metadata[b"fastembed"])
    assert (
        settings["settings"]
        == json.loads((tmp_path / "out/fastembed.json").read_text())["settings"]
    )
    assert settings["settings"]["output"]["form"] == "parquet"


def test_others_read_safetensors(segments, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    convert(segments["npz"], tmp_path / "out", "safetensors")
    tensors = safetensors.load_file(tmp_path / "out" / "embeddings.safetensors")
    assert torch.equal(tensors["embeddings"], EmbeddingStore(segments["zarr"]).as_torch())
    index = pq.read_table(tmp_path / "out" / "index.parquet")
    assert index.drop_columns("row").equals(
        pq.read_table(segments["zarr"] / "index.parquet").drop_columns("row")
    )


@pytest.mark.parametrize("form", FORMS)
def test_the_store_reads_every_form(segments, tmp_path, form):
    convert(segments["npz"], tmp_path / "out", form)
    store, expected = EmbeddingStore(tmp_path / "out"), EmbeddingStore(segments["zarr"])
    assert store.form == form and "name" in store.columns
    keys = expected.keys()
    assert sorted(store.keys()) == sorted(keys)
    assert torch.equal(store[keys], expected.as_torch()) and store[0].dtype == torch.float16
    row = store.row(keys[5])
    assert torch.equal(store[row], expected[5]) and torch.equal(store[-1], store[len(store) - 1])
    blocks = list(store.blocks(7))
    assert [len(block) for block in blocks[:-1]] == [7] * (len(blocks) - 1)
    np.testing.assert_array_equal(np.concatenate(blocks), store.as_numpy())
    if form == "safetensors":
        assert not blocks[0].flags.owndata and not blocks[0].flags.writeable
    features = PanopticFeatures(tmp_path / "out")
    assert torch.equal(features[keys[5]], expected[5])
    loader = torch.utils.data.DataLoader(
        store, batch_size=5, num_workers=1, multiprocessing_context="spawn"
    )
    assert torch.equal(torch.cat(list(loader)), store.as_torch())


def test_a_damaged_page_of_parquet_is_an_error(samples, tmp_path):
    convert(samples["npy"], tmp_path / "out", "parquet")
    path = tmp_path / "out" / "embeddings.parquet"
    content = bytearray(path.read_bytes())
    at = content.find(EmbeddingStore(samples["zarr"])[4].numpy().tobytes())
    content[at + 9] ^= 4
    path.write_bytes(content)
    with pytest.raises(OSError, match=r"(?i)crc"):
        EmbeddingStore(tmp_path / "out").as_numpy()


# The index is a database ------------------------------------------------------------------


def test_an_index_in_a_database(plates, database, tmp_path):
    plates.fill(5)
    out = tmp_path / "out"
    run_npy(plates, out, lambda folder: Postgres(database, folder))
    run_multichannel(plates, tmp_path / "zarr")
    with pytest.raises(FileNotFoundError, match="may be indexed in PostgreSQL"):
        EmbeddingStore(out)
    store, expected = EmbeddingStore(out, database), EmbeddingStore(tmp_path / "zarr")
    assert store.columns == ("name", "text_id") and len(store) == 5
    for key, text in zip(expected.keys(), expected.column("text_id"), strict=True):
        assert torch.equal(store[key], expected[key])
        assert store.column("text_id")[store.row(key)] == text
    with pytest.raises(ValueError, match=r"tensor_path, which .* does not hold"):
        convert(out, tmp_path / "new", "zarr", database=database)
    source = TensorCsv(plates.manifest)
    convert(out, tmp_path / "new", "zarr", database=database, source=source)
    assert files(tmp_path / "new") == files(tmp_path / "zarr")
    with pytest.raises(FileNotFoundError, match="has no embedding_path in"):
        EmbeddingStore(tmp_path / "elsewhere", database)


# Refusals and faults ----------------------------------------------------------------------


def test_an_unfinished_run_is_refused(samples, tmp_path):
    index = opened(samples["zarr"])
    commit(index, [1], dtype="float32")
    with pytest.raises(ValueError, match="is not finished: a run is at work or was stopped"):
        convert(samples["zarr"], tmp_path / "new", "npy")
    assert not (tmp_path / "new").exists()


def test_targets(samples, tmp_path):
    source, new = samples["npy"], tmp_path / "new"
    with pytest.raises(ValueError, match="form must be one of"):
        convert(source, new, "hdf5")
    with pytest.raises(ValueError, match="npz is a form of segments"):
        convert(source, new, "npz")
    for target in (source, source / "below", source.parent):
        with pytest.raises(ValueError, match="beside"):
            convert(source, target, "zarr", overwrite=True)
    with pytest.raises(FileNotFoundError, match=r"none of|No such file"):
        convert(tmp_path / "nothing", new, "zarr")
    new.mkdir()
    convert(source, new, "zarr")  # an empty folder is none
    before = tree(new)
    with pytest.raises(FileExistsError, match="--overwrite replaces it"):
        convert(source, new, "parquet")
    assert tree(new) == before
    (new / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt, which is no part of a cache"):
        convert(source, new, "parquet", overwrite=True)
    (new / "notes.txt").unlink()
    convert(source, new, "parquet", overwrite=True)
    assert set(tree(new)) == {"embeddings.parquet", "fastembed.json"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "emb_1.npy").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="holds no cache"):
        convert(source, tmp_path / "mine", "parquet", overwrite=True)


def test_a_damaged_vector_stops_it(samples, tmp_path):
    store = EmbeddingStore(samples["npy"])
    path = samples["npy"] / f"{store.keys()[3]}.npy"
    np.save(path, np.full(80, np.nan, np.float32))
    with pytest.raises(ValueError, match="non-finite"):
        convert(samples["npy"], tmp_path / "new", "zarr")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError):
        convert(samples["npy"], tmp_path / "new", "parquet")
    assert {path.name for path in tmp_path.iterdir()} == {"tensors", "npy", "zarr"}


# A process of its own, which forks: a child for each moment, without the threads of this one.
KILLED = """
import gc, os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_store import tree
from fastembed.convert import convert

def forked(run, *arguments):
    process = os.fork()
    if process == 0:
        try:
            run(*arguments)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

def killed(at, form):
    # Every file that is opened, renamed, linked or removed is a moment to die.
    moments = 0
    def audit(event, arguments):
        nonlocal moments
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.link", "os.symlink"):
            if ".new.converting" in str(arguments[0]):
                moments += 1
                if moments == at:
                    os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(audit)
    convert(source, new, form)

def again(form):
    convert(source, new, form)
    assert tree(new) == tree(root / "whole")
    assert not list(root.glob(".*"))

gc.freeze()  # else each child copies this process's memory
root, source = Path({root!r}), {source!r}
new = root / "new"
for form in ("npy", "zarr", "parquet", "safetensors"):
    shutil.rmtree(root / "whole", ignore_errors=True)
    assert forked(convert, source, root / "whole", form) == 0
    at, count = 1, 0
    while (status := forked(killed, at, form)) != 0:
        assert status == -signal.SIGKILL and not new.exists(), (form, at, status)
        assert forked(again, form) == 0, (form, at)
        shutil.rmtree(new)
        at, count = at + {step}, count + 1
    shutil.rmtree(new)
    print(form, count)
"""


def test_killed_at_every_step_and_again(samples, tmp_path):
    step = 3 * int(os.environ.get("FASTEMBED_TORTURE_STEP", "3"))
    script = KILLED.format(
        tests=str(Path(__file__).parent), root=str(tmp_path), source=str(samples["npy"]), step=step
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = dict(line.split() for line in done.stdout.splitlines())
    assert counts.keys() == {"npy", "zarr", "parquet", "safetensors"}
    assert all(int(count) >= 2 for count in counts.values()), counts


# Command line -----------------------------------------------------------------------------


def test_command(segments, coco, tmp_path, capsys):
    npy, new = str(segments["npy"]), str(tmp_path / "new")
    assert cli.main(["convert", npy, new, "--format", "zarr"]) == 1
    assert "--data_path" in capsys.readouterr().err
    data = ["--data_path", str(coco.folder), "--split", "val2017"]
    assert cli.main(["convert", npy, new, "--format", "zarr", *data]) == 0
    assert files(tmp_path / "new") == files(segments["zarr"])
    assert cli.main(["convert", npy, new, "--format", "npz", *data]) == 1
    assert cli.main(["convert", npy, new, "--format", "npz", "--overwrite", *data]) == 0
    assert files(tmp_path / "new") == files(segments["npz"])
    assert cli.main(["convert", new, str(tmp_path / "npy2"), "--format", "npy"]) == 0
    assert "no place for label" in capsys.readouterr().out
    assert cli.main(["convert", npy, str(tmp_path / "p"), "--format", "parquet"]) == 0
    assert "holds no label" in capsys.readouterr().out
