"""Each model's named upstream implementation: what parity is measured against.

Weights are random but seeded and scaled like trained ones (`weights.randomize`); the upstream
model is saved in the layout that its authors publish, and that file is what the engine loads.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from .models.dino import DINOV2, DINOV3
from .models.huggingface import KNOWN
from .models.openclip import OPENAI
from .models.weights import randomize


@dataclass
class Upstream:
    """A library's own model and preprocessing.

    Attributes:
        origin: the library's name, version and class.
        module: in float32, on the CPU.
        prepare: an RGB image to [3, height, width] float32.
        embed: [B, 3, height, width] to [B, D].
        output: the engine's output that `embed` is compared with.
        size: of the input, (height, width).
        state: the weights as the model's authors lay them out, for a file.
    """

    origin: str
    module: nn.Module
    prepare: Callable[[Image.Image], Tensor]
    embed: Callable[[Tensor], Tensor]
    output: str
    size: tuple[int, int]
    state: Callable[[], dict[str, Tensor]]

    def save(self, folder: Path) -> Path:
        path = folder / "upstream.pth"
        torch.save(self.state(), path)
        return path


def upstream(spec: str, seed: int = 0) -> Upstream:
    """The upstream implementation of `spec`, with weights from `seed`.

    Raises ValueError for a spec that names none, ImportError where the library is missing.
    """
    kind, _, name = spec.partition(":")
    if kind not in _KINDS:
        raise ValueError(f"{spec} has no upstream implementation to compare with")
    found = _KINDS[kind](name)
    found.module.eval().requires_grad_(False)
    randomize(found.module, seed)
    return found


def _transformers(name: str) -> Upstream:
    import transformers

    if name not in KNOWN:
        raise ValueError(f"transformers:{name} is not one of {', '.join(KNOWN)}")
    from .models.huggingface import _CLASSES

    settings = KNOWN[name]
    config_class, model_class = (getattr(transformers, n) for n in _CLASSES[settings["model_type"]])
    model = model_class(config_class.from_dict(settings))
    clip = settings["model_type"] == "clip_vision_model"
    side = 224 if "dino" in settings["model_type"] else settings["image_size"]

    def embed(x: Tensor) -> Tensor:
        result = model(pixel_values=x)
        return result.image_embeds if clip else result.pooler_output

    processor = _processor(name, settings["model_type"], side)
    return Upstream(
        origin=f"transformers {version('transformers')} {model_class.__name__}",
        module=model,
        prepare=lambda image: processor(image, return_tensors="pt")["pixel_values"][0],
        embed=embed,
        output="pooled",
        size=(side, side),
        state=model.state_dict,
    )


def _processor(name: str, model_type: str, side: int):
    """The image processor with the settings that the model's repository publishes."""
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    square = {"height": side, "width": side}
    if model_type == "clip_vision_model":
        return _torchvision_backed("CLIPImageProcessor")(
            size={"shortest_edge": side}, crop_size=square
        )
    if model_type == "siglip_vision_model":
        resample = 2 if "siglip2" in name else 3
        return _torchvision_backed("SiglipImageProcessor")(size=square, resample=resample)
    if model_type == "dinov3_vit":
        sat = {"image_mean": [0.430, 0.411, 0.296], "image_std": [0.213, 0.156, 0.143]}
        return _torchvision_backed("DINOv3ViTImageProcessor")(**(sat if "sat493m" in name else {}))
    return _torchvision_backed("BitImageProcessor")(size={"shortest_edge": 256}, **imagenet)


def _torchvision_backed(name: str):
    """transformers 5 resizes with torchvision by itself; before, a class apart did."""
    import transformers

    older = int(version("transformers").partition(".")[0]) < 5
    return getattr(transformers, f"{name}Fast" if older else name)


