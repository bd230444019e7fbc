"""``fastembed panoptic``: COCO's folders in, a cache of unit vectors out."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyEngine
from PIL import Image

from fastembed import (
    CocoPanoptic,
    ImageTsv,
    NpyPerPart,
    NpzPerSample,
    SegmentCrops,
    SegmentTsv,
    cli,
    extract,
    load_engine,
)
from fastembed.datasets import PanopticFeatures
from fastembed.engines import Resize
from fastembed.signature import SignatureMismatch
from fastembed.testing import colours_of, scene

PERSON, CAR, SKY = 1, 3, 187
CATEGORIES = [
    {"id": SKY, "name": "sky-other-merged", "isthing": 0},
    {"id": PERSON, "name": "person", "isthing": 1},
    {"id": CAR, "name": "car", "isthing": 1},
]
LABELS = {PERSON: 0, CAR: 1, SKY: 2}
FORMS = {"npy": (NpyPerPart, SegmentTsv), "npz": (NpzPerSample, ImageTsv)}


class RgbEngine(TinyEngine):
    """A tiny engine that is fed as SigLIP is, and remembers what it was fed."""

    def __init__(self, batch_size: int = 8, size: int = 32, resize=None, wait: float = 0) -> None:
        super().__init__(batch_size, size, channels=3)
        self.contract = dataclasses.replace(
            self.contract, mean=(0.5,) * 3, std=(0.5,) * 3,
            resize=resize or Resize("pillow-bicubic"),
        )  # fmt: skip
        self.fed: list[torch.Tensor] = []
        self.wait = wait

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        time.sleep(self.wait)
        self.fed.append(batch.clone())
        return super().__call__(batch)


class Coco:
    """A data set in COCO's folders, under `split`."""

    def __init__(self, folder: Path, split: str = "val2017") -> None:
        self.folder, self.split = folder, split
        self.images: list[dict] = []
        self.annotations: list[dict] = []
        for name in (split, f"annotations/panoptic_{split}"):
            (folder / name).mkdir(parents=True)

    def add(self, number: int, segments: int = 4, size: tuple[int, int] = (60, 80), **change):
        """A photo of a few segments; `change` are other parts of it than the right ones."""
        rgb, ids = scene(*size, segments, seed=number)
        name = change.get("file_name", f"{number:012d}.jpg")
        photo = change.get("photo", rgb)
        if isinstance(photo, np.ndarray):
            stream = io.BytesIO()
            Image.fromarray(photo).save(stream, "JPEG", quality=95)
            photo = stream.getvalue()
        png = change.get("map", ids)
        if isinstance(png, np.ndarray):
            stream = io.BytesIO()
            Image.fromarray(colours_of(png)).save(stream, "PNG")
            png = stream.getvalue()
        for place, content in (
            (self.folder / self.split / Path(name).name, photo),
            (self.maps / f"{number:012d}.png", png),
        ):
            if content is not None:
                place.write_bytes(content)
        values, areas = np.unique(ids, return_counts=True)
        listed = [
            {"id": int(v), "category_id": [PERSON, CAR, SKY][i % 3], "iscrowd": 0, "area": int(a)}
            for i, (v, a) in enumerate(zip(values, areas, strict=True))
        ]
        self.images.append({"id": number, "file_name": name})
        self.annotations.append(
            {
                "image_id": change.get("image_id", number),
                "file_name": change.get("map_name", f"{number:012d}.png"),
                "segments_info": change.get("listed", lambda rows: rows)(listed),
            }
        )
        self.save()
        return self

    def save(self) -> None:
        listing = {
            "images": self.images, "annotations": self.annotations, "categories": CATEGORIES,
        }  # fmt: skip
        path = self.folder / "annotations" / f"panoptic_{self.split}.json"
        path.write_text(json.dumps(listing))

    def fill(self, count: int) -> Coco:
        for i in range(count):
            self.add(i + 1, 3 + i % 4, (40 + i, 50 + 3 * i % 20))
        return self

    @property
    def maps(self) -> Path:
        return self.folder / "annotations" / f"panoptic_{self.split}"

    def source(self, **options) -> CocoPanoptic:
        return CocoPanoptic(self.folder, self.split, **options)

    def run(self, out: Path, form: str = "npy", engine=None, recipe=None, chosen=None, **options):
        sink, index = FORMS[form]
        return extract(
            self.source(**(chosen or {})), recipe or SegmentCrops(), engine or RgbEngine(),
            sink(out), index(out), **options,
        )  # fmt: skip


