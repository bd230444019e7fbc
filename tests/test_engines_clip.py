"""CLIP and SigLIP, through open_clip and through transformers, against those libraries."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from test_engines import assert_same, images, lively

from fastembed.engines import Resize, load_engine
from fastembed.engines.preprocess import model_input

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")

OPTIONS = {"precision": "fp32", "batch_size": 2, "device": "cpu"}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)


@pytest.fixture(autouse=True)
def small_towers(monkeypatch):
    """open_clip's own configurations with two blocks: the same code in a fraction of the time."""
    whole = open_clip.get_model_config

    def small(name):
        config = json.loads(json.dumps(whole(name)))
        if not name.startswith("RN") and "timm_model_name" not in config["vision_cfg"]:
            config["vision_cfg"] |= {"layers": 2, "width": 128, "head_width": 32}
        config["text_cfg"] |= {"layers": 1, "width": 64, "heads": 2, "vocab_size": 50}
        return config

    monkeypatch.setattr(open_clip, "get_model_config", small)
    monkeypatch.setattr("open_clip.factory.get_model_config", small)


def upstream(name: str, **options) -> torch.nn.Module:
    logging.disable(logging.WARNING)
    try:
        return lively(open_clip.create_model(name, pretrained=None, **options), seed=1)
    finally:
        logging.disable(logging.NOTSET)


@pytest.fixture
def saved(tmp_path):
    from safetensors.torch import save_file

    def save(model, name: str = "model.safetensors"):
        path = tmp_path / name
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
        return path

    return save


