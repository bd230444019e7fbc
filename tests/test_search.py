"""The nearest vectors, against all cosines in float64."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra zarr)")


from test_panoptic_job import Coco, RgbEngine
from test_store import run_panoptic

from fastembed import cli, neighbours, search
from fastembed.datasets import EmbeddingStore, PanopticFeatures
from fastembed.queries import ImageQueries
from fastembed.signature import SignatureMismatch
from fastembed.testing import microscopy


def oracle(vectors, queries, k, leave_out=()) -> tuple[np.ndarray, np.ndarray]:
    """All cosines in float64; of equal ones the lower row first."""
    x, q = np.asarray(vectors, np.float64), np.atleast_2d(np.asarray(queries, np.float64))
    lengths = np.sqrt(np.einsum("nd,nd->n", x, x))
    unit = q / np.linalg.norm(q, axis=1, keepdims=True)
    cosines = np.stack([(x * one).sum(1) for one in unit]) / np.where(lengths == 0, 1, lengths)
    for row, out in zip(cosines, leave_out, strict=bool(leave_out)):
        row[[] if out is None else out] = -np.inf
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(cosines, order, axis=1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK_BYTES", 1)  # the least: 64 rows


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000])
def test_rows_and_cosines(count, dtype):
    draw = np.random.default_rng(count)
    vectors = (draw.standard_normal((count, 48)) + 1).astype(dtype)
    queries = draw.standard_normal((7, 48)).astype(dtype)
    for k in (1, 10, 64, 2000):
        rows, cosines = search(vectors, queries, k)
        expected_rows, expected = oracle(vectors, queries, k)
        assert rows.shape == (7, min(k, count))
        np.testing.assert_array_equal(rows, expected_rows)
        np.testing.assert_allclose(cosines, expected, atol=1e-14)
    one = search(torch.from_numpy(vectors), torch.from_numpy(queries[3]), 10)
    np.testing.assert_array_equal(one.rows[0], search(vectors, queries, 10).rows[3])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ties_come_by_row(data):
    """Few different vectors, so that most cosines are equal, to the last bit or nearly."""
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    kinds = draw.standard_normal((data.draw(st.integers(1, 4)), 33)).astype("f4")
    kinds[0] = data.draw(st.sampled_from([0, 1e-25, 1e25, 1])) * kinds[0]
    count, k = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 90))
    vectors = kinds[draw.integers(0, len(kinds), count)]
    if data.draw(st.booleans()):  # the next number in a place or two: closer than float32 can tell
        at = draw.integers(0, count, 5), draw.integers(0, 33, 5)
        vectors[at] = np.nextafter(vectors[at], np.float32(9))
    query = draw.standard_normal((2, 33))
    out = [data.draw(st.integers(0, count - 1)), None]
    rows, cosines = search(vectors, query, k, leave_out=out)
    x = vectors.astype(np.float64)
    unit = query / np.linalg.norm(query, axis=1, keepdims=True)
    for number in range(2):
        lengths = np.sqrt((x * x).sum(1))
        exact = (x * unit[number]).sum(1) / np.where(lengths == 0, 1, lengths)
        order = [r for r in np.argsort(-exact, kind="stable") if r != out[number]][:k]
        found = rows[number][rows[number] >= 0]
        assert found.tolist() == order
        assert np.isnan(cosines[number][len(order) :]).all()


def test_zeros_have_no_direction():
    vectors = np.eye(5, dtype="f2")[[0, 1, 2, 3]]
    vectors[1] = 0
    rows, cosines = search(vectors, [-1, 0, 0, 1, 0], 4)
    assert rows.tolist() == [[3, 1, 2, 0]]
    np.testing.assert_allclose(cosines, [[0.5**0.5, 0, 0, -(0.5**0.5)]])


def test_what_is_refused():
    vectors = np.ones((70, 4), "f4")
    for query in ([0, 0, 0, 0], [1, np.nan, 0, 0], [np.inf, 0, 0, 0]):
        with pytest.raises(ValueError, match="query 0 must be finite and not zero"):
            search(vectors, query)
    with pytest.raises(ValueError, match=r"queries must be \[Q, 4\]"):
        search(vectors, [1, 2, 3])
    with pytest.raises(ValueError, match="k must be at least 1"):
        search(vectors, vectors[0], 0)
    with pytest.raises(ValueError, match=r"vectors must be \[N, D\]"):
        search(vectors[0], vectors[0])
    with pytest.raises(ValueError, match="leave_out must have 1"):
        search(vectors, vectors[0], leave_out=[1, 2])
    for bad in (np.nan, np.inf):
        vectors[66, 2] = bad
        with pytest.raises(ValueError, match="row 66 is not finite"):
            search(vectors, vectors[0])


def test_a_low_precision_of_torch_does_not_reach_it():
    draw = np.random.default_rng(0)
    base = draw.standard_normal(256)
    vectors = (base + 1e-3 * draw.standard_normal((500, 256))).astype("f4")
    torch.set_float32_matmul_precision("medium")
    try:
        rows = search(vectors, base, 20).rows
    finally:
        torch.set_float32_matmul_precision("highest")
    np.testing.assert_array_equal(rows, oracle(vectors, base, 20)[0])


# A cache ----------------------------------------------------------------------------------


@pytest.fixture
def plates_out(plates, tmp_path):
    """A cache of a real model (random weights), and its data."""
    plates.fill(5)
    plates.rows.append((plates.rows[0][0], 77))  # a tensor with two texts
    plates.add("one.npy", microscopy("uint16", 50, 50, 99, 8), 3)
    command = [
        "multichannel", "--manifest", str(plates.manifest), "--output-dir", str(tmp_path / "out"),
        "--model", "dinov3:vits16", "--weights", "random", "--img-size", "32", "--batch-size", "8",
        "--crops", "grid",
    ]  # fmt: skip
    assert cli.main([*command, "--format", "zarr"]) == 0
    return tmp_path / "out"


def asked(capsys, *arguments: str) -> list[dict]:
    capsys.readouterr()
    assert cli.main(["search", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_samples_by_name_by_path_and_as_files(plates, plates_out, tmp_path, capsys):
    store = EmbeddingStore(plates_out)
    vectors, names = store.as_numpy(), store.column("name")
    own = store.column("tensor_path").tolist().index(plates.rows[-1][0])
    rows, cosines = oracle(vectors, vectors[own], 3, [own])
    by_name, by_path = asked(
        capsys, str(plates_out), "--like", names[own], "--like", plates.rows[-1][0], "--k", "3"
    )
    assert by_name["nearest"] == by_path["nearest"] and by_name["like"] == names[own]
    assert [one["name"] for one in by_name["nearest"]] == names[rows[0]].tolist()
    np.testing.assert_allclose([one["cosine"] for one in by_name["nearest"]], cosines[0])
    assert set(by_name["nearest"][0]) == {"cosine", "name", "tensor_path", "text_id"}
    # The same pixels under another name go through the model; grids do not depend on names.
    copy = shutil.copy(plates.rows[-1][0], tmp_path / "copy.npy")
    [as_file] = asked(capsys, str(plates_out), "--like", str(copy), "--k", "3")
    best = as_file["nearest"]
    assert [one["name"] for one in best] == [names[own], *names[rows[0][:2]]]
    assert best[0]["cosine"] == pytest.approx(1, abs=1e-12)
    np.testing.assert_array_equal(ImageQueries(plates_out).embed(copy), vectors[own])
    assert cli.main(["search", str(plates_out), "--like", plates.rows[0][0]]) == 1
    assert "is the tensor of 2 rows: name one, such as emb_" in capsys.readouterr().err
    assert cli.main(["search", str(plates_out), "--like", "emb_x"]) == 1
    assert "neither a key of" in capsys.readouterr().err
    path = plates_out / "fastembed.json"
    content = json.loads(path.read_text())
    content["settings"]["engine"]["architecture"] = "else"
    path.write_text(json.dumps(content))
    with pytest.raises(SignatureMismatch, match=r"another engine.*\n  architecture: 'else' there"):
        ImageQueries(plates_out)


@pytest.mark.parametrize("form", ["npy", "npz", "zarr"])
def test_segments_and_a_whole_photo(tmp_path, form, monkeypatch, capsys):
    monkeypatch.setattr("fastembed.engines.load_engine", lambda spec, **options: RgbEngine())
    coco = Coco(tmp_path / "coco").fill(4)
    photo = np.random.default_rng(3).integers(0, 255, (40, 56, 3), np.uint8)
    coco.add(9, photo=photo, map=np.full((40, 56), 5, np.int32), listed=lambda rows: [
        {"id": 5, "category_id": 1, "iscrowd": 0, "area": photo.size // 3}
    ])  # fmt: skip
    run_panoptic(coco, tmp_path / "out") if form == "zarr" else coco.run(tmp_path / "out", form)
    features = PanopticFeatures(tmp_path / "out")
    key = next(iter(features))
    out = str(tmp_path / "out")
    by_ids, by_name = asked(
        capsys, out, "--like", key[0], str(key[1]), "--like", f"{key[0]}_{key[1]}"
    )
    assert by_ids["nearest"] == by_name["nearest"] and by_ids["like"] == f"{key[0]} {key[1]}"
    expected = features.nearest(*key)
    found = [((one["image_id"], one["segment_id"]), one["cosine"]) for one in by_ids["nearest"]]
    assert found == expected and key not in dict(found)
    image = coco.folder / "val2017" / "000000000009.jpg"
    [like] = asked(capsys, out, "--like", str(image), "--k", "2")
    assert (like["nearest"][0]["image_id"], like["nearest"][0]["segment_id"]) == ("000000000009", 5)
    assert like["nearest"][0]["cosine"] == pytest.approx(1, abs=1e-12)
    assert cli.main(["search", out, "--like", *key[:1], str(key[1])]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    (image_id, segment_id), cosine = expected[0]
    assert line.startswith(f"  {cosine:.4f}  {image_id} {segment_id}")
    assert cli.main(["search", out, "--like", key[0], "4711"]) == 1
    assert cli.main(["search", out, "--like", "a", "b", "c"]) == 2


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "fastembed.json").write_text('{"settings": {"recipe": {"recipe": "maps"}}}')
    with pytest.raises(ValueError, match="one vector per sample or segment; it is maps"):
        ImageQueries(tmp_path)
