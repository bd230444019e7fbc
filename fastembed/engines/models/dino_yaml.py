"""Read the architecture of a DINO training configuration (`student` and `crops` of its YAML)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .channels import PATCH_EMBEDDINGS
from .dino import ARCHS, DinoArch, ffn_width

# The keys of `student` that make the model, with what the training code assumes when one is absent.
_DEFAULTS = {
    "arch": "vit_large",
    "patch_size": 16,
    "in_chans": 3,
    "n_storage_tokens": 0,
    "layerscale": 1e-5,
    "ffn_layer": "mlp",
    "ffn_ratio": 4.0,
    "qkv_bias": True,
    "mask_k_bias": False,
    "norm_layer": "layernorm",
    "pos_embed_rope_base": 100.0,
    "pos_embed_rope_min_period": None,
    "pos_embed_rope_max_period": None,
    "pos_embed_rope_normalize_coords": "separate",
    "pos_embed_rope_dtype": "bf16",
    "patch_embed_strategy": "inflate",
}

# Keys that would change the model, with the only values that are built here.
_ONLY = {
    "proj_bias": (True,),
    "ffn_bias": (True,),
    "pos_embed_type": ("rope", "ropenew"),
    "untie_cls_and_patch_norms": (False,),
    "sin_cos_embeddings": (False,),
    "fourier_embeddings": (False,),
    "multiple_pos_embeddings": (False,),
    "cls_pos_embedding": (False,),
    "reg_pos_embedding": (False,),
    "mask_attention": (False,),
    "mask_register_attention": (False,),
    "pos_embed_rope_gamma": (None, 1, 1.0),
    "pos_embed_rope_init_multi_frequencies": (False,),
    "sparse24_default": (False,),
}

# Keys that act in training only (regularisation, initialisation, augmentation of the positions,
# where weights come from, number formats), or only on parts that _ONLY excludes.
_TRAINING = frozenset(
    """drop_path_rate drop_path_uniform drop_path_shape patch_drop
    pretrained_weights resume_from_teacher_chkpt
    block_chunks init_std_cls init_std_reg rescale_weights_by_layer_id
    untie_global_and_local_cls_norm pos_embed_rope_shift_coords pos_embed_rope_jitter_coords
    pos_embed_rope_rescale_coords fp8_enabled fp8_filter sparse24_ranges sparse24_filter
    fourier_encoding_dim interpolate_offset interpolate_antialias pos_embed_grid_size""".split()
)

_NORM_EPS = {"layernorm": 1e-6, "layernormbf16": 1e-5}
_FFN_LAYERS = ("mlp", "swiglu", "swiglu32", "swiglu64", "swiglu128")


def read_dino_yaml(path: str | Path) -> tuple[DinoArch, tuple[float, ...], tuple[float, ...]]:
    """The architecture, rgb_mean and rgb_std of a DINO training YAML.

    Raises ValueError naming any key of `student` that is unknown, or whose value makes a model that
    is not built here: a key is read, or listed in this file as harmless, and never skipped.
    """
    import yaml

    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no such configuration: {path}")
    config = yaml.safe_load(path.read_text())
    if not isinstance(config, Mapping) or not isinstance(config.get("student"), Mapping):
        raise ValueError(
            f"{path}: a DINO training configuration has a `student` section; this file has none"
        )
    student = config["student"]

    unknown = [k for k in student if k not in _DEFAULTS and k not in _ONLY and k not in _TRAINING]
    if unknown:
        raise ValueError(
            f"{path}: unknown key(s) in `student`: {', '.join(map(str, unknown))}; they may "
            "change the model"
        )
    for key, allowed in _ONLY.items():
        if key in student and student[key] not in allowed:
            raise ValueError(
                f"{path}: student.{key} must be one of {list(allowed)}, got {student[key]!r}"
            )
    value = {**_DEFAULTS, **{k: v for k, v in student.items() if k in _DEFAULTS}}
    value["patch_embed_strategy"] = str(value["patch_embed_strategy"] or "inflate").lower()
    for key, allowed in {
        "arch": ARCHS,
        "ffn_layer": _FFN_LAYERS,
        "norm_layer": _NORM_EPS,
        "pos_embed_rope_dtype": ("fp32", "bf16", "fp16"),
        "pos_embed_rope_normalize_coords": ("separate", "min", "max"),
        "patch_embed_strategy": ("standard", *PATCH_EMBEDDINGS),
    }.items():
        if value[key] not in allowed:
            raise ValueError(
                f"{path}: student.{key} must be one of {', '.join(allowed)}, got {value[key]!r}"
            )
    teacher = config.get("teacher") or {}
    if teacher.get("in_chans", value["in_chans"]) != value["in_chans"]:
        raise ValueError(
            f"{path}: student.in_chans is {value['in_chans']} and teacher.in_chans "
            f"{teacher['in_chans']}; they must agree"
        )

    dim, depth, heads, own_ratio = ARCHS[value["arch"]]
    # The training code takes the ratio from the arch and leaves the key at its default of 4;
    # another value is a fork's own, and the checkpoint's shapes prove or refute it.
    ratio = own_ratio if float(value["ffn_ratio"]) == 4.0 else float(value["ffn_ratio"])
    periods = (value["pos_embed_rope_min_period"], value["pos_embed_rope_max_period"])
    if (periods[0] is None) != (periods[1] is None):
        raise ValueError(
            f"{path}: pos_embed_rope_min_period and _max_period must be given together, got "
            f"{periods}"
        )
    arch = DinoArch(
        dim=dim,
        depth=depth,
        heads=heads,
        ffn=ffn_width(dim, ratio, value["ffn_layer"]),
        swiglu=value["ffn_layer"] != "mlp",
        patch_size=int(value["patch_size"]),
        in_chans=int(value["in_chans"]),
        storage_tokens=int(value["n_storage_tokens"]),
        layerscale=value["layerscale"] is not None,
        qkv_bias=bool(value["qkv_bias"]),
        mask_k_bias=bool(value["mask_k_bias"]),
        norm_eps=_NORM_EPS[value["norm_layer"]],
        rope_base=None if periods[0] is not None else float(value["pos_embed_rope_base"]),
        rope_periods=None if periods[0] is None else (float(periods[0]), float(periods[1])),
        rope_coords=value["pos_embed_rope_normalize_coords"],
        rope_dtype=value["pos_embed_rope_dtype"],
        patch_embedding=value["patch_embed_strategy"].replace("standard", "inflate"),
    )
    crops = config.get("crops") or {}
    mean = tuple(float(v) for v in crops.get("rgb_mean", (0.485, 0.456, 0.406)))
    std = tuple(float(v) for v in crops.get("rgb_std", (0.229, 0.224, 0.225)))
    if len(mean) != len(std) or len(mean) not in (3, arch.in_chans):
        raise ValueError(
            f"{path}: crops.rgb_mean and rgb_std must have 3 or in_chans={arch.in_chans} values, "
            f"got {len(mean)} and {len(std)}"
        )
    return arch, mean, std
