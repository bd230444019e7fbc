"""``fastembed maps``: a folder of images in, spatial feature maps and their masks out."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import test_photo
import torch
from conftest import TinyEngine
from PIL import Image
from test_engines import lively

from fastembed import (
    ImageFolder,
    MapFiles,
    MapTsv,
    SpatialMaps,
    cli,
    extract,
    load_engine,
)
from fastembed.datasets import FeatureMaps
from fastembed.engines import Resize
from fastembed.engines.assemble import assemble
from fastembed.engines.models import zoo
from fastembed.recipes.maps import premultiplied
from fastembed.records import Item, Picture
from fastembed.signature import SignatureMismatch
from fastembed.testing import scene


class MapEngine(TinyEngine):
    """The mean levels of 8 x 8 patches, as a map; remembers what it was fed."""

    def __init__(self, batch_size=8, size=32, resize=None, wait: float = 0, outputs=("map",)):
        super().__init__(batch_size, size, channels=3)
        self.contract = dataclasses.replace(
            self.contract, resize=resize or Resize("pillow-bicubic")
        )
        self.outputs = dict.fromkeys(outputs, (3, size // 8, size // 8))
        self.spec, self.precision, self.facts = "tiny", "fp32", {"patch_size": 8}
        self.fed: list[torch.Tensor] = []
        self.wait = wait

    def settings(self) -> dict:
        return {"spec": self.spec, "output": ",".join(self.outputs)}

    def __call__(self, batch: torch.Tensor):
        time.sleep(self.wait)
        self.calls += 1
        self.fed.append(batch.clone())
        means = torch.nn.functional.avg_pool2d(batch * 255, 8)
        results = {output: means + i for i, output in enumerate(self.outputs)}
        return results if len(results) > 1 else means


def run(folder, out, engine=None, recipe=None, recursive=False, meta=None, **options):
    engine = engine or MapEngine()
    source = ImageFolder(folder, recursive=recursive)
    sink = MapFiles(out, engine.outputs, meta)
    return extract(
        source, recipe or SpatialMaps(), engine, sink, MapTsv(out, source.paths), **options
    )


def save(path: Path, seed: int = 0, size: tuple[int, int] = (40, 56), alpha=None) -> Path:
    pixels = scene(*size, 4, seed)[0]
    if alpha is not None:
        pixels = np.dstack([pixels, alpha])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def fill(folder: Path, count: int) -> Path:
    for i in range(count):
        alpha = np.zeros((40 + i, 50 + 3 * i % 20), np.uint8)
        alpha[:, i : i + 20] = 255
        save(folder / f"photo_{i:03d}.png", i, alpha.shape, alpha if i % 2 else None)
    return folder


def outputs(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.suffix in (".npy", ".tsv", ".json") and not path.name.startswith((".", "fastembed"))
    }


def failures(folder: Path) -> list[dict]:
    path = folder / "failures.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rows_of(folder: Path) -> list[dict]:
    with (folder / "maps.tsv").open(newline="") as stream:
        return list(csv.DictReader(stream, dialect="excel-tab"))


# Against the libraries' own forward -----------------------------------------------------------


def photo() -> np.ndarray:
    """A photo of COCO where there are real images, else a drawing like one: [H, W, 3]."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FASTEMBED_DATA", default)) / "coco_panoptic" / "val2017"
    for path in sorted(folder.glob("*.jpg")):
        return np.asarray(Image.open(path).convert("RGB"))
    return scene(427, 640, 12, seed=1)[0]


