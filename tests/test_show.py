"""``fastembed show``: what is drawn where, and that its colours are the principal components."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_panoptic_job import Coco, RgbEngine

from fastembed import CocoPanoptic, NpyPerPart, SegmentCrops, SegmentTsv, cli, extract, plots
from fastembed.plots import segments as segments_module
from fastembed.plots.pca import as_colours, otsu_threshold, principal_components
from fastembed.plots.sheet import DARK, EMPTY, LARGEST, LIGHT, TILE, Layout, balanced_columns

RED, GREEN, BLUE, YELLOW = (
    (200, 30, 30), (30, 160, 60), (30, 60, 200), (220, 200, 40)
)  # fmt: skip


class Maps:
    """A folder of feature maps and one of their photos."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.photos = folder / "maps", folder / "photos"
        self.folder.mkdir()
        self.photos.mkdir()

    def add(self, name: str, features, mask=None, photo=None, layer=None, **meta) -> Maps:
        path = self.folder / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, features)
        if mask is not None:
            np.save(path.with_name(f"{path.stem}_mask.npy"), mask.astype(np.uint8))
        if layer is not None:
            np.save(path.with_name(f"{path.stem}_layer{layer[0]}.npy"), layer[1])
        if photo is not None:
            meta["source"] = str(self.photos / f"{path.stem}.png")
            Image.fromarray(photo).save(meta["source"])
        if meta:
            path.with_suffix(".json").write_text(json.dumps(meta))
        return self

    def sheet(self, **options) -> np.ndarray:
        (page,) = plots.feature_sheet(self.folder, **options)
        return np.asarray(page)


@pytest.fixture
def maps(tmp_path) -> Maps:
    return Maps(tmp_path)


def noise(seed: int, channels: int = 8, height: int = 4, width: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(channels, height, width)).astype(np.float32)


def tile(sheet: np.ndarray, count: int, number: int, which: int, tiles: int = 3) -> np.ndarray:
    """Tile `which` of image `number` of `count`: [224, 224, 3]."""
    layout = Layout(tiles, lines=1, columns=balanced_columns(count, tiles), notes=3)
    left, top = layout.place(number, which)
    return sheet[top : top + TILE, left : left + TILE]


def svd_components(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, three directions with their documented sign, and shares, by NumPy's SVD."""
    mean = rows.mean(axis=0)
    _, values, directions = np.linalg.svd(rows - mean, full_matrices=False)
    for row in directions[:3]:
        row *= np.sign(row[np.abs(row).argmax()])
    return mean, directions[:3], (values**2 / (values**2).sum())[:3]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_components_are_those_of_one_svd_of_all_rows(dtype):
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(12, 40)) * np.linspace(9, 1, 12)[:, None]
    # A mean far above the spread: sums of squares would cancel.
    parts = [
        (rng.normal(size=(n, 12)) @ mixing + 3000 * (dtype == "float32")).astype(dtype)
        for n in (16, 0, 1, 49, 256)
    ]
    found = principal_components(parts)
    rows = np.concatenate(parts).astype(np.float64)
    mean, directions, shares = svd_components(rows)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(found.directions, directions, atol=1e-9)
    np.testing.assert_allclose(found.shares, shares, rtol=1e-9)
    np.testing.assert_allclose(found.project(rows), (rows - mean) @ directions.T, atol=1e-6)


def test_components_without_variance_are_grey_not_amplified_rounding():
    rng = np.random.default_rng(1)
    line = rng.normal(size=(64, 1)) * rng.normal(size=(1, 8))
    found = principal_components([line])
    assert found.shares[0] == pytest.approx(1) and (found.shares[1:] == 0).all()
    colours = as_colours(found.project(line), found.shares)
    assert (colours[:, 1:] == 128).all() and colours[:, 0].min() == 0 and colours[:, 0].max() == 255
    constant = principal_components([np.ones((9, 5))])
    assert (as_colours(constant.project(np.ones((9, 5))), constant.shares) == 128).all()


def test_components_that_cannot_be():
    with pytest.raises(ValueError, match="at least two rows; got 1"):
        principal_components([np.ones((1, 4)), np.ones((0, 4))])
    with pytest.raises(ValueError, match="3 components need as many columns; got 2"):
        principal_components([np.ones((9, 2))])


