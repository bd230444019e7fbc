"""Opening volumes: every layout at its place in the world, and every way to be wrong."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import tifffile
import torch
import zarr
from PIL import Image
from volume_files import Pyramid, Server, brightness, paint, write_n5

from fastembed.volumes import Stores
from fastembed.volumes.grids import Grid, read_mean, read_nearest
from fastembed.volumes.multiscales import parse_ome

CORNER = (640.0, -320.0, 96.0)


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    yield server
    server.close()


def stores(**options) -> Stores:
    return Stores(2, pause=0.01, **{"retries": 3, **options})


WRITERS = {
    "ome-v2": lambda p, path: p.ome(path, 2),
    "ome-v3": lambda p, path: p.ome(path, 3),
    "ome-xyz": lambda p, path: p.ome(path, 2, axes="xyz"),
    "ome-tczyx": lambda p, path: p.ome(path, 2, axes="tczyx"),
    "n5-cosem": lambda p, path: p.n5(path, "cosem"),
    "n5-transform": lambda p, path: p.n5(path, "transform"),
}


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("resolution", [32, 64, 128])
def test_every_scale_shows_the_same_world(tmp_path, layout, resolution):
    """Scales whose corners coincide have centres half a voxel apart: none may be shifted."""
    path = WRITERS[layout](Pyramid(brightness, CORNER), tmp_path / "image")
    level = stores().open(path).choose(resolution)
    assert level.voxel == (resolution,) * 3
    np.testing.assert_allclose(level.corner, CORNER)
    np.testing.assert_allclose(level.end, np.array(CORNER) + 32 * 32)
    corner = tuple(np.array(CORNER) + 256)
    grid = Grid(corner, 128.0, (2, 3, 4))
    expected = paint(brightness, corner, (128.0,) * 3, (2, 3, 4))
    np.testing.assert_allclose(read_mean(level, grid), expected, rtol=1e-6)


@pytest.mark.parametrize("style", ["viewer", "paintera"])
def test_n5_downsampling_factors_move_the_centre(tmp_path, style):
    """These say no translation: the finest scale's first centre is at 0."""
    path = Pyramid(brightness, (-16, -16, -16)).n5(tmp_path / "image.n5", style)
    for resolution in (32, 64, 128):
        level = stores().open(path).choose(resolution)
        assert level.url.endswith(f"s{int(np.log2(resolution // 32))}")
        np.testing.assert_allclose(level.corner, (-16, -16, -16), atol=1e-9)
        expected = paint(brightness, level.corner, level.voxel, (2, 3, 4))
        got = read_mean(level, Grid(tuple(level.corner), float(resolution), (2, 3, 4)))
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_plain_zarr_with_the_attributes_of_funlib(tmp_path, zarr_format):
    path = Pyramid(brightness, CORNER).plain(
        tmp_path / "a", zarr_format, voxel_size=[32, 32, 32], offset=list(CORNER)
    )
    level = stores().open(path).choose(32)
    np.testing.assert_allclose(level.corner, CORNER)
    path = Pyramid(brightness).plain(tmp_path / "b", zarr_format, resolution=[0.1] * 3, units="um")
    assert stores().open(path).choose(100).voxel == (100.0,) * 3


def test_dimension_names_of_plain_zarr(tmp_path):
    content = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    array = zarr.create_array(tmp_path / "2", data=content, zarr_format=2)
    array.attrs.update({"_ARRAY_DIMENSIONS": ["x", "z", "y"], "resolution": [3, 4, 2]})
    names = ("x", "z", "y")
    array = zarr.create_array(tmp_path / "3", data=content, zarr_format=3, dimension_names=names)
    array.attrs["resolution"] = [3, 4, 2]
    for name in ("2", "3"):
        level = stores().open(tmp_path / name).choose(1)
        np.testing.assert_array_equal(level.read([slice(None)] * 3), content.transpose(1, 2, 0))
        assert level.voxel == (3, 4, 2)