def _openclip(name: str) -> Upstream:
    import open_clip

    name = name.removeprefix("hf-hub:")
    for model_name, tag in open_clip.list_pretrained():
        published = open_clip.get_pretrained_cfg(model_name, tag)
        repo = published.get("hf_hub", "").rstrip("/")
        if name in (repo, f"{model_name}/{tag}") or (name == model_name):
            break
    else:
        raise ValueError(f"openclip:{name} is not a model that open_clip publishes weights of")
    if published.get("quick_gelu") and "quickgelu" not in model_name:
        model_name += "-quickgelu"
    logging.disable(logging.WARNING)  # that there are no weights is meant so
    try:
        model = open_clip.create_model(model_name, pretrained=None, load_weights=False)
    finally:
        logging.disable(logging.NOTSET)
    keys = ("mean", "std", "interpolation", "resize_mode")
    side = open_clip.get_model_config(model_name)["vision_cfg"]["image_size"]
    transform = open_clip.image_transform(
        side, is_train=False, **{key: published[key] for key in keys}
    )
    return Upstream(
        origin=f"open_clip {version('open_clip_torch')} {model_name}",
        module=model,
        prepare=transform,
        embed=model.encode_image,
        output="pooled",
        size=(side, side),
        state=model.state_dict,
    )


def _openai(name: str) -> Upstream:
    if name not in OPENAI:
        raise ValueError(f"openai:{name} is not one of {', '.join(OPENAI)}")
    return _openclip(f"{OPENAI[name]}/openai")


def _timm(name: str) -> Upstream:
    import timm

    options = {"global_pool": "token"} if "dinov3" in name else {}
    model = timm.create_model(name, pretrained=False, num_classes=0, **options)
    settings = timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    return Upstream(
        origin=f"timm {version('timm')} {type(model).__name__}",
        module=model,
        prepare=timm.data.create_transform(**settings, is_training=False),
        embed=model,
        output="pooled",
        size=tuple(settings["input_size"][1:]),
        state=model.state_dict,
    )


def _dinov3(name: str) -> Upstream:
    if name not in DINOV3:
        raise ValueError(f"dinov3:{name} is not one of {', '.join(DINOV3)}")
    found = _transformers(f"facebook/dinov3-{name}-pretrain-lvd1689m")
    found.output = "cls"
    found.state = lambda: dinov3_authors_layout(found.module)
    return found


def _dinov2(name: str) -> Upstream:
    """At 518, where the two libraries need not resample positions, which they do differently."""
    from torchvision.transforms import v2

    if name not in DINOV2:
        raise ValueError(f"dinov2:{name} is not one of {', '.join(DINOV2)}")
    size = {"s": "small", "b": "base", "l": "large", "g": "giant"}[name[3]]
    registers = "with-registers-" if DINOV2[name][1] else ""
    found = _transformers(f"facebook/dinov2-{registers}{size}")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    found.prepare = v2.Compose([
        v2.Resize(592, v2.InterpolationMode.BICUBIC), v2.CenterCrop(518), v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std),
    ])  # fmt: skip
    found.output, found.size = "cls", (518, 518)
    found.state = lambda: dinov2_authors_layout(found.module)
    return found


_KINDS = {
    "transformers": _transformers,
    "openclip": _openclip,
    "openai": _openai,
    "timm": _timm,
    "dinov3": _dinov3,
    "dinov2": _dinov2,
}


