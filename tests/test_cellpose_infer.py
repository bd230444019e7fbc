"""Full inference over tiles with a segmenter that needs no weights: counts, resume, shards."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cellpose", reason="cellpose is not installed")
tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed")
ndimage = pytest.importorskip("scipy.ndimage", reason="SciPy is not installed")

from fastembed.cellpose import infer as job  # noqa: E402 (needs tifffile)
from fastembed.cellpose.tile_store import SUMMARY, TABLE  # noqa: E402
from fastembed.signature import SignatureMismatch  # noqa: E402

SETTINGS = {"model": "threshold", "level": 1200}
DONORS = ("20100500", "20100600", "20100700")


def segment(image: np.ndarray) -> np.ndarray:
    """Connected regions of bright marker."""
    return ndimage.label(image[..., 1] > SETTINGS["level"])[0]


def tile(seed: int, shape=(64, 48), dtype="uint16") -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(2, *shape)), (0, 2, 2))
    planes = (1000 + 4000 * smooth).clip(0, 60000).astype(np.uint16)
    return tuple((planes // (1 if dtype == "uint16" else 256)).astype(dtype))


@pytest.fixture
def tiles(tmp_path) -> Path:
    """12 tiles of 3 donors and 2 markers, three of them with c2 instead of c1."""
    folder = tmp_path / "rosmap"
    for i in range(12):
        marker, donor = ("gfap", "neun")[i % 2], DONORS[i % 3]
        place = folder / marker / f"{donor}_slide"
        place.mkdir(parents=True, exist_ok=True)
        dapi, image = tile(i)
        channel = "c2" if i >= 9 else "c1"
        tifffile.imwrite(place / f"field{i}_b0c0.tif", dapi)
        tifffile.imwrite(place / f"field{i}_b0{channel}.tif", image)
    return folder


def run(tiles: Path, output: Path, segmenter=segment, **options) -> job.InferReport:
    options = {"model": "baseline", "settings": SETTINGS, **options}
    return job.infer(tiles, output, segmenter, **options)


def rows_of(output: Path) -> list[dict[str, str]]:
    with (output / TABLE).open(newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def files_of(output: Path) -> dict[str, bytes]:
    return {
        path.relative_to(output).as_posix(): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.name != "failures.jsonl"
    }


def test_counts_are_those_of_a_loop_over_objects(tiles, tmp_path):
    report = run(tiles, tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert (report.embedded, report.failed, len(rows)) == (12, 0, 12)
    for row in rows:
        dapi, marker = (tifffile.imread(tiles / row[name]) for name in ("tile_c0", "tile_c1"))
        labels = segment(np.stack([dapi, marker, 0 * dapi], axis=-1))
        means = [float(marker[labels == label].mean()) for label in range(1, labels.max() + 1)]
        assert int(row["n_total_cells"]) == len(means) > 3
        for q in (60, 70, 75, 80, 90):
            threshold = float(np.percentile(marker, q))
            assert float(row[f"threshold_q{q}"]) == threshold
            assert int(row[f"n_marker_positive_q{q}"]) == sum(mean > threshold for mean in means)
        positive = int(row["n_marker_positive"])
        assert positive == int(row["n_marker_positive_q75"])
        assert int(row["area_px"]) == 64 * 48
        assert float(row["ratio"]) == positive / len(means)
        assert float(row["pos_density_mpx"]) == pytest.approx(positive * 1e6 / 3072, rel=1e-15)
        assert float(row["total_density_mpx"]) == pytest.approx(len(means) * 1e6 / 3072, rel=1e-15)
        assert row["donor"] in DONORS and row["donor"] in row["tile_c0"]
        assert row["marker"] == row["tile_c0"].split("/")[0]
        assert int(row["c2_fallback"]) == ("c2" in row["tile_c1"])
    assert sum(int(row["c2_fallback"]) for row in rows) == 3
    assert len({row["n_marker_positive_q60"] for row in rows}) > 1


def test_an_object_at_the_threshold_is_not_positive():
    marker = np.array([[4, 4, 0, 0], [4, 4, 9, 9]], dtype=np.uint8)
    labels = np.array([[1, 1, 0, 0], [1, 1, 2, 2]], dtype=np.uint16)
    total, thresholds, positive = job.count_positive(labels, marker, [50, 40])
    assert total == 2 and thresholds[0] == 4.0
    assert positive.tolist() == [1, 1]  # 4 > 4 does not hold


def test_one_run_resumed_runs_and_shards_leave_the_same_bytes(tiles, tmp_path):
    run(tiles, tmp_path / "one", keep_masks=True)
    expected = files_of(tmp_path / "one")
    for part in (2, 0, 1):
        report = run(tiles, tmp_path / "shards", keep_masks=True, shard=(part, 3))
        assert report.listed < 12
    assert files_of(tmp_path / "shards") == expected

    calls = []

    def tiring(image):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return segment(image)

    with pytest.raises(KeyboardInterrupt):
        run(tiles, tmp_path / "stopped", tiring, keep_masks=True)
    assert len(rows_of(tmp_path / "stopped")) == 4
    state = json.loads((tmp_path / "stopped" / SUMMARY).read_text())
    assert (state["n_tiles"], state["n_committed"], len(state["missing"])) == (12, 4, 8)
    (tmp_path / "stopped" / TABLE).unlink()
    report = run(tiles, tmp_path / "stopped", keep_masks=True)
    assert (report.already_done, report.embedded) == (4, 8)
    assert files_of(tmp_path / "stopped") == expected


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from test_cellpose_infer import SETTINGS, segment
from fastembed.cellpose.infer import infer

def slow(image):
    time.sleep(0.1)
    return segment(image)

infer({tiles!r}, {output!r}, slow, model="baseline", settings=SETTINGS, keep_masks=True)
"""