def test_units_are_honoured_and_scales_chained():
    def axes(unit):
        return [{"name": n, "type": "space", "unit": unit} for n in "zyx"]

    steps = [
        {"type": "scale", "scale": [2, 2, 2]},
        {"type": "translation", "translation": [4, 0, 0]},
    ]
    for unit, factor in (("angstrom", 0.1), ("nanometer", 1), ("micrometer", 1e3), ("µm", 1e3)):
        entry = {
            "axes": axes(unit),
            "datasets": [{"path": "0", "coordinateTransformations": steps}],
            "coordinateTransformations": [{"type": "scale", "scale": [10, 10, 10]}],
        }
        (scale,) = parse_ome(entry, "x").scales
        np.testing.assert_allclose(scale.voxel, [20 * factor] * 3)
        np.testing.assert_allclose(scale.origin, [40 * factor, 0, 0])
    with pytest.raises(ValueError, match="unit of axis z must be one of length; got 'furlong'"):
        parse_ome({**entry, "axes": axes("furlong")}, "x")


def test_the_users_figures_stand_for_the_metadatas(tmp_path):
    path = Pyramid(brightness).ome(tmp_path / "image", unit=None)
    with pytest.raises(ValueError, match=r"image: its axis z has no unit of length; give the res"):
        stores().open(path)
    pyramid = stores().open(path, (40.0, 10.0, 10.0), (5.0, 6.0, 7.0))
    level = pyramid.open(pyramid.scales[1])
    assert level.voxel == (80, 20, 20)
    # Half a voxel of the finest scale further, for its centre.
    np.testing.assert_allclose(level.origin, (5 + 20, 6 + 5, 7 + 5))
    known = Pyramid(brightness).ome(tmp_path / "known")
    moved = stores().open(known, None, (0.0, 0.0, 1000.0)).choose(64)
    np.testing.assert_allclose(moved.origin, (16, 16, 1016))


def test_choice_of_a_scale(tmp_path):
    isotropic = stores().open(Pyramid(brightness).ome(tmp_path / "i"))
    asked = {16: 32, 32: 32, 40: 32, 63.9: 32, 64: 64, 127: 64, 128: 128, 999: 128}
    assert {r: isotropic.choose(r).voxel[0] for r in asked} == asked
    # z is coarser than asked at every scale: only y and x decide, and z may not get coarser.
    flat = stores().open(Pyramid(brightness, voxel=(50, 5, 5)).ome(tmp_path / "f"))
    assert flat.choose(20).voxel == (50, 5, 5)
    assert flat.choose(100).voxel == (100, 10, 10)


def test_mean_of_what_a_voxel_covers(tmp_path):
    rng = np.random.default_rng(0)
    content = rng.integers(0, 65536, (12, 20, 28)).astype(np.uint16)
    array = zarr.create_array(tmp_path / "a", data=content, chunks=(5, 6, 7), zarr_format=2)
    array.attrs["resolution"] = [10, 10, 10]
    level = stores().open(tmp_path / "a").choose(1)
    start = tuple(level.corner)
    whole = torch.from_numpy(content.astype(np.float64))[None, None]
    half = torch.nn.functional.avg_pool3d(whole, 2)[0, 0].numpy()
    np.testing.assert_array_equal(
        read_mean(level, Grid(start, 20.0, (6, 10, 14))), np.rint(half).astype(np.uint16)
    )
    np.testing.assert_array_equal(read_mean(level, Grid(start, 10.0, (12, 20, 28))), content)
    # 15 nm from 10 nm: on a lattice of 5 nm both are whole.
    fine = content.astype(np.float64)
    for axis in range(3):
        fine = fine.repeat(2, axis)
    fine = fine[1:22, 2:35, 4:52]
    blocks = fine.reshape(7, 3, 11, 3, 16, 3).mean((1, 3, 5))
    corner = tuple(np.array(start) + (5, 10, 20))
    got = read_mean(level, Grid(corner, 15.0, (7, 11, 16)))
    assert np.abs(got - blocks).max() <= 0.5 + 0.01


def test_linear_between_voxels(tmp_path):
    rng = np.random.default_rng(1)
    content = rng.random((6, 7, 8), np.float32)
    array = zarr.create_array(tmp_path / "a", data=content, zarr_format=2)
    array.attrs["resolution"] = [40, 40, 40]
    level = stores().open(tmp_path / "a").choose(40)
    got = read_mean(level, Grid(tuple(level.corner), 10.0, (24, 28, 32)))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(content)[None, None], scale_factor=4, mode="trilinear", align_corners=False
    )
    np.testing.assert_allclose(got, expected[0, 0].numpy(), atol=1e-6)