def in_every_format(folder: Path) -> dict[str, np.ndarray]:
    """The photo under many names; by name the 8-bit RGB, times alpha, that it stands for."""
    rgb = photo()
    height, width = rgb.shape[:2]
    grey = rgb[..., 1]
    low = np.random.default_rng(0).integers(-100, 100, rgb.shape)
    rgb16 = np.clip(rgb.astype(np.int64) * 257 + low, 0, 65535).astype(np.uint16)
    y, x = np.mgrid[:height, :width]
    alpha = np.clip(400 - np.hypot(y - height / 3, x - width / 2), 0, 255).astype(np.uint8)
    alpha16 = alpha.astype(np.uint16) * 257
    eight = test_photo.to_8_bits
    key = tuple(rgb[0, 0].tolist())

    def times(pixels: np.ndarray, opacity: np.ndarray) -> np.ndarray:
        share = opacity.astype(np.float32) / np.float32(255)
        return (pixels.astype(np.float32) * share[..., None]).astype(np.uint8)

    image, rgba = Image.fromarray(rgb), np.dstack([rgb, alpha])
    palette, cmyk = image.quantize(64), image.convert("CMYK")
    colours = np.asarray(palette.convert("RGB"))
    encoded, png16, tiff = test_photo.encoded, test_photo.png16, test_photo.tiff
    three = test_photo.grey
    files = {
        "rgb.png": (encoded(image, "PNG"), rgb),
        "rgba.png": (encoded(Image.fromarray(rgba), "PNG"), times(rgb, alpha)),
        "grey.png": (encoded(Image.fromarray(grey), "PNG"), three(grey)),
        "la.png": (
            encoded(Image.fromarray(np.dstack([grey, alpha]), "LA"), "PNG"),
            times(three(grey), alpha),
        ),
        "palette.png": (encoded(palette, "PNG"), colours),
        "palette_seen.png": (
            encoded(palette, "PNG", transparency=7),
            times(colours, (np.asarray(palette) != 7) * np.uint8(255)),
        ),
        "key.png": (
            encoded(image, "PNG", transparency=key),
            times(rgb, (rgb != rgb[0, 0]).any(axis=2) * np.uint8(255)),
        ),
        "binary.png": (
            encoded(Image.fromarray(grey > 99), "PNG"), three((grey > 99) * np.uint8(255)),
        ),
        "grey16.png": (png16(rgb16[..., :1]), three(eight(rgb16[..., 0]))),
        "rgb16.png": (png16(rgb16), eight(rgb16)),
        "rgba16.png": (png16(np.dstack([rgb16, alpha16])), times(eight(rgb16), alpha)),
        "la16.png": (
            png16(np.dstack([rgb16[..., 0], alpha16])), times(three(eight(rgb16[..., 0])), alpha),
        ),
        "photo.JPG": (encoded(image, "JPEG", quality=95), None),
        "grey.jpeg": (encoded(Image.fromarray(grey), "JPEG"), None),
        "cmyk.jpg": (encoded(cmyk, "JPEG"), None),
        "lossy.webp": (encoded(image, "WEBP"), None),
        "rgba.webp": (
            encoded(Image.fromarray(rgba), "WEBP", lossless=True, exact=True), times(rgb, alpha),
        ),
        "rgb.bmp": (encoded(image, "BMP"), rgb),
        "rgb.tif": (encoded(image, "TIFF"), rgb),
        "rgba.tiff": (encoded(Image.fromarray(rgba), "TIFF"), times(rgb, alpha)),
        "cmyk.tif": (encoded(cmyk, "TIFF"), np.asarray(cmyk.convert("RGB"))),
        "grey16.tif": (tiff(rgb16[..., 0]), three(eight(rgb16[..., 0]))),
        "rgb16.TIF": (tiff(rgb16, photometric="rgb", compression="lzw"), eight(rgb16)),
        "rgba16.tif": (
            tiff(np.dstack([rgb16, alpha16]), photometric="rgb", extrasamples=["unassalpha"]),
            times(eight(rgb16), alpha),
        ),
    }  # fmt: skip
    expected = {}
    folder.mkdir(exist_ok=True)
    for i, (name, (content, pixels)) in enumerate(files.items()):
        if pixels is None:
            pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        stem = f"{i:02d}_{name}"
        (folder / stem).write_bytes(content)
        expected[Path(stem).stem] = pixels
    assert len(expected) == 24
    return expected


TINY = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
DINO = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
SQUARE = {"height": 64, "width": 64}
TRANSFORMERS = {
    "dinov2": ("Dinov2", {**TINY, "patch_size": 14, "image_size": 70}, "BitImageProcessor", DINO),
    "dinov2_with_registers": (
        "Dinov2WithRegisters", {**TINY, "patch_size": 14, "image_size": 70}, "BitImageProcessor",
        DINO,
    ),
    "dinov3": (
        "DINOv3ViT", {**TINY, "intermediate_size": 128, "patch_size": 16, "num_register_tokens": 4},
        "DINOv3ViTImageProcessor", {"size": SQUARE},
    ),
    "clip": (
        "CLIPVision",
        {**TINY, "intermediate_size": 128, "patch_size": 16, "image_size": 64,
         "projection_dim": 32},
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 64}, "crop_size": SQUARE},
    ),
}  # fmt: skip


def check_maps(out: Path, expected: dict[str, torch.Tensor], dim: int) -> None:
    features = FeatureMaps(out)
    assert set(features) == set(expected)
    stack = torch.stack(list(expected.values()))
    patches = stack[0].flatten(1).T.double()
    patches = patches / patches.norm(dim=1, keepdim=True)
    assert (patches @ patches.T).min() < 0.99  # the weights tell patches apart
    for name, theirs in expected.items():
        ours = features[name].map
        assert ours.dtype == torch.float32 and ours.shape == theirs.shape and len(ours) == dim
        cosine = torch.cosine_similarity(ours.double(), theirs.double(), dim=0)
        assert cosine.min() >= 0.99999, name
        assert (ours - theirs).abs().max() <= 2e-4 * theirs.abs().max(), name


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_maps_follow_transformers_in_every_format(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    name, config, processor, sizes = TRANSFORMERS[kind]
    suffix = "ModelWithProjection" if kind == "clip" else "Model"
    config = getattr(transformers, f"{name}Config")(**config)
    model = lively(getattr(transformers, f"{name}{suffix}")(config), seed=5)
    processor = getattr(transformers, processor)(**sizes)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    pictures = in_every_format(tmp_path / "in")
    engine = load_engine(
        f"transformers:{tmp_path / 'model'}", output="map", precision="fp32", device="cpu",
        batch_size=8,
    )  # fmt: skip
    # DINOv3's own preprocessing squashes; the others' cut the centre.
    recipe = SpatialMaps("squash" if kind == "dinov3" else "center-crop")
    report = run(tmp_path / "in", tmp_path / "out", engine, recipe)
    assert (report.embedded, report.failed) == (len(pictures), 0), failures(tmp_path / "out")

    images = [Image.fromarray(pixels) for pixels in pictures.values()]
    x = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in images])
    prefix = 1 + {"dinov2_with_registers": 4, "dinov3": 4}.get(kind, 0)
    with torch.inference_mode():
        tokens = model(pixel_values=x).last_hidden_state[:, prefix:]
    maps = tokens.transpose(1, 2).unflatten(2, (4, 4))
    check_maps(tmp_path / "out", dict(zip(pictures, maps, strict=True)), 64)


