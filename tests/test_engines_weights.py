"""Weight files and DINO configurations, against a plain forward pass in float64."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastembed.engines import load_engine
from fastembed.engines.models import dino, dino_yaml
from fastembed.engines.models.weights import hash_files, load_state, read_weights, unwrap

DIM, DEPTH, HEADS, WIDTH = 64, 2, 2, 256
CONFIG = """
student:
  arch: vit_tiny_for_tests
  patch_size: 16
  drop_path_rate: 0.2
  layerscale: 1.0e-05
  patch_drop: 0.0
  pretrained_weights: ''
  ffn_layer: mlp
  ffn_ratio: 4.0
  resume_from_teacher_chkpt: '/nowhere/teacher_checkpoint.pth'
  qkv_bias: true
  proj_bias: true
  ffn_bias: true
  norm_layer: layernormbf16
  n_storage_tokens: 0
  mask_k_bias: false
  in_chans: 5
  patch_embed_strategy: inflate
  pos_embed_type: ropenew
  pos_embed_rope_base: 100.0
  pos_embed_rope_min_period: null
  pos_embed_rope_max_period: null
  pos_embed_rope_normalize_coords: separate
  pos_embed_rope_rescale_coords: 2
  pos_embed_rope_dtype: fp32
teacher:
  momentum_teacher: 0.992
  in_chans: 5
crops:
  global_crops_size: 256
  rgb_mean: [0.1, 0.2, 0.3, 0.4, 0.5]
  rgb_std: [0.5, 0.4, 0.3, 0.2, 0.1]
"""


@pytest.fixture(scope="module", autouse=True)
def tiny_arch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dino.ARCHS, "vit_tiny_for_tests", (DIM, DEPTH, HEADS, 4.0))
        patch.setitem(dino.DINOV3, "tiny16", dino.DinoArch(DIM, DEPTH, HEADS, WIDTH))
        yield


def authors_state(channels: int = 5, storage: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the authors' names, a key bias among them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, mean=0.0, std=0.1):
        return mean + std * torch.randn(*shape, generator=generator)

    state = {
        "cls_token": normal(1, 1, DIM),
        "mask_token": normal(1, DIM),
        "patch_embed.proj.weight": normal(DIM, channels, 16, 16, std=0.05),
        "patch_embed.proj.bias": normal(DIM),
        "norm.weight": normal(DIM, mean=1.0),
        "norm.bias": normal(DIM),
    }
    if storage:
        state["storage_tokens"] = normal(1, storage, DIM)
    for i in range(DEPTH):
        for name, (rows, cols) in {
            "attn.qkv": (3 * DIM, DIM),
            "attn.proj": (DIM, DIM),
            "mlp.fc1": (WIDTH, DIM),
            "mlp.fc2": (DIM, WIDTH),
        }.items():
            state[f"blocks.{i}.{name}.weight"] = normal(rows, cols, std=cols**-0.5)
            state[f"blocks.{i}.{name}.bias"] = normal(rows, std=0.5)
        for name in ("norm1", "norm2"):
            state[f"blocks.{i}.{name}.weight"] = normal(DIM, mean=1.0)
            state[f"blocks.{i}.{name}.bias"] = normal(DIM)
        for name in ("ls1", "ls2"):
            state[f"blocks.{i}.{name}.gamma"] = normal(DIM, mean=1.0)
    return state


def patches(s: dict[str, Tensor], x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, D, h, w], by one kernel, or by one per channel and their fusion."""

    def conv(x, name):
        return F.conv2d(
            x, s[f"patch_embed.{name}.weight"], s[f"patch_embed.{name}.bias"], stride=16
        )

    if "patch_embed.proj.weight" in s:
        return conv(x, "proj")
    features = [conv(x[:, c : c + 1], f"per_channel_proj.{c}") for c in range(x.shape[1])]
    means = torch.stack([f.mean(dim=(1, 2, 3)) for f in features], dim=1)
    sums = []
    for mixer in ("fuse_mlp", "fuse_mlp_a", "fuse_mlp_b"):
        name = f"patch_embed.{mixer}"
        if f"{name}.0.weight" not in s:
            continue
        hidden = (means @ s[f"{name}.0.weight"].T + s[f"{name}.0.bias"]).clamp_min(0)
        logits = hidden @ s[f"{name}.2.weight"].T + s[f"{name}.2.bias"]
        weights = 1 / (1 + (-logits).exp())
        sums.append(
            sum(w[:, None, None, None] * f for w, f in zip(weights.T, features, strict=True))
        )
    if len(sums) == 1:
        return sums[0]
    gate = s["patch_embed.combine_gate"].clamp(0, 1)
    return gate * sums[0] + (1 - gate) * sums[1]