def test_labels_are_those_of_the_voxel_at_the_centre(tmp_path):
    rng = np.random.default_rng(2)
    content = rng.integers(1, 1 << 60, (5, 6, 7), dtype=np.uint64)
    array = zarr.create_array(tmp_path / "a", data=content, chunks=(2, 2, 2), zarr_format=3)
    array.attrs["resolution"] = [50, 4.6, 4.6]
    level = stores().open(tmp_path / "a").choose(50)
    corner = (-60.0, -7.0, 3.0)
    values, inside = read_nearest(level, Grid(corner, 8.0, (50, 8, 6)))
    for at in np.ndindex(values.shape):
        voxel = [
            round((c + (i + 0.5) * 8 - o) / v)
            for c, i, o, v in zip(corner, at, level.origin, level.voxel, strict=True)
        ]
        there = all(0 <= k < n for k, n in zip(voxel, content.shape, strict=True))
        assert inside[at] == there
        assert values[at] == (content[tuple(voxel)] if there else 0)


def test_large_reads_come_in_bricks_and_agree(tmp_path, monkeypatch):
    level = stores().open(Pyramid(brightness, depth=1).ome(tmp_path / "a")).choose(32)
    grid = Grid((32.0, 64.0, 40.0), 48.0, (17, 16, 15))
    whole = read_mean(level, grid)
    monkeypatch.setattr("fastembed.volumes.grids._BRICK_VOXELS", 500)
    np.testing.assert_array_equal(read_mean(level, grid), whole)


def sections(folder, content, suffix="tif", digits=0):
    folder.mkdir()
    for z, section in enumerate(content):
        name = folder / f"z{z:0{digits}d}.{suffix}"
        if suffix == "png":
            Image.fromarray(section).save(name)
        else:
            tifffile.imwrite(name, section, compression="deflate")
    return folder


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_sections_in_natural_order_read_one_by_one(tmp_path, suffix):
    content = np.random.default_rng(3).integers(0, 255, (12, 9, 10)).astype(np.uint8)
    folder = sections(tmp_path / "s", content, suffix)
    with pytest.raises(ValueError, match=r"/s: its attributes have no resolution; give"):
        stores().open(folder)
    level = stores().open(folder, (50.0, 4.0, 4.0)).choose(4)
    assert (level.shape, level.dtype) == ((12, 9, 10), np.uint8)
    for z in range(1, 10):
        (folder / f"z{z}.{suffix}").write_bytes(b"unread")
    np.testing.assert_array_equal(
        level.read([slice(10, 12), slice(2, 7), slice(3, 9)]), content[10:, 2:7, 3:9]
    )
    with pytest.raises(ValueError, match=rf"z5\.{suffix} is not a readable"):
        level.read([slice(5, 6), slice(None), slice(None)])


def test_sections_that_do_not_belong(tmp_path):
    content = np.zeros((3, 8, 8), np.uint16)
    folder = sections(tmp_path / "s", content)
    tifffile.imwrite(folder / "z2.tif", np.zeros((8, 9), np.uint16))
    level = stores().open(folder, (1.0, 1.0, 1.0)).choose(1)
    with pytest.raises(ValueError, match=r"section 2 must be uint16 \[8, 8\].*uint16 \[8, 9\]"):
        level.read([slice(None)] * 3)
    tifffile.imwrite(folder / "z0.tif", np.zeros((8, 8, 3), np.uint8), photometric="rgb")
    with pytest.raises(ValueError, match=r"z0.tif must be one 2D grey section; it is \[8, 8, 3\]"):
        stores().open(folder, (1.0, 1.0, 1.0)).choose(1)


def test_pages_of_one_tiff(tmp_path):
    content = np.random.default_rng(4).integers(0, 65535, (5, 6, 7)).astype(">u2")
    tifffile.imwrite(tmp_path / "a.tif", content, byteorder=">", photometric="minisblack")
    level = stores().open(tmp_path / "a.tif", (1.0, 1.0, 1.0)).choose(1)
    np.testing.assert_array_equal(
        level.read([slice(1, 4), slice(None), np.array([0, 6])]), content[1:4][..., [0, 6]]
    )
    (tmp_path / "b.tif").write_bytes(b"II*\0garbage")
    with pytest.raises(ValueError, match=r"b.tif is not a readable TIFF"):
        stores().open(tmp_path / "b.tif", (1.0, 1.0, 1.0)).choose(1)