def test_maps_follow_open_clip_in_every_format(tmp_path, monkeypatch):
    """The residual stream before ln_post; inner blocks; and normed, projected, of unit length."""
    open_clip = pytest.importorskip("open_clip")
    from safetensors.torch import save_file

    config = json.loads(json.dumps(open_clip.get_model_config("ViT-B-32-quickgelu")))
    config["vision_cfg"] |= {"layers": 3, "width": 128, "head_width": 32}
    config["text_cfg"] |= {"layers": 1, "width": 64, "heads": 2, "vocab_size": 50}
    for place in ("open_clip.get_model_config", "open_clip.factory.get_model_config"):
        monkeypatch.setattr(place, lambda name: json.loads(json.dumps(config)))
    logging.disable(logging.WARNING)
    model = lively(open_clip.create_model("ViT-B-32-quickgelu", pretrained=None), seed=1)
    logging.disable(logging.NOTSET)
    weights = tmp_path / "clip.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, weights)
    pictures = in_every_format(tmp_path / "in")
    fitting = {"weights": weights, "precision": "fp32", "device": "cpu", "batch_size": 8}
    engine = load_engine("openai:ViT-B/32", output=["map", "map@0", "map@-2"], **fitting)
    run(tmp_path / "in", tmp_path / "out", engine)
    unit = load_engine("openai:ViT-B/32", output="processed", **fitting)
    run(tmp_path / "in", tmp_path / "unit", unit)

    streams = []
    for block in model.visual.transformer.resblocks:
        block.register_forward_hook(lambda module, args, result: streams.append(result))
    preprocess = open_clip.image_transform(
        224, is_train=False, mean=engine.contract.mean, std=engine.contract.std
    )
    x = torch.stack([preprocess(Image.fromarray(pixels)) for pixels in pictures.values()])
    with torch.inference_mode():
        model.encode_image(x)
        first, middle, last = (s[:, 1:].transpose(1, 2).unflatten(2, (7, 7)) for s in streams)
        projected = model.visual.ln_post(streams[-1])[:, 1:] @ model.visual.proj
        projected = torch.nn.functional.normalize(projected, dim=-1)
        projected = projected.transpose(1, 2).unflatten(2, (7, 7))
    check_maps(tmp_path / "out", dict(zip(pictures, last, strict=True)), 128)
    check_maps(tmp_path / "unit", dict(zip(pictures, projected, strict=True)), 512)
    features = FeatureMaps(tmp_path / "out")
    for name, a, b in zip(pictures, first, middle, strict=True):
        for layer, theirs in ((0, a), (-2, b)):
            ours = features.layer(name, layer)
            assert (ours - theirs).abs().max() <= 2e-4 * theirs.abs().max()


@pytest.mark.parametrize(
    "model,shape,prefix",
    [
        ("ViT-L/14", (1024, 16, 16), 1),
        ("ViT-L/14@336px", (1024, 24, 24), 1),
        ("ViT-B/16", (768, 14, 14), 1),
        ("ViT-B/32", (768, 7, 7), 1),
        ("facebook/dinov2-small", (384, 16, 16), 1),
        ("facebook/dinov2-base", (768, 16, 16), 1),
        ("facebook/dinov2-large", (1024, 16, 16), 1),
        ("facebook/dinov2-giant", (1536, 16, 16), 1),
        ("facebook/dinov2-with-registers-large", (1024, 16, 16), 5),
        ("facebook/dinov3-vitl16-pretrain-lvd1689m", (1024, 14, 14), 5),
    ],
)
def test_shapes_of_the_published_models(monkeypatch, model, shape, prefix):
    """Their own forward, of the published dimensions, without weights in memory."""
    from fastembed.cli.maps import spec_of

    for place in ("zoo", "huggingface", "openclip"):
        monkeypatch.setattr(f"fastembed.engines.models.{place}.randomize", lambda *_: None)
    spec = spec_of(model)
    with pytest.warns(UserWarning, match="RANDOM"), torch.device("meta"):
        backbone = zoo.build(spec, "random", None, 0)
    features, contract, facts = assemble(
        spec, backbone, output="map", channels=3, channel_mode="inflate", channel_pool="mean",
        normalize="model", precision="fp32",
    )  # fmt: skip
    features.to("meta")
    assert facts["prefix_tokens"] == prefix
    assert features.result_shapes() == (shape,)
    (result,) = features(torch.empty(1, *contract.shape, device="meta"))
    assert tuple(result.shape) == (1, *shape)


# Masks and resize rules ----------------------------------------------------------------------


def by_pillow(image: Image.Image, rule: str, size: int) -> np.ndarray:
    """An image in its own few lines at the input's size; 0 beside it."""
    width, height = image.size
    if rule == "squash":
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    if rule == "center-crop":
        scale = size / min(width, height)
        resized = (max(size, int(width * scale + 1e-9)), max(size, int(height * scale + 1e-9)))
        levels = np.asarray(image.resize(resized, Image.Resampling.BICUBIC))
        top, left = round((resized[1] - size) / 2), round((resized[0] - size) / 2)
        return levels[top : top + size, left : left + size]
    scale = size / max(width, height)
    resized = max(1, round(width * scale)), max(1, round(height * scale))
    levels = np.asarray(image.resize(resized, Image.Resampling.BICUBIC))
    square = np.zeros((size, size, *levels.shape[2:]), np.uint8)
    top, left = (size - resized[1]) // 2, (size - resized[0]) // 2
    square[top : top + resized[1], left : left + resized[0]] = levels
    return square