@pytest.fixture
def coco(tmp_path) -> Coco:
    return Coco(tmp_path / "coco")


def outputs(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix in (".npy", ".npz", ".tsv") and not path.name.startswith(".")
    }


def failures(folder: Path) -> list[dict]:
    path = folder / "failures.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rows_of(folder: Path, name: str = "inst2feat.tsv") -> list[dict]:
    with (folder / name).open(newline="") as stream:
        return list(csv.DictReader(stream, dialect="excel-tab"))


def seeds_crop(image: Image.Image, png: Path, segment: int, alpha=0.3, ratio=0.1) -> Image.Image:
    """The seed's way, in its own few lines: everything on the whole image, in floats."""
    rgb = np.asarray(image.convert("RGB")).astype(np.float64) / 255
    colour = np.asarray(Image.open(png).convert("RGB")).astype(np.int64)
    mask = colour[..., 0] + 256 * colour[..., 1] + 65536 * colour[..., 2] == segment
    weight = np.where(mask, 1.0, float(np.float32(alpha)))[..., None]
    blended = rgb * weight + (1 - weight) * 0.5
    y, x = np.nonzero(mask)
    pad_y = int(ratio * (y.max() - y.min() + 1))
    pad_x = int(ratio * (x.max() - x.min() + 1))
    blended = blended[
        max(0, y.min() - pad_y) : y.max() + 1 + pad_y, max(0, x.min() - pad_x) : x.max() + 1 + pad_x
    ]
    return Image.fromarray((blended * 255).astype(np.uint8))


def squashed(crop: Image.Image, size: int) -> torch.Tensor:
    levels = np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC)).astype(np.float32)
    return torch.from_numpy((levels / np.float32(255) - 0.5) / 0.5).permute(2, 0, 1)


def test_real_photo_through_siglip_follows_pillow_and_open_clip(real_data, tmp_path):
    """Crops bit for bit; embeddings of the same seeded weights, loaded by both from a file."""
    open_clip = pytest.importorskip("open_clip")
    from open_clip.transform import image_transform
    from safetensors.torch import save_file

    logging.disable(logging.WARNING)
    config = open_clip.get_model_config("ViT-B-16-SigLIP")
    visual = open_clip.model._build_vision_tower(config["embed_dim"], config["vision_cfg"])
    logging.disable(logging.NOTSET)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in visual.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.05, generator=generator)
    visual.eval()
    weights = tmp_path / "visual.safetensors"
    save_file({f"visual.{k}": v.contiguous() for k, v in visual.state_dict().items()}, weights)
    engine = load_engine(
        "openclip:timm/ViT-B-16-SigLIP", weights=weights, output="pooled", precision="fp32",
        device="cpu", batch_size=6,
    )  # fmt: skip
    fed = []
    compute, engine.run = engine.run, lambda batch: (fed.append(batch.clone()), compute(batch))[1]
    source = CocoPanoptic(real_data / "coco_panoptic", "val2017", include_crowd=True)
    report = extract(
        source, SegmentCrops(), engine, NpyPerPart(tmp_path), SegmentTsv(tmp_path), workers=1
    )
    assert (report.embedded, report.vectors, report.failed) == (1, 18, 0)

    preprocess = image_transform(
        224, is_train=False, mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode="squash",
        interpolation="bicubic",
    )  # fmt: skip
    image = Image.open(real_data / "coco_panoptic" / "val2017" / "000000142238.jpg")
    png = real_data / "coco_panoptic" / "panoptic_val2017" / "000000142238.png"
    features = PanopticFeatures(tmp_path)
    ids = sorted(segment for _, segment in features)
    crops = [seeds_crop(image, png, segment) for segment in ids]
    assert torch.equal(torch.cat(fed), torch.stack([squashed(crop, 224) for crop in crops]))
    with torch.inference_mode():
        expected = visual(torch.stack([preprocess(crop) for crop in crops])).double()
        expected = expected / expected.norm(dim=1, keepdim=True)
    assert (expected @ expected.T).min() < 0.99  # the weights tell crops apart
    for segment, vector in zip(ids, expected, strict=True):
        ours = features["000000142238", segment]
        assert ours.dtype == torch.float16 and ours.shape == (768,)
        assert torch.cosine_similarity(ours.double(), vector, dim=0) >= 0.99999
        assert (ours.double() - vector).abs().max() < 2e-4  # rounded once, to float16


