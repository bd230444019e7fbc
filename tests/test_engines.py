"""Engines against their upstream models, and the behaviour that does not depend on the model."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from fastembed.engines import InputContract, Resize, load_engine
from fastembed.engines.models import dino
from fastembed.engines.models import hub as engines_hub
from fastembed.engines.models.channels import inflate_kernel
from fastembed.engines.upstream import dinov2_authors_layout, dinov3_authors_layout

transformers = pytest.importorskip("transformers")

# float32 against another implementation of the same graph: summation orders differ, nothing else.
MAX_RELATIVE = 2e-5


def images(count: int, channels: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def quiet_random(spec: str, **options):
    options = {"size": 64, "precision": "fp32", "batch_size": 2, "device": "cpu", **options}
    with pytest.warns(UserWarning, match="RANDOM weights"):
        return load_engine(spec, weights="random", **options)


def assert_same(ours: Tensor, reference: Tensor, relative: float = MAX_RELATIVE) -> None:
    assert ours.dtype == torch.float32 and ours.shape == reference.shape
    cosine = torch.cosine_similarity(ours.double(), reference.double(), dim=-1)
    assert cosine.min() >= 0.999999
    assert (ours - reference).abs().max() <= relative * reference.abs().max()


def lively(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random: a constant bias or norm would hide a wrong mapping."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2 and "token" not in name and "position" not in name:
                p.normal_(0, p[0].numel() ** -0.5, generator=generator)
            elif name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "lambda1")):
                p.normal_(1, 0.1, generator=generator)
            else:
                p.normal_(0, 0.1, generator=generator)
    return model.eval()


TINY = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.fixture(scope="module", autouse=True)
def tiny_names():
    """`dinov3:tiny16`, and plus with a gated FFN: the published path at little cost."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dino.DINOV3, "tiny16", dino.DinoArch(64, 3, 2, 256))
        patch.setitem(dino.DINOV3, "tiny16plus", dino.DinoArch(64, 3, 2, 264, swiglu=True))
        yield


@pytest.fixture(scope="module")
def hf_dinov3():
    config = transformers.DINOv3ViTConfig(**TINY, intermediate_size=256, num_register_tokens=4)
    return lively(transformers.DINOv3ViTModel(config), seed=1)


@pytest.fixture(scope="module")
def dinov3_file(hf_dinov3, tmp_path_factory):
    path = tmp_path_factory.mktemp("dinov3") / "dinov3_tiny16_pretrain_lvd1689m.pth"
    torch.save(dinov3_authors_layout(hf_dinov3), path)
    return path


def upstream(model, x: Tensor) -> Tensor:
    """Every post-norm token [B, T, D] of an HF model."""
    with torch.inference_mode():
        return model(pixel_values=x).last_hidden_state


# --- parity with the upstream implementations -------------------------------------------------


@pytest.mark.parametrize("size", [64, 112])
def test_dinov3_file_matches_transformers(hf_dinov3, dinov3_file, size):
    engine = load_engine(
        "dinov3:tiny16",
        weights=dinov3_file,
        size=size,
        precision="fp32",
        output="tokens",
        batch_size=3,
        device="cpu",
    )
    x = images(3, 3, size)
    assert engine.prefix_tokens == 5 and engine.patch_size == 16 and engine.dim == 64
    assert_same(engine(x), upstream(hf_dinov3, x))


def test_a_published_dinov3_name_at_its_own_size(tmp_path):
    config = transformers.DINOv3ViTConfig(num_register_tokens=4)  # its defaults are ViT-S/16
    model = lively(transformers.DINOv3ViTModel(config), seed=6)
    torch.save(dinov3_authors_layout(model), tmp_path / "vits16.pth")
    engine = load_engine(
        "dinov3:vits16",
        weights=tmp_path / "vits16.pth",
        size=64,
        precision="fp32",
        batch_size=2,
        device="cpu",
    )
    x = images(2, 3, 64)
    assert_same(engine(x), upstream(model, x)[:, 0])


def test_dinov3_gated_ffn_matches_transformers(tmp_path):
    config = transformers.DINOv3ViTConfig(
        **TINY, intermediate_size=264, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu"
    )
    model = lively(transformers.DINOv3ViTModel(config), seed=2)
    torch.save(dinov3_authors_layout(model), tmp_path / "plus.pth")
    engine = load_engine(
        "dinov3:tiny16plus",
        weights=tmp_path / "plus.pth",
        size=64,
        precision="fp32",
        batch_size=2,
        device="cpu",
    )
    x = images(2, 3, 64)
    assert_same(engine(x), upstream(model, x)[:, 0])