def test_otsu_parts_two_heaps():
    rng = np.random.default_rng(2)
    low, high = rng.normal(-4, 1, 300), rng.normal(5, 0.5, 40)
    assert low.max() < otsu_threshold(np.concatenate([low, high])) < high.min()


def test_colours_of_the_sheet_are_the_components_of_all_unmasked_patches(maps):
    features = [noise(i) * (1 + i) + i for i in range(3)]
    mask = np.ones((4, 4), bool)
    mask[0, :2] = False
    for i, feature in enumerate(features):
        maps.add(f"image{i}", feature, mask if i == 1 else None)
    sheet = maps.sheet()

    keeps = [np.ones((4, 4), bool), mask, np.ones((4, 4), bool)]
    rows = np.concatenate(
        [f[:, keep].T.astype(np.float64) for f, keep in zip(features, keeps, strict=True)]
    )
    mean, directions, _ = svd_components(rows)
    values = (rows - mean) @ directions.T
    low, high = np.percentile(values, (1, 99), axis=0)
    for i, (feature, keep) in enumerate(zip(features, keeps, strict=True)):
        picture = tile(sheet, 3, i, 1)[28::56, 28::56].astype(int)
        value = (feature.reshape(8, 16).T - mean) @ directions.T
        expected = (255 * ((value - low) / (high - low)).clip(0, 1)).reshape(4, 4, 3)
        assert np.abs(picture - expected)[keep].max() <= 0.51
        assert (picture[~keep] == DARK).all()


def test_masked_patches_change_nothing(maps):
    mask = np.ones((4, 4), bool)
    mask[1:3, 1:3] = False
    first = maps.add("a", noise(0), mask).add("b", noise(1)).sheet()
    wild = noise(0)
    wild[:, ~mask] = 1e4
    assert np.array_equal(first, maps.add("a", wild, mask).sheet())


def test_same_folder_same_bytes(maps, tmp_path):
    for i in range(4):
        maps.add(f"sub{i % 2}/image{i}", noise(i), photo=np.full((20, 30, 3), 60 * i, np.uint8))
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    for path in paths:
        assert plots.save_pages(plots.feature_sheet(maps.folder), path) == [path]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_photo_patches_and_mask_cover_each_other(maps):
    """Four quadrants of an image show up as the same quadrants of all three tiles."""
    photo = np.zeros((200, 200, 3), np.uint8)
    photo[:100, :100], photo[:100, 100:] = RED, GREEN
    photo[100:, :100], photo[100:, 100:] = BLUE, YELLOW
    features = np.zeros((4, 8, 8), np.float16)
    features[0, :4, :4] = features[1, :4, 4:] = features[2, 4:, :4] = 1
    mask = np.ones((8, 8), bool)
    mask[4:, 4:] = False
    maps.add("other", noise(0, 4, 8, 8), np.ones((8, 8)))
    maps.add("quadrants", features, mask, photo)
    sheet = maps.sheet(per_image=True)
    shown, colours, masked = (tile(sheet, 2, 1, i) for i in range(3))
    near, far = slice(0, 112), slice(112, 224)
    for rows, columns, colour, kept in (
        (near, near, RED, True), (near, far, GREEN, True),
        (far, near, BLUE, True), (far, far, YELLOW, False),
    ):  # fmt: skip
        inside = shown[rows, columns][4:-4, 4:-4]  # bicubic rings at the edges
        assert (inside == colour).all()
        assert (colours[rows, columns] == colours[rows, columns][0, 0]).all()
        assert (masked[rows, columns] == (LIGHT if kept else DARK)).all()
    assert (colours[far, far] == DARK).all()
    assert len({tuple(colours[y, x]) for y in (0, 223) for x in (0, 223)}) == 4
    assert (tile(sheet, 2, 0, 0) == EMPTY).all()  # a photo that is not recorded