def test_what_is_not_there_or_not_a_volume(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*nothing"):
        stores().open(tmp_path / "nothing")
    with pytest.raises(
        FileNotFoundError, match=r"has no array or multiscale group: none of zarr\.js"
    ):
        stores().open(tmp_path)
    with pytest.raises(
        ValueError, match="must be local, file, http, https, s3 or gs; got ftp://a/b"
    ):
        stores().open("ftp://user:secret@a/b")
    zarr.open_group(tmp_path / "group", mode="w", zarr_format=2).attrs["colour"] = "grey"
    with pytest.raises(ValueError, match=r"zarr group without multiscales; its attributes.*colour"):
        stores().open(tmp_path / "group")
    path = Pyramid(brightness).ome(tmp_path / "lost")
    shutil.rmtree(path / "s1")
    with pytest.raises(FileNotFoundError, match="lost/s1"):
        stores().open(path).choose(64)
    (path / ".zattrs").write_text("{")
    with pytest.raises(ValueError, match=r"lost/.zattrs is not JSON"):
        stores().open(path)
    array = zarr.create_array(tmp_path / "flat", data=np.zeros((4, 4), np.uint8), zarr_format=2)
    array.attrs["resolution"] = [1, 1, 1]
    with pytest.raises(ValueError, match=r"flat must have the axes z, y, x; its shape is \(4, 4\)"):
        stores().open(tmp_path / "flat").choose(1)
    array = zarr.create_array(
        tmp_path / "rgb", data=np.zeros((3, 4, 4, 4), np.uint8), zarr_format=2
    )
    array.attrs["resolution"] = [1, 1, 1]
    with pytest.raises(ValueError, match=r"one channel and one time point; its shape is \(3, 4, 4"):
        stores().open(tmp_path / "rgb").choose(1)
    write_n5(tmp_path / "bare", np.zeros((4, 4, 4), np.uint8), {})
    with pytest.raises(ValueError, match="have no transform, pixelResolution or resolution; give"):
        stores().open(tmp_path / "bare")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "attributes.json").write_text(json.dumps({"n5": "4.0.0"}))
    with pytest.raises(ValueError, match="N5 group without multiscales and without an array s0"):
        stores().open(tmp_path / "root")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": [{"name": n} for n in "cyx"]}, "must have the axes z, y and x; it has"),
        ({"datasets": []}, "name no array"),
        ({"datasets": [{"path": "s0"}]}, "KeyError: 'coordinateTransformations'"),
    ],
)
def test_broken_multiscales(tmp_path, change, message):
    path = Pyramid(brightness).ome(tmp_path / "broken")
    attributes = json.loads((path / ".zattrs").read_text())
    attributes["multiscales"][0].update(change)
    (path / ".zattrs").write_text(json.dumps(attributes))
    with pytest.raises(ValueError, match=f"broken.*{message}"):
        stores().open(path)


def test_a_damaged_chunk_names_its_file(tmp_path):
    path = Pyramid(brightness, depth=1).ome(tmp_path / "image")
    (path / "s0" / "1.1.1").write_bytes(b"garbage")
    level = stores().open(path).choose(32)
    level.read([slice(0, 8)] * 3)
    with pytest.raises(ValueError, match=r"image/s0.*1\.1\.1"):
        level.read([slice(8, 16)] * 3)


def chunks(requests):
    return sorted(r.rpartition("/")[2] for r in requests if r.rpartition("/")[2][:1].isdigit())