SIZES = [(40, 56), (56, 40), (32, 32), (33, 64), (9, 70), (120, 7), (1, 1)]


@pytest.mark.parametrize("rule", ["center-crop", "squash", "letterbox"])
def test_input_and_mask_are_those_of_pillow(tmp_path, rule):
    rng = np.random.default_rng(1)
    for i, (height, width) in enumerate(SIZES):
        alpha = np.zeros((height, width), np.uint8)
        y, x = np.sort(rng.integers(0, (height, width), (2, 2)), axis=0).T
        alpha[y[0] : y[1] + 1, x[0] : x[1] + 1] = rng.integers(1, 256)
        save(tmp_path / "in" / f"{i}.png", i, (height, width), alpha)
        save(tmp_path / "in" / f"{i}_opaque.png", i, (height, width))
    engine = MapEngine(batch_size=1)
    report = run(tmp_path / "in", tmp_path / "out", engine, SpatialMaps(rule), workers=1)
    assert (report.embedded, report.failed) == (14, 0)
    features = FeatureMaps(tmp_path / "out")
    for fed, path in zip(engine.fed, sorted((tmp_path / "in").iterdir()), strict=True):
        pixels = np.asarray(Image.open(path).convert("RGBA"))
        opacity = pixels[..., 3:].astype(np.float32) / np.float32(255)
        rgb = Image.fromarray((pixels[..., :3].astype(np.float32) * opacity).astype(np.uint8))
        levels = by_pillow(rgb, rule, 32)
        np.testing.assert_array_equal(
            fed[0].permute(1, 2, 0).numpy(), levels.astype(np.float32) / np.float32(255)
        )
        seen = by_pillow(Image.fromarray(pixels[..., 3]), rule, 32) > 0
        mask = features[path.stem].mask
        assert mask.dtype == torch.uint8
        np.testing.assert_array_equal(mask, seen.reshape(4, 8, 4, 8).max(axis=(1, 3)))


FILTERS = ("pillow-bicubic", "pillow-bilinear", "torch-uint8-bicubic", "float-bilinear")


@pytest.mark.parametrize("rule", ["center-crop", "squash", "letterbox"])
@pytest.mark.parametrize("filter", FILTERS)
def test_masks_lie_on_the_features_to_the_pixel(tmp_path, filter, rule):
    """White where it is opaque: every patch that shows any white has its mask, and no other."""
    rng = np.random.default_rng(2)
    for i, (height, width) in enumerate(SIZES * 3):
        pixels = np.full((height, width, 4), 255, np.uint8)
        y, x = np.sort(rng.integers(0, (height, width), (2, 2)), axis=0).T
        pixels[..., 3] = 0
        pixels[y[0] : y[1] + 1, x[0] : x[1] + 1, 3] = 255
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i}.png")
    engine = MapEngine(resize=Resize(filter))
    run(tmp_path / "in", tmp_path / "out", engine, SpatialMaps(rule))
    features = FeatureMaps(tmp_path / "out")
    assert len(features) == 21
    masks = torch.stack([features[name].mask for name in features])
    maps = torch.stack([features[name].map for name in features])
    # A float filter's cubic has no negative lobes here, and uint8 saturates: white is never black.
    assert torch.equal(masks.bool(), (maps > 0).all(1)) and torch.equal(
        masks.bool(), (maps > 0).any(1)
    )
    assert 0 < masks.float().mean() < 1


def test_boxes_tell_where_the_input_lies_in_the_image(tmp_path):
    save(tmp_path / "in" / "a.png", 0, (64, 128))
    boxes = {}
    for rule in ("center-crop", "squash", "letterbox"):
        run(tmp_path / "in", tmp_path / rule, recipe=SpatialMaps(rule), meta={})
        boxes[rule] = json.loads((tmp_path / rule / "a.json").read_text())["image_box"]
    assert boxes == {
        "center-crop": [0, 32, 64, 96], "squash": [0, 0, 64, 128], "letterbox": [-32, 0, 96, 128],
    }  # fmt: skip


def test_alpha_is_multiplied_in_and_truncated():
    rng = np.random.default_rng(0)
    image, alpha = rng.integers(0, 256, (2, 50, 60, 3), dtype=np.uint8)
    alpha = alpha[..., 0]
    exact = image.astype(np.float64) * alpha[..., None] / 255
    ours = premultiplied(Picture(image, alpha))
    assert ours.dtype == np.uint8
    # float32 may fall short of an integer that is exact, and truncation then takes one off.
    assert ((ours <= exact) & (ours > exact - 1 - 1e-4)).all()
    product = image.astype(np.float32) * (alpha.astype(np.float32) / 255)[..., None]
    np.testing.assert_array_equal(ours, np.trunc(product))
    assert premultiplied(Picture(image)).tobytes() == image.tobytes()