@pytest.mark.parametrize(
    ("how", "left", "middle", "top"),
    [
        ({"resize": "squash"}, RED, GREEN, GREEN),
        ({"resize": "center-crop"}, GREEN, GREEN, GREEN),
        ({"resize": "letterbox"}, RED, GREEN, (0, 0, 0)),
        ({}, GREEN, GREEN, GREEN),
    ],
)
@pytest.mark.parametrize("where", ["option", "json", "settings"])
def test_photos_are_fitted_as_the_features_were(maps, how, left, middle, top, where):
    photo = np.zeros((100, 200, 3), np.uint8)
    photo[:, :50], photo[:, 50:150], photo[:, 150:] = RED, GREEN, BLUE
    maps.add("wide", noise(0), photo=photo, **(how if where == "json" else {}))
    if where == "settings" and how:
        settings = {"settings": {"recipe": how}}
        (maps.folder / "fastembed.json").write_text(json.dumps(settings))
    shown = tile(maps.sheet(**(how if where == "option" else {})), 1, 0, 0, tiles=2)
    assert tuple(shown[112, 4]) == left
    assert tuple(shown[112, 112]) == middle
    assert tuple(shown[4, 112]) == top


@pytest.mark.parametrize(("shorter", "edge"), [(224, RED), (256, GREEN), (None, RED)])
def test_photos_are_fitted_as_the_engine_says(maps, shorter, edge):
    """Resized to 256 and cut to 224, a model sees the central 87.5 %."""
    photo = np.empty((320, 320, 3), np.uint8)
    photo[:], photo[20:300, 20:300] = RED, GREEN
    contract = {"height": 224, "width": 224, "resize": {"filter": "x", "shorter": shorter}}
    settings = {"settings": {"engine": {"spec": "kind:name", "input": contract}}}
    (maps.folder / "fastembed.json").write_text(json.dumps(settings))
    maps.add("framed", noise(0), photo=photo)
    shown = tile(maps.sheet(), 1, 0, 0, tiles=2)
    assert tuple(shown[5, 5]) == edge
    assert tuple(shown[112, 112]) == GREEN


def test_photos_are_cut_where_the_json_says(maps):
    """The box is (top, left, bottom, right) in the photo's pixels, here beyond its lower edge."""
    photo = np.empty((100, 200, 3), np.uint8)
    photo[:], photo[:, 150:] = GREEN, BLUE
    maps.add("boxed", noise(0), photo=photo, image_box=[-0.0, 100, 200, 200])
    shown = tile(maps.sheet(), 1, 0, 0, tiles=2)
    assert (shown[8:104, 8:104] == GREEN).all()
    assert (shown[8:104, 120:216] == BLUE).all()
    assert (shown[112:] == 0).all()
    assert (tile(maps.sheet(resize="squash"), 1, 0, 0, 2)[:, 8:160] == GREEN).all()


def test_transparent_and_16_bit_photos(maps):
    clear = np.full((40, 40, 4), 200, np.uint8)
    clear[..., 3] = 255
    clear[:20, :, 3] = 0
    maps.add("a", noise(0), photo=clear)
    maps.add("b", noise(1), photo=np.full((40, 40), 0x6000, np.uint16))
    sheet = maps.sheet()
    assert (tile(sheet, 2, 0, 0, 2)[:100] == 0).all()
    assert (tile(sheet, 2, 0, 0, 2)[124:] == 200).all()
    assert (tile(sheet, 2, 1, 0, 2) == 0x60).all()


def test_photos_that_moved_are_found_by_name(maps, tmp_path):
    photo = np.full((10, 10, 3), RED, np.uint8)
    maps.add("sub/a", noise(0), source="/gone/a.JPG").add("sub/b", noise(1))
    maps.add("sub/c_png", noise(2))
    index = "name\tsource\tshape\tdtype\nsub/c_png\tsub/c.png\t8x4x4\tfloat32\n"
    (maps.folder / "maps.tsv").write_text(index)
    moved = tmp_path / "moved" / "sub"
    moved.mkdir(parents=True)
    Image.fromarray(photo).save(moved / "a.JPG", quality=100)
    Image.fromarray(photo).save(moved / "b.webp", lossless=True)
    Image.fromarray(photo).save(moved / "c.png")
    lost, found = maps.sheet(), maps.sheet(images=tmp_path / "moved")
    for number in range(3):
        assert (tile(lost, 3, number, 0, 2) == EMPTY).all()
        assert np.abs(tile(found, 3, number, 0, 2).astype(int) - RED).max() <= 3


