"""`transformers:` models, hub or folder: DINOv2 (with registers or not), DINOv3, CLIP, SigLIP."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

from torch import Tensor, nn

from .backbone import Backbone, Size, check_size, own_resize, statistics, unknown
from .hub import fetch_model
from .weights import mismatch_report, randomize, read_weights

# model_type: (configuration class, model class)
_CLASSES = {
    "dinov2": ("Dinov2Config", "Dinov2Model"),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel"),
    "dinov3_vit": ("DINOv3ViTConfig", "DINOv3ViTModel"),
    "clip_vision_model": ("CLIPVisionConfig", "CLIPVisionModelWithProjection"),
    "siglip_vision_model": ("SiglipVisionConfig", "SiglipVisionModel"),
}
# A configuration of both towers, and the type of its vision part.
_TWO_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
# What such a checkpoint holds beside the vision tower.
_TEXT = ("text_model.", "text_projection.", "logit_scale", "logit_bias")


def _dinov2(kind: str, dim: int, depth: int, heads: int, **options) -> dict:
    return {
        "model_type": kind,
        "hidden_size": dim,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "patch_size": 14,
        "image_size": 518,
        "layer_norm_eps": 1e-6,
        **options,
    }


def _dinov3(dim: int, depth: int, heads: int, width: int, **options) -> dict:
    return {
        "model_type": "dinov3_vit",
        "hidden_size": dim,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": width,
        "patch_size": 16,
        "num_register_tokens": 4,
        **options,
    }


def _tower(kind: str, dims: tuple[int, int, int], patch: int, size: int, **options) -> dict:
    dim, depth, heads = dims
    return {
        "model_type": kind,
        "hidden_size": dim,
        "intermediate_size": 4 * dim,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "patch_size": patch,
        "image_size": size,
        **options,
    }


def _clip(dims: tuple[int, int, int], patch: int, size: int, projection: int) -> dict:
    return _tower("clip_vision_model", dims, patch, size, projection_dim=projection)


def _siglip(letter: str, patch: int, size: int) -> dict:
    if letter == "so400m":
        return _tower("siglip_vision_model", _SO400M, patch, size, intermediate_size=4304)
    return _tower("siglip_vision_model", {"base": _BASE, "large": _LARGE}[letter], patch, size)


_BASE, _LARGE, _SO400M = (768, 12, 12), (1024, 24, 16), (1152, 27, 16)
_GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
# Published dimensions, so that weights='random' or weights=PATH needs no network.
KNOWN: dict[str, dict] = {
    **{
        f"facebook/dinov2-{registers}{size}": _dinov2(kind, *dims)
        for registers, kind in (("", "dinov2"), ("with-registers-", "dinov2_with_registers"))
        for size, *dims in (("small", 384, 12, 6), ("base", 768, 12, 12), ("large", 1024, 24, 16))
    },
    "facebook/dinov2-giant": _dinov2("dinov2", 1536, 40, 24, use_swiglu_ffn=True),
    "facebook/dinov2-with-registers-giant": _dinov2(
        "dinov2_with_registers", 1536, 40, 24, use_swiglu_ffn=True
    ),
    "facebook/dinov3-vits16-pretrain-lvd1689m": _dinov3(384, 12, 6, 1536),
    "facebook/dinov3-vits16plus-pretrain-lvd1689m": _dinov3(384, 12, 6, 1536, **_GATED),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": _dinov3(768, 12, 12, 3072),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": _dinov3(1024, 24, 16, 4096),
    "facebook/dinov3-vitl16-pretrain-sat493m": _dinov3(1024, 24, 16, 4096),
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": _dinov3(1280, 32, 20, 5120, **_GATED),
    "facebook/dinov3-vit7b16-pretrain-lvd1689m": _dinov3(
        4096, 40, 32, 8192, query_bias=False, value_bias=False, **_GATED
    ),
    "facebook/dinov3-vit7b16-pretrain-sat493m": _dinov3(
        4096, 40, 32, 8192, query_bias=False, value_bias=False, **_GATED
    ),
    "openai/clip-vit-base-patch32": _clip(_BASE, 32, 224, 512),
    "openai/clip-vit-base-patch16": _clip(_BASE, 16, 224, 512),
    "openai/clip-vit-large-patch14": _clip(_LARGE, 14, 224, 768),
    "openai/clip-vit-large-patch14-336": _clip(_LARGE, 14, 336, 768),
    **{
        f"google/siglip-{size}-patch{patch}-{side}": _siglip(size, patch, side)
        for size, patch, sides in (
            ("base", 16, (224, 256, 384, 512)),
            ("large", 16, (256, 384)),
            ("so400m", 14, (224, 384)),
        )
        for side in sides
    },
    **{
        f"google/siglip2-{size}-patch{patch}-{side}": _siglip(size, patch, side)
        for size, patch, sides in (
            ("base", 16, (224, 256, 384, 512)),
            ("base", 32, (256,)),
            ("large", 16, (256, 384, 512)),
            ("so400m", 14, (224, 384)),
            ("so400m", 16, (256, 384, 512)),
        )
        for side in sides
    },
}

_OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# The numbers of Pillow's filters, as preprocessor_config.json writes them.
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def build_transformers(
    name: str, weights: str | Path | None, size: Size | None, seed: int
) -> Backbone:
    """The backbone of a hub id or of a folder with `config.json`; see `zoo.build`."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "this model needs transformers: pip install 'fastembed-vision[transformers]'"
        ) from error

    folder = _folder(name, weights)
    if folder is None and name not in KNOWN:
        raise ValueError(
            unknown("transformers model (its dimensions are not known offline)", name, KNOWN)
        )
    if folder is None:
        config_json = KNOWN[name]
        architecture = name
    else:
        raw = (folder / "config.json").read_bytes()
        config_json = json.loads(raw)
        architecture = f"config-{hashlib.sha256(raw).hexdigest()[:16]}"
    config_json = _vision_part(config_json)
    model_type = config_json.get("model_type")
    if model_type not in _CLASSES:
        supported = ", ".join([*_CLASSES, *_TWO_TOWERS])
        raise ValueError(f"transformers:{name} is a {model_type!r}; supported are {supported}")
    config_class, model_class = (getattr(transformers, n) for n in _CLASSES[model_type])
    config = config_class.from_dict(config_json)
    mean, std, own, filter, shorter = _preprocessing(name, folder, model_type, config)
    size = size or own
    check_size(size, config.patch_size)

    if weights == "random":
        model = model_class(config)
        randomize(model, seed)
        weights_id = f"random:{seed}"
    else:
        source = weights if weights is not None else folder
        model, weights_id = _load(model_class, config, source)

    modules = dict(model.named_modules())
    clip = model_type == "clip_vision_model"
    return Backbone(
        module=model,
        forward=_forward(model, model_type, config, size),
        blocks=next(
            m
            for m in modules.values()
            if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers
        ),
        conv=next(m for m in modules.values() if isinstance(m, nn.Conv2d)),
        size=size,
        dim=config.hidden_size,
        pooled_dim=config.projection_dim if clip else config.hidden_size,
        prefix_tokens=0
        if model_type == "siglip_vision_model"
        else 1 + getattr(config, "num_register_tokens", 0),
        class_token=model_type != "siglip_vision_model",
        mean=mean,
        std=std,
        resize=own_resize(filter, own, shorter, size),
        weights_id=weights_id,
        architecture=architecture,
        norm=model.vision_model.post_layernorm if clip else None,
        project=model.visual_projection if clip else None,
    )


