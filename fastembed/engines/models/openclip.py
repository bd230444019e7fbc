"""`openclip:` and `openai:` models: the vision tower of open_clip, without its text tower."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ..contract import Resize
from .backbone import Backbone, Size, check_size, own_resize, unknown
from .hub import fetch_file
from .weights import hash_files, hollow, load_state, randomize, read_weights

# As clip.available_models() names them; its ResNets have no patch tokens.
OPENAI = {
    "ViT-B/32": "ViT-B-32-quickgelu",
    "ViT-B/16": "ViT-B-16-quickgelu",
    "ViT-L/14": "ViT-L-14-quickgelu",
    "ViT-L/14@336px": "ViT-L-14-336-quickgelu",
}
_WEIGHTS = "open_clip_model.safetensors"
_CONFIG = "open_clip_config.json"


def build_openai(name: str, weights: str | Path | None, size: Size | None, seed: int) -> Backbone:
    """OpenAI's CLIP under its own names, with its .pt archive or open_clip's conversion of it."""
    if name not in OPENAI:
        raise ValueError(unknown("openai model", name, OPENAI))
    return build_openclip(f"{OPENAI[name]}/openai", weights, size, seed)


def build_openclip(name: str, weights: str | Path | None, size: Size | None, seed: int) -> Backbone:
    """A model, MODEL/TAG or hub repository that open_clip knows, or a folder of its format."""
    try:
        from open_clip.model import _build_vision_tower
    except ImportError as error:
        raise ImportError(
            "this model needs open_clip: pip install 'fastembed-vision[openclip]'"
        ) from error

    model, preprocess, published = _resolve(name, weights)
    vision = dict(model["vision_cfg"])
    if isinstance(vision.get("layers"), list):
        raise ValueError(f"openclip:{name} is a ResNet; engines take ViT-like models only")
    own = _pair(vision["image_size"])
    size = size or own
    if not vision.get("timm_model_name"):
        vision["image_size"] = size
    visual = hollow(_build_vision_tower, model["embed_dim"], vision, model.get("quick_gelu", False))
    trunk = getattr(visual, "trunk", None)
    conv = visual.conv1 if trunk is None else getattr(trunk.patch_embed, "proj", None)
    if not isinstance(conv, nn.Conv2d):
        raise ValueError(f"openclip:{name} is not a ViT with patch tokens; engines take no other")
    check_size(size, conv.kernel_size[0])

    if weights == "random":
        randomize(visual, seed)
        weights_id = f"random:{seed}"
    else:
        source = weights if weights is not None else fetch_file(*published)
        state, weights_id = _read(source)
        load_state(visual, _visual_part(state, visual), source)
    if trunk is not None and size != own:
        trunk.set_input_size(img_size=size)
    return Backbone(
        module=visual,
        conv=conv,
        size=size,
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        resize=_resize(preprocess, own, size),
        weights_id=weights_id,
        architecture=f"open_clip-{name}",
        **(_openclip_vit(visual) if trunk is None else _timm_trunk(visual)),
    )


def _openclip_vit(visual: nn.Module) -> dict:
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = visual.transformer(visual._embeds(x))
        pooled = visual._pool(tokens)[0]
        return tokens, pooled if visual.proj is None else pooled @ visual.proj

    # With another pooling than the class token, no norm of a token leads to the embedding.
    plain = visual.attn_pool is None and not visual.final_ln_after_pool
    width = visual.conv1.out_channels
    return {
        "forward": forward,
        "blocks": visual.transformer.resblocks,
        "dim": width,
        "pooled_dim": width if visual.proj is None else visual.proj.shape[1],
        "prefix_tokens": 1,
        "class_token": True,
        "norm": visual.ln_post if plain else None,
        "project": (lambda tokens: tokens @ visual.proj) if plain else None,
    }


def _timm_trunk(visual: nn.Module) -> dict:
    trunk = visual.trunk

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = trunk.forward_features(x)
        return tokens, visual.head(trunk.forward_head(tokens))

    projection = next(
        (m for m in reversed(list(visual.head.modules())) if hasattr(m, "out_features")), None
    )
    return {
        "forward": forward,
        "blocks": trunk.blocks,
        "dim": trunk.embed_dim,
        "pooled_dim": projection.out_features
        if projection
        else trunk.num_classes or trunk.num_features,
        "prefix_tokens": trunk.num_prefix_tokens,
        "class_token": getattr(trunk, "cls_token", None) is not None,
        "has_tokens": not isinstance(trunk.norm, nn.Identity),
    }


def _resolve(name: str, weights: str | Path | None) -> tuple[dict, dict, tuple[str, str]]:
    """The model's configuration, its preprocessing, and the hub file of its weights.

    Preprocessing is that of the checkpoint: what open_clip says for a model without one is
    CLIP's, for a SigLIP too.
    """
    import open_clip

    name = name.removeprefix("hf-hub:")
    for folder in (name.removeprefix("local-dir:"), weights):
        if folder not in (None, "random") and (file := Path(folder) / _CONFIG).is_file():
            config = json.loads(file.read_text())
            return config["model_cfg"], config["preprocess_cfg"], ("", "")

    candidates = [
        (model, tag, open_clip.get_pretrained_cfg(model, tag))
        for model, tag in open_clip.list_pretrained()
    ]
    repos = [c for c in candidates if _repo(c[2])[0] == name]
    found = (
        [c for c in candidates if name in (c[0], f"{c[0]}/{c[1]}")]
        # One repository may serve a model and its -quickgelu twin; the weights decide which.
        or [c for c in repos if not c[2].get("quick_gelu") or c[0].endswith("quickgelu")]
        or repos
    )
    if not found and "/" in name and weights is None:
        config = json.loads(fetch_file(name, _CONFIG).read_text())
        return config["model_cfg"], config["preprocess_cfg"], (name, _WEIGHTS)
    if not found:
        known = dict.fromkeys(text for c in candidates for text in (c[0], _repo(c[2])[0]) if text)
        raise ValueError(unknown("openclip model", name, known, show=12))
    ways = {json.dumps([_preprocess(c[2]), _quick_gelu(c[0], c[2])]) for c in found}
    if len(ways) > 1 or (weights is None and len(found) > 1):
        tags = ", ".join(c[1] for c in found)
        raise ValueError(
            f"openclip:{name} was published with several weights, and they need different "
            f"preprocessing or activations; name one: openclip:{name}/TAG with TAG one of {tags}"
        )
    model, _, pretrained = found[0]
    config = {
        **open_clip.get_model_config(model),
        "quick_gelu": _quick_gelu(model, pretrained),
    }
    return config, _preprocess(pretrained), _repo(pretrained)


def _quick_gelu(model: str, pretrained: dict) -> bool:
    """Weights that were trained with QuickGELU need it, whichever of the two names is given."""
    return "quickgelu" in model or bool(pretrained.get("quick_gelu"))


def _preprocess(pretrained: dict) -> dict:
    return {k: pretrained[k] for k in ("mean", "std", "interpolation", "resize_mode")}


def _repo(pretrained: dict) -> tuple[str, str]:
    """(repository, file) on the hub, of `org/repo/[file]`."""
    org, _, rest = pretrained.get("hf_hub", "").partition("/")
    repo, _, file = rest.partition("/")
    return (f"{org}/{repo}" if repo else "", file or _WEIGHTS)


def _resize(preprocess: dict, own: Size, size: Size) -> Resize:
    mode = preprocess.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise ValueError(f"open_clip's resize_mode {mode!r} is not one of shortest, squash")
    shorter = min(own) if mode == "shortest" else None
    return own_resize(f"pillow-{preprocess.get('interpolation', 'bicubic')}", own, shorter, size)


def _visual_part(state: dict[str, Tensor], visual: nn.Module) -> dict[str, Tensor]:
    """The vision tower's tensors under their own names, positions resampled as open_clip does."""
    from open_clip.model import resize_pos_embed

    state = {k: v for k, v in state.items() if k.startswith("visual.")} or {
        f"visual.{k}": v for k, v in state.items()
    }
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    resize_pos_embed(state, SimpleNamespace(visual=visual))
    return {k.removeprefix("visual."): v for k, v in state.items()}


def _read(source: str | Path) -> tuple[dict[str, Tensor], str]:
    """`read_weights`, and OpenAI's own .pt, which is a TorchScript archive and no state dict."""
    path = Path(source).expanduser()
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            script = any("/code/" in name for name in archive.namelist())
        if script:
            return torch.jit.load(path, map_location="cpu").state_dict(), hash_files([path])
    return read_weights(path)


def _pair(size: int | list[int]) -> Size:
    return (size, size) if isinstance(size, int) else tuple(size)