def test_a_layer_is_drawn_from_its_own_files(maps):
    maps.add("a", noise(0), layer=(4, noise(7))).add("b", noise(1), layer=(4, noise(8)))
    sheet = maps.sheet(layer=4)
    assert not np.array_equal(tile(sheet, 2, 0, 1, 2), tile(maps.sheet(), 2, 0, 1, 2))
    only = Maps(maps.folder.parent / "photos").add("a", noise(7)).add("b", noise(8))
    assert np.array_equal(tile(sheet, 2, 0, 1, 2), tile(only.sheet(), 2, 0, 1, 2))
    with pytest.raises(ValueError, match="layer 3 of a is not there; layers: 4"):
        maps.sheet(layer=3)


def test_foreground_is_the_side_away_from_the_borders(maps):
    rng = np.random.default_rng(3)
    inside = np.zeros((8, 8), bool)
    inside[2:6, 2:6] = True
    for i in range(2):
        features = rng.normal(0, 0.2, (6, 8, 8)).astype(np.float32)
        features[0] += np.where(inside, 5, -5)
        maps.add(f"image{i}", features)
    shown = tile(maps.sheet(foreground=True), 2, 1, 1, 2)[14::28, 14::28]
    assert np.array_equal((shown == DARK).all(2), ~inside)
    assert len({tuple(colour) for colour in shown[inside]}) > 8  # components of its own


def test_smooth_interpolates_the_colours_and_keeps_the_mask(maps):
    mask = np.ones((4, 4), bool)
    mask[:, 0] = False
    maps.add("a", noise(0), mask)
    squares, smooth = maps.sheet(), maps.sheet(smooth=True)
    assert len(np.unique(tile(squares, 1, 0, 1).reshape(-1, 3), axis=0)) <= 13
    blended = tile(smooth, 1, 0, 1)
    assert len(np.unique(blended.reshape(-1, 3), axis=0)) > 1000
    assert (blended[:, :56] == DARK).all()
    # What is masked weighs nothing: beside it stands the colour of the patch itself.
    own = tile(squares, 1, 0, 1)[27, 57].astype(int)
    assert np.abs(blended[27, 57] - own).max() <= 3


def test_many_images_go_on_the_next_page(maps, tmp_path):
    for i in range(150):
        maps.add(f"{i:03d}", noise(i, 3, 2, 2))
    paths = plots.save_pages(plots.feature_sheet(maps.folder, limit=150), tmp_path / "s.png")
    assert [path.name for path in paths] == ["s.png", "s-2.png"]
    for path in paths:
        with Image.open(path) as page:
            assert max(page.size) <= LARGEST
    # A smaller selection is spread over the folder: its first and its last are among it.
    few = Maps(tmp_path / "photos")
    for i in (0, 74, 149):
        few.add(f"{i:03d}", noise(i, 3, 2, 2))
    assert np.array_equal(maps.sheet(limit=3)[166:], few.sheet()[166:])


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("b", np.full((8, 4, 4), np.nan, np.float32), r"b\.npy has values that are not finite"),
        ("b", np.ones((8, 4), np.float32), r"b\.npy must be a feature map \[C, h, w\] of floats"),
        ("b", np.ones((8, 4, 4), np.int32), r"it is int32 \[8, 4, 4\]"),
        ("b", np.ones((6, 4, 4), np.float32), r"of one C; a\.npy has 8, b\.npy has 6"),
        ("b_mask", np.ones((3, 3), np.uint8), r"shape \[4, 4\]; it is \[3, 3\]"),
    ],
)
def test_files_that_are_no_maps(maps, name, array, message):
    maps.add("a", noise(0)).add("b", noise(1)).add(name, array)
    with pytest.raises(ValueError, match=message):
        maps.sheet()


def test_nothing_but_masked_patches(maps):
    maps.add("a", noise(0), np.zeros((4, 4)))
    with pytest.raises(ValueError, match="a: fewer than two patches are not masked"):
        maps.sheet()


