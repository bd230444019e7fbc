"""Tiles and annotations on disk: pairing, splits, audit, formats, and what is wrong with them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image

pytest.importorskip("cellpose", reason="cellpose is not installed")

from cellpose_study import draw_tiles

from fastembed.cellpose.dataset import (
    LeakageError,
    list_examples,
    prepare,
    read_splits,
    split_donors,
)
from fastembed.cellpose.images import as_mask, read_image, read_mask, write_tiff
from fastembed.cellpose.tiles import Naming, audit, find_tiles, read_clinical_donors
from fastembed.cli import main


def test_prepare_writes_every_image_into_the_split_of_its_donor(tmp_path):
    masks = draw_tiles(tmp_path / "tiles")
    report = prepare(tmp_path / "tiles", tmp_path / "data")

    order = np.array([str(100000 + i) for i in range(5)])
    np.random.default_rng(2024).shuffle(order)
    splits = {"train": order[:3], "val": order[3:4], "test": order[4:]}
    written = yaml.safe_load((tmp_path / "data" / "donor_splits.yaml").read_text())
    assert written == {name: sorted(donors.tolist()) for name, donors in splits.items()}
    assert report.written == {"train": 6, "val": 2, "test": 2}
    assert report.by_marker["gfap"] == {"train": 3, "val": 1, "test": 1}
    assert json.loads((tmp_path / "data" / "prepare.json").read_text())["masks"] == 10

    for split, donors in splits.items():
        found = list_examples(tmp_path / "data", split)
        assert {example.donor for example in found} == set(donors)
        for example in found:
            dapi = tifffile.imread(tmp_path / "tiles" / f"{example.stem}_dapi-b0c0.tif")
            marker = tifffile.imread(
                tmp_path / "tiles" / f"{example.stem}_{example.marker}-b0c1.tif"
            )
            image = tifffile.imread(example.image_path)
            np.testing.assert_array_equal(image, np.stack([dapi, marker, 0 * dapi], axis=-1))
            labels = tifffile.imread(example.mask_path)
            np.testing.assert_array_equal(labels, masks[example.stem])
            assert labels.dtype == np.uint16
            assert not example.image(zero_dapi=True)[..., 0].any()


def test_prepare_gives_the_same_bytes_again_and_follows_given_splits(tmp_path):
    draw_tiles(tmp_path / "tiles")
    prepare(tmp_path / "tiles", tmp_path / "data")
    splits = tmp_path / "data" / "donor_splits.yaml"
    prepare(tmp_path / "tiles", tmp_path / "again", splits=splits)
    files = sorted(p.relative_to(tmp_path / "data") for p in (tmp_path / "data").rglob("*.*"))
    assert len(files) == 22
    for file in files:
        assert (tmp_path / "data" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_prepare_counts_and_names_what_it_leaves_out(tmp_path, capsys):
    tiles = tmp_path / "tiles"
    draw_tiles(tiles, donors=6)
    (tiles / "gfap_100000_t0_dapi-b0c0.tif").unlink()  # leaves a marker without DAPI
    (tiles / "iba1_100000_t1_iba1-b0c1.tif").unlink()
    (tiles / "gfap_100001_t2_cellbodies.npy").unlink()
    (tiles / "gfap_100002_t4_gfap-b0c1.tif").rename(tiles / "gfap_100002_t4_gfap-b0c2.tif")
    np.save(tiles / "iba1_100004_t9_cellbodies.npy", np.zeros((64, 64), np.int32))
    np.save(tiles / "gfap_nobody_cellbodies.npy", np.zeros((64, 64), np.int32))
    for channel in "01":
        tifffile.imwrite(tiles / f"gfap_nobody_b0c{channel}.tif", np.zeros((64, 64), np.uint16))
    status = main(
        ["cellpose", "prepare", "--tiles", str(tiles), "--output-dir", str(tmp_path / "data")]
    )
    assert status == 3
    report = json.loads((tmp_path / "data" / "prepare.json").read_text())
    names = {
        key: [path.rpartition("/")[2] for path in report[key]]
        for key in report
        if isinstance(report[key], list)
    }
    assert names["image_missing"] == []
    assert names["marker_missing"] == [
        "gfap_100000_t0_cellbodies.npy", "iba1_100000_t1_cellbodies.npy",
    ]  # fmt: skip
    assert names["donor_unknown"] == ["gfap_nobody_cellbodies.npy"]
    assert names["fallback"] == ["gfap_100002_t4"]
    assert names["tiles_without_mask"] == ["gfap_100001_t2"]
    assert names["unpaired_tiles"] == [
        "gfap_100000_t0_gfap-b0c1.tif",
        "iba1_100000_t1_dapi-b0c0.tif",
    ]
    assert names["empty_masks"] == ["iba1_100004_t9"]
    assert report["masks"] == 12 and sum(report["written"].values()) == 9
    assert "1 masks without donor in their path: " in capsys.readouterr().out


def test_prepare_reads_masks_of_every_format_and_the_layout_with_marker_files(tmp_path):
    masks = draw_tiles(tmp_path / "tiles")
    for number, (stem, labels) in enumerate(masks.items()):
        start = tmp_path / "tiles" / stem
        dapi, marker = sorted(tmp_path.glob(f"tiles/{stem}_*b0c?.tif"))
        dapi.rename(start.with_suffix(".png"))  # TIFFs by another name
        marker.rename(f"{start}_marker.png")
        mask = start.with_name(f"{stem}_cellbodies.npy")
        if number % 2:
            mask.unlink()
            Image.fromarray(labels.astype(np.uint8)).save(mask.with_suffix(".png"))
    report = prepare(tmp_path / "tiles", tmp_path / "data")
    assert sum(report.written.values()) == 10
    for split in ("train", "val", "test"):
        for example in list_examples(tmp_path / "data", split):
            np.testing.assert_array_equal(example.mask(), masks[example.stem])


def test_a_donor_in_two_splits_is_refused(tmp_path):
    draw_tiles(tmp_path / "tiles")
    leaky = tmp_path / "leaky.yaml"
    leaky.write_text("train: ['100000', '100001']\nval: ['100001']\ntest: ['100002']\n")
    with pytest.raises(LeakageError, match="donors in more than one split: 100001"):
        prepare(tmp_path / "tiles", tmp_path / "data", splits=leaky)
    prepare(tmp_path / "tiles", tmp_path / "data")
    stray = list_examples(tmp_path / "data", "test")[0]
    for path in (stray.image_path, stray.mask_path):
        (tmp_path / "data" / "train_cells" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(LeakageError, match=stray.donor):
        list_examples(tmp_path / "data", "val")


def test_one_image_under_two_donors_is_leakage(tmp_path):
    tiles = tmp_path / "tiles"
    draw_tiles(tiles)
    splits = split_donors({str(100000 + i) for i in range(5)})
    first, second = (int(splits[name][0]) - 100000 for name in ("train", "test"))
    for channel in ("dapi-b0c0", "gfap-b0c1"):
        source = tiles / f"gfap_{100000 + first}_t{2 * first}_{channel}.tif"
        target = tiles / f"gfap_{100000 + second}_t{2 * second}_{channel}.tif"
        target.write_bytes(source.read_bytes())
    with pytest.raises(LeakageError, match="are the same image"):
        prepare(tiles, tmp_path / "data")


def test_splits_that_make_no_sense(tmp_path):
    with pytest.raises(ValueError, match=r"3 donors are too few: val would have none"):
        split_donors(["a", "b", "c"])
    with pytest.raises(ValueError, match=r"three shares that sum to 1; got \[0.5, 0.5\]"):
        split_donors(["a", "b"], (0.5, 0.5))
    draw_tiles(tmp_path / "tiles")
    few = tmp_path / "few.yaml"
    few.write_text("train: ['100000']\nval: ['100001']\ntest: ['100002']\n")
    with pytest.raises(ValueError, match="no split for donors 100003, 100004"):
        prepare(tmp_path / "tiles", tmp_path / "data", splits=few)
    few.write_text("train: []\n")
    with pytest.raises(ValueError, match="must list donors under train, val, test"):
        read_splits(few)


def test_an_unknown_marker_or_split_is_named(tmp_path):
    draw_tiles(tmp_path / "tiles")
    prepare(tmp_path / "tiles", tmp_path / "data")
    assert {e.marker for e in list_examples(tmp_path / "data", "train", ["gfap"])} == {"gfap"}
    with pytest.raises(ValueError, match="no image of marker 'neun' in train; found gfap, iba1"):
        list_examples(tmp_path / "data", "train", ["neun"])
    with pytest.raises(ValueError, match="split must be one of train, val, test; got 'all'"):
        list_examples(tmp_path / "data", "all")
    with pytest.raises(NotADirectoryError, match="has no folder train_cells"):
        list_examples(tmp_path, "train")


def test_tiles_pair_by_channel_with_c2_where_there_is_no_c1(tmp_path):
    names = {
        "gfap/10100574_x_b0c0.tif": "gfap/10100574_x_b0c1.tif",
        "gfap/10100574_y_dapi-b0c0x1.tif": "gfap/10100574_y_gfap-b0c2x1.tif",
        "neun/20100574_x_b0c0.tif": "neun/20100574_x_b0c1.tif",
        "pecam/tile-c0.tif": "pecam/tile-c1.tif",
    }
    names["gfap/10100574_y_dapi-b0c0.tif"] = "gfap/10100574_y_gfap-b0c2.tif"
    del names["gfap/10100574_y_dapi-b0c0x1.tif"]  # a channel is a whole word
    lonely = ["neun/20100575_z_b0c0.tif", "gfap/abc0.tif"]
    for name in [*names, *names.values(), *lonely]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_tiles(tmp_path)
    pairs = {
        str(t.dapi.relative_to(tmp_path)): str(t.image.relative_to(tmp_path)) for t in found.tiles
    }
    assert pairs == names
    assert [str(path.relative_to(tmp_path)) for path in found.unpaired] == lonely[:1]
    assert [(t.marker, t.donor, t.fallback) for t in found.tiles] == [
        ("gfap", "10100574", False), ("gfap", "10100574", True),
        ("neun", "20100574", False), ("pecam", None, False),
    ]  # fmt: skip
    (tmp_path / "gfap" / "10100574_X_b0c1.tif").touch()
    with pytest.raises(ValueError, match="would both be channel c1 of gfap/10100574_x"):
        find_tiles(tmp_path)
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        find_tiles(tmp_path / "none")


def test_audit_says_who_is_on_one_side_only(tmp_path):
    draw_tiles(tmp_path / "tiles", donors=4)
    (tmp_path / "tiles" / "gfap_100000_t0_dapi-b0c0.tif").unlink()
    clinical = tmp_path / "clinical.csv"
    clinical.write_text("projid,cogdx\n100000.0,1\n100001,2\n100001,3\n999999,4\n")
    assert read_clinical_donors(clinical) == ["100000", "100001", "100001", "999999"]
    output = tmp_path / "audit.json"
    arguments = ["--tiles", str(tmp_path / "tiles"), "--clinical", str(clinical)]
    assert main(["cellpose", "audit", *arguments, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["n_paired_tiles"] == 7
    assert found["n_marker_from_c2_fallback"] == 0
    assert found["n_tile_donors"] == 4 and found["n_clinical_donors"] == 3
    assert found["donors_not_in_clinical"] == ["100002", "100003"]
    assert found["clinical_donors_missing_tiles"] == ["999999"]
    assert found["clinical_duplicate_donors"] == ["100001"]
    assert found["marker_tile_counts"] == {"gfap": 3, "iba1": 4}
    assert [path.rpartition("/")[2] for path in found["unpaired_files"]] == [
        "gfap_100000_t0_gfap-b0c1.tif"
    ]
    with pytest.raises(ValueError, match="has no column donor"):
        read_clinical_donors(clinical, "donor")
    own = Naming(markers=("t3",), donor=r"(?<=_)1000\d\d(?=_)")
    assert audit(find_tiles(tmp_path / "tiles", own), []).unknown_marker_tiles == 6


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((4, 4), np.float32), "must have integer labels; found float32"),
        (np.ones((4, 4), bool), "must have integer labels; found bool"),
        (np.full((4, 4), -1), "must have labels from 0 on; found -1"),
        (np.full((4, 4), 2**32), "must have labels up to"),
        (np.ones((4, 4, 3), int), r"must be a label mask \[H, W\]; found shape \[4, 4, 3\]"),
        (np.ones((0, 4), int), r"found shape \[0, 4\]"),
    ],
)
def test_masks_that_are_none(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ValueError, match=message):
        read_mask(tmp_path / "x.npy")


def test_70000_objects_keep_their_numbers(tmp_path):
    labels = np.arange(70_000, dtype=np.int64).reshape(250, 280)
    assert as_mask(labels).dtype == np.uint32
    write_tiff(tmp_path / "many.tif", as_mask(labels))
    np.testing.assert_array_equal(read_mask(tmp_path / "many.tif"), labels)


def test_image_and_mask_of_different_shape(tmp_path):
    draw_tiles(tmp_path / "tiles")
    np.save(tmp_path / "tiles" / "iba1_100001_t3_cellbodies.npy", np.ones((60, 64), int))
    with pytest.raises(ValueError, match=r"iba1_100001_t3: image and mask must have one shape"):
        prepare(tmp_path / "tiles", tmp_path / "data")


def test_formats_are_told_by_content(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 2**16, (5, 7, 3)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "tiff.png", pixels, photometric="rgb")
    np.testing.assert_array_equal(read_image(tmp_path / "tiff.png"), pixels)
    tifffile.imwrite(tmp_path / "big.tif", pixels, bigtiff=True, photometric="rgb")
    np.testing.assert_array_equal(read_image(tmp_path / "big.tif"), pixels)
    import cv2

    cv2.imwrite(str(tmp_path / "deep.png"), pixels[..., ::-1])  # Pillow cannot keep 16 bits
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png"), pixels)
    Image.fromarray((pixels >> 8).astype(np.uint8)).save(tmp_path / "rgb.png")
    np.testing.assert_array_equal(read_image(tmp_path / "rgb.png"), pixels >> 8)
    (tmp_path / "x.tif").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match="is neither TIFF, PNG nor"):
        read_image(tmp_path / "x.tif")
    (tmp_path / "cut.tif").write_bytes((tmp_path / "tiff.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cut.tif cannot be decoded"):
        read_image(tmp_path / "cut.tif")