@pytest.mark.parametrize("factor,dtype", [(2, "float32"), (3, "float16"), (16, "float32")])
def test_upsampling_is_torchs_bilinear(tmp_path, factor, dtype):
    fill(tmp_path / "in", 4)
    run(tmp_path / "in", tmp_path / "plain")
    run(tmp_path / "in", tmp_path / "up", recipe=SpatialMaps("squash", factor, dtype))
    run(tmp_path / "in", tmp_path / "one", recipe=SpatialMaps("squash"))
    plain, up = FeatureMaps(tmp_path / "one"), FeatureMaps(tmp_path / "up")
    for name in plain:
        expected = torch.nn.functional.interpolate(
            plain[name].map[None], scale_factor=factor, mode="bilinear", align_corners=False
        )[0]
        assert torch.equal(up[name].map, expected.to(getattr(torch, dtype)))
        alpha = np.asarray(Image.open(tmp_path / "in" / f"{name}.png").convert("RGBA"))[..., 3]
        seen = torch.from_numpy(by_pillow(Image.fromarray(alpha), "squash", 32) > 0).float()
        pooled = torch.nn.functional.adaptive_max_pool2d(seen[None], 4 * factor)[0]
        assert torch.equal(up[name].mask, pooled.byte())


def test_fp16_is_one_rounding_and_never_infinite(tmp_path):
    fill(tmp_path / "in", 3)
    run(tmp_path / "in", tmp_path / "a")
    run(tmp_path / "in", tmp_path / "b", recipe=SpatialMaps(dtype="float16"))
    one, other = FeatureMaps(tmp_path / "a"), FeatureMaps(tmp_path / "b")
    for name in one:
        assert torch.equal(one[name].map.half(), other[name].map)
    item = Item("a.png", "a.png", "a")
    rest = (np.ones((4, 4), np.uint8), {})
    features = np.full((1, 2, 2, 2), 65519.0, np.float32)
    assert (
        SpatialMaps(dtype="float16").embed(item, {"map": features}, rest).maps["map"].max() == 65504
    )
    features[0, 1, 0, 0] = -65520
    with pytest.raises(ValueError, match="map reaches 65520, too large for float16"):
        SpatialMaps(dtype="float16").embed(item, {"map": features}, rest)
    for bad in (np.nan, np.inf):
        features[0, 0, 0, 0] = bad
        for dtype in ("float16", "float32"):
            with pytest.raises(ValueError, match="the model gave 1 non-finite values of 8"):
                SpatialMaps(dtype=dtype).embed(item, {"map": features}, rest)


def test_layers_come_of_one_pass(tmp_path):
    fill(tmp_path / "in", 10)
    engine = MapEngine(batch_size=4, outputs=("map", "map@3", "map@-1"))
    report = run(tmp_path / "in", tmp_path / "out", engine)
    assert (engine.calls, report.embedded, report.vectors) == (3, 10, 30)
    assert "10 embedded (30 maps)" in str(report)
    features = FeatureMaps(tmp_path / "out")
    for name in features:
        assert torch.equal(features.layer(name, 3), features[name].map + 1)
        assert torch.equal(features.layer(name, -1), features[name].map + 2)
    assert (tmp_path / "out" / "photo_003_layer-1.npy").exists()
    with pytest.raises(FileNotFoundError):
        features.layer("photo_003", 5)
    with pytest.raises(KeyError):
        features["none"]


# Names ---------------------------------------------------------------------------------------


def names(folder: Path, *files: str, recursive: bool = False) -> dict[str, str]:
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    source = ImageFolder(folder, recursive=recursive)
    assert source.count() == len(list(source.items()))
    return {item.path: item.name for item in source.items()}


def test_no_two_images_share_a_file(tmp_path):
    found = names(
        tmp_path, "a.bmp", "a.jpg", "a.png", "a_jpg.png", "a_mask.png", "a_layer3.png", "A.tif",
        "b_mask.png", "B.png", "c_layer-1.webp", "c_mask_mask.png", "c_mask.png", "d.JPG", "d.jpg",
        "e_mask_layer.png", "e.png",
    )  # fmt: skip
    assert found == {
        "A.tif": "A", "B.png": "B", "a.bmp": "a_bmp", "a.jpg": "a_jpg", "a.png": "a_png",
        "a_jpg.png": "a_jpg_png", "a_layer3.png": "a_layer3_png", "a_mask.png": "a_mask_png",
        "b_mask.png": "b_mask_png", "c_layer-1.webp": "c_layer-1", "c_mask.png": "c_mask",
        "c_mask_mask.png": "c_mask_mask_png", "d.JPG": "d", "d.jpg": "d_jpg",
        "e.png": "e", "e_mask_layer.png": "e_mask_layer",
    }  # fmt: skip
    files = set()
    for name in found.values():
        own = {f"{name}{end}".casefold() for end in (".npy", "_mask.npy", "_layer3.npy", ".json",
                                                     "_layer-1.npy")}  # fmt: skip
        assert not files & own
        files |= own


def test_a_name_that_came_before_its_stem(tmp_path):
    """Sorted, `A_mask` precedes `a`, whose mask it would be where case counts for nothing."""
    assert names(tmp_path, "A_mask.png", "a.png") == {"A_mask.png": "A_mask", "a.png": "a_png"}


def test_which_files_are_images(tmp_path):
    found = names(
        tmp_path, "b.PNG", "a.jpeg", ".hidden.png", "x.gif", "noextension", "sub/c.webp",
        "sub/.cache/d.png", "sub/deep/a.Tiff", ".git/e.png", "Sub/c.png", recursive=True,
    )  # fmt: skip
    assert found == {
        "Sub/c.png": "Sub/c", "a.jpeg": "a", "b.PNG": "b", "sub/c.webp": "sub/c_webp",
        "sub/deep/a.Tiff": "sub/deep/a",
    }  # fmt: skip
    source = ImageFolder(tmp_path)
    assert [item.name for item in source.items()] == ["a", "b"]
    assert source.other_files == 2
    with pytest.raises(FileNotFoundError):
        ImageFolder(tmp_path / "none")