def _vision_part(config: dict) -> dict:
    """The vision tower's configuration, where that of both towers is given."""
    kind = _TWO_TOWERS.get(config.get("model_type"))
    if kind is None:
        return config
    shared = {k: config[k] for k in ("projection_dim",) if k in config}
    return {**config.get("vision_config", {}), **shared, "model_type": kind}


def _forward(model: nn.Module, model_type: str, config, size: Size):
    # DINO models resample their positions by themselves, the others when they are told to.
    options = {}
    if model_type in _TWO_TOWERS.values() and size != (config.image_size,) * 2:
        options["interpolate_pos_encoding"] = True
    pooled = "image_embeds" if model_type == "clip_vision_model" else "pooler_output"

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        result = model(pixel_values=x, **options)
        return result.last_hidden_state, getattr(result, pooled)

    return forward


def _folder(name: str, weights: str | Path | None) -> Path | None:
    """The folder whose config.json describes the model: the spec's, the weights', or the hub's."""
    for candidate in (name, weights):
        if candidate not in (None, "random"):
            path = Path(candidate).expanduser()
            if (path / "config.json").is_file():
                return path
            if candidate is name and (path.is_dir() or name.startswith(("/", ".", "~"))):
                raise FileNotFoundError(f"transformers:{name} is no folder with a config.json")
    return fetch_model(name) if weights is None else None


