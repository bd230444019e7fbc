"""A backbone, the outputs asked of it and the channels it is fed, made one module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .contract import InputContract
from .models.backbone import Backbone
from .models.channels import channel_map, inflate_conv, inflate_stats
from .outputs import Features, parse_outputs
from .precision import DTYPES


def assemble(
    spec: str,
    backbone: Backbone,
    *,
    output: str | Sequence[str],
    channels: int,
    channel_mode: str,
    channel_pool: str,
    normalize: str,
    precision: str,
) -> tuple[Features, InputContract, dict]:
    """The module in float32, what it must be fed (in `precision`), and the facts that decide its
    numbers; `load_engine` explains the arguments."""
    outputs = parse_outputs(output, backbone, spec)
    model_channels = backbone.conv.in_channels
    planes = channel_map(channel_mode, channels, model_channels)
    mean, std = _statistics(spec, backbone, normalize)
    if channel_mode == "replicate":
        mean, std = tuple(mean) * channels, tuple(std) * channels
    else:
        mean, std = inflate_stats(mean, channels), inflate_stats(std, channels)
        if channels != model_channels:
            _widen(backbone, channels)
    images = channels if channel_mode == "replicate" else 1
    features = Features(backbone, outputs, images, channel_pool).eval().requires_grad_(False)
    contract = InputContract(
        *backbone.size, channels, planes, mean, std, backbone.resize, DTYPES[precision]
    )
    facts = {
        "architecture": backbone.architecture,
        "weights_id": backbone.weights_id,
        "patch_size": backbone.patch_size,
        "prefix_tokens": backbone.prefix_tokens,
        "channel_mode": channel_mode,
        "channel_pool": channel_pool,
        "normalize": normalize,
    }
    return features, contract, facts


def _statistics(
    spec: str, backbone: Backbone, normalize: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if normalize == "none":
        channels = backbone.conv.in_channels
        return (0.0,) * channels, (1.0,) * channels
    if backbone.mean is None or backbone.std is None:
        raise ValueError(
            f"normalize='model': nothing beside {spec} says its mean and std (no "
            "preprocessor_config.json, not a known id); add the file, or pass normalize='none' "
            "for plain 0..1 input"
        )
    if max(abs(v) for v in (*backbone.mean, *backbone.std)) > 1.5:
        raise ValueError(
            f"normalize='model': {spec} has mean {list(backbone.mean)} in raw intensities, but "
            "the quantised input of an engine is 0..1; pass normalize='none' to feed 0..1 as it is"
        )
    return backbone.mean, backbone.std


def _widen(backbone: Backbone, channels: int) -> None:
    inflate_conv(backbone.conv, channels)
    # transformers checks a channel count that it keeps beside the convolution.
    for module in backbone.module.modules():
        if isinstance(module, nn.Module) and isinstance(getattr(module, "num_channels", None), int):
            module.num_channels = channels
