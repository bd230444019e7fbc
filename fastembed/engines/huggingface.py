"""`transformers:` models: DINOv2, with registers or without, and DINOv3; hub or folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

from torch import nn

from .backbone import Backbone, check_size, statistics, unknown
from .hub import fetch_model
from .weights import mismatch_report, randomize, read_weights

# model_type: (configuration class, model class)
_CLASSES = {
    "dinov2": ("Dinov2Config", "Dinov2Model"),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel"),
    "dinov3_vit": ("DINOv3ViTConfig", "DINOv3ViTModel"),
}


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
}

# The numbers of Pillow's filters, as preprocessor_config.json writes them.
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def build_transformers(name: str, weights: str | Path | None, size: int, seed: int) -> Backbone:
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
    model_type = config_json.get("model_type")
    if model_type not in _CLASSES:
        raise ValueError(
            f"transformers:{name} is a {model_type!r}; supported are {', '.join(_CLASSES)}"
        )
    config_class, model_class = (getattr(transformers, n) for n in _CLASSES[model_type])
    config = config_class.from_dict(config_json)
    check_size(size, config.patch_size)

    if weights == "random":
        model = model_class(config)
        randomize(model, seed)
        weights_id = f"random:{seed}"
    else:
        source = weights if weights is not None else folder
        model, weights_id = _load(model_class, config, source)

    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    mean, std, interpolation = _preprocessing(name, folder, model_type)
    return Backbone(
        module=model,
        tokens=lambda x: model(pixel_values=x).last_hidden_state,
        pooled=lambda x: model(pixel_values=x).pooler_output,
        conv=conv,
        dim=config.hidden_size,
        prefix_tokens=1 + getattr(config, "num_register_tokens", 0),
        class_token=True,
        mean=mean,
        std=std,
        interpolation=interpolation,
        weights_id=weights_id,
        architecture=architecture,
    )


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


def _preprocessing(name: str, folder: Path | None, model_type: str):
    """(mean, std, interpolation) for 0..1 input, from the folder's preprocessor or the known id."""
    file = folder / "preprocessor_config.json" if folder is not None else None
    if file is not None and file.is_file():
        settings = json.loads(file.read_text())
        factor = settings.get("rescale_factor", 1 / 255)
        if settings.get("do_rescale", True) and abs(factor * 255 - 1) > 1e-6:
            raise ValueError(f"{file}: rescale_factor must be 1/255 for 0..1 input, got {factor}")
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if settings.get("do_normalize", True):
            mean, std = tuple(settings["image_mean"]), tuple(settings["image_std"])
        return mean, std, _RESAMPLE[settings.get("resample", 2)]
    interpolation = "bilinear" if model_type == "dinov3_vit" else "bicubic"
    if name not in KNOWN:
        return None, None, interpolation
    return *statistics(name), interpolation