@pytest.mark.parametrize("batch_size,workers", [(1, 1), (5, 3), (64, 2)])
def test_every_segment_is_the_crop_of_the_seed(coco, tmp_path, batch_size, workers):
    coco.fill(7)
    engine = RgbEngine(batch_size)
    report = coco.run(tmp_path / "out", engine=engine, workers=workers)
    rows = rows_of(tmp_path / "out")
    assert (report.embedded, report.vectors, report.failed) == (7, len(rows), 0)
    assert len(rows) == sum(len(row["segments_info"]) for row in coco.annotations)
    fed = {batch.numpy().tobytes() for batch in torch.cat(engine.fed)}
    for row in rows:
        image_id, segment = row["image_id"], int(row["segment_id"])
        assert row["feat_file"] == f"{image_id}_{segment}.npy" and len(image_id) == 12
        image = Image.open(coco.folder / "val2017" / f"{image_id}.jpg")
        crop = squashed(seeds_crop(image, coco.maps / f"{image_id}.png", segment), 32)
        assert crop.numpy().tobytes() in fed
        vector = crop.double().reshape(3, 4, 8, 4, 8).mean(dim=(2, 4)).flatten()
        stored = np.load(tmp_path / "out" / row["feat_file"])
        assert stored.dtype == np.float16 and stored.shape == (48,)
        np.testing.assert_allclose(stored, vector / vector.norm(), atol=2e-3 / 4)


def test_models_that_cut_the_centre_get_what_their_own_transform_gives(coco, tmp_path):
    from torchvision.transforms import CenterCrop
    from torchvision.transforms import Resize as ResizeShorter

    coco.add(1)
    engine = RgbEngine(resize=Resize("pillow-bicubic", shorter=40))
    coco.run(tmp_path / "out", engine=engine, workers=1)
    image = Image.open(coco.folder / "val2017" / "000000000001.jpg")
    transform = [ResizeShorter(40, Image.Resampling.BICUBIC), CenterCrop(32)]
    for fed, row in zip(
        torch.cat(engine.fed),
        sorted(coco.annotations[0]["segments_info"], key=lambda row: row["id"]),
        strict=True,
    ):
        crop = seeds_crop(image, coco.maps / "000000000001.png", row["id"])
        for step in transform:
            crop = step(crop)
        assert torch.equal(fed, squashed(crop, 32))


def test_npz_holds_what_npy_holds(coco, tmp_path):
    coco.fill(5)
    coco.run(tmp_path / "npy")
    coco.run(tmp_path / "npz", "npz")
    one, other = PanopticFeatures(tmp_path / "npy"), PanopticFeatures(tmp_path / "npz")
    assert set(one) == set(other) and len(one) == len(other) > 5
    assert all(torch.equal(one[key], other[key]) for key in one)
    for row in rows_of(tmp_path / "npz", "image_index.tsv"):
        with np.load(tmp_path / "npz" / row["feat_file"]) as arrays:
            assert arrays["segment_ids"].dtype == arrays["labels"].dtype == np.int32
            assert arrays["embeddings"].dtype == np.float16
            assert len(arrays["segment_ids"]) == int(row["num_segments"])
            [annotation] = [a for a in coco.annotations if a["image_id"] == int(row["image_id"])]
            category = {s["id"]: s["category_id"] for s in annotation["segments_info"]}
            labels = [LABELS[category[i]] for i in arrays["segment_ids"].tolist()]
            assert arrays["labels"].tolist() == labels


