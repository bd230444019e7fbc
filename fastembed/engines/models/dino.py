"""DINOv2 and DINOv3 from the authors' own weight files, on timm's modules.

Both published layouts are renamed here, tensor by tensor, and then loaded strictly: timm's
converters recognise a DINOv3 file by its storage tokens (a file may have none), drop key biases,
and resample DINOv2's position table in another way than the authors' hub code does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .backbone import Size
from .channels import FusedChannels
from .weights import hollow

# arch: (dim, depth, heads, FFN ratio), as in the training code of DINOv3.
ARCHS = {
    "vit_small": (384, 12, 6, 4.0),
    "vit_base": (768, 12, 12, 4.0),
    "vit_large": (1024, 24, 16, 4.0),
    "vit_so400m": (1152, 27, 18, 3.777777778),
    "vit_huge2": (1280, 32, 20, 4.0),
    "vit_giant2": (1536, 40, 24, 4.0),
    "vit_7b": (4096, 40, 32, 3.0),
}


@dataclass(frozen=True)
class DinoArch:
    """One DINOv3-style ViT, as far as inference needs to know it."""

    dim: int
    depth: int
    heads: int
    ffn: int
    swiglu: bool = False
    patch_size: int = 16
    in_chans: int = 3
    storage_tokens: int = 4
    layerscale: bool = True
    qkv_bias: bool = True
    mask_k_bias: bool = True
    norm_eps: float = 1e-5
    rope_base: float | None = 100.0
    rope_periods: tuple[float, float] | None = None
    rope_coords: str = "separate"
    rope_dtype: str = "fp32"
    patch_embedding: str = "inflate"


def ffn_width(dim: int, ratio: float, layer: str) -> int:
    """FFN hidden width: dim*ratio, or for `swiglu[N]` two thirds of it, rounded up to N (8)."""
    hidden = int(dim * ratio)
    if layer == "mlp":
        return hidden
    align = int(layer.removeprefix("swiglu") or 8)
    hidden = int(hidden * 2 / 3)
    return hidden + (-hidden % align)


def _published(arch: str, ratio: float | None = None, layer: str = "mlp", **options) -> DinoArch:
    dim, depth, heads, own_ratio = ARCHS[arch]
    width = ffn_width(dim, ratio or own_ratio, layer)
    return DinoArch(dim, depth, heads, width, swiglu=layer != "mlp", **options)


DINOV3 = {
    "vits16": _published("vit_small"),
    "vits16plus": _published("vit_small", 6.0, "swiglu"),
    "vitb16": _published("vit_base"),
    "vitl16": _published("vit_large"),
    "vith16plus": _published("vit_huge2", 6.0, "swiglu"),
    "vit7b16": _published("vit_7b", 3.0, "swiglu64", qkv_bias=False),
}

# name: (timm architecture, registers)
DINOV2 = {
    f"vit{letter}14{suffix}": (f"vit_{size}_patch14_{reg}dinov2", bool(suffix))
    for letter, size in (("s", "small"), ("b", "base"), ("l", "large"), ("g", "giant"))
    for suffix, reg in (("", ""), ("_reg", "reg4_"))
}


def grid_of(size: Size, patch: int) -> Size:
    """Patches down and across."""
    return size[0] // patch, size[1] // patch


def build_dinov3(arch: DinoArch, size: Size) -> nn.Module:
    """A timm `Eva` of this architecture for input of `size`, its weights still to be written."""
    from timm.layers import LayerNorm
    from timm.models.eva import Eva

    model = hollow(
        Eva,
        img_size=size,
        patch_size=arch.patch_size,
        in_chans=arch.in_chans,
        num_classes=0,
        global_pool="token",
        embed_dim=arch.dim,
        depth=arch.depth,
        num_heads=arch.heads,
        # One fused qkv with a full bias: with RoPE a key bias does not cancel in the softmax, and a
        # model trained without its mask has one.
        attn_type="rope",
        qkv_bias=arch.qkv_bias,
        # timm truncates dim * mlp_ratio; the half keeps rounding from losing a unit.
        mlp_ratio=(arch.ffn + 0.5) / arch.dim,
        swiglu_mlp=arch.swiglu,
        swiglu_align_to=1 if arch.swiglu else 0,
        norm_layer=partial(LayerNorm, eps=arch.norm_eps),
        init_values=1.0 if arch.layerscale else None,
        class_token=True,
        num_reg_tokens=arch.storage_tokens,
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        rope_type="dinov3",
        rope_rotate_half=True,
        use_fc_norm=False,
        dynamic_img_size=False,
    )
    if arch.patch_embedding != "inflate":
        model.patch_embed.proj = FusedChannels(
            arch.patch_embedding, arch.in_chans, arch.dim, arch.patch_size
        )
    set_rope(model, arch, grid_of(size, arch.patch_size))
    return model


def set_rope(model: nn.Module, arch: DinoArch, grid: Size, periods: Tensor | None = None) -> None:
    """Give the model its rotation table [patches, 2*head_dim] (sin, cos), in float32.

    The angles are formed in the architecture's own number format and with the checkpoint's periods
    when it has them (the published files keep them rounded to bfloat16), as the authors' code does.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arch.rope_dtype]
    quarter = arch.dim // arch.heads // 4
    if periods is not None and periods.shape != (quarter,):
        raise ValueError(
            f"rope_embed.periods must be [{quarter}] for {arch.heads} heads of {4 * quarter}, "
            f"got {list(periods.shape)}"
        )
    if periods is None:
        if arch.rope_periods is not None:
            low, high = arch.rope_periods
            periods = low * (high / low) ** torch.linspace(0, 1, quarter, dtype=dtype)
        else:
            periods = arch.rope_base ** (2 * torch.arange(quarter, dtype=dtype) / (2 * quarter))
    divide = {"min": (min(grid),) * 2, "max": (max(grid),) * 2}.get(arch.rope_coords, grid)
    sides = [torch.arange(0.5, n, dtype=dtype) / by for n, by in zip(grid, divide, strict=True)]
    coords = 2.0 * torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, 1) - 1.0
    angles = (2 * math.pi * coords[:, :, None] / periods.to(dtype)).flatten(1).tile(2)
    table = torch.cat([angles.sin(), angles.cos()], dim=-1).float()
    model.rope.register_buffer("periods", periods.float(), persistent=False)
    model.rope.register_buffer("pos_embed_cached", table, persistent=False)