def dinov3_authors_layout(model: nn.Module) -> dict[str, Tensor]:
    """A transformers DINOv3ViTModel's weights as facebookresearch/dinov3 names them."""
    s = model.state_dict()
    dim = model.config.hidden_size
    blocks = "model.layer" if "model.layer.0.norm1.weight" in s else "layer"
    out = {
        "cls_token": s["embeddings.cls_token"],
        "storage_tokens": s["embeddings.register_tokens"],
        "mask_token": s["embeddings.mask_token"][0],
        "patch_embed.proj.weight": s["embeddings.patch_embeddings.weight"],
        "patch_embed.proj.bias": s["embeddings.patch_embeddings.bias"],
        "norm.weight": s["norm.weight"],
        "norm.bias": s["norm.bias"],
        "rope_embed.periods": 1 / model.rope_embeddings.inv_freq,
        "local_cls_norm.weight": torch.ones(dim),
        "local_cls_norm.bias": torch.zeros(dim),
    }
    gated = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"}
    names = gated if model.config.use_gated_mlp else {"up_proj": "fc1", "down_proj": "fc2"}
    for i in range(model.config.num_hidden_layers):
        hf, our = f"{blocks}.{i}", f"blocks.{i}"
        out[f"{our}.attn.qkv.weight"] = _fused(s, f"{hf}.attention", "weight")
        bias = _fused(s, f"{hf}.attention", "bias")
        bias[dim : 2 * dim] = 7.0  # masked in the published files; whatever stands there is unused
        out[f"{our}.attn.qkv.bias"] = bias
        out[f"{our}.attn.qkv.bias_mask"] = torch.full((3 * dim,), math.nan)
        for kind in ("weight", "bias"):
            out[f"{our}.attn.proj.{kind}"] = s[f"{hf}.attention.o_proj.{kind}"]
            for n in ("norm1", "norm2"):
                out[f"{our}.{n}.{kind}"] = s[f"{hf}.{n}.{kind}"]
            for theirs, authors in names.items():
                out[f"{our}.mlp.{authors}.{kind}"] = s[f"{hf}.mlp.{theirs}.{kind}"]
        out[f"{our}.ls1.gamma"] = s[f"{hf}.layer_scale1.lambda1"]
        out[f"{our}.ls2.gamma"] = s[f"{hf}.layer_scale2.lambda1"]
    return out


def dinov2_authors_layout(model: nn.Module) -> dict[str, Tensor]:
    """A transformers Dinov2Model's weights as facebookresearch/dinov2 names them."""
    s = model.state_dict()
    out = {
        "cls_token": s["embeddings.cls_token"],
        "pos_embed": s["embeddings.position_embeddings"],
        "mask_token": s["embeddings.mask_token"],
        "patch_embed.proj.weight": s["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": s["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": s["layernorm.weight"],
        "norm.bias": s["layernorm.bias"],
    }
    if "embeddings.register_tokens" in s:
        out["register_tokens"] = s["embeddings.register_tokens"]
    swiglu = {"weights_in": "w12", "weights_out": "w3"}
    names = swiglu if model.config.use_swiglu_ffn else {"fc1": "fc1", "fc2": "fc2"}
    for i in range(model.config.num_hidden_layers):
        hf, our = f"encoder.layer.{i}", f"blocks.{i}"
        for kind in ("weight", "bias"):
            out[f"{our}.attn.qkv.{kind}"] = _fused(s, f"{hf}.attention", kind)
            out[f"{our}.attn.proj.{kind}"] = s[f"{hf}.attention.o_proj.{kind}"]
            for n in ("norm1", "norm2"):
                out[f"{our}.{n}.{kind}"] = s[f"{hf}.{n}.{kind}"]
            for theirs, authors in names.items():
                out[f"{our}.mlp.{authors}.{kind}"] = s[f"{hf}.mlp.{theirs}.{kind}"]
        out[f"{our}.ls1.gamma"] = s[f"{hf}.layer_scale1.lambda1"]
        out[f"{our}.ls2.gamma"] = s[f"{hf}.layer_scale2.lambda1"]
    return out


def _fused(state: Mapping[str, Tensor], block: str, kind: str) -> Tensor:
    """q, k, v of a transformers block as the authors' one tensor; an absent bias is zero."""
    parts = [state.get(f"{block}.{n}_proj.{kind}") for n in "qkv"]
    zeros = torch.zeros_like(next(p for p in parts if p is not None))
    return torch.cat([zeros if p is None else p for p in parts])