def test_http_reads_the_chunks_of_the_crop_only(tmp_path, server):
    Pyramid(brightness, CORNER).ome(tmp_path / "image")
    level = stores().open(f"{server.url}/image").choose(32)
    server.requests.clear()
    grid = Grid(tuple(np.array(CORNER) + 8 * 32), 32.0, (8, 8, 8))
    expected = paint(brightness, grid.corner, (32.0,) * 3, grid.shape)
    np.testing.assert_allclose(read_mean(level, grid), expected)
    assert chunks(server.requests) == ["1.1.1"]
    server.requests.clear()
    # Voxels 1 to 8.5, 1 to 7 and 1 to 16 of chunks of 8.
    read_mean(level, Grid(tuple(np.array(CORNER) + 32), 48.0, (5, 4, 10)))
    assert chunks(server.requests) == ["0.0.0", "0.0.1", "1.0.0", "1.0.1"]
    server.requests.clear()
    level = stores().open(f"{server.url}/image").choose(32)
    server.requests.clear()
    # Voxels 3.25 to 7.75: the middle third needs three of them, the last but two.
    read_mean(level, Grid(tuple(np.array(CORNER) + 3.25 * 32), 48.0, (3, 3, 3)))
    assert chunks(server.requests) == ["0.0.0"]


def test_http_404_is_said_at_once(tmp_path, server):
    with pytest.raises(FileNotFoundError, match=f"{server.url}/nothing has no array"):
        stores().open(f"{server.url}/nothing")
    assert len(server.requests) == len(set(server.requests)) == 5
    Pyramid(brightness).ome(tmp_path / "image")
    shutil.rmtree(tmp_path / "image" / "s0")
    with pytest.raises(FileNotFoundError, match=f"{server.url}/image/s0"):
        stores().open(f"{server.url}/image").choose(32)


@pytest.mark.parametrize("how", ["503", "cut"])
def test_http_is_tried_again_and_then_given_up(tmp_path, server, how):
    Pyramid(brightness).ome(tmp_path / "image")
    url = f"{server.url}/image"
    server.fail(2, how)
    level = stores(retries=3).open(url).choose(32)
    server.fail(2, how, "0.0.0")
    expected = paint(brightness, (0, 0, 0), (32.0,) * 3, (4, 4, 4))
    np.testing.assert_allclose(read_mean(level, Grid((0, 0, 0), 32.0, (4, 4, 4))), expected)
    server.fail(10**6, how, "1.1.1")
    server.requests.clear()
    with pytest.raises(OSError, match=rf"{url}/s0.*1\.1\.1.*3 retry attempts failed"):
        level.read([slice(8, 10)] * 3)
    assert len(server.requests) == 4
    with pytest.raises(OSError, match=f"{server.url}/other"):
        server.fail(10**6, how)
        stores(retries=1).open(f"{server.url}/other")


def test_a_refusal_may_stand_for_what_is_not_there(tmp_path, server):
    """S3 answers 403 for a missing key where listing is not allowed."""
    Pyramid(brightness).ome(tmp_path / "image")
    server.fail(10**6, "403", "zarr.json")
    assert stores().open(f"{server.url}/image").choose(32).shape == (32, 32, 32)
    server.fail(10**6, "403")
    with pytest.raises(PermissionError, match=f"{server.url}/image/.*Forbidden"):
        stores().open(f"{server.url}/image")


def test_no_connection_is_an_oserror():
    with pytest.raises(OSError, match=r"http://127.0.0.1:9/image.*Could not connect"):
        stores(retries=1).open("http://user:secret@127.0.0.1:9/image?token=secret")
    try:
        stores(retries=0).open("http://user:secret@127.0.0.1:9/image?token=secret")
    except OSError as error:
        assert "secret" not in str(error)


def test_s3_without_credentials(tmp_path, server, monkeypatch):
    """Path-style requests of TensorStore's own S3 client, at an endpoint of ours."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    Pyramid(brightness, CORNER).ome(tmp_path / "bucket-of-ours" / "deep" / "image", 3)
    level = stores().open("s3://bucket-of-ours/deep/image").choose(64)
    assert level.url == "s3://bucket-of-ours/deep/image/s1"
    expected = paint(brightness, CORNER, (64.0,) * 3, (4, 4, 4))
    np.testing.assert_allclose(read_mean(level, Grid(CORNER, 64.0, (4, 4, 4))), expected)
    assert all(request.startswith("/bucket-of-ours/deep/image/") for request in server.requests)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_threads": 0}, "num_threads must be >= 1; got 0"),
        ({"retries": -1}, "retries must be >= 0"),
        (
            {"s3_credentials": "mine"},
            "s3_credentials must be auto, default or anonymous; got 'mine'",
        ),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Stores(**options)