def test_nearest_is_the_exact_order(coco, tmp_path):
    coco.fill(5)
    coco.run(tmp_path / "out", "npz")
    features = PanopticFeatures(tmp_path / "out")
    keys = list(features)
    vectors = np.stack([features[key].numpy() for key in keys]).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for own in (0, 7):
        cosines = vectors @ vectors[own]
        order = [i for i in np.argsort(-cosines) if i != own]
        found = features.nearest(*keys[own], k=4)
        assert [key for key, _ in found] == [keys[i] for i in order[:4]]
        np.testing.assert_allclose([c for _, c in found], cosines[order[:4]], atol=1e-5)
    assert len(features.nearest(*keys[0], k=1000)) == len(keys) - 1
    with pytest.raises(KeyError):
        features["000000000001", 5]
    with pytest.raises(ValueError, match="at least 1"):
        features.nearest(*keys[0], k=0)
    with pytest.raises(FileNotFoundError, match="inst2feat"):
        PanopticFeatures(tmp_path)


def test_which_segments_are_taken(coco, tmp_path):
    def listed(rows):
        rows[0]["iscrowd"] = 1
        rows[1]["category_id"] = 999  # no category of the list
        del rows[2]  # pixels whose id is not listed
        return rows

    coco.add(1, 6, listed=listed)
    segments = coco.annotations[0]["segments_info"]
    ids = [row["id"] for row in segments]

    def taken(**options):
        return {part for item in coco.source(**options).items() for part in item.parts}

    assert taken() == {*ids[2:]}
    assert taken(include_crowd=True) == {ids[0], *ids[2:]}
    area = segments[3]["area"]
    assert taken(min_area=area) == {row["id"] for row in segments[2:] if row["area"] >= area}
    assert taken(classes=["car", SKY]) == {
        row["id"] for row in segments[2:] if row["category_id"] in (CAR, SKY)
    }
    assert taken(classes=["187"]) == taken(classes=["sky-other-merged"])
    with pytest.raises(ValueError, match=r"got \['cat'\]; it has 187 sky-other-merged"):
        coco.source(classes=["cat"])
    coco.run(tmp_path / "out")
    assert {int(row["segment_id"]) for row in rows_of(tmp_path / "out")} == {*ids[2:]}


def test_numbers_of_images(coco):
    coco.add(1, file_name="COCO_val2014_000000000001.jpg")
    coco.add(2, file_name="000000000002.jpg")
    coco.add(3, file_name="sub/0003.jpg")
    coco.add(4, file_name="no_number.jpg")
    coco.add(5, file_name="03_copy.jpg")
    names = [(item.name, bool(item.defect)) for item in coco.source().items()]
    assert names == [
        ("2014", False), ("000000000002", False), ("3", False), ("annotation_3", True),
        ("annotation_4", True),
    ]  # fmt: skip


def test_a_cache_grows_by_classes_and_splits(coco, tmp_path):
    """npy: each segment is done by itself. npz: which segments were taken is a setting."""
    coco.fill(6)
    out = tmp_path / "out"
    first = coco.run(out, chosen={"classes": ["person"]})
    engine = RgbEngine()
    second = coco.run(out, engine=engine)
    assert sum(len(batch) for batch in engine.fed) == second.vectors  # none of them twice
    coco.run(tmp_path / "whole")
    assert first.vectors + second.vectors == len(rows_of(out))
    assert outputs(out) == outputs(tmp_path / "whole")

    coco.run(tmp_path / "npz", "npz", chosen={"classes": ["person"]})
    with pytest.raises(SignatureMismatch, match=r"selection.classes: \[1\] there, None now"):
        coco.run(tmp_path / "npz", "npz")