@pytest.mark.parametrize("registers", [False, True])
def test_dinov2_file_matches_transformers_on_its_own_grid(tmp_path, registers):
    # 8 x 8 positions: at 112 no resampling is needed, and every implementation agrees.
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{name}Config")(
        hidden_size=384, num_attention_heads=6, patch_size=14, image_size=112
    )
    model = lively(getattr(transformers, f"{name}Model")(config), seed=3)
    torch.save(dinov2_authors_layout(model), tmp_path / "v2.pth")
    engine = load_engine(
        "dinov2:vits14_reg" if registers else "dinov2:vits14",
        weights=tmp_path / "v2.pth",
        size=112,
        precision="fp32",
        output="tokens",
        batch_size=2,
        device="cpu",
    )
    x = images(2, 3, 112)
    assert engine.prefix_tokens == (5 if registers else 1)
    assert_same(engine(x), upstream(model, x))


@pytest.mark.parametrize(
    ("registers", "resample"),
    [
        (False, {"scale_factor": (5.1 / 8, 5.1 / 8), "antialias": False}),
        (True, {"size": (5, 5), "antialias": True}),
    ],
)
def test_dinov2_positions_are_resampled_as_the_authors_do(tmp_path, registers, resample):
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{name}Config")(
        hidden_size=384, num_attention_heads=6, patch_size=14, image_size=112
    )
    model = lively(getattr(transformers, f"{name}Model")(config), seed=4)
    torch.save(dinov2_authors_layout(model), tmp_path / "v2.pth")
    engine = load_engine(
        "dinov2:vits14_reg" if registers else "dinov2:vits14",
        weights=tmp_path / "v2.pth",
        size=70,
        precision="fp32",
        batch_size=2,
        device="cpu",
    )
    # The same model with the table already on the 5 x 5 grid needs no resampling of its own.
    table = model.embeddings.position_embeddings.detach()
    grid = table[:, 1:].reshape(1, 8, 8, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, mode="bicubic", **resample)
    resized = torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    model.embeddings.position_embeddings = torch.nn.Parameter(resized)
    x = images(2, 3, 70)
    assert_same(engine(x), upstream(model, x)[:, 0])


@pytest.mark.parametrize("legacy_names", [False, True])
def test_transformers_folder(hf_dinov3, tmp_path, legacy_names, capfd):
    from safetensors.torch import load_file, save_file

    hf_dinov3.save_pretrained(tmp_path)
    if legacy_names:  # the hub's files carry the names of an earlier transformers
        file = tmp_path / "model.safetensors"
        state = {k.replace("model.layer.", "layer."): v for k, v in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3})
    )
    capfd.readouterr()
    engine = load_engine(
        f"transformers:{tmp_path}",
        size=64,
        precision="fp32",
        output="tokens",
        batch_size=2,
        device="cpu",
    )
    assert capfd.readouterr() == ("", "")
    x = images(2, 3, 64)
    assert torch.equal(engine(x), upstream(hf_dinov3, x))
    assert engine.contract.mean == (0.1, 0.2, 0.3) and engine.contract.std == (0.4, 0.5, 0.6)
    assert engine.contract.resize == Resize("float-bicubic")
    assert len(engine.weights_id) == 64


def test_timm_safetensors_file(tmp_path):
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    model = timm.create_model("vit_small_patch16_dinov3", num_classes=0, global_pool="token")
    model = lively(model, seed=5)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    engine = load_engine(
        "timm:vit_small_patch16_dinov3.lvd1689m",
        weights=tmp_path / "model.safetensors",
        size=64,
        precision="fp32",
        output="pooled",
        batch_size=2,
        device="cpu",
    )
    x = images(2, 3, 64)
    with torch.inference_mode():
        assert_same(engine(x), model(x))
    assert engine.contract.resize == Resize("pillow-bicubic", 64)  # all of the image: crop_pct 1


# --- outputs ----------------------------------------------------------------------------------


def test_outputs_are_views_of_the_same_tokens(dinov3_file):
    x = images(2, 3, 64)

    def run(output):
        return load_engine(
            "dinov3:tiny16",
            weights=dinov3_file,
            size=64,
            precision="fp32",
            output=output,
            batch_size=2,
            device="cpu",
        )(x)

    tokens, grid = run("tokens"), run("map")
    assert tokens.shape == (2, 5 + 16, 64) and grid.shape == (2, 64, 4, 4)
    assert torch.equal(run("cls"), tokens[:, 0])
    assert torch.equal(run("pooled"), tokens[:, 0])
    assert torch.equal(grid[1, :, 2, 3], tokens[1, 5 + 2 * 4 + 3])