def test_links(tmp_path):
    """To files they are followed; folders could lead in circles; where one ends in nothing, it is
    said."""
    elsewhere = save(tmp_path / "elsewhere" / "photo.png")
    folder = tmp_path / "in"
    save(folder / "own.png")
    (folder / "link.png").symlink_to(elsewhere)
    (folder / "broken.png").symlink_to(tmp_path / "gone.png")
    (folder / "circle").symlink_to(folder)
    source = ImageFolder(folder, recursive=True)
    assert [item.name for item in source.items()] == ["broken", "link", "own"]
    assert source.linked_folders == ["circle"]
    report = run(folder, tmp_path / "out", recursive=True)
    assert (report.embedded, report.failed) == (2, 1)
    assert failures(tmp_path / "out")[0]["path"] == "broken.png"


def test_names_that_cannot_be_written_are_recorded(tmp_path):
    folder = tmp_path / "in"
    save(folder / "ok.png")
    save(folder / f"{'n' * 200}.png")
    content = (folder / "ok.png").read_bytes()
    try:
        (Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png"))).write_bytes(content)
    except OSError:
        pytest.skip("this file system takes no name that is not UTF-8")
    save(folder / "tab\tnew\nline é.png")
    report = run(folder, tmp_path / "out")
    assert (report.embedded, report.failed) == (2, 2)
    reasons = {record["path"]: record["reason"] for record in failures(tmp_path / "out")}
    assert reasons == {
        r"caf\xe9.png": "the file name is not UTF-8",
        f"{'n' * 200}.png": "the file name is longer than 160 bytes",
    }
    assert set(FeatureMaps(tmp_path / "out")) == {"ok", "tab\tnew\nline é"}
    engine = MapEngine()
    run(folder, tmp_path / "out", engine)
    assert engine.calls == 0


# Resume, shards, failures --------------------------------------------------------------------


def test_resume_and_shards_give_the_bytes_of_one_run(tmp_path):
    folder = fill(tmp_path / "in", 12)
    fill(folder / "sub" / "deep", 4)
    for extension in ("jpg", "bmp"):
        save(folder / f"photo_003.{extension}", 1)
    options = {"recursive": True, "meta": {"model": "tiny"}}
    run(folder, tmp_path / "one", **options)
    for i in (2, 0, 1):
        run(folder, tmp_path / "three", **options, shard=(i, 3))
    whole = outputs(tmp_path / "one")
    assert outputs(tmp_path / "three") == whole
    assert len(whole) == 3 * 18 + 2  # index and checksums
    assert "photo_003_jpg_mask.npy" in whole and "sub/deep/photo_001.json" in whole

    index = tmp_path / "three" / "maps.tsv"
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join(lines[:5]) + lines[5][:7])  # a torn row
    for lost in ("photo_000.npy", "photo_001_mask.npy", "photo_002.json"):
        (tmp_path / "three" / lost).unlink()
    kept = {line.split("\t")[0] for line in lines[1:5]} - {"photo_000", "photo_001", "photo_002"}
    engine = MapEngine()
    report = run(folder, tmp_path / "three", engine, **options)
    assert outputs(tmp_path / "three") == whole
    assert (report.already_done, report.embedded) == (len(kept), 18 - len(kept))
    again = run(folder, tmp_path / "three", engine, **options)
    assert (again.embedded, again.already_done) == (0, 18)


def test_meta_that_is_asked_for_later_is_made(tmp_path):
    folder = fill(tmp_path / "in", 3)
    run(folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob("photo*.json"))
    report = run(folder, tmp_path / "out", meta={})
    assert report.embedded == 3 and len(list((tmp_path / "out").glob("photo*.json"))) == 3
    assert run(folder, tmp_path / "out").already_done == 3
    assert len(rows_of(tmp_path / "out")) == 3


def test_a_name_that_stands_for_another_image_now_is_made_again(tmp_path):
    folder = fill(tmp_path / "in", 3)
    run(folder, tmp_path / "out")
    save(folder / "photo_001.bmp", 77)
    report = run(folder, tmp_path / "out")
    assert (report.embedded, report.already_done) == (2, 2)
    run(folder, tmp_path / "fresh")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "fresh")