@pytest.mark.parametrize("form", FORMS)
def test_resume_and_shards_give_the_bytes_of_one_run(coco, tmp_path, form):
    coco.fill(12)
    coco.run(tmp_path / "one", form)
    for i in (2, 0, 1):
        coco.run(tmp_path / "three", form, shard=(i, 3))
    assert outputs(tmp_path / "three") == outputs(tmp_path / "one")

    index = tmp_path / "three" / FORMS[form][1].file_name
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join(lines[:5]) + lines[5][:7])  # a torn row, in the middle of a photo
    lost = tmp_path / "three" / next(part for part in lines[1].split() if ".np" in part)
    lost.unlink()  # a row without its file
    engine = RgbEngine()
    coco.run(tmp_path / "three", form, engine)
    assert outputs(tmp_path / "three") == outputs(tmp_path / "one")
    calls = engine.calls
    again = coco.run(tmp_path / "three", form, engine)
    assert (again.embedded, again.already_done, engine.calls) == (0, 12, calls)


def test_an_index_never_holds_a_path_twice(coco, tmp_path):
    coco.fill(2)
    items = list(coco.source().items())
    for index in (SegmentTsv(tmp_path), ImageTsv(tmp_path)):
        index.open()
        index.commit(items)
        index.commit(items[1:])
        again = type(index)(tmp_path)
        again.open()
        again.commit(items)
        lines = index.path.read_text().splitlines()
        assert len(lines) == len(set(lines)) == 1 + (7 if type(index) is SegmentTsv else 2)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from fastembed import cli, engines