def reference(
    s: dict[str, Tensor],
    x: Tensor,
    *,
    periods: Tensor | None = None,
    eps: float = 1e-5,
    mask_k: bool = False,
    rope: torch.dtype = torch.float32,
) -> Tensor:
    """Post-norm tokens [B, T, D] of a DINOv3 ViT in float64, except for the stated angle format."""
    s, x = {k: v.double() for k, v in s.items()}, x.double()
    grid, head = x.shape[-1] // 16, DIM // HEADS
    y = patches(s, x)
    y = y.flatten(2).transpose(1, 2)
    prefix = torch.cat([s["cls_token"], s.get("storage_tokens", torch.zeros(1, 0, DIM))], dim=1)
    y = torch.cat([prefix.expand(len(x), -1, -1), y], dim=1)

    if periods is None:
        periods = 100.0 ** (torch.arange(head // 4).to(rope) * 2 / (head // 2))
    angles = torch.zeros(y.shape[1], head, dtype=torch.float64)
    for p in range(grid * grid):
        row, column = p // grid, p % grid
        for axis, index in enumerate((row, column)):
            coordinate = 2 * (torch.tensor(index + 0.5).to(rope) / grid) - 1
            span = slice(axis * head // 4, (axis + 1) * head // 4)
            angles[prefix.shape[1] + p, span] = (
                2 * math.pi * coordinate / periods.to(rope)
            ).double()
    angles[:, head // 2 :] = angles[:, : head // 2]
    cos, sin = angles.cos(), angles.sin()
    if rope != torch.float32:  # the table itself has that format too
        cos, sin = angles.to(rope).cos().double(), angles.to(rope).sin().double()

    def rotate(t):  # [B, heads, T, head]
        first, second = t.chunk(2, dim=-1)
        return t * cos + torch.cat([-second, first], dim=-1) * sin

    def norm(t, name):
        return F.layer_norm(t, (DIM,), s[f"{name}.weight"], s[f"{name}.bias"], eps)

    def linear(t, name):
        return F.linear(t, s[f"{name}.weight"], s[f"{name}.bias"])

    for i in range(DEPTH):
        b = f"blocks.{i}"
        bias = s[f"{b}.attn.qkv.bias"].clone()
        if mask_k:
            bias[DIM : 2 * DIM] = 0
        qkv = F.linear(norm(y, f"{b}.norm1"), s[f"{b}.attn.qkv.weight"], bias)
        q, k, v = qkv.unflatten(2, (3, HEADS, head)).permute(2, 0, 3, 1, 4)
        attention = (rotate(q) @ rotate(k).transpose(-1, -2) / math.sqrt(head)).softmax(dim=-1)
        mixed = (attention @ v).transpose(1, 2).flatten(2)
        y = y + s[f"{b}.ls1.gamma"] * linear(mixed, f"{b}.attn.proj")
        hidden = F.gelu(linear(norm(y, f"{b}.norm2"), f"{b}.mlp.fc1"))
        y = y + s[f"{b}.ls2.gamma"] * linear(hidden, f"{b}.mlp.fc2")
    return norm(y, "norm").float()


def images(count: int, channels: int, size: int = 64) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(9))


def engine_of(spec, weights, **options):
    options = {"size": 64, "precision": "fp32", "batch_size": 2, "device": "cpu", **options}
    return load_engine(spec, weights=weights, **options)


def close(ours: Tensor, expected: Tensor) -> None:
    assert (ours - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.fixture
def config(tmp_path):
    """Writes CONFIG with replacements and returns its spec."""

    def write(*replacements: tuple[str, str]) -> str:
        text = CONFIG
        for old, new in replacements:
            assert text.count(old) >= 1
            text = text.replace(old, new)
        (tmp_path / "config.yaml").write_text(text)
        return f"dinov3:{tmp_path / 'config.yaml'}"

    return write


@pytest.fixture
def save(tmp_path):
    def write(content, name="weights.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


def teacher(state: dict[str, Tensor]) -> dict:
    """A training checkpoint: the teacher's backbone and heads, the student beside it, a counter."""
    wrapped = {f"backbone.{k}": v for k, v in state.items()}
    heads = {"dino_head.mlp.0.weight": torch.zeros(2, 2), "ibot_head.last.weight": torch.zeros(2)}
    student = {f"backbone.{k}": torch.zeros_like(v) for k, v in state.items()}
    return {"teacher": {**wrapped, **heads}, "student": student, "iteration": 3}


# --- configurations ---------------------------------------------------------------------------


def test_five_channel_teacher_without_storage_tokens(config, save):
    state = authors_state()
    engine = engine_of(config(), save(teacher(state)), channels=5, output="tokens")
    x = images(2, 5)
    assert engine.prefix_tokens == 1
    close(engine(x), reference(state, x))
    # The key bias is part of this model: without it the features are others.
    assert (engine(x) - reference(state, x, mask_k=True)).abs().max() > 1e-2
    assert engine.contract.mean == (0.1, 0.2, 0.3, 0.4, 0.5)
    assert engine.contract.std == (0.5, 0.4, 0.3, 0.2, 0.1)
    assert engine.contract.channel_map == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("strategy", ["channelvit", "dichavit"])
@pytest.mark.parametrize("gate", [0.3, 1.7])
def test_channels_that_are_fused(config, save, strategy, gate):
    """The CPJUMP1 configuration's own patch embedding: a kernel per channel, fused by content."""
    state = authors_state()
    generator = torch.Generator().manual_seed(5)
    del state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    for c in range(5):
        name = f"patch_embed.per_channel_proj.{c}"
        state[f"{name}.weight"] = 0.1 * torch.randn(DIM, 1, 16, 16, generator=generator)
        state[f"{name}.bias"] = torch.randn(DIM, generator=generator)
    for mixer in ("fuse_mlp",) if strategy == "channelvit" else ("fuse_mlp_a", "fuse_mlp_b"):
        name = f"patch_embed.{mixer}"
        state[f"{name}.0.weight"] = 20 * torch.randn(32, 5, generator=generator)
        state[f"{name}.0.bias"] = torch.randn(32, generator=generator)
        state[f"{name}.2.weight"] = torch.randn(5, 32, generator=generator)
        state[f"{name}.2.bias"] = torch.randn(5, generator=generator)
    if strategy == "dichavit":
        state["patch_embed.combine_gate"] = torch.tensor([gate])
    engine = engine_of(
        config(("inflate", strategy)), save(teacher(state)), channels=5, output="tokens"
    )
    x = images(2, 5)
    close(engine(x), reference(state, x))
    alone = engine(x[1:])
    assert torch.equal(alone[0], engine(x)[1])  # the fusion weights are the image's own
    with pytest.raises(ValueError, match="per_channel_proj"):
        engine_of(config(("inflate", strategy)), save(authors_state()), channels=5)


@pytest.mark.parametrize(
    ("replacements", "oracle"),
    [
        ([("mask_k_bias: false", "mask_k_bias: true")], {"mask_k": True}),
        ([("layernormbf16", "layernorm")], {"eps": 1e-6}),
        ([("rope_dtype: fp32", "rope_dtype: bf16")], {"rope": torch.bfloat16}),
        (
            [("min_period: null", "min_period: 0.5"), ("max_period: null", "max_period: 90.0")],
            {"periods": 0.5 * 180 ** torch.linspace(0, 1, 8)},
        ),
    ],
)
def test_model_keys_change_the_model(config, save, replacements, oracle):
    # Small activations, so that the epsilon of a norm is seen.
    state = {
        k: v * (0.01 if "token" in k or "patch_embed" in k else 1)
        for k, v in authors_state().items()
    }
    path, x = save(state), images(2, 5)
    changed = engine_of(config(*replacements), path, channels=5, output="tokens")
    close(changed(x), reference(state, x, **oracle))
    plain = engine_of(config(), path, channels=5, output="tokens")
    assert (changed(x) - plain(x)).abs().max() > 1e-4
    assert changed.settings()["architecture"] != plain.settings()["architecture"]


def test_periods_of_the_file_are_used(config, save):
    state = authors_state()
    periods = (100.0 ** (torch.arange(8) * 2 / 16)).bfloat16()
    path = save({**state, "rope_embed.periods": periods})
    x = images(2, 5)
    close(
        engine_of(config(), path, channels=5, output="tokens")(x),
        reference(state, x, periods=periods.float()),
    )
    with pytest.raises(ValueError, match=r"periods must be \[8\].*got \[4\]"):
        engine_of(config(), save({**state, "rope_embed.periods": periods[:4]}), channels=5)


def test_rgb_weights_under_a_five_channel_configuration_are_inflated(config, save):
    state = authors_state(channels=3)
    engine = engine_of(config(), save(state), channels=5, output="tokens")
    kernel = state["patch_embed.proj.weight"]
    mean = kernel.mean(dim=1, keepdim=True)
    wide = {**state, "patch_embed.proj.weight": torch.cat([kernel, mean, mean], dim=1)}
    x = images(2, 5)
    close(engine(x), reference(wide, x))
    with pytest.raises(ValueError, match=r"channels must be 5, .* got 3"):
        engine_of(config(), save(state), channels=3)
    with pytest.raises(ValueError, match="takes 4 channels, the configuration says in_chans 5"):
        engine_of(config(), save(authors_state(channels=4)), channels=5)


def test_storage_tokens_must_agree(config, save):
    with pytest.raises(
        ValueError, match="has 4 storage tokens and the model 0; set n_storage_tokens: 4"
    ):
        engine_of(config(), save(authors_state(storage=4)), channels=5)
    with pytest.raises(ValueError, match=r"has 0 storage tokens and the model 4.*config\.yaml"):
        engine_of("dinov3:tiny16", save(authors_state(channels=3)))


def test_raw_intensity_statistics_are_refused(config, save):
    raw = ("[0.1, 0.2, 0.3, 0.4, 0.5]", "[2302.6, 2262.1, 4284.0, 2382.8, 1496.6]")
    path = save(authors_state())
    with pytest.raises(ValueError, match=r"2302\.6.*raw intensities.*normalize='none'"):
        engine_of(config(raw), path, channels=5)
    engine = engine_of(config(raw), path, channels=5, normalize="none")
    assert engine.contract.mean == (0.0,) * 5 and engine.contract.std == (1.0,) * 5


@pytest.mark.parametrize(
    ("replacement", "message"),
    [
        (("  patch_drop: 0.0", "  patch_dorp: 0.0"), "unknown key.*patch_dorp"),
        (
            ("inflate", "hyenavit"),
            "patch_embed_strategy must be one of .*inflate.*channelvit.* got 'hyenavit'",
        ),
        (
            ("arch: vit_tiny_for_tests", "arch: convnext_tiny"),
            "student.arch must be one of vit_small",
        ),
        (("layernormbf16", "rmsnorm"), "norm_layer must be one of layernorm, layernormbf16"),
        (("ropenew", "learned"), "pos_embed_type must be one of"),
        (("proj_bias: true", "proj_bias: false"), "proj_bias must be one of"),
        (("  in_chans: 5\ncrops", "  in_chans: 3\ncrops"), "must agree"),
        (("min_period: null", "min_period: 1.0"), "given together"),
        (("[0.5, 0.4, 0.3, 0.2, 0.1]", "[0.5, 0.4]"), "in_chans=5 values, got 5 and 2"),
        (("student:", "pupil:"), "has a `student` section"),
    ],
)
def test_configurations_that_are_not_understood_are_refused(config, replacement, message):
    with pytest.raises(ValueError, match=message):
        dino_yaml.read_dino_yaml(config(replacement).removeprefix("dinov3:"))


def test_missing_configuration(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        load_engine(f"dinov3:{tmp_path}/none.yaml", weights="x.pth")


@pytest.mark.parametrize(
    ("arch", "layer", "ratio", "width"),
    [
        ("vit_small", "mlp", 4.0, 1536),
        ("vit_small", "swiglu", 6.0, 1536),
        ("vit_huge2", "swiglu", 6.0, 5120),
        ("vit_7b", "swiglu64", 3.0, 8192),
        ("vit_so400m", "mlp", 4.0, 4352),
        ("vit_so400m", "swiglu", 4.0, 2904),
        ("vit_so400m", "swiglu64", 4.0, 2944),
    ],
)
def test_ffn_widths(config, arch, layer, ratio, width):
    spec = config(
        ("arch: vit_tiny_for_tests", f"arch: {arch}"),
        ("ffn_layer: mlp", f"ffn_layer: {layer}"),
        ("ffn_ratio: 4.0", f"ffn_ratio: {ratio}"),
    )
    assert dino_yaml.read_dino_yaml(spec.removeprefix("dinov3:"))[0].ffn == width


def test_odd_ffn_width_survives_timms_rounding():
    assert int(56 * (61 / 56)) == 60
    model = dino.build_dinov3(dino.DinoArch(dim=56, depth=1, heads=7, ffn=61), (32, 32))
    assert model.blocks[0].mlp.fc1.out_features == 61


# --- files ------------------------------------------------------------------------------------


def test_wrappers_and_prefixes_come_off():
    state = {"a": torch.ones(1), "b.c": torch.zeros(1)}
    for wrapped in (
        state,
        {"teacher": state, "student": {"a": torch.zeros(1)}},
        {"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
        {"state_dict": {f"module.backbone._orig_mod.{k}": v for k, v in state.items()}},
        {
            "model": {
                f"{w}.backbone.{k}": v * (w == "teacher")
                for k, v in state.items()
                for w in ("student", "teacher")
            }
        },
    ):
        found = unwrap(wrapped)
        assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)


def test_what_is_not_a_state_dict_is_refused(save, tmp_path):
    with pytest.raises(ValueError, match="'epoch' is a int"):
        unwrap({"a": torch.ones(1), "epoch": 3})
    with pytest.raises(ValueError, match=r"it is empty"):
        unwrap({"model": {}})
    with pytest.raises(ValueError, match="must hold a state dict, got list"):
        read_weights(save([torch.ones(1)]))
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*absent\.pth"):
        read_weights(tmp_path / "absent.pth")
    (tmp_path / "weights.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must end in one of .*\.pth"):
        read_weights(tmp_path / "weights.npz")


def test_code_in_a_pickle_does_not_run(tmp_path):
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"model": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="not a readable PyTorch weight file"):
        read_weights(tmp_path / "evil.pth")
    assert not marker.exists()


def test_folders_and_shards(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "model-00002-of-00002.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    state, digest = read_weights(tmp_path)
    assert sorted(state) == ["a", "b"] and state["a"].sum() == 2
    files = sorted(tmp_path.glob("*.safetensors"))
    assert digest == hash_files(files[::-1]) != hash_files(files[:1])
    save_file({"c": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"holds 3 \.safetensors files"):
        read_weights(tmp_path)


def save_dcp(content: dict, folder) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(content, checkpoint_id=folder, no_dist=True)


@pytest.mark.parametrize("wrapped", ["teacher.backbone.", "backbone."])
def test_distributed_checkpoints(config, save, tmp_path, wrapped):
    """A DCP folder of the training code gives what the same weights in one file give."""
    state = authors_state()
    model = {f"{wrapped}{k}": v for k, v in state.items()}
    model |= {f"student.backbone.{k}": torch.zeros_like(v) for k, v in state.items()}
    content = {"model": model, "optimizer": {"state": {"x": torch.zeros(3)}}, "iteration": 7}
    if wrapped == "backbone.":
        content = {"model": {f"backbone.{k}": v for k, v in state.items()}}
    save_dcp(content, tmp_path / "ckpt")
    x = images(2, 5)
    engine = engine_of(config(), tmp_path / "ckpt", channels=5)
    assert torch.equal(engine(x), engine_of(config(), save(state), channels=5)(x))
    assert engine.weights_id == hash_files(sorted((tmp_path / "ckpt").iterdir()))


def test_distributed_checkpoints_run_no_code_and_leave_no_folder(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    save_dcp({"model": {"backbone.a": torch.ones(3)}}, tmp_path / "ckpt")
    metadata = tmp_path / "ckpt" / ".metadata"
    good = metadata.read_bytes()
    metadata.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"not readable as metadata.*names posix\.system"):
        read_weights(tmp_path / "ckpt")
    assert not (tmp_path / "ran").exists()
    metadata.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match="not readable as metadata"):
        read_weights(tmp_path / "ckpt")
    shard = next((tmp_path / "ckpt").glob("*.distcp"))
    name = shard.name.encode()
    metadata.write_bytes(good.replace(name, b"../" + name[3:]))
    with pytest.raises(ValueError, match="outside of it"):
        read_weights(tmp_path / "ckpt")
    metadata.write_bytes(good)
    shard.write_bytes(shard.read_bytes()[:40])
    with pytest.raises(ValueError, match="damaged distributed checkpoint"):
        read_weights(tmp_path / "ckpt")


def test_weights_id_is_the_sha256_of_the_file(config, save):
    path = save(authors_state())
    engine = engine_of(config(), path, channels=5)
    assert engine.weights_id == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_mismatch_names_the_tensors(config, save):
    state = authors_state()
    del state["norm.bias"], state["blocks.1.ls2.gamma"]
    state["blocks.0.mlp.fc1.weight"] = torch.zeros(100, DIM)
    state["blocks.9.norm1.weight"] = torch.zeros(DIM)
    with pytest.raises(ValueError) as error:
        engine_of(config(), save(state), channels=5)
    for part in (
        "1 with another shape: blocks.0.mlp.fc1.weight is [100, 64] in the file and [256, 64] in ",
        "2 missing: ",
        "norm.bias",
        "blocks.1.gamma_2",
        "1 unexpected: blocks.9.norm1.weight",
    ):
        assert part in str(error.value)


def test_a_long_mismatch_is_cut_short_with_its_count():
    with pytest.raises(ValueError, match=r"12 unexpected: x0, x1, x2, x3, \.\.$"):
        load_state(torch.nn.Identity(), {f"x{i}": torch.ones(1) for i in range(12)}, "file")


def test_transformers_mismatch_is_told_too_and_only_by_the_error(tmp_path, caplog):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    config = transformers.DINOv3ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    transformers.DINOv3ViTModel(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    state.pop("norm.weight")
    state["norm.bias"] = torch.zeros(65)
    state["surplus"] = torch.zeros(1)
    save_file(state, file, metadata={"format": "pt"})
    library = logging.getLogger("transformers")  # it does not propagate to the root logger
    library.addHandler(caplog.handler)
    try:
        with pytest.raises(ValueError) as error:
            engine_of(f"transformers:{tmp_path}", None, normalize="none")
    finally:
        library.removeHandler(caplog.handler)
    assert not caplog.records
    for part in (
        "norm.bias is [65] in the file and [64] in the model",
        "1 missing: norm.weight",
        "1 unexpected: surplus",
    ):
        assert part in str(error.value)


def test_authors_layout_is_refused_by_timm(save):
    state = authors_state(channels=3, storage=4)
    with pytest.raises(ValueError, match=r"authors' layout.*dinov3:NAME"):
        engine_of("timm:vit_small_patch16_dinov3", save(state))


def test_nothing_is_printed(config, save, capfd):
    engine_of(config(), save(teacher(authors_state())), channels=5)(images(1, 5))
    assert capfd.readouterr() == ("", "")
