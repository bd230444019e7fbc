"""Naming volumes and sampling them: the same bits for an index, aligned in the world."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
import zarr
from volume_files import Pyramid, Server, brightness, paint

from fastembed.volumes import (
    DataSet,
    Place,
    Sampling,
    Stores,
    Volumes,
    find_cellmap,
    read_datasets,
    with_organelles,
)
from fastembed.volumes.sampling import Dice

SMALL = {"base_resolution": 64, "min_resolution_for_raw": 32, "output_image_dim": 8}


def blobs(z, y, x):
    """Instances: cubes of 256 nm in a checkerboard, each with its own id."""
    a, b, c = (np.floor(v / 256).astype(np.int64) for v in (z, y, x))
    return np.where((a + b + c) % 2 == 0, 1 + (a % 8) + 8 * (b % 8) + 64 * (c % 8), 0).astype(
        np.uint16
    )


def bright(threshold):
    return lambda z, y, x: (brightness(z, y, x) > threshold).astype(np.uint8)


def nothing(z, y, x):
    return (z + y + x).astype(np.uint8) * 0


def data_set(folder: Path, label=blobs, name="a", raw=brightness, **where) -> DataSet:
    """Raw of 32 nm, 64^3, and labels of 64 nm in a box of their own: corner, shape."""
    place = {"corner": (0, 0, 0), "shape": (32, 32, 32), **where}
    image = Pyramid(raw, voxel=(32,) * 3, shape=(64,) * 3, depth=2).ome(
        folder / name / "raw", chunk=32
    )
    labels = Pyramid(label, voxel=(64,) * 3, depth=1, **place).ome(folder / name / "cell", 3)
    return DataSet(name, Place(str(image)), {"cell": Place(str(labels))})


def volumes(datasets, count=4, **options) -> Volumes:
    sampling = Sampling(**{**SMALL, **options})
    return Volumes(datasets, range(count), sampling, Stores(2, retries=1, pause=0.01))


def read_all(source: Volumes) -> list:
    return [source.read(item) for item in source.items()]


def digest(volume) -> str:
    parts = [volume.raw, volume.gt] + ([] if volume.mask is None else [volume.mask])
    content = b"".join(part.tobytes() for part in parts)
    return hashlib.sha256(content + json.dumps(volume.provenance).encode()).hexdigest()


def test_a_volume_as_its_provenance_says(tmp_path):
    """Every voxel is the world's at the place that the provenance names."""
    source = volumes([data_set(tmp_path)], 8, augment=False)
    for index, volume in enumerate(read_all(source)):
        facts = json.loads(json.dumps(volume.provenance))
        corner = facts["crop"]["offset_nm"]
        assert facts["crop"]["shape_nm"] == [512.0] * 3
        assert facts["volume_index"] == index
        np.testing.assert_array_equal(volume.raw, paint(brightness, corner, (32,) * 3, (16,) * 3))
        known = volume.mask.astype(bool)
        expected = paint(blobs, corner, (64,) * 3, (8,) * 3)
        np.testing.assert_array_equal(volume.gt, (expected > 0) & known)
        ids = np.unique(expected[known & (expected > 0)])
        assert facts["unique_ids"] == len(ids) >= 2
        assert facts["valid_gt_fraction"] == known.mean() >= 0.05
        assert facts["label_fraction"] == (volume.gt[known] > 0).mean() >= 0.01
        assert (facts["num_classes"], facts["unique_classes"]) == (2, [0, 1])
        assert facts["levels"]["raw"]["voxel_size_nm"] == [32.0] * 3
        assert facts["levels"]["cell"]["url"].endswith("a/cell/s0")
        assert facts["source_dataset"]["paths"]["raw"].endswith("a/raw/s0")
        assert volume.nbytes == 16**3 * 4 + 2 * 8**3
        assert (volume.raw.dtype, volume.gt.dtype, volume.mask.dtype) == ("f4", "u1", "u1")


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("shift", [0.0, 16.0, 10.0])
def test_raw_and_labels_at_other_resolutions_meet(tmp_path, augment, shift):
    """Labels of 64 nm on raw of 32: where a label says bright, raw is. Also when turned."""
    data = data_set(tmp_path, bright(7000), corner=(shift,) * 3, shape=(31,) * 3)
    turns = set()
    for volume in read_all(volumes([data], 10, augment=augment, min_unique_ids=1)):
        eighths = volume.raw.reshape(8, 2, 8, 2, 8, 2).mean((1, 3, 5))
        known = volume.mask.astype(bool)
        # A label voxel's centre is at most `shift` from that of the grid's, per axis.
        sure = known & (np.abs(eighths - 7000) > 7 * shift)
        assert sure.mean() > 0.5
        np.testing.assert_array_equal(volume.gt[sure] == 1, eighths[sure] > 7000)
        turns.add(json.dumps(volume.provenance["augmentation"]))
    assert len(turns) > 5 if augment else turns == {"null"}