@pytest.mark.parametrize(
    "spec,name",
    [
        ("openai:ViT-B/32", "ViT-B-32-quickgelu"),
        ("openai:ViT-L/14", "ViT-L-14-quickgelu"),
        ("openclip:ViT-B-32/laion2b_s34b_b79k", "ViT-B-32"),
        ("openclip:laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "ViT-B-32"),
        ("openclip:hf-hub:timm/vit_base_patch32_clip_224.openai", "ViT-B-32-quickgelu"),
    ],
)
def test_clip_follows_open_clip(saved, spec, name):
    model = upstream(name)
    outputs = ["pooled", "cls", "tokens", "map", "processed", "map@0", "map@-1"]
    engine = load_engine(spec, weights=saved(model), output=outputs, **OPTIONS)
    x = images(2, 3, 224)
    results = engine(x)
    with torch.inference_mode():
        assert_same(results["pooled"], model.encode_image(x))
        theirs = model.visual.forward_intermediates(x, output_extra_tokens=True)
        first, last = theirs["image_intermediates"]
        stream = last.flatten(2).transpose(1, 2)
        normed = model.visual.ln_post(stream) @ model.visual.proj
        token = theirs["image_intermediates_prefix"][-1]
        assert_same(results["cls"], model.visual.ln_post(token)[:, 0])
    assert_same(results["map@0"], first)
    assert torch.equal(results["map"], results["map@-1"])  # before ln_post
    assert_same(results["map"], last)
    assert_same(results["tokens"], torch.cat([token, stream], dim=1))
    grid = last.shape[2:]
    unit = torch.nn.functional.normalize(normed, dim=-1).transpose(1, 2).unflatten(2, grid)
    assert_same(results["processed"], unit)
    assert {k: tuple(v.shape[1:]) for k, v in results.items()} == engine.outputs
    assert engine.contract.mean == CLIP_MEAN and engine.contract.resize.shorter == 224


def test_siglip_keeps_its_own_statistics_from_a_local_file(saved):
    """Without published weights open_clip says CLIP's mean, std and centre crop for it."""
    model = upstream("ViT-B-16-SigLIP")
    engine = load_engine(
        "openclip:timm/ViT-B-16-SigLIP", weights=saved(model), output=["pooled", "map"], **OPTIONS
    )
    x = images(1, 3, 224)
    with torch.inference_mode():
        results = engine(x)
        assert_same(results["pooled"], model.encode_image(x))
    assert results["map"].shape == (1, 768, 14, 14)
    contract = engine.contract
    assert contract.mean == contract.std == (0.5, 0.5, 0.5)
    assert contract.resize == Resize("pillow-bicubic")
    assert engine.prefix_tokens == 0


@pytest.mark.parametrize("size", [(160, 160), (96, 256)])
def test_clip_positions_are_resampled_as_open_clip_does(saved, size):
    model = upstream("ViT-B-32")
    bigger = upstream("ViT-B-32", force_image_size=size)
    state = model.state_dict()
    open_clip.model.resize_pos_embed(state, bigger)
    bigger.load_state_dict(state)
    engine = load_engine(
        "openclip:ViT-B-32/laion2b_s34b_b79k",
        weights=saved(model),
        size=size,
        output=["pooled", "map"],
        **OPTIONS,
    )
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        results = engine(x)
        assert_same(results["pooled"], bigger.encode_image(x))
    assert results["map"].shape[2:] == (size[0] // 32, size[1] // 32)


def test_the_archive_as_openai_publishes_it(tmp_path):
    model = upstream("ViT-B-32-quickgelu")

    class Archive(torch.nn.Module):
        """Their .pt: a TorchScript module with half-precision weights under these names."""

        def __init__(self):
            super().__init__()
            self.visual = model.visual.half()
            self.register_buffer("input_resolution", torch.tensor(224))

        def forward(self, x):
            return self.visual.conv1(x)

    archive = torch.jit.trace(Archive(), torch.zeros(1, 3, 224, 224, dtype=torch.half))
    archive.save(str(tmp_path / "ViT-B-32.pt"))
    engine = load_engine(
        "openai:ViT-B/32", weights=tmp_path / "ViT-B-32.pt", output="pooled", **OPTIONS
    )
    x = images(2, 3, 224)
    with torch.inference_mode():
        assert_same(engine(x), model.visual.float()(x))


def test_a_folder_of_open_clip(saved, tmp_path):
    model = upstream("ViT-B-32")
    saved(model, "open_clip_model.safetensors")
    config = {
        "model_cfg": open_clip.get_model_config("ViT-B-32"),
        "preprocess_cfg": {
            "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6],
            "interpolation": "bicubic", "resize_mode": "squash",
        },
    }  # fmt: skip
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    engine = load_engine("openclip:my/own", weights=tmp_path, output="pooled", size=224, **OPTIONS)
    x = images(2, 3, 224)
    with torch.inference_mode():
        assert_same(engine(x), model.encode_image(x))
    assert engine.contract.mean == (0.1, 0.2, 0.3)
    assert engine.contract.resize == Resize("pillow-bicubic")


@pytest.mark.parametrize(
    "spec,message",
    [
        ("openclip:ViT-B-32", r"published with several weights.*openclip:ViT-B-32/TAG.*laion2b"),
        ("openclip:ViT-B-23", "unknown openclip model 'ViT-B-23'; did you mean ViT-B-32"),
        ("openclip:RN50/openai", "is a ResNet"),
        ("openai:ViT-B-32", "unknown openai model 'ViT-B-32'; did you mean ViT-B/32"),
    ],
)
def test_names_that_are_not_enough(spec, message):
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=message):
        load_engine(spec, weights="random", **OPTIONS)


def test_outputs_that_a_model_does_not_have():
    for output, message in [
        ("cls", "no class token"),
        ("processed", "project tokens"),
        ("map@12", r"BLOCK in -12\.\.11"),
        ("pooled@1", "NAME one of cls, tokens, map"),
        ("grid", "output must be one of"),
        (["map", "map"], "one or several different"),
    ]:
        with pytest.warns(UserWarning), pytest.raises(ValueError, match=message):
            load_engine(
                "transformers:google/siglip-base-patch16-224", weights="random", output=output,
                **OPTIONS,
            )  # fmt: skip


# --- transformers -----------------------------------------------------------------------------

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 64, "patch_size": 16}  # fmt: skip


def two_towers(kind: str, tmp_path, **preprocessor):
    """A folder as the hub has it: both towers, and the vision tower's preprocessor."""
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 40}  # fmt: skip
    classes = {
        "clip": (transformers.CLIPConfig, transformers.CLIPModel),
        "siglip": (transformers.SiglipConfig, transformers.SiglipModel),
    }
    config_class, model_class = classes[kind]
    options = {"projection_dim": 24} if kind == "clip" else {}
    config = config_class(vision_config=dict(TINY), text_config=text, **options)
    model = lively(model_class(config), seed=2)
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return model


CLIP_PREPROCESSOR = {
    "do_center_crop": True, "crop_size": {"height": 64, "width": 64},
    "size": {"shortest_edge": 72}, "resample": 3, "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
}  # fmt: skip