def test_a_model_without_class_token_offers_pooled_only():
    spec = "timm:vit_base_patch16_siglip_224"
    assert quiet_random(spec, output="pooled")(images(1, 3, 64)).shape == (1, 768)
    with (
        pytest.warns(UserWarning, match="RANDOM"),
        pytest.raises(ValueError, match="no class token"),
    ):
        load_engine(spec, weights="random", size=64, output="cls")


# --- exactness --------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sample_has_the_same_bits_in_any_company(dinov3_file, precision):
    engine = load_engine(
        "dinov3:tiny16",
        weights=dinov3_file,
        size=112,
        precision=precision,
        batch_size=7,
        device="cpu",
    )
    x = images(7, 3, 112).to(engine.contract.dtype)
    whole = engine(x)
    assert whole.dtype == torch.float32 and len(torch.unique(whole, dim=0)) == 7
    for position in (1, 4, 6):
        assert torch.equal(engine(x.roll(position, 0)).roll(-position, 0), whole)
    for start, stop in ((0, 1), (3, 4), (2, 7), (5, 7)):
        assert torch.equal(engine(x[start:stop]), whole[start:stop])
    assert torch.equal(engine(x.to(memory_format=torch.channels_last)), whole)


def test_the_model_only_ever_sees_one_shape(dinov3_file):
    engine = load_engine(
        "dinov3:tiny16", weights=dinov3_file, size=64, precision="fp32", batch_size=3, device="cpu"
    )
    run, seen = engine.run, []
    engine.run = lambda x: run(seen.append(x) or x)
    x = images(3, 3, 64)
    for count in (1, 2, 3):
        assert engine(x[:count]).shape == (count, 64)
        assert seen[-1].shape == (3, 3, 64, 64) and seen[-1].is_contiguous()
        assert torch.equal(seen[-1][:count], x[:count]) and not seen[-1][count:].any()


def test_bf16_follows_fp32(hf_dinov3, dinov3_file, tmp_path):
    hf_dinov3.save_pretrained(tmp_path)
    x = images(2, 3, 112)
    for spec, weights in (("dinov3:tiny16", dinov3_file), (f"transformers:{tmp_path}", None)):
        full, half = (
            load_engine(
                spec,
                weights=weights,
                size=112,
                precision=p,
                batch_size=2,
                normalize="none",
                device="cpu",
            )
            for p in ("fp32", "bf16")
        )
        assert half.contract.dtype == torch.bfloat16
        cosine = torch.cosine_similarity(full(x), half(x.bfloat16()))
        assert 0.999 <= cosine.min() and not torch.equal(full(x), half(x.bfloat16()))