def test_a_killed_run_goes_on(tiles, tmp_path):
    output = tmp_path / "killed"
    code = KILLED.format(tests=str(Path(__file__).parent), tiles=str(tiles), output=str(output))
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ})
    deadline = time.monotonic() + 120
    while len(list(output.glob("tiles/*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    committed = len(list(output.glob("tiles/*.json")))
    assert committed < 12
    assert job.rebuild(output) == committed == len(rows_of(output))
    report = run(tiles, output, keep_masks=True)
    assert (report.already_done, report.embedded) == (committed, 12 - committed)
    run(tiles, tmp_path / "whole", keep_masks=True)
    assert files_of(output) == files_of(tmp_path / "whole")


def test_bad_tiles_are_named_and_the_others_done(tiles, tmp_path):
    gfap = tiles / "gfap" / f"{DONORS[0]}_slide"
    (gfap / "field0_b0c1.tif").write_bytes(b"no image at all")
    tifffile.imwrite(gfap / "field6_b0c1.tif", np.zeros((64, 47), np.uint16))
    tifffile.imwrite(
        tiles / "gfap" / f"{DONORS[2]}_slide" / "field2_b0c1.tif", np.zeros((64, 48), np.float32)
    )
    report = run(tiles, tmp_path / "out")
    assert (report.embedded, report.failed, report.committed) == (9, 3, 9)
    records = [json.loads(line) for line in Path(report.failures_file).read_text().splitlines()]
    reasons = {Path(record["key"]).name: record["reason"] for record in records}
    assert "neither TIFF, PNG nor .npy" in reasons["field0"]
    assert "DAPI and marker must be alike" in reasons["field6"]
    assert "uint8 or uint16 pixels; found float32" in reasons["field2"]
    state = json.loads((tmp_path / "out" / SUMMARY).read_text())
    assert sorted(state["missing"]) == sorted(record["key"] for record in records)
    with pytest.raises(job.TileFailed, match="field0"):
        run(tiles, tmp_path / "strict", strict=True)


def test_a_segmenters_mistakes_are_the_tiles_failures(tiles, tmp_path):
    wrong = iter([np.zeros((3, 3), int), np.zeros((64, 48), float), -np.ones((64, 48), int)])
    report = run(tiles, tmp_path / "out", lambda image: next(wrong, segment(image)))
    reasons = [json.loads(line)["reason"] for line in open(report.failures_file)]
    assert report.failed == 3 and report.embedded == 9
    assert "must have one shape" in reasons[0]
    assert "integer labels; found float64" in reasons[1]
    assert "labels from 0 on; found -1" in reasons[2]


def test_memory_and_our_own_errors_stop_the_run(tiles, tmp_path):
    def broken(image):
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        run(tiles, tmp_path / "out", broken)


def test_more_than_65535_objects_do_not_wrap(tmp_path):
    shape = (560, 520)
    tifffile.imwrite(tmp_path / "gfap_20100500_b0c0.tif", np.zeros(shape, np.uint8))
    marker = np.zeros(shape, np.uint8)
    marker[::2, ::2] = 1
    tifffile.imwrite(tmp_path / "gfap_20100500_b0c1.tif", marker)
    run(
        tmp_path, tmp_path / "out", lambda image: ndimage.label(image[..., 1])[0],
        settings={}, keep_masks=True,
    )  # fmt: skip
    (row,) = rows_of(tmp_path / "out")
    assert int(row["n_total_cells"]) == int(row["n_marker_positive"]) == 280 * 260 > 65535
    (mask,) = (tmp_path / "out" / "pred_masks").glob("*.tif")
    labels = tifffile.imread(mask)
    assert labels.dtype == np.uint32 and labels.max() == len(np.unique(labels)) - 1 == 280 * 260


def test_tiles_without_objects_or_names_count(tmp_path):
    tifffile.imwrite(tmp_path / "field_b0c0.tif", np.zeros((8, 8), np.uint8))
    tifffile.imwrite(tmp_path / "field_b0c1.tif", np.zeros((8, 8), np.uint8))
    run(tmp_path, tmp_path / "out")
    (row,) = rows_of(tmp_path / "out")
    assert (row["n_total_cells"], row["ratio"], row["total_density_mpx"]) == ("0", "", "0.0")
    assert (row["donor"], row["marker"]) == ("unknown", "unknown")


def test_marker_only_models_get_no_dapi(tiles, tmp_path):
    seen = []

    def watching(image):
        seen.append((image[..., 0].any(), image[..., 1].any()))
        return segment(image)

    run(tiles, tmp_path / "out", watching, zero_dapi=True)
    assert set(seen) == {(False, True)}


def test_other_settings_are_refused_until_overwritten(tiles, tmp_path):
    run(tiles, tmp_path / "out", limit=2)
    with pytest.raises(SignatureMismatch, match="percentiles"):
        run(tiles, tmp_path / "out", percentiles=[75])
    with pytest.raises(SignatureMismatch, match=r"segmenter\.level: 1200 there, 1300 now"):
        run(tiles, tmp_path / "out", settings={**SETTINGS, "level": 1300})
    report = run(tiles, tmp_path / "out", percentiles=[75], limit=1, overwrite=True)
    assert report.embedded == report.committed == 1


def test_masks_that_are_asked_for_later_are_made(tiles, tmp_path):
    run(tiles, tmp_path / "out", limit=3)
    report = run(tiles, tmp_path / "out", limit=3, keep_masks=True)
    assert report.embedded == 3 and len(list((tmp_path / "out" / "pred_masks").iterdir())) == 3


def test_a_damaged_record_is_named(tiles, tmp_path):
    run(tiles, tmp_path / "out", limit=2)
    record = next((tmp_path / "out" / "tiles").glob("*.json"))
    record.write_text("{}")
    with pytest.raises(ValueError, match=f"{record.name} is not the record of a tile.*remove it"):
        job.rebuild(tmp_path / "out")


def test_arguments_are_refused_by_name(tiles, tmp_path):
    for options, message in (
        ({"percentiles": [75, 101]}, r"percentiles must be in 0..100; got \[75.0, 101.0\]"),
        ({"percentiles": [75, 75.0]}, "named once each"),
        ({"percentiles": [60]}, "positive must be one of percentiles"),
        ({"shard": (3, 3)}, "shard must be i/n"),
        ({"shard": (0, 2), "overwrite": True}, "overwrite removes the outputs of all shards"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tiles, tmp_path / "out", **options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pairs of channels"):
        run(tmp_path / "empty", tmp_path / "out")


def test_the_command_counts_what_cellpose_itself_segments(real_data, tmp_path, capsys):
    """A small network of random weights on real nuclei, against cellpose's own eval."""
    models = pytest.importorskip("cellpose.models", reason="cellpose is not installed")
    from fastembed import cli
    from fastembed.cellpose.network import load_network

    nuclei = tifffile.imread(real_data / "nuclei" / "img2d.tif")
    assert nuclei.dtype in (np.uint8, np.uint16)
    for i in range(2):
        crop = nuclei[100 * i : 100 * i + 96, :80]
        tifffile.imwrite(tmp_path / f"gfap_2010050{i}_b0c0.tif", crop)
        tifffile.imwrite(tmp_path / f"gfap_2010050{i}_b0c1.tif", crop.max() - crop)
    command = [
        "cellpose", "infer", "--tiles", str(tmp_path), "--output-dir", str(tmp_path / "study"),
        "--model", "random:1x32@3", "--name", "tiny", "--precision", "fp32", "--device", "cpu",
        "--flow-threshold", "0", "--cellprob-threshold", "-0.5", "--save-masks",
    ]  # fmt: skip
    for channel in ("c0", "c1"):
        (tmp_path / f"gfap_20100502_b0{channel}.tif").write_bytes(b"nothing")
    assert cli.main(command) == 3
    out = capsys.readouterr()
    assert "random weights" in out.err and "1 failed" in out.out and "failures.jsonl" in out.out
    assert cli.main([*command, "--strict"]) == 3
    assert "gfap_20100502: " in capsys.readouterr().err
    assert cli.main([*command, "--allow-failures"]) == 0
    assert "2 already done, 1 failed" in capsys.readouterr().out
    network = load_network("random:1x32@3", device="cpu", precision="fp32")
    output = tmp_path / "study" / "downstream" / "full_inference" / "tiny"
    rows = rows_of(output)
    masks = sorted((output / "pred_masks").glob("*.tif"))
    assert [row["donor"] for row in rows] == ["20100500", "20100501"] and len(masks) == 2
    assert isinstance(network.model, models.CellposeModel)
    for row, mask in zip(rows, masks, strict=True):
        dapi, marker = (tifffile.imread(tmp_path / row[name]) for name in ("tile_c0", "tile_c1"))
        expected, _, _ = network.model.eval(
            np.stack([dapi, marker, 0 * dapi], axis=-1), flow_threshold=0, cellprob_threshold=-0.5
        )
        np.testing.assert_array_equal(tifffile.imread(mask), expected)
        means = [marker[expected == label].mean() for label in range(1, expected.max() + 1)]
        assert int(row["n_total_cells"]) == len(means) > 0
        above = sum(mean > np.percentile(marker, 60) for mean in means)
        assert int(row["n_marker_positive_q60"]) == above
        assert row["model"] == "tiny"