def test_turned_volumes_are_the_same_crops_turned(tmp_path):
    data = [data_set(tmp_path, corner=(512, 512, 512), shape=(12, 12, 12))]
    for plain, turned in zip(
        read_all(volumes(data, 12, augment=False)), read_all(volumes(data, 12)), strict=True
    ):
        turn = turned.provenance["augmentation"]
        for part in ("raw", "gt", "mask"):
            expected = np.moveaxis(getattr(plain, part), turn["axes"], (0, 1, 2))
            for axis in turn["flips"]:
                expected = np.flip(expected, axis)
            np.testing.assert_array_equal(getattr(turned, part), expected)
        assert plain.provenance["crop"] == turned.provenance["crop"]


def test_an_index_is_the_same_in_any_order_thread_and_process(tmp_path):
    data = [data_set(tmp_path), data_set(tmp_path, name="b", label=bright(9000))]
    options = {"min_unique_ids": 1}
    forward = {
        v.provenance["volume_index"]: digest(v) for v in read_all(volumes(data, 8, **options))
    }
    assert len(set(forward.values())) == 8
    source = volumes(data, 8, **options)
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(source.read, reversed(list(source.items()))))
    assert {v.provenance["volume_index"]: digest(v) for v in again} == forward
    (tmp_path / "data.yaml").write_text(
        yaml.safe_dump(
            {
                "datasets": [
                    {"name": d.name, "raw": d.raw.path, "labels": {"cell": d.labels["cell"].path}}
                    for d in data
                ]
            }
        )
    )
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_volumes_sources import *
        data = read_datasets({str(tmp_path / "data.yaml")!r})
        source = volumes(data, 8, min_unique_ids=1)
        item = [*source.items()][5]
        print(digest(source.read(item)))
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    out = subprocess.run(run, capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.strip() == forward[5]


def test_the_dice_are_these_for_good():
    """A new release of NumPy, or of this library, must not move a single crop."""
    dice = Dice(0, 7)
    assert [dice.below(1000) for _ in range(6)] == [38, 777, 799, 476, 840, 948]
    dice = Dice(3, 0)
    assert [dice.below(2**40) for _ in range(3)] == [94172255183, 260375905581, 881010591534]
    few = Dice(1, 1)
    assert {few.below(3) for _ in range(100)} == {0, 1, 2}


def test_items_and_settings(tmp_path):
    data = data_set(tmp_path)
    source = Volumes([data], [3, 12], Sampling(**SMALL))
    items = list(source.items())
    assert [(item.key, item.name) for item in items] == [
        ("volume_000003",) * 2,
        ("volume_000012",) * 2,
    ]
    assert [item.fields["volume_index"] for item in items] == [3, 12]
    assert source.count() == 2
    settings = json.loads(json.dumps(source.selection()))
    assert settings["sampling"]["organelles"] == ["cell"]
    assert settings["datasets"][0]["raw"]["path"] == data.raw.path
    assert settings == Volumes([data], [0], Sampling(**SMALL)).selection()
    assert settings != Volumes([data], [0], Sampling(**SMALL, seed=1)).selection()
    secret = DataSet("a", Place("https://me:secret@host/raw?token=secret"), data.labels)
    assert "secret" not in json.dumps(Volumes([secret], [0]).selection())
    with pytest.raises(ValueError, match="volumes have one channel; asked for 3"):
        source.read(items[0], 3)
    with pytest.raises(ValueError, match="volume indices must be >= 0; got -1"):
        Volumes([data], [-1])
    with pytest.raises(ValueError, match="volume indices must be different"):
        Volumes([data], [1, 1])
    with pytest.raises(
        ValueError, match=r"no data set has the organelles \['er'\]; there are \['cell"
    ):
        Volumes([data], [0], Sampling(organelles=("er",)))


def test_crops_leave_the_labels_only_when_they_may(tmp_path):
    """Labels of 768 nm in raw of 2048 nm; crops of 512 nm."""
    where = {"corner": (640, 640, 640), "shape": (12, 12, 12)}
    data = [data_set(tmp_path, **where)]
    inside = read_all(volumes(data, 20, gt_extension=False))
    assert all(volume.mask is None for volume in inside)
    corners = np.array([volume.provenance["crop"]["offset_nm"] for volume in inside])
    assert corners.min() >= 640 and (corners + 512).max() <= 640 + 768
    assert len({tuple(corner) for corner in corners}) > 10
    outside = read_all(volumes(data, 20))
    masks = [volume.provenance["valid_gt_fraction"] for volume in outside]
    assert min(masks) < 0.6 and max(masks) > 0.8
    corners = np.array([volume.provenance["crop"]["offset_nm"] for volume in outside])
    assert corners.min() >= 640 - 256 and corners.max() <= 640 + 768 - 256
    for volume in outside:
        corner = np.array(volume.provenance["crop"]["offset_nm"])
        known = paint(
            lambda z, y, x: np.logical_and.reduce(
                [np.broadcast_to((v > 640) & (v < 1408), (8, 8, 8)) for v in (z, y, x)]
            ),
            corner, (64,) * 3, (8,) * 3,
        )  # fmt: skip
        turn = volume.provenance["augmentation"]
        expected = np.flip(known.transpose(turn["axes"]), turn["flips"])
        np.testing.assert_array_equal(volume.mask, expected)


def test_crops_stay_in_raw_where_the_labels_lattice_does_not(tmp_path):
    """One place alone is in raw and in the labels: between two steps of the labels' lattice."""
    data = [data_set(tmp_path, bright(0), corner=(1510,) * 3, shape=(9,) * 3)]
    options = {"gt_extension": False, "min_unique_ids": 1, "augment": False}
    for volume in read_all(volumes(data, 3, **options)):
        assert volume.provenance["crop"]["offset_nm"] == [1536.0] * 3
        expected = paint(brightness, (1536,) * 3, (32,) * 3, (16,) * 3)
        np.testing.assert_array_equal(volume.raw, expected)


def test_labels_smaller_than_a_crop(tmp_path):
    """A box of 256 nm in crops of 512: at least half of it on each axis, one in 64 at least."""
    data = [data_set(tmp_path, bright(0), corner=(0, 896, 896), shape=(4, 4, 4))]
    found = read_all(volumes(data, 10, min_unique_ids=1, min_ground_truth_fraction=0))
    assert all(1 / 64 <= volume.provenance["valid_gt_fraction"] <= 1 / 8 for volume in found)
    with pytest.raises(ValueError, match=r"100 below min_ground_truth_fraction 0.2 \(best 0.125\)"):
        read_all(volumes(data, 1, min_unique_ids=1, min_ground_truth_fraction=0.2))
    with pytest.raises(
        ValueError, match="a: no crop of 512 nm lies in the labels along z, without"
    ):
        read_all(volumes(data, 1, gt_extension=False))


@pytest.mark.parametrize(
    ("label", "options", "message"),
    [
        (
            nothing,
            {},
            r"volume 0: none of 100 crops of a will do: 100 below min_label_fraction .* \(best 0\)",
        ),
        (nothing, {"attempts": 7}, "none of 7 crops of a will do: 7 below min_label_fraction"),
        (bright(0), {}, r"100 below min_unique_ids 2 \(best 1\)"),
        (blobs, {"min_label_fraction": 0.9}, r"below min_label_fraction 0.9 \(best 0\.[4-6]"),
    ],
)
def test_when_no_crop_does(tmp_path, label, options, message):
    with pytest.raises(ValueError, match=message):
        read_all(volumes([data_set(tmp_path, label)], 1, **options))


def test_crops_are_drawn_again_until_one_does(tmp_path):
    def corner_only(z, y, x):
        return ((z < 900) & (y < 900)).astype(np.uint8) * (1 + (x > 900).astype(np.uint8))

    found = read_all(volumes([data_set(tmp_path, corner_only)], 6, min_label_fraction=0.2))
    assert max(volume.provenance["attempts"] for volume in found) > 1
    assert all(volume.provenance["label_fraction"] >= 0.2 for volume in found)


def test_nothing_but_labels_is_read_of_crops_that_do_not_do(tmp_path):
    data = data_set(tmp_path, nothing)
    server = Server(tmp_path)
    try:
        remote = DataSet("a", Place(f"{server.url}/a/raw"), {"cell": Place(f"{server.url}/a/cell")})
        with pytest.raises(ValueError, match="none of 5 crops of a will do"):
            read_all(volumes([remote], 1, attempts=5))
        chunks = [r for r in server.requests if r.rpartition("/s0/")[2][:1] in "0123456789c"]
        assert any("/cell/s0/" in r for r in server.requests)
        assert not [r for r in chunks if "/raw/" in r and not r.endswith("zarr.json")]
        server.fail(10**6, "503", "/raw/s0/")
        with pytest.raises(OSError, match=r"/a/raw/s0.*retry attempts failed"):
            read_all(volumes([remote], 1, min_label_fraction=0, min_unique_ids=0))
    finally:
        server.close()
    assert data.name == "a"


def test_classes_of_several_organelles(tmp_path):
    """The later name stands where both are; ids of two organelles are different."""
    both = data_set(tmp_path, bright(2000))
    other = Pyramid(bright(8000), voxel=(64,) * 3, shape=(16, 32, 32), depth=1)
    other.ome(tmp_path / "a" / "nucleus")
    data = DataSet(
        "a", both.raw, {"nucleus": Place(str(tmp_path / "a" / "nucleus")), **both.labels}
    )
    for names in (("cell", "nucleus"), ("nucleus", "cell")):
        for volume in read_all(volumes([data], 4, organelles=names, augment=False)):
            corner = volume.provenance["crop"]["offset_nm"]
            world = paint(brightness, corner, (64,) * 3, (8,) * 3)
            expected = np.zeros((8, 8, 8), np.uint8)
            for number, name in enumerate(names, 1):
                expected[world > {"cell": 2000, "nucleus": 8000}[name]] = number
            z = corner[0] + 64 * (np.arange(8) + 0.5)
            known = np.broadcast_to((z < 1024)[:, None, None], (8, 8, 8))  # the nucleus's box
            np.testing.assert_array_equal(volume.mask, known)
            np.testing.assert_array_equal(volume.gt, expected * known)
            assert volume.provenance["num_classes"] == 3
            assert volume.provenance["unique_ids"] == 2


def test_values_and_unknown_voxels(tmp_path):
    def ids(z, y, x):
        return (np.floor(x / 128) % 4).astype(np.uint8) + (z + y).astype(np.uint8) * 0

    data = data_set(tmp_path, ids)
    label = Place(data.labels["cell"].path, values=(0, 2), unknown=3)
    data = DataSet("a", data.raw, {"cell": label})
    for volume in read_all(volumes([data], 4, augment=False)):
        world = paint(ids, volume.provenance["crop"]["offset_nm"], (64,) * 3, (8,) * 3)
        inside = world != 3
        np.testing.assert_array_equal(volume.mask[:, :, 1:-1], inside[:, :, 1:-1])
        np.testing.assert_array_equal(volume.gt, np.isin(world, (0, 2)) & volume.mask.astype(bool))
        assert volume.provenance["unique_ids"] == 2


def test_the_annotators_unknown_is_masked(tmp_path):
    def ids(z, y, x):
        return np.where(x < 1024, 255, 1).astype(np.uint8) + (z + y).astype(np.uint8) * 0

    data = data_set(tmp_path)
    path = Pyramid(ids, voxel=(64,) * 3, depth=1).ome(tmp_path / "crop", 2, unknown=255)
    data = DataSet("a", data.raw, {"cell": Place(str(path))})
    masks = []
    for volume in read_all(volumes([data], 8, augment=False, min_unique_ids=1)):
        x = volume.provenance["crop"]["offset_nm"][2] + 64 * (np.arange(8) + 0.5)
        inside = np.broadcast_to(x > 1024, (8, 8, 8))
        assert not (volume.mask & ~inside).any()
        masks.append(volume.mask.mean())
    assert min(masks) < 1


def test_anisotropic_sections_fill_cubes(tmp_path):
    """Voxels of 50 x 8 x 8 nm; the grid is cubic all the same, and in the right place."""
    raw = Pyramid(brightness, voxel=(50, 8, 8), shape=(20, 128, 128), depth=1)
    raw.plain(tmp_path / "raw", voxel_size=[50, 8, 8], offset=[0, 0, 0])
    cell = Pyramid(bright(3000), voxel=(50, 8, 8), shape=(20, 128, 128), depth=1)
    cell.plain(tmp_path / "cell", 3, voxel_size=[50, 8, 8], offset=[0, 0, 0])
    data = DataSet("a", Place(str(tmp_path / "raw")), {"cell": Place(str(tmp_path / "cell"))})
    options = {"base_resolution": 32, "min_resolution_for_raw": 16, "output_image_dim": 16}
    for volume in read_all(volumes([data], 4, **options, augment=False, min_unique_ids=1)):
        corner = np.array(volume.provenance["crop"]["offset_nm"])
        expected = paint(brightness, corner, (16,) * 3, (32,) * 3)
        deep = slice(2, -2)  # beyond the outermost centres along z it is the outermost value
        np.testing.assert_allclose(volume.raw[deep], expected[deep], rtol=1e-5)
        world = paint(brightness, corner, (32,) * 3, (16,) * 3)
        sure = np.abs(world - 3000) > 25 + 8 + 16 + 1
        np.testing.assert_array_equal(volume.gt[sure], (world > 3000)[sure])


def test_data_sets_that_are_no_use(tmp_path):
    data = data_set(tmp_path)
    with pytest.raises(
        ValueError, match="no crop can be drawn: a: a crop of 8192 nm does not fit into raw, 2048"
    ):
        read_all(volumes([data], 1, output_image_dim=128))
    far = data_set(tmp_path, name="far", corner=(9000, 0, 0))
    with pytest.raises(
        ValueError, match=r"far: raw and labels must overlap; raw is at 0\.\.2048 x"
    ):
        read_all(volumes([far], 1))
    lost = DataSet("lost", Place(str(tmp_path / "lost")), data.labels)
    with pytest.raises(FileNotFoundError, match=r"there is no .*lost"):
        read_all(volumes([lost], 1))
    floating = DataSet("f", data.raw, {"cell": data.raw})
    with pytest.raises(TypeError, match=r"a/raw/s1: labels must be integers; they are float32"):
        read_all(volumes([floating], 1))
    zarr.create_array(tmp_path / "wide", data=np.zeros((64,) * 3, np.int64), zarr_format=2)
    wide = DataSet("w", Place(str(tmp_path / "wide"), (32.0,) * 3), data.labels)
    with pytest.raises(TypeError, match="raw must be uint8, uint16, int16, float32; it is int64"):
        read_all(volumes([wide], 1))
    holes = data_set(tmp_path, name="holes", raw=lambda z, y, x: brightness(z, y, x) * np.nan)
    with pytest.raises(ValueError, match="holes/raw/s0 has pixels that are no numbers"):
        read_all(volumes([holes], 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"organelles": ()}, "organelles must be 1 to 255 different names"),
        ({"organelles": "cell"}, "organelles must be a sequence of names; got 'cell'"),
        ({"organelles": ("a", "a")}, "organelles must be 1 to 255 different names"),
        ({"min_resolution_for_raw": 256}, "at most base_resolution; got 256 and 128"),
        ({"min_resolution_for_raw": 30}, "must be a whole number; got 546.13"),
        ({"output_image_dim": 0}, "output_image_dim and attempts must be >= 1; got 0"),
        ({"min_label_fraction": 1.5}, "min_label_fraction must be in 0..1; got 1.5"),
        ({"seed": -1}, "min_unique_ids and seed must be >= 0"),
    ],
)
def test_sampling_is_checked(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Sampling(**options)


def test_the_specs_crop():
    assert (Sampling().raw_dim, Sampling().extent) == (512, 16384)


# Naming ------------------------------------------------------------------------------


def write_yaml(folder: Path, content) -> Path:
    path = folder / "datasets.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_yaml(tmp_path):
    path = write_yaml(
        tmp_path,
        """
        datasets:
          - name: vnc
            raw: sections/raw
            labels:
              mito: {path: s3://bucket/mito, resolution: [50, 4.6, 4.6], values: [191]}
              cell: {path: /data/cell.zarr, resolution: 8, translation: [0, -4, 2.5], unknown: 255}
        """,
    )
    (data,) = read_datasets(path)
    assert data.raw == Place(str(tmp_path / "sections" / "raw"))
    assert data.labels == {
        "mito": Place("s3://bucket/mito", (50.0, 4.6, 4.6), values=(191,)),
        "cell": Place("/data/cell.zarr", (8.0, 8.0, 8.0), (0.0, -4.0, 2.5), unknown=255),
    }


ROW = {"name": "a", "raw": "r", "labels": {"cell": "c"}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is not YAML"),
        ("- a", "must be a mapping with datasets"),
        ({"datasets": []}, "must be a list with one data set at least"),
        ({"datasets": [ROW], "data": 1}, r"has unknown keys \['data'\]; there are datasets"),
        ({"datasets": [{**ROW, "scale": 1}]}, r"datasets\[0\] has unknown keys \['scale'\]"),
        ({"datasets": [{"name": "a", "raw": "r"}]}, r"datasets\[0\] lacks labels"),
        ({"datasets": [ROW, ROW]}, r"datasets\[1\]: the name 'a' is there twice"),
        ({"datasets": [{**ROW, "labels": {}}]}, "must map organelles to places"),
        ({"datasets": [{**ROW, "raw": {"resolution": 4}}]}, r"\[0\].raw lacks path"),
        ({"datasets": [{**ROW, "raw": {"path": "r", "values": [1]}}]}, "unknown keys .'values'"),
        ({"datasets": [{**ROW, "raw": {"path": "r", "resolution": [1, 2]}}]}, "one or three along"),
        (
            {"datasets": [{**ROW, "raw": {"path": "r", "resolution": 0}}]},
            "numbers > 0, one or three",
        ),
        ({"datasets": [{**ROW, "raw": {"path": ""}}]}, "raw.path must be a path or an address"),
        ({"datasets": [{**ROW, "labels": {"c": {"path": "l", "values": 1}}}]}, "list of integers"),
    ],
)
def test_yaml_is_strict(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_datasets(write_yaml(tmp_path, content))


def test_data_sets_with_all_organelles():
    def with_labels(name, *organelles):
        return DataSet(name, Place("r"), {o: Place(o) for o in organelles})

    rows = [with_labels("a", "cell"), with_labels("b", "cell", "mito"), with_labels("c", "er")]
    assert [d.name for d in with_organelles(rows, ["mito", "cell"])] == ["b"]
    with pytest.raises(ValueError, match=r"\['golgi'\]; there are \['cell', 'er', 'mito'\]"):
        with_organelles(rows, ["cell", "golgi"])
    with pytest.raises(
        ValueError, match=r"all of the organelles .*; a: \['cell'\]; b: \['cell', 'mi"
    ):
        with_organelles(rows, ["er", "mito"])


@pytest.fixture
def tree(tmp_path):
    """Two data sets of the CellMap tree: ground truth in crops 7 and 115, one inference."""
    image = Pyramid(brightness, voxel=(32,) * 3, shape=(64,) * 3, depth=2)
    labels = Pyramid(blobs, voxel=(64,) * 3, depth=1)
    one = tmp_path / "jrc_one" / "jrc_one.zarr" / "recon-1"
    image.ome(one / "em" / "fibsem-uint8", chunk=32)
    (one / "em" / "fibsem-uint16").mkdir()
    for organelle in ("cell", "mito"):
        labels.ome(one / "labels" / "groundtruth" / "crop115" / organelle)
    labels.ome(one / "labels" / "groundtruth" / "crop7" / "cell")
    labels.ome(one / "labels" / "inference" / "segmentations" / "cell")
    image.ome(tmp_path / "jrc_two" / "recon-1" / "em" / "fibsem-uint16", chunk=32)
    labels.ome(tmp_path / "jrc_two" / "recon-1" / "labels" / "groundtruth" / "crop9" / "cell")
    (tmp_path / "jrc_two" / "recon-1" / "labels" / "groundtruth" / "notes").mkdir()
    return tmp_path


def names(datasets):
    return [dataset.name for dataset in datasets]


def test_cellmap_tree(tree):
    found = find_cellmap(tree)
    assert names(found) == ["jrc_one/crop7", "jrc_one/crop115", "jrc_two/crop9"]
    assert sorted(found[1].labels) == ["cell", "mito"]
    assert found[0].raw.path.endswith("jrc_one.zarr/recon-1/em/fibsem-uint8")
    assert found[2].raw.path.endswith("jrc_two/recon-1/em/fibsem-uint16")
    assert names(find_cellmap(tree, crops=["crop115", 9])) == ["jrc_one/crop115", "jrc_two/crop9"]
    assert names(find_cellmap(tree, inference=["jrc_one"])) == ["jrc_one/inference"]
    both = find_cellmap(tree, crops=[7], inference=["jrc_one"])
    assert names(both) == ["jrc_one/crop7", "jrc_one/inference"]
    source = Volumes.from_cellmap(tree, range(3), Sampling(**SMALL), crops=[7, 115])
    assert names(source.datasets) == ["jrc_one/crop7", "jrc_one/crop115"]
    for volume in read_all(source):
        name = volume.provenance["source_dataset"]["name"].rpartition("/")[2]
        assert f"groundtruth/{name}/cell" in volume.provenance["source_dataset"]["paths"]["cell"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"crops": [8]},
            r"crop-filter names \[8\], which are none of the crops of .*: \[7, 9, 115\]",
        ),
        ({"crops": ["x"]}, "crop-filter takes numbers of crops, as 115 or crop115; got 'x'"),
        (
            {"inference": ["jrc_two"]},
            r"inference-filter names \['jrc_two'\], .* with inference: \['jrc_one'\]",
        ),
        ({"em": "tem"}, r"must have the array tem; it has \['fibsem-uint16', 'fibsem-uint8'\]"),
    ],
)
def test_cellmap_filters_are_checked(tree, options, message):
    with pytest.raises(ValueError, match=message):
        find_cellmap(tree, **options)