@pytest.mark.parametrize(
    "spec", ["dinov3:tiny16", "transformers:facebook/dinov3-vits16-pretrain-lvd1689m"]
)
def test_rotation_tables_stay_float32_in_bf16(spec):
    full, half = quiet_random(spec), quiet_random(spec, precision="bf16")

    def tables(engine):
        return [
            (name, buffer)
            for name, buffer in engine.run.named_buffers()
            if "periods" in name or "inv_freq" in name or "pos_embed_cached" in name
        ]

    assert tables(full)
    for (_, a), (_, b) in zip(tables(full), tables(half), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a, b)
    assert {p.dtype for p in half.run.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("channels", [3, 4, 5, 6, 8])
def test_bf16_of_any_number_of_channels(channels):
    """oneDNN 3.13 convolves 16x16 patches of 4, 6 or 8 bfloat16 channels into noise (AMX)."""
    whole, half = (
        quiet_random("dinov3:tiny16", channels=channels, precision=p) for p in ("fp32", "bf16")
    )
    x = images(2, channels, 64)
    assert torch.cosine_similarity(whole(x), half(x.bfloat16())).min() > 0.999


@pytest.mark.parametrize("spec", ["dinov3:tiny16", "timm:vit_small_patch16_dinov3.lvd1689m"])
def test_random_weights_are_a_function_of_the_seed_alone(spec):
    x = images(2, 3, 64)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = quiet_random(spec)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = quiet_random(spec), quiet_random(spec, seed=1)
    assert torch.equal(first(x), again(x))
    assert not torch.equal(first(x), other(x))
    assert (first.weights_id, other.weights_id) == ("random:0", "random:1")


@pytest.mark.parametrize(
    "spec",
    [
        "dinov2:vits14",
        "dinov2:vits14_reg",
        "dinov3:vits16plus",
        "timm:vit_small_patch14_dinov2.lvd142m",
        "timm:vit_small_patch16_dinov3_qkvb.lvd1689m",
        "transformers:facebook/dinov2-small",
        "transformers:facebook/dinov2-with-registers-small",
        "transformers:facebook/dinov3-vits16plus-pretrain-lvd1689m",
    ],
)
def test_random_weights_are_alive(spec):
    a, b = quiet_random(spec, size=112)(images(2, 3, 112))
    assert (a - b).norm() > 0.1 * a.norm()


# --- channels ---------------------------------------------------------------------------------


def test_inflate_is_the_rgb_kernel_and_its_mean(dinov3_file):
    rgb, five = (
        load_engine(
            "dinov3:tiny16",
            weights=dinov3_file,
            size=64,
            channels=c,
            precision="fp32",
            batch_size=2,
            device="cpu",
        )
        for c in (3, 5)
    )
    kernel = rgb.run.module.patch_embed.proj.weight
    wide = five.run.module.patch_embed.proj.weight
    assert wide.shape == (64, 5, 16, 16)
    assert torch.equal(wide[:, :3], kernel)
    mean = (kernel[:, 0] + kernel[:, 1] + kernel[:, 2]) / 3
    for extra in (3, 4):
        torch.testing.assert_close(wide[:, extra], mean, rtol=1e-6, atol=1e-8)
    # Linearity: x in an extra channel acts as x in all three RGB channels at a third.
    x = images(2, 5, 64)
    folded = x[:, :3] + (x[:, 3:].sum(dim=1, keepdim=True) / 3)
    assert_same(five(x), rgb(folded))
    assert five.contract.channel_map == (0, 1, 2, 3, 4)
    assert five.contract.mean[:3] == rgb.contract.mean
    assert five.contract.mean[3:] == pytest.approx([sum(rgb.contract.mean) / 3] * 2)
    assert five.contract.std[3:] == pytest.approx([sum(rgb.contract.std) / 3] * 2)


def test_inflate_kernel_keeps_three_channels_as_they_are():
    kernel = images(4, 3, 2)
    assert torch.equal(inflate_kernel(kernel, 3), kernel)


def test_inflate_reaches_transformers_models():
    rgb, six = (
        quiet_random("transformers:facebook/dinov2-small", size=56, channels=c) for c in (3, 6)
    )
    x = images(2, 3, 56)
    padded = torch.cat([x, torch.zeros_like(x)], dim=1)
    assert_same(six(padded), rgb(x))


@pytest.mark.parametrize("output", ["cls", "map"])
@pytest.mark.parametrize("pool", ["mean", "concat"])
def test_replicate_is_a_loop_over_channels(dinov3_file, output, pool):
    options = {"size": 64, "precision": "fp32", "output": output, "device": "cpu"}
    engine = load_engine(
        "dinov3:tiny16",
        weights=dinov3_file,
        channels=4,
        channel_mode="replicate",
        channel_pool=pool,
        batch_size=2,
        **options,
    )
    assert engine.contract.channel_map == (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3)
    assert engine.contract.mean == (0.485, 0.456, 0.406) * 4
    x = images(2, 4, 64)
    planes = x[:, list(engine.contract.channel_map)]
    rgb = load_engine("dinov3:tiny16", weights=dinov3_file, batch_size=2, **options)
    each = [rgb(x[:, c : c + 1].expand(-1, 3, -1, -1)) for c in range(4)]
    expected = sum(each) / 4 if pool == "mean" else torch.cat(each, dim=1)
    assert engine.dim == expected.shape[1]
    torch.testing.assert_close(engine(planes), expected, rtol=1e-4, atol=1e-4)


# --- statistics, settings, checks -------------------------------------------------------------


def test_statistics_follow_the_checkpoint_not_the_family(hf_dinov3, dinov3_file, tmp_path):
    sat = tmp_path / "dinov3_tiny16_pretrain_sat493m.pth"
    sat.symlink_to(dinov3_file)
    options = {"size": 64, "batch_size": 1, "device": "cpu"}
    for path, mean, std in (
        (dinov3_file, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (sat, (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)),
    ):
        contract = load_engine("dinov3:tiny16", weights=path, **options).contract
        assert contract.mean == mean and contract.std == std
    plain = load_engine("dinov3:tiny16", weights=sat, normalize="none", **options).contract
    assert plain.mean == (0, 0, 0) and plain.std == (1, 1, 1)

    hf_dinov3.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        load_engine(f"transformers:{tmp_path / 'bare'}", **options)


def test_settings_are_json_and_tell_engines_apart(dinov3_file):
    options = {"size": 64, "batch_size": 2, "device": "cpu", "precision": "fp32"}
    a = load_engine("dinov3:tiny16", weights=dinov3_file, **options)
    settings = json.loads(json.dumps(a.settings()))
    assert settings == a.settings()
    for change in (
        {"batch_size": 3},
        {"size": 80},
        {"output": "map"},
        {"precision": "bf16"},
        {"normalize": "none"},
        {"channels": 4},
    ):
        other = load_engine("dinov3:tiny16", weights=dinov3_file, **{**options, **change})
        assert other.settings() != settings
    assert "dinov3:tiny16" in repr(a) and "cls 64-d" in repr(a)


def test_batches_are_checked(dinov3_file):
    engine = load_engine(
        "dinov3:tiny16", weights=dinov3_file, size=64, batch_size=2, precision="fp32", device="cpu"
    )
    with pytest.raises(ValueError, match=r"1 <= B <= 2, got \[3, 3, 64, 64\]"):
        engine(images(3, 3, 64))
    with pytest.raises(ValueError, match=r"got \[0, 3, 64, 64\]"):
        engine(images(0, 3, 64))
    with pytest.raises(ValueError, match=r"got \[1, 4, 64, 64\]"):
        engine(images(1, 4, 64))
    with pytest.raises(TypeError, match=r"must be torch\.float32, got torch\.bfloat16"):
        engine(images(1, 3, 64).bfloat16())
    with pytest.raises(TypeError, match="got ndarray"):
        engine(images(1, 3, 64).numpy())


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("vitl16", {}, "KIND:NAME"),
        ("dinov4:vitl16", {}, "unknown kind of model 'dinov4'; did you mean dinov"),
        ("dinov3:vitl61", {}, "unknown dinov3 model 'vitl61'; did you mean vitl16"),
        ("dinov2:vitb14_regs", {}, "did you mean vitb14_reg"),
        ("timm:vit_smal_patch16_dinov3", {}, "did you mean vit_small_patch16_dinov3"),
        ("timm:vit_small_patch16_dinov3.lvd", {}, "lvd1689m"),
        ("timm:resnet50", {}, "not a ViT"),
        ("dinov3:vitl16", {}, r"needs weights=PATH.*\.pth"),
        ("dinov3:tiny16", {"size": 100}, "got 100; the nearest are 96 or 112"),
        ("dinov2:vits14", {"size": 10}, "the nearest are 14"),
        ("dinov3:tiny16", {"output": "pool"}, "output must be one of cls"),
        (
            "dinov3:tiny16",
            {"runtime": "jax"},
            "runtime must be one of torch, onnx, tensorrt, got 'jax'",
        ),
        ("dinov3:tiny16", {"precision": "fp16", "device": "cpu"}, "fp16.*CPU"),
        ("dinov3:tiny16", {"channels": 2}, "channel_mode='replicate'"),
        ("dinov3:tiny16", {"channels": 0}, "channels must be an integer >= 1, got 0"),
        ("dinov3:tiny16", {"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*RANDOM weights")
def test_wrong_requests_say_what_is_right(spec, options, message):
    weights = None if "needs weights" in message else "random"
    with pytest.raises(ValueError, match=message):
        load_engine(spec, weights=weights, **{"size": 112, **options})


@pytest.mark.parametrize(
    "spec", ["transformers:facebook/dinov2-small", "timm:vit_small_patch14_dinov2.lvd142m"]
)
def test_unreachable_hub_says_what_and_what_instead(monkeypatch, spec):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(RuntimeError, match=r"could not fetch .*dinov2.*no route.*weights=PATH"):
        load_engine(spec)


def test_gated_model_says_how_to_get_access(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def gated(*args, **kwargs):
        raise GatedRepoError.__new__(GatedRepoError)  # its constructor wants a live HTTP response

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    with pytest.raises(
        RuntimeError, match=r"accept its licence at https://huggingface\.co/facebook/x"
    ):
        engines_hub.fetch_model("facebook/x")


def test_contract_checks_itself():
    with pytest.raises(ValueError, match=r"one value per input plane \(3\), got 2 and 3"):
        InputContract(
            64, 64, 3, (0, 1, 2), (0.0, 0.0), (1.0, 1.0, 1.0), Resize("float-bilinear"),
            torch.float32,
        )  # fmt: skip