# Panoptic caches


class Recorded(RgbEngine):
    """An engine whose settings say what it was fed, as those of `load_engine` do."""

    def settings(self) -> dict:
        return {**super().settings(), "input": self.contract.settings()}


def blended(image: np.ndarray, ids: np.ndarray, segment: int, size: int) -> np.ndarray:
    """A crop as the script of the format makes it, by NumPy and Pillow."""
    y, x = np.nonzero(ids == segment)
    pads = int(0.1 * (y.max() - y.min() + 1)), int(0.1 * (x.max() - x.min() + 1))
    window = tuple(
        slice(max(0, side.min() - pad), min(length, side.max() + pad + 1))
        for side, pad, length in zip((y, x), pads, ids.shape, strict=True)
    )
    alpha = np.where(ids[window] == segment, np.float32(1), np.float32(0.3))
    alpha = alpha[..., None].astype(np.float64)
    crop = ((image[window] / 255 * alpha + (1 - alpha) * 0.5) * 255).astype(np.uint8)
    return np.asarray(Image.fromarray(crop).resize((size, size), Image.Resampling.BICUBIC))


def neighbours(cache: Path, key: tuple[str, int]) -> list[tuple[float, tuple[str, int]]]:
    """(cosine, key) of all others, best first, off the files."""
    vectors = {}
    for path in cache.glob("*_*.npy"):
        image, segment = path.stem.split("_")
        vector = np.load(path).astype(np.float64)
        vectors[image, int(segment)] = vector / np.linalg.norm(vector)
    return sorted(
        ((vectors[key] @ vector, other) for other, vector in vectors.items() if other != key),
        reverse=True,
    )


def test_neighbours_are_shown_as_the_model_saw_them(real_data, tmp_path):
    data = real_data / "coco_panoptic"
    source = CocoPanoptic(data, "val2017")
    extract(source, SegmentCrops(), Recorded(size=224), NpyPerPart(tmp_path), SegmentTsv(tmp_path))
    image = np.asarray(Image.open(data / "val2017/000000142238.jpg").convert("RGB"))
    rgb = np.asarray(Image.open(data / "panoptic_val2017/000000142238.png")).astype(int)
    ids = rgb @ (1, 256, 65536)

    key = ("000000142238", 3937500)
    (page,) = plots.neighbour_sheet(tmp_path, data, "val2017", like=[key], k=5)
    sheet = np.asarray(page)
    layout = Layout(tiles=1, lines=2, columns=6, notes=2)
    shown = [key, *(other for _, other in neighbours(tmp_path, key)[:5])]
    for number, (_, segment) in enumerate(shown):
        left, top = layout.place(number)
        tile = sheet[top : top + TILE, left : left + TILE]
        assert np.array_equal(tile, blended(image, ids, segment, 224)), (number, segment)


@pytest.fixture
def cache(tmp_path) -> tuple[Coco, Path]:
    coco = Coco(tmp_path / "coco").fill(5)
    coco.run(tmp_path / "cache", engine=Recorded())
    return coco, tmp_path / "cache"