def _load(model_class, config, source: str | Path):
    state, digest = read_weights(source)
    state = {k: v for k, v in state.items() if not k.startswith(_TEXT)}
    with _quiet():
        # The library's own loader, for its renames between versions; strictness is judged below.
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=state,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype="float32",
        )
    # A model without masking has no use for the mask token, and a file may come without it.
    report = mismatch_report(
        shapes=sorted((k, tuple(a), tuple(b)) for k, a, b in info["mismatched_keys"]),
        missing=sorted(k for k in info["missing_keys"] if not k.endswith("mask_token")),
        unexpected=sorted(info["unexpected_keys"]),
    )
    if report:
        raise ValueError(f"{source} does not fit this model: {report}")
    return model, digest


@contextlib.contextmanager
def _quiet():
    """No progress bar and no load report on the terminal: this module raises instead."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _preprocessing(name: str, folder: Path | None, model_type: str, config):
    """(mean, std, size, filter, shorter side or None): of the folder's preprocessor or known id."""
    file = folder / "preprocessor_config.json" if folder is not None else None
    if file is not None and file.is_file():
        return _read_preprocessor(file, model_type)
    known = name if name in KNOWN else ""
    side = 224 if "dino" in model_type else config.image_size
    own, shorter, interpolation = (side, side), None, "bicubic"
    mean, std = statistics(known)
    if model_type == "clip_vision_model":
        mean, std, shorter = *_OPENAI, side
    elif model_type == "siglip_vision_model":
        mean, std = (0.5,) * 3, (0.5,) * 3
        interpolation = "bilinear" if "siglip2" in known else "bicubic"
    elif model_type == "dinov3_vit":
        interpolation = "bilinear"
    else:
        shorter = 256
    if not known:
        mean = std = None
    return mean, std, own, _filter(model_type, interpolation), shorter


def _read_preprocessor(file: Path, model_type: str):
    settings = json.loads(file.read_text())
    factor = settings.get("rescale_factor", 1 / 255)
    if settings.get("do_rescale", True) and abs(factor * 255 - 1) > 1e-6:
        raise ValueError(f"{file}: rescale_factor must be 1/255 for 0..1 input, got {factor}")
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if settings.get("do_normalize", True):
        mean, std = tuple(settings["image_mean"]), tuple(settings["image_std"])
    size = _sides(settings.get("size", 224))
    own, shorter = size, None
    if settings.get("do_center_crop", "crop_size" in settings):
        own, shorter = _sides(settings["crop_size"]), min(size)
    return mean, std, own, _filter(model_type, _RESAMPLE[settings.get("resample", 2)]), shorter


def _sides(size: int | dict) -> Size:
    if isinstance(size, int):
        return size, size
    if "shortest_edge" in size:
        return size["shortest_edge"], size["shortest_edge"]
    return size["height"], size["width"]


def _filter(model_type: str, interpolation: str) -> str:
    """transformers resizes uint8 with torchvision, and DINOv3's images after division by 255."""
    return f"{'float' if model_type == 'dinov3_vit' else 'torch-uint8'}-{interpolation}"
