"""Engines: published vision transformers behind one call, with their input contract stated.

engine = load_engine("dinov3:vitl16", weights="dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth")
features = engine(batch)        # [B, 3, 224, 224] -> [B, 1024] float32
"""

from __future__ import annotations

from pathlib import Path

import torch

from .channels import CHANNEL_MODES
from .contract import InputContract
from .torch_runtime import DTYPES, OUTPUTS, Engine, check_choices, torch_engine
from .zoo import KINDS, build

__all__ = ["KINDS", "Engine", "InputContract", "load_engine"]

RUNTIMES = ("torch",)


def load_engine(
    spec: str,
    *,
    runtime: str = "torch",
    weights: str | Path | None = None,
    precision: str = "auto",
    output: str = "cls",
    size: int = 224,
    channels: int = 3,
    channel_mode: str = "inflate",
    channel_pool: str = "mean",
    normalize: str = "model",
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> Engine:
    """Load a model as an engine that maps [B, P, size, size] to float32 features.

    Args:
        spec: `KIND:NAME`, split at the first colon. `transformers:` a hub id or a folder with
            config.json (DINOv2, DINOv2 with registers, DINOv3 ViT); `timm:` a ViT of timm;
            `dinov2:`/`dinov3:` a published name (`vits14_reg`, `vitl16`, ..) with the authors'
            .pth; `dinov3:/path/to/config.yaml` a DINO training configuration.
        runtime: "torch".
        weights: None for the published weights, a .pth/.pt/.bin/.safetensors file or a folder, or
            "random" (seeded by `seed`, with a warning: plumbing and speed only).
        precision: "fp32", "bf16", "fp16" (not on a CPU), or "auto": bf16 where the device computes
            it natively, else fp32. The whole model is cast; rotation tables stay float32 and so
            does the output.
        output: "cls" [B, D] the class token after the final norm; "pooled" [B, D] the model's own
            pooling; "tokens" [B, T, D]; "map" [B, D, g, g] the patch tokens, g = size / patch.
        size: input side, a multiple of the patch size.
        channels: C source channels.
        channel_mode: "inflate" widens an RGB patch kernel to C channels, the extra ones being the
            mean of the RGB kernels (and of their statistics); "replicate" runs each channel as its
            own RGB image.
        channel_pool: with "replicate", "mean" over the C vectors (D) or "concat" (C*D, channel by
            channel).
        normalize: "model" for the checkpoint's own mean and std, "none" for plain 0..1 input.
        batch_size: the fixed batch shape, part of the settings; by default 16 on a CPU, 128 on
        CUDA. device: by default "cuda" when there is one, else "cpu". seed: of `weights="random"`.

    Raises:
        ValueError: an unknown kind, name or choice; weights that do not fit, naming the tensors; a
            size that is no multiple of the patch; statistics in raw intensities.
        FileNotFoundError, RuntimeError: weights that are not there or cannot be fetched.
        ImportError: naming the extra to install.

    Exactness:
        A sample's features have the same bits whatever its batch mates and position, per device,
        runtime, batch_size and precision. In float32 they follow the named upstream model to
        rounding.
    """
    if not isinstance(spec, str):
        raise TypeError(f"spec must be a string KIND:NAME, got {type(spec).__name__}")
    check_choices(
        runtime=(runtime, RUNTIMES),
        precision=(precision, ("auto", *DTYPES)),
        output=(output, OUTPUTS),
        channel_mode=(channel_mode, CHANNEL_MODES),
        channel_pool=(channel_pool, ("mean", "concat")),
        normalize=(normalize, ("model", "none")),
    )
    for name, value in (
        ("size", size),
        ("channels", channels),
        ("batch_size", 1 if batch_size is None else batch_size),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    backbone = build(spec, weights, size, seed)
    return torch_engine(
        spec,
        backbone,
        precision=precision,
        output=output,
        size=size,
        channels=channels,
        channel_mode=channel_mode,
        channel_pool=channel_pool,
        normalize=normalize,
        batch_size=batch_size,
        device=device,
    )