@pytest.fixture
def drawn(monkeypatch):
    """Cells of a sheet as they are, in rows, instead of its pages."""

    def rows(cache, *arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(segments_module, "pages", lambda *given: given)
            _, _, cells, count, layout, _ = plots.neighbour_sheet(cache, *arguments, **options)
        cells = list(cells)
        assert len(cells) == count
        return [cells[i : i + layout.columns] for i in range(0, count, layout.columns)]

    return rows


def test_captions_tell_class_cosine_and_segment(cache, drawn):
    coco, folder = cache
    labels = {item.name: item.parts for item in coco.source().items()}
    names = ("person", "car", "sky-other-merged")  # by id
    for query, *rest in drawn(folder, coco.folder, "val2017", limit=4, k=6):
        image, segment = query.lines[1][0].split("_")
        assert query.framed and query.lines[0][0] == names[labels[image][int(segment)]]
        expected = neighbours(folder, (image, int(segment)))[:6]
        for cell, (cosine, (other, part)) in zip(rest, expected, strict=True):
            caption, where = (text for text, _ in cell.lines)
            assert caption == f"{cosine:.3f}  {names[labels[other][part]]}"
            assert where == f"{other}_{part}" and not cell.framed


def test_queries_are_spread_over_the_classes_and_always_the_same(cache, drawn):
    coco, folder = cache

    def queries(limit):
        rows = drawn(folder, coco.folder, "val2017", limit=limit, k=1)
        return [tuple(text for text, _ in row[0].lines) for row in rows]

    first = queries(3)
    assert [name for name, _ in first] == ["person", "car", "sky-other-merged"]
    assert queries(3) == first and queries(5)[:3] == first
    assert len(set(queries(100))) == len(list(folder.glob("*_*.npy")))
    assert [name for name, _ in queries(2)] == ["person", "sky-other-merged"]


def test_a_cache_of_npz_and_one_without_settings(cache, drawn, tmp_path):
    coco, folder = cache
    coco.run(tmp_path / "npz", form="npz", engine=Recorded())

    def captions(cache):
        rows = drawn(cache, coco.folder, "val2017", k=2)
        return [cell.lines for row in rows for cell in row]

    assert plots.is_panoptic_cache(tmp_path / "npz")
    assert captions(tmp_path / "npz") == captions(folder)
    (folder / "fastembed.json").unlink()
    assert captions(tmp_path / "npz") == captions(folder)


def test_segments_that_are_not_there(cache):
    coco, folder = cache
    with pytest.raises(ValueError, match="the cache holds no segment 1 of image '7'"):
        plots.neighbour_sheet(folder, coco.folder, "val2017", like=[("7", 1)])
    with pytest.raises(ValueError, match=r"k must be in 1\.\.14; got 15"):
        plots.neighbour_sheet(folder, coco.folder, "val2017", k=15)
    other = Coco(coco.folder, "train2017").add(77)
    with pytest.raises(ValueError, match="is it of another split"):
        plots.neighbour_sheet(folder, other.folder, "train2017")


# The command


def test_show_writes_a_sheet(maps, cache, tmp_path, capsys):
    maps.add("a", noise(0)).add("b", noise(1))
    out = tmp_path / "new" / "maps.png"
    assert cli.main(["show", str(maps.folder), "--out", str(out), "--foreground", "--smooth"]) == 0
    coco, folder = cache
    command = ["show", str(folder), "--data-path", str(coco.folder), "--split", "val2017"]
    assert cli.main([*command, "--k", "14", "--out", str(tmp_path / "cache.png")]) == 0
    assert capsys.readouterr().out.split() == [str(out), str(tmp_path / "cache.png")]
    with Image.open(tmp_path / "cache.png") as sheet:
        assert sheet.format == "PNG" and max(sheet.size) <= LARGEST


def test_show_refuses(maps, cache, tmp_path, capsys):
    maps.add("a", noise(0))
    coco, folder = cache
    np.save(tmp_path / "photos" / "emb_1.npy", np.ones(8, np.float32))
    data = ["--data_path", str(coco.folder), "--split", "val2017"]
    for arguments, status, message in (
        ([tmp_path / "nowhere"], 1, "there is no folder"),
        ([tmp_path / "photos"], 1, "it draws folders of feature maps"),
        ([maps.folder, "--k", "3"], 2, "--k is for a panoptic cache"),
        ([maps.folder, "--out", "sheet.jpg"], 2, "--out must be a .png file; got sheet.jpg"),
        ([maps.folder, "--images", tmp_path / "no"], 1, "images: there is no folder"),
        ([maps.folder, "--font", maps.folder / "a.npy"], 1, "font must be a TrueType"),
        ([folder], 2, "needs --data_path"),
        ([folder, *data, "--layer", "3"], 2, "--layer is for feature maps"),
        ([folder, *data, "--like", "1", "x"], 2, "--like takes an image id and a number"),
        ([folder, *data, "--k", "15"], 1, "k must be in 1..14; got 15"),
    ):
        assert cli.main(["show", *map(str, arguments)]) == status, arguments
        assert message in capsys.readouterr().err