from test_panoptic_job import RgbEngine
engines.load_engine = lambda *a, **k: RgbEngine(wait=0.1)
sys.exit(cli.main(sys.argv[1:]))
"""


def test_kill_minus_nine_and_again(coco, tmp_path, monkeypatch):
    coco.fill(40)
    out = tmp_path / "killed"
    command = ["panoptic", "--data_path", str(coco.folder), "--split", "val2017", "--cache_dir"]
    script = KILLED.format(tests=str(Path(__file__).parent))
    # Once amid the first files, none of which has a row; once after the first rows.
    for moment in (lambda: len(list(out.glob("*_*.npy"))) > 10, lambda: len(rows_of(out)) > 10):
        process = subprocess.Popen(
            [sys.executable, "-c", script, *command, str(out)], stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while not ((out / "inst2feat.tsv").exists() and moment()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert 10 < len(rows_of(out)) < 180
    monkeypatch.setattr("fastembed.engines.load_engine", lambda *a, **k: RgbEngine())
    assert cli.main([*command, str(out)]) == 0
    assert cli.main([*command, str(tmp_path / "whole")]) == 0
    assert outputs(out) == outputs(tmp_path / "whole")
    assert len(rows_of(out)) == len({row["feat_file"] for row in rows_of(out)}) == 180
    assert not list(out.glob(".*.npy.*"))


def jpeg(image: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95, **options)
    return stream.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    return jpeg(Image.fromarray(scene(60, 80, 4, seed=9)[0]), exif=exif)


PHOTOS = {
    "grey": jpeg(Image.fromarray(scene(60, 80, 4, seed=9)[0]).convert("L")),
    "CMYK": jpeg(Image.fromarray(scene(60, 80, 4, seed=9)[0]).convert("CMYK")),
    "rotated": rotated(),
    "progressive": jpeg(Image.fromarray(scene(60, 80, 4, seed=9)[0]), progressive=True),
}


@pytest.mark.parametrize("kind", PHOTOS)
def test_odd_photos_are_read_as_pillow_reads_them(coco, tmp_path, kind):
    coco.add(9, photo=PHOTOS[kind])
    engine = RgbEngine()
    assert coco.run(tmp_path / "out", engine=engine).failed == 0
    image = Image.open(io.BytesIO(PHOTOS[kind]))
    assert image.size == (80, 60)
    ids = sorted(row["id"] for row in coco.annotations[0]["segments_info"])
    for fed, segment in zip(torch.cat(engine.fed), ids, strict=True):
        crop = seeds_crop(image, coco.maps / "000000000009.png", segment)
        assert torch.equal(fed, squashed(crop, 32))


def test_a_map_of_another_size_is_resized_nearest(coco, tmp_path):
    from torchvision.transforms.v2 import InterpolationMode, functional

    _, ids = scene(60, 80, 4, seed=1)
    coco.add(1, map=ids[::2, 3:50])
    source = coco.source()
    photo = source.read(next(source.items()))
    small = torch.from_numpy(np.ascontiguousarray(ids[::2, 3:50]))[None]
    theirs = functional.resize(small, [60, 80], InterpolationMode.NEAREST)[0]
    np.testing.assert_array_equal(photo.ids, theirs)
    for segment, (y0, x0, y1, x1) in zip(photo.segments.ids, photo.segments.boxes, strict=True):
        y, x = np.nonzero(photo.ids == segment)
        assert (y0, x0, y1, x1) == (y.min(), x.min(), y.max(), x.max())


def encoded(image: Image.Image, form: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


GREY16 = encoded(Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80)), "PNG")
_SIZE = bytes([0xFF, 0xC0, 0, 11, 8])  # of a grey JPEG's frame; height and width follow
HUGE = PHOTOS["grey"].replace(_SIZE + bytes([0, 60, 0, 80]), _SIZE + b"\xff" * 4)
COLOURS = Image.fromarray(colours_of(scene(60, 80, 4, seed=9)[1]))
BAD = {
    "no photo": ({"photo": None}, "No such file"),
    "no map": ({"map": None}, "000000000009.png: No such file"),
    "truncated photo": ({"photo": PHOTOS["grey"][:900]}, "truncated"),
    "no image": ({"photo": b"<html>not found</html>"}, "cannot identify image file"),
    "empty photo": ({"photo": b""}, "cannot identify image file"),
    "65535 x 65535": ({"photo": HUGE}, "not a readable photo: Image size"),
    "16-bit photo": ({"photo": GREY16}, "found PNG of mode I;16"),
    "16-bit map": ({"map": GREY16}, "000000000009.png: png must be 8-bit RGB"),
    "palette map": ({"map": encoded(COLOURS.quantize(4), "PNG")}, "got 2-bit palette"),
    "truncated map": ({"map": encoded(COLOURS, "PNG")[:-30]}, "png ends at byte"),
    "photo outside": ({"file_name": "../val2017/000000000009.jpg"}, "leaves its folder"),
    "absolute photo": ({"file_name": "/etc/hostname1.jpg"}, "leaves its folder"),
    "map outside": ({"map_name": "../../secret.png"}, "leaves its folder"),
    "other ids": ({"map": np.full((60, 80), 77, np.int32)}, "none of the listed segments"),
    "an id too large": (
        {"listed": lambda rows: [{**rows[0], "id": 2**24}]},
        "segment ids must be in 1..16777215",
    ),
    "no image of that id": ({"image_id": 77}, "image_id 77 is not among the images"),
    "no list": ({"listed": lambda rows: None}, "TypeError"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_photo_is_recorded_and_the_others_are_done(coco, tmp_path, kind):
    change, reason = BAD[kind]
    coco.add(1).add(9, **change).add(2)
    report = coco.run(tmp_path / "out")
    assert (report.embedded, report.failed) == (2, 1)
    [record] = failures(tmp_path / "out")
    assert reason in record["reason"], record
    assert {row["image_id"] for row in rows_of(tmp_path / "out")} == {
        "000000000001", "000000000002",
    }  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_listed_segment_without_a_pixel_is_recorded(coco, tmp_path, form):
    """The other segments of its photo are kept, and none is made again."""
    coco.add(1, listed=lambda rows: [*rows, {**rows[0], "id": 4711}]).add(2)
    report = coco.run(tmp_path / "out", form)
    assert (report.embedded, report.failed, report.vectors) == (1, 1, 8)
    [record] = failures(tmp_path / "out")
    assert record["reason"] == "listed, but not in the file: [4711]"
    assert len(PanopticFeatures(tmp_path / "out")) == 8
    engine = RgbEngine()
    coco.run(tmp_path / "out", form, engine)
    assert engine.calls == 0


@pytest.fixture
def tiny_models(monkeypatch):
    calls = []

    def load(spec, **options):
        calls.append((spec, options))
        return RgbEngine(options["batch_size"] or 8)

    monkeypatch.setattr("fastembed.engines.load_engine", load)
    return calls


def test_command_line(coco, tmp_path, tiny_models, capsys):
    coco.fill(3)
    out = tmp_path / "out"
    seed = [
        "panoptic", "--data_path", str(coco.folder), "--split", "val2017", "--cache_dir", str(out),
        "--embedder_spec", "openclip:timm/ViT-B-16-SigLIP", "--batch_size", "5", "--num_workers",
        "0", "--device", "cpu", "--bg_alpha", "0.3", "--pad_ratio", "0.1",
    ]  # fmt: skip
    report = tmp_path / "report.json"
    assert cli.main([*seed, "--report", str(report)]) == 0
    assert "3 embedded (12 vectors), 0 already done, 0 failed" in capsys.readouterr().out
    assert json.loads(report.read_text())["vectors"] == 12
    spec, options = tiny_models[0]
    assert spec == "openclip:timm/ViT-B-16-SigLIP"
    assert (options["output"], options["batch_size"], options["device"]) == ("pooled", 5, "cpu")
    hyphens = [part.replace("_", "-") if part.startswith("--") else part for part in seed]
    assert cli.main(hyphens) == 0
    assert "0 embedded, 3 already done" in capsys.readouterr().out
    assert cli.main([*seed, "--bg-alpha", "0.5"]) == 1
    error = capsys.readouterr().err
    assert "recipe.bg_alpha: 0.3 there, 0.5 now" in error and "--overwrite" in error
    assert cli.main([*seed, "--format", "npz"]) == 1
    assert "output.form: 'npy' there, 'npz' now" in capsys.readouterr().err
    (out / "notes.npy").write_bytes(b"mine")
    assert cli.main([*seed, "--bg-alpha", "0.5", "--overwrite"]) == 0
    assert (out / "notes.npy").read_bytes() == b"mine" and len(rows_of(out)) == 12
    assert cli.main([*seed, "--format", "npz", "--overwrite"]) == 0
    assert set(outputs(out)) == {
        "notes.npy", "image_index.tsv", "checksums.tsv", *(f"{i:012d}.npz" for i in (1, 2, 3)),
    }  # fmt: skip
    assert len(PanopticFeatures(out)) == 12


def test_exit_status_of_failures(coco, tmp_path, tiny_models, capsys):
    coco.add(1).add(2, photo=b"").add(3)
    command = ["panoptic", "--data_path", str(coco.folder), "--split", "val2017", "--cache_dir"]
    assert cli.main([*command, str(tmp_path / "a")]) == 3
    assert "failures.jsonl" in capsys.readouterr().out
    [record] = failures(tmp_path / "a")
    assert record["image_id"] == "000000000002" and record["map"] == "000000000002.png"
    assert cli.main([*command, str(tmp_path / "b"), "--allow-failures"]) == 0
    assert cli.main([*command, str(tmp_path / "c"), "--strict"]) == 3


def test_refusals(coco, tmp_path, tiny_models, capsys):
    coco.add(1)
    base = ["panoptic", "--data_path", str(coco.folder), "--cache_dir", str(tmp_path / "out")]
    val = [*base, "--split", "val2017"]
    for arguments, status, message in [
        (base, 1, "there is neither"),
        ([*base, "--split", "../x"], 1, "split must name a folder"),
        ([*val, "--classes", "cat"], 1, "classes must be categories of the list"),
        ([*val, "--min_area", "100000"], 1, "lists no such segments"),
        ([*val, "--bg_alpha", "1.5"], 2, "bg_alpha must be in 0..1; got 1.5"),
        ([*val, "--pad_ratio", "-1"], 2, "pad_ratio must be a number >= 0"),
        ([*val, "--overwrite", "--shard", "0/2"], 2, "without --shard"),
    ]:
        assert cli.main(arguments) == status, arguments
        assert message in capsys.readouterr().err
    (coco.folder / "annotations" / "panoptic_val2017.json").write_text('{"images": []}')
    assert cli.main(val) == 1
    assert "must be a panoptic annotation" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["panoptic", "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_recipe_round_trip():
    recipe = SegmentCrops(0.25, 0.5)
    assert SegmentCrops.from_settings(json.loads(json.dumps(recipe.settings()))) == recipe