def test_settings_never_mix_and_overwrite_leaves_what_is_not_ours(tmp_path):
    folder, out = fill(tmp_path / "in", 3), tmp_path / "out"
    run(folder, out, MapEngine(outputs=("map", "map@3")))
    with pytest.raises(SignatureMismatch, match=r"recipe.upsample: 1 there, 2 now"):
        run(folder, out, MapEngine(outputs=("map", "map@3")), SpatialMaps(upsample=2))
    with pytest.raises(SignatureMismatch, match=r"engine.output: 'map,map@3' there, 'map' now"):
        run(folder, out)
    for mine in ("notes.npy", "my_layer3.npy", "photo_000_layers.npy", "photo_000.txt"):
        (out / mine).write_bytes(b"mine")
    run(folder, out, overwrite=True)
    there = outputs(out)
    assert set(there) == {
        "maps.tsv", "checksums.tsv", "notes.npy", "my_layer3.npy", "photo_000_layers.npy",
        *(f"photo_{i:03d}{end}.npy" for i in range(3) for end in ("", "_mask")),
    }  # fmt: skip
    assert there["notes.npy"] == b"mine"

    # A folder that another program filled is not ours to empty.
    other = tmp_path / "other"
    other.mkdir()
    for name in ("x.npy", "x_mask.npy"):
        (other / name).write_bytes(b"theirs")
    run(folder, other, overwrite=True)
    assert (other / "x_mask.npy").read_bytes() == b"theirs"


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from fastembed import cli, engines
from test_maps_job import MapEngine
engines.load_engine = lambda *a, **k: MapEngine(2, wait=0.1, outputs=k["output"])
sys.exit(cli.main(sys.argv[1:]))
"""


def test_kill_minus_nine_and_again(tmp_path, monkeypatch):
    folder = fill(tmp_path / "in", 60)
    out = tmp_path / "killed"
    command = ["maps", "--input", str(folder), "--layers", "1", "--save_meta", "--output"]
    script = KILLED.format(tests=str(Path(__file__).parent))
    # Once amid the first files, none of which has a row; once after the first rows.
    for moment in (
        lambda: len(list(out.glob("*_mask.npy"))) > 3, lambda: len(rows_of(out)) > 10,
    ):  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-c", script, *command, str(out)], stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 100
        while not ((out / "maps.tsv").exists() and moment()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert 10 < len(rows_of(out)) < 60
    stale = out / f".photo_000.json.{os.uname().nodename}-{2**22 + 1}.tmp"
    stale.write_text("{")
    monkeypatch.setattr(
        "fastembed.engines.load_engine", lambda *a, **k: MapEngine(2, outputs=k["output"])
    )
    assert cli.main([*command, str(out)]) == 0
    assert cli.main([*command, str(tmp_path / "whole")]) == 0
    assert outputs(out) == outputs(tmp_path / "whole")
    assert len(rows_of(out)) == 60 and len(outputs(out)) == 4 * 60 + 2
    assert not list(out.glob(".*.tmp"))


@pytest.mark.parametrize("name", ["empty.png", "cut.jpg", "cut16.tif", "float.tif", "bomb.png"])
def test_a_bad_image_is_recorded_and_the_others_are_done(tmp_path, name):
    content, message = test_photo.BAD[name]
    folder = fill(tmp_path / "in", 2)
    (folder / f"bad_{name}").write_bytes(content)
    report = run(folder, tmp_path / "out")
    assert (report.embedded, report.failed) == (2, 1)
    [record] = failures(tmp_path / "out")
    assert record["path"] == f"bad_{name}" and re.search(message, record["reason"])


def test_what_is_too_long_for_a_centre(tmp_path):
    save(tmp_path / "in" / "line.png", 0, (1, 5000))
    report = run(tmp_path / "in", tmp_path / "out")
    assert report.failed == 1
    assert "1 x 5000 pixels are too long" in failures(tmp_path / "out")[0]["reason"]
    for rule in ("squash", "letterbox"):
        assert run(tmp_path / "in", tmp_path / rule, recipe=SpatialMaps(rule)).embedded == 1


def test_refusals_of_the_nouns(tmp_path):
    for arguments, message in [
        ({"resize": "stretch"}, "resize must be one of center-crop, squash, letterbox"),
        ({"upsample": 0}, "upsample must be an integer >= 1; got 0"),
        ({"upsample": 1.5}, "upsample must be an integer >= 1; got 1.5"),
        ({"dtype": "uint8"}, "dtype must be one of float32, float16; got 'uint8'"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            SpatialMaps(**arguments)
    for given, message in [
        (("cls",), "outputs must be maps; got 'cls'"),
        (("map@3",), "outputs must have one of map and processed"),
        (("map", "processed"), "outputs must have one of map and processed"),
    ]:
        with pytest.raises(ValueError, match=message):
            MapFiles(tmp_path, given)
    save(tmp_path / "in" / "a.png")
    wide = MapEngine()
    wide.contract = dataclasses.replace(wide.contract, width=64)
    five = MapEngine()
    five.contract = TinyEngine().contract
    for engine, message in [(wide, "this needs a square input"), (five, "an engine of RGB")]:
        run(tmp_path / "in", tmp_path / "out", engine, overwrite=True)
        assert message in failures(tmp_path / "out")[0]["reason"]
    recipe = SpatialMaps("letterbox", 2, "float16")
    assert SpatialMaps.from_settings(json.loads(json.dumps(recipe.settings()))) == recipe


# Command line --------------------------------------------------------------------------------


@pytest.fixture
def tiny_models(monkeypatch):
    calls = []

    def load(spec, **options):
        calls.append((spec, options))
        engine = MapEngine(options["batch_size"] or 8, outputs=options["output"])
        engine.spec = spec
        return engine

    monkeypatch.setattr("fastembed.engines.load_engine", load)
    return calls


def test_command_line(tmp_path, tiny_models, capsys):
    folder, out = fill(tmp_path / "in", 3), tmp_path / "out"
    save(folder / "photo_001.jpg")
    save(folder / "sub" / "b.png")
    (folder / "list.txt").touch()
    seed = [
        "maps", "--input", str(folder), "--output", str(out), "--model", "ViT-L/14", "--size",
        "224", "--device", "cpu", "--fp16", "--save_meta",
    ]  # fmt: skip
    assert cli.main([*seed, "--report", str(tmp_path / "report.json")]) == 0
    told = capsys.readouterr()
    assert "4 embedded, 0 already done, 0 failed" in told.out
    assert "photo_001.png -> photo_001_png.npy; its own name is taken" in told.err
    assert "1 files of another kind are left alone" in told.err
    assert json.loads((tmp_path / "report.json").read_text())["unit"] == "maps"
    spec, options = tiny_models[0]
    assert (spec, options["output"], options["size"]) == ("openai:ViT-L/14", ["map"], 224)
    facts = json.loads((out / "photo_001_png.json").read_text())
    expected = {
        "source": "photo_001.png", "orig_size_hw": [41, 53], "size_input": 32,
        "feature_shape": [3, 4, 4], "mask_shape": [4, 4], "dtype": "float16",
        "model": "openai:ViT-L/14", "feature_type": "patch_map",
        "preprocessing": "alpha_multiplication center-crop pillow-bicubic", "grid_size": 4,
        "hidden_dim": 3, "spatial_mode": "last", "interpolated": False, "interpolation_factor": 1,
        "outputs": ["map"], "patch_size": 8, "precision": "fp32",
    }  # fmt: skip
    assert {key: facts.get(key) for key in expected} == expected
    array = np.load(out / "photo_001_png.npy")
    assert (list(array.shape), str(array.dtype)) == (facts["feature_shape"], facts["dtype"])
    assert rows_of(out)[1] == {
        "name": "photo_001", "source": "photo_001.jpg", "shape": "3x4x4", "dtype": "float16",
    }  # fmt: skip

    hyphens = [part.replace("_", "-") if part.startswith("--") else part for part in seed]
    assert cli.main(hyphens) == 0
    assert "0 embedded, 4 already done" in capsys.readouterr().out
    assert cli.main([*seed, "--recursive"]) == 0
    assert "1 embedded, 4 already done" in capsys.readouterr().out
    assert cli.main([*seed, "--spatial-mode", "processed", "--layers", "3,-1"]) == 1
    error = capsys.readouterr().err
    assert "engine.output: 'map' there, 'processed,map@3,map@-1' now" in error
    assert cli.main([*seed, "--overwrite", "--upsample", "2", "--resize", "letterbox"]) == 0
    facts = json.loads((out / "photo_000.json").read_text())
    assert (facts["interpolated"], facts["interpolation_factor"]) == (True, 2)
    assert (facts["grid_size"], facts["feature_shape"]) == (4, [3, 8, 8])


def test_exit_status_of_failures(tmp_path, tiny_models, capsys):
    folder = fill(tmp_path / "in", 2)
    (folder / "bad.png").write_bytes(b"")
    command = ["maps", "--input", str(folder), "--output"]
    assert cli.main([*command, str(tmp_path / "a")]) == 3
    assert "failures.jsonl" in capsys.readouterr().out
    assert cli.main([*command, str(tmp_path / "b"), "--allow-failures"]) == 0
    assert cli.main([*command, str(tmp_path / "c"), "--strict"]) == 3


@pytest.mark.parametrize(
    "model,spec",
    [
        ("ViT-B/32", "openai:ViT-B/32"),
        ("ViT-L/14@336px", "openai:ViT-L/14@336px"),
        ("facebook/dinov2-large", "transformers:facebook/dinov2-large"),
        (
            "facebook/dinov3-vitl16-pretrain-lvd1689m",
            "transformers:facebook/dinov3-vitl16-pretrain-lvd1689m",
        ),
        ("timm:vit_small_patch14_dinov2", "timm:vit_small_patch14_dinov2"),
    ],
)
def test_models_by_their_usual_names(tmp_path, tiny_models, model, spec):
    fill(tmp_path / "in", 1)
    command = ["maps", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert cli.main([*command, "--model", model]) == 0
    assert tiny_models[0][0] == spec


def test_refusals(tmp_path, tiny_models, capsys):
    folder = fill(tmp_path / "in", 1)
    (tmp_path / "none" / "sub").mkdir(parents=True)
    base = ["maps", "--output", str(tmp_path / "out"), "--input"]
    for arguments, status, message in [
        ([*base, str(folder), "--model", "ViT-H/14"], 2, "or one of ViT-B/32, ViT-B/16"),
        ([*base, str(tmp_path / "gone")], 1, "No such file or directory"),
        ([*base, str(tmp_path / "none")], 1, "has no images; see --recursive"),
        ([*base, str(folder), "--overwrite", "--shard", "0/2"], 2, "without --shard"),
    ]:
        assert cli.main(arguments) == status, arguments
        assert message in capsys.readouterr().err
    for arguments, message in [
        (["--layers", "1,x"], "must look like 3,7,-1"),
        (["--layers", "3,03"], "must look like 3,7,-1, each once"),
        (["--upsample", "0"], "must be at least 1"),
        (["--resize", "stretch"], "invalid choice"),
    ]:
        with pytest.raises(SystemExit):
            cli.main([*base, str(folder), *arguments])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["maps", "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_a_size_that_is_no_multiple_of_the_patch(tmp_path, capsys):
    fill(tmp_path / "in", 1)
    command = ["maps", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    options = ["--weights", "random", "--device", "cpu"]
    status = cli.main([*command, *options, "--model", "facebook/dinov2-small", "--size", "225"])
    assert status == 1
    error = capsys.readouterr().err
    assert "size must be a multiple of the patch size 14, got 225" in error
    assert "224 or 238" in error