def test_cellmap_trees_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        find_cellmap(tmp_path / "nothing")
    with pytest.raises(
        ValueError, match=r"has no data set: no <data set>/<data set>\.zarr/recon-<N>"
    ):
        find_cellmap(tmp_path)
    with pytest.raises(ValueError, match=r"data-root must be a local folder.*got s3://bucket"):
        find_cellmap("s3://bucket/data")


# Real sections -----------------------------------------------------------------------


def test_real_sections(real_data, tmp_path):
    """Twenty sections of 50 x 4.6 x 4.6 nm: crops of 768 nm, mitochondria and glia."""
    place = {"resolution": [50, 4.6, 4.6]}
    labels = {"path": str(real_data / "em_vnc" / "labels"), **place}
    raw = {"path": str(real_data / "em_vnc" / "raw"), **place}
    path = write_yaml(
        tmp_path,
        {
            "datasets": [
                {
                    "name": "vnc",
                    "raw": raw,
                    "labels": {
                        "mito": {**labels, "values": [191]},
                        "glia": {**labels, "values": [159]},
                    },
                }
            ]
        },
    )
    sampling = Sampling(
        ("mito", "glia"), base_resolution=32, min_resolution_for_raw=16, output_image_dim=24,
        augment=False,
    )  # fmt: skip
    first = read_all(Volumes.from_yaml(path, range(4), sampling))
    again = read_all(Volumes.from_yaml(path, range(4), sampling))
    assert [digest(v) for v in first] == [digest(v) for v in again]

    import tifffile
    from PIL import Image

    sections = sorted((real_data / "em_vnc" / "raw").iterdir())
    shown = np.stack([tifffile.imread(section) for section in sections])
    files = sorted((real_data / "em_vnc" / "labels").iterdir())
    ids = np.stack([np.asarray(Image.open(file)) for file in files])
    for volume in first:
        assert volume.raw.shape == (48, 48, 48) and volume.raw.dtype == np.uint8
        corner = np.array(volume.provenance["crop"]["offset_nm"])
        at = [
            np.floor((corner[axis] + (np.arange(24) + 0.5) * 32) / size + 0.5 + 1e-6).astype(int)
            for axis, size in enumerate((50, 4.6, 4.6))
        ]
        world = ids[np.ix_(*at)]
        expected = np.select([world == 191, world == 159], [1, 2], 0)
        np.testing.assert_array_equal(volume.gt, expected)
        # Raw is the mean of what it covers in y and x, linear in z: the crop's own mean.
        low = np.rint(corner / (50, 4.6, 4.6) + 0.5).astype(int)
        box = shown[low[0] : low[0] + 16, low[1] : low[1] + 167, low[2] : low[2] + 167]
        assert abs(volume.raw.mean() - box.mean()) < 2
        assert np.corrcoef(volume.raw.mean((0, 1)), _profile(box))[0, 1] > 0.99


def _profile(box: np.ndarray) -> np.ndarray:
    """Mean along x in 48 steps."""
    profile = box.mean((0, 1))
    return np.interp((np.arange(48) + 0.5) / 48 * len(profile) - 0.5, range(len(profile)), profile)