@pytest.mark.parametrize("size", [None, (80, 48)])
def test_clip_of_transformers(tmp_path, size):
    model = two_towers("clip", tmp_path, **CLIP_PREPROCESSOR)
    outputs = ["pooled", "cls", "map", "processed", "map@0"]
    engine = load_engine(f"transformers:{tmp_path}", output=outputs, size=size, **OPTIONS)
    size = size or (64, 64)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        results = engine(x)
        vision = model.vision_model(
            x, interpolate_pos_encoding=size != (64, 64), output_hidden_states=True
        )
        assert_same(results["pooled"], model.visual_projection(vision.pooler_output))
        assert_same(results["cls"], vision.pooler_output)
        patches = vision.last_hidden_state[:, 1:]
        embedded = model.visual_projection(model.vision_model.post_layernorm(patches))
    grid = (size[0] // 16, size[1] // 16)
    assert_same(results["map"], patches.transpose(1, 2).unflatten(2, grid))
    unit = torch.nn.functional.normalize(embedded, dim=-1)
    assert_same(results["processed"], unit.transpose(1, 2).unflatten(2, grid))
    first = vision.hidden_states[1][:, 1:]
    assert_same(results["map@0"], first.transpose(1, 2).unflatten(2, grid))


def test_siglip_of_transformers(tmp_path):
    model = two_towers("siglip", tmp_path, size={"height": 64, "width": 64}, resample=2,
                       image_mean=[0.5] * 3, image_std=[0.5] * 3)  # fmt: skip
    engine = load_engine(f"transformers:{tmp_path}", output=["pooled", "map"], **OPTIONS)
    x = images(2, 3, 64)
    with torch.inference_mode():
        results = engine(x)
        vision = model.vision_model(x)
    assert_same(results["pooled"], vision.pooler_output)
    patches = vision.last_hidden_state.transpose(1, 2).unflatten(2, (4, 4))
    assert_same(results["map"], patches)
    assert engine.contract.resize == Resize("torch-uint8-bilinear")


# --- from an image to the model's input -------------------------------------------------------


def photograph(height: int, width: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    )


@pytest.mark.parametrize("shape", [(301, 420), (90, 64), (33, 250)])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_input_is_that_of_the_transformers_processor(tmp_path, kind, shape):
    squash = {"size": {"height": 64, "width": 64}, "resample": 3, "image_mean": [0.5] * 3,
              "image_std": [0.5] * 3}  # fmt: skip
    settings = CLIP_PREPROCESSOR if kind == "clip" else squash
    two_towers(kind, tmp_path, **settings)
    processor = {
        "clip": transformers.CLIPImageProcessor,
        "siglip": transformers.SiglipImageProcessor,
    }
    engine = load_engine(f"transformers:{tmp_path}", output="pooled", **OPTIONS)
    image = photograph(*shape)
    theirs = processor[kind](**settings)(image, return_tensors="pt")["pixel_values"][0]
    ours = model_input(image, engine.contract)
    # They fold 1/255 into mean and std, which rounds elsewhere: far below one level.
    assert (ours - theirs).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(301, 420), (300, 257)])
@pytest.mark.parametrize(
    "spec", ["openclip:ViT-B-32/laion2b_s34b_b79k", "openclip:ViT-B-16-SigLIP"]
)
def test_input_is_that_of_open_clip(spec, shape):
    name, _, tag = spec.removeprefix("openclip:").partition("/")
    published = open_clip.get_pretrained_cfg(name, tag or "webli")
    keys = ("mean", "std", "interpolation", "resize_mode")
    transform = open_clip.image_transform(224, is_train=False, **{k: published[k] for k in keys})
    with pytest.warns(UserWarning):
        engine = load_engine(spec, weights="random", output="pooled", **OPTIONS)
    image = photograph(*shape)
    assert torch.equal(model_input(image, engine.contract), transform(image))


def test_input_of_dinov3_is_resized_after_the_division():
    with pytest.warns(UserWarning):
        engine = load_engine(
            "transformers:facebook/dinov3-vits16-pretrain-lvd1689m", weights="random", **OPTIONS
        )
    image = photograph(301, 420)
    theirs = transformers.DINOv3ViTImageProcessor()(image, return_tensors="pt")["pixel_values"][0]
    # Their weights are float32, ours float64: below a hundredth of a level.
    assert (model_input(image, engine.contract) - theirs).abs().max() < 2e-5
