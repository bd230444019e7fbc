"""The models an engine can be made of: `KIND:NAME` to a backbone with weights and statistics."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..contract import Resize
from . import dino
from .backbone import (
    IMAGENET,
    Backbone,
    Size,
    check_size,
    own_resize,
    statistics,
    unknown,
)
from .channels import inflate_conv
from .dino_yaml import read_dino_yaml
from .hub import fetch_file
from .huggingface import build_transformers
from .openclip import build_openai, build_openclip
from .weights import load_state, randomize, read_weights


def build(spec: str, weights: str | Path | None, size: Size | None, seed: int) -> Backbone:
    """The backbone named by `spec` with its weights, in float32 on the CPU; `size` None is its own.

    Raises ValueError for an unknown kind or name, weights that do not fit, or a size that is not a
    multiple of the patch; ImportError naming the extra to install.
    """
    kind, colon, name = spec.partition(":")
    if not colon or not name:
        raise ValueError(
            f"spec must be KIND:NAME with KIND one of {', '.join(KINDS)}, got {spec!r}"
        )
    if kind not in KINDS:
        raise ValueError(unknown("kind of model", kind, KINDS))
    if not (weights is None or isinstance(weights, (str, Path))):
        raise TypeError(f"weights must be None, a path or 'random', got {type(weights).__name__}")
    if weights == "random":
        warnings.warn(
            f"{spec}: RANDOM weights (seed {seed}); the embeddings mean nothing, use this for "
            "plumbing and speed only",
            stacklevel=4,
        )
    # Construction draws initial values; the caller's generators stay as they were.
    with torch.random.fork_rng(devices=[]):
        return KINDS[kind](name, weights, size, seed)


def timm_backbone(model: nn.Module, size: Size, **facts) -> Backbone:
    """A timm ViT as a backbone."""
    final_norm = not isinstance(getattr(model, "norm", None), (nn.Identity, type(None)))

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = model.forward_features(x)
        return tokens, model.forward_head(tokens, pre_logits=True)

    return Backbone(
        module=model,
        forward=forward,
        blocks=model.blocks,
        conv=model.patch_embed.proj,
        size=size,
        dim=model.embed_dim,
        pooled_dim=model.num_features,
        prefix_tokens=model.num_prefix_tokens,
        class_token=getattr(model, "cls_token", None) is not None,
        has_tokens=final_norm,
        **facts,
    )


def require_path(kind: str, name: str, weights: str | Path | None) -> str | Path:
    """`weights`, which these kinds cannot fetch themselves."""
    if weights is None:
        raise ValueError(
            f"{kind}:{name} needs weights=PATH, the .pth file as its authors publish it (or "
            "weights='random' for plumbing)"
        )
    return weights


def _dinov3(name: str, weights: str | Path | None, size: Size | None, seed: int) -> Backbone:
    if name.endswith((".yaml", ".yml")):
        arch, mean, std = read_dino_yaml(name)
    elif name in dino.DINOV3:
        arch = dino.DINOV3[name]
        mean, std = statistics(Path(weights or "").name)
    else:
        raise ValueError(unknown("dinov3 model", name, [*dino.DINOV3, "/path/to/config.yaml"]))
    weights = require_path("dinov3", name, weights)
    size = size or (224, 224)
    check_size(size, arch.patch_size)

    if weights == "random":
        model = dino.build_dinov3(arch, size)
        randomize(model, seed)
        weights_id = f"random:{seed}"
    else:
        state, weights_id = read_weights(weights)
        state, periods = dino.convert_dinov3(state, arch)
        published = not name.endswith((".yaml", ".yml"))
        stored = replace(arch, in_chans=_stored_channels(state, arch, published))
        _check_storage_tokens(state, arch, weights)
        model = dino.build_dinov3(stored, size)
        load_state(model, state, weights)
        dino.set_rope(model, arch, dino.grid_of(size, arch.patch_size), periods)
        if not published and stored.in_chans != arch.in_chans:
            inflate_conv(model.patch_embed.proj, arch.in_chans)
    digest = hashlib.sha256(json.dumps(asdict(arch), sort_keys=True).encode()).hexdigest()
    return timm_backbone(
        model,
        size,
        mean=mean,
        std=std,
        resize=Resize("float-bilinear"),
        weights_id=weights_id,
        architecture=f"dinov3-{digest[:16]}",
    )


def _stored_channels(state: dict[str, Tensor], arch: dino.DinoArch, published: bool) -> int:
    """The file's input channels: any for a published name, RGB or its own for a configuration."""
    kernel = state.get("patch_embed.proj.weight")
    if kernel is None or kernel.ndim != 4:
        return arch.in_chans  # the strict load names it
    channels = kernel.shape[1]
    if published or channels in (3, arch.in_chans):
        return channels
    raise ValueError(
        f"the checkpoint takes {channels} channels, the configuration says in_chans {arch.in_chans}"
    )