_DINOV3_RENAMES = (
    ("storage_tokens", "reg_token"),
    ("ls1.gamma", "gamma_1"),
    ("ls2.gamma", "gamma_2"),
    ("mlp.w1.", "mlp.fc1_g."),
    ("mlp.w2.", "mlp.fc1_x."),
    ("mlp.w3.", "mlp.fc2."),
    ("patch_embed.per_channel_proj.", "patch_embed.proj.per_channel_proj."),
    ("patch_embed.fuse_mlp", "patch_embed.proj.fuse_mlp"),
    ("patch_embed.combine_gate", "patch_embed.proj.combine_gate"),
)
# Unused at inference by design: the mask token, the norm of local crops, the projection heads.
_UNUSED = ("mask_token", "local_cls_norm.", "dino_head.", "ibot_head.")


def convert_dinov3(
    state: Mapping[str, Tensor], arch: DinoArch
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The authors' DINOv3 names as timm's, and the RoPE periods of the file, if it has them.

    A key bias that is masked (by the file's `bias_mask` or by the configuration) is written as
    zeros.
    """
    masked = arch.mask_k_bias or any(k.endswith(".qkv.bias_mask") for k in state)
    out, periods = {}, None
    for name, value in state.items():
        if name.endswith("rope_embed.periods"):
            periods = value.float()
            continue
        if name.startswith(_UNUSED) or name.endswith(".bias_mask"):
            continue
        if masked and name.endswith(".qkv.bias"):
            value = value.clone()
            value[value.numel() // 3 : 2 * value.numel() // 3] = 0
        for old, new in _DINOV3_RENAMES:
            name = name.replace(old, new)
        out[name] = value
    return out, periods


def build_dinov2(name: str, size: Size, in_chans: int) -> nn.Module:
    """timm's DINOv2 of this name for input of `size`, its weights still to be written."""
    import timm

    return hollow(
        timm.create_model, DINOV2[name][0], img_size=size, in_chans=in_chans, num_classes=0
    )


def convert_dinov2(state: Mapping[str, Tensor], registers: bool, grid: Size) -> dict[str, Tensor]:
    """The authors' DINOv2 names as timm's, positions resampled to the grid as their code does.

    Without registers: bicubic with the scales (grid + 0.1) / side; with registers: bicubic,
    antialiased, to the grid. Float32 throughout; at the native grid the table is used as it is.
    """
    out = {
        k.replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2."): v
        for k, v in state.items()
        if not k.startswith(_UNUSED)
    }
    if "pos_embed" not in out or "cls_token" not in out:
        return out  # the strict load names what is missing
    table = out["pos_embed"].float()
    cls, patches = table[:, :1], table[:, 1:]
    side = math.isqrt(patches.shape[1])
    if (side, side) != grid and side * side == patches.shape[1]:
        patches = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        if registers:
            patches = nn.functional.interpolate(patches, size=grid, mode="bicubic", antialias=True)
        else:
            # The 0.1 is the authors' guard against rounding; it also shifts the sampling positions.
            scales = [(count + 0.1) / side for count in grid]
            patches = nn.functional.interpolate(patches, scale_factor=scales, mode="bicubic")
        patches = patches.permute(0, 2, 3, 1).flatten(1, 2)
    if registers:
        # timm adds positions to patches only, so the class token carries its own here.
        out["reg_token"] = out.pop("register_tokens", torch.empty(0))
        out["cls_token"] = out["cls_token"] + cls
        out["pos_embed"] = patches
    else:
        out["pos_embed"] = torch.cat([cls, patches], dim=1)
    return out