def _check_storage_tokens(state: dict[str, Tensor], arch: dino.DinoArch, source: object) -> None:
    # The training code loads without strictness and would run the model without its registers.
    found = state["reg_token"].shape[1] if "reg_token" in state else 0
    if found != arch.storage_tokens:
        raise ValueError(
            f"{source} has {found} storage tokens and the model {arch.storage_tokens}; set "
            f"n_storage_tokens: {found} in the configuration (the published names have 4; another "
            "checkpoint is loaded as dinov3:/path/to/config.yaml)"
        )


def _dinov2(name: str, weights: str | Path | None, size: Size | None, seed: int) -> Backbone:
    if name not in dino.DINOV2:
        raise ValueError(unknown("dinov2 model", name, dino.DINOV2))
    weights = require_path("dinov2", name, weights)
    size = size or (224, 224)
    check_size(size, 14)
    if weights == "random":
        model = dino.build_dinov2(name, size, 3)
        randomize(model, seed)
        weights_id = f"random:{seed}"
    else:
        state, weights_id = read_weights(weights)
        state = dino.convert_dinov2(state, dino.DINOV2[name][1], dino.grid_of(size, 14))
        kernel = state.get("patch_embed.proj.weight")
        model = dino.build_dinov2(
            name, size, kernel.shape[1] if kernel is not None and kernel.ndim == 4 else 3
        )
        load_state(model, state, weights)
    return timm_backbone(
        model,
        size,
        mean=IMAGENET[0],
        std=IMAGENET[1],
        resize=own_resize("pillow-bicubic", (224, 224), 256, size),
        weights_id=weights_id,
        architecture=f"dinov2-{name}",
    )


def _timm(name: str, weights: str | Path | None, size: Size | None, seed: int) -> Backbone:
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(unknown("timm model", architecture, timm.list_models("vit*"), show=12))
    tags = [m.partition(".")[2] for m in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ValueError(unknown(f"weights tag of timm model {architecture}", tag, tags))
    config = timm.get_pretrained_cfg(name) if tag or tags else None
    own = tuple(config.input_size[1:]) if config else (224, 224)
    size = size or own
    options = {"img_size": size, "num_classes": 0}
    if "dinov3" in architecture:
        # The authors pool the class token; timm's own default is the patch mean. One input size is
        # all an engine has, so the rotation table is made once.
        options |= {"global_pool": "token", "dynamic_img_size": False}
    model = _timm_vit(architecture, options)
    check_size(size, model.patch_embed.proj.kernel_size[0])

    state, weights_id = None, f"random:{seed}"
    if weights != "random":
        if weights is None:
            if config is None or not config.hf_hub_id:
                raise ValueError(
                    f"timm:{name} has no published weights on the hub; pass weights=PATH or "
                    "weights='random'"
                )
            weights = fetch_file(config.hf_hub_id, config.hf_hub_filename or "model.safetensors")
        state, weights_id = read_weights(weights)
        if any(
            k.endswith(("rope_embed.periods", ".bias_mask")) or k == "storage_tokens" for k in state
        ):
            raise ValueError(
                f"{weights} is in its authors' layout, not timm's; load it as dinov3:NAME"
            )
        kernel = state.get("patch_embed.proj.weight")
        if kernel is not None and kernel.ndim == 4:
            if kernel.shape[1] != model.patch_embed.proj.in_channels:
                model = _timm_vit(architecture, {**options, "in_chans": kernel.shape[1]})
    if state is None:
        randomize(model, seed)
    else:
        # timm's own filter of this family resamples the position table to this size.
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        state = convert(state, model) if convert else state
        state = {k: v for k, v in state.items() if not k.startswith("head.")}
        load_state(model, state, weights)
    return timm_backbone(
        model,
        size,
        mean=tuple(config.mean) if config else None,
        std=tuple(config.std) if config else None,
        resize=_timm_resize(config, own, size),
        weights_id=weights_id,
        architecture=architecture,
    )


def _timm_resize(config, own: Size, size: Size) -> Resize:
    """timm's own evaluation transform: Pillow, a share of the image kept, or all of it squashed."""
    if config is None:
        return Resize("pillow-bicubic")
    if config.crop_mode not in ("center", "squash"):
        raise ValueError(f"timm's crop_mode {config.crop_mode!r} is not one of center, squash")
    shorter = math.floor(min(own) / config.crop_pct) if config.crop_mode == "center" else None
    return own_resize(f"pillow-{config.interpolation}", own, shorter, size)


def _timm_vit(architecture: str, options: dict) -> nn.Module:
    import timm

    refusal = (
        f"timm:{architecture} is not a ViT with patch tokens; engines take ViT-like models only"
    )
    try:
        model = timm.create_model(architecture, **options)
    except TypeError as error:  # a convolutional network takes no img_size
        raise ValueError(refusal) from error
    conv = getattr(getattr(model, "patch_embed", None), "proj", None)
    if not isinstance(conv, nn.Conv2d) or not hasattr(model, "num_prefix_tokens"):
        raise ValueError(refusal)
    return model


KINDS = {
    "openclip": build_openclip,
    "openai": build_openai,
    "transformers": build_transformers,
    "timm": _timm,
    "dinov3": _dinov3,
    "dinov2": _dinov2,
}
