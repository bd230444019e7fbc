"""Engines: published vision transformers behind one call, with their input contract stated.

engine = load_engine("dinov3:vitl16", weights="dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth")
features = engine(batch)        # [B, 3, 224, 224] -> [B, 1024] float32
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from . import torch_runtime
from .assemble import assemble
from .backbone import Size
from .channels import CHANNEL_MODES
from .contract import InputContract, Resize
from .engine import Engine
from .gate import Gate
from .outputs import OUTPUTS
from .precision import DTYPES, resolve_precision
from .zoo import KINDS, build

__all__ = ["KINDS", "OUTPUTS", "Engine", "InputContract", "Resize", "load_engine"]

RUNTIMES = ("torch",)
# Constants, never tuned: the batch shape is part of the settings, because it decides the bits.
_BATCH_SIZES = {"cpu": 16, "cuda": 128}


def load_engine(
    spec: str,
    *,
    runtime: str = "torch",
    weights: str | Path | None = None,
    precision: str = "auto",
    output: str | Sequence[str] = "cls",
    size: int | Size | None = None,
    channels: int = 3,
    channel_mode: str = "inflate",
    channel_pool: str = "mean",
    normalize: str = "model",
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> Engine:
    """Load a model as an engine that maps [B, P, height, width] to float32 features.

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
            does the output. Below fp32 the cosine to fp32 is measured on synthetic images, once,
            and must be at least 0.999.
        output: one, or several to be computed in one pass: "cls" [B, D] the class token after the
            final norm; "pooled" [B, D'] the model's own embedding (CLIP: projected); "tokens"
            [B, T, D]; "map" [B, D, g, g'] the patch tokens, one per patch; "processed"
            [B, D', g, g'] CLIP's patch tokens in the space of its embedding, of unit length.
            Tokens and map are after the final norm; CLIP's are the residual stream before it.
            "cls@K", "tokens@K", "map@K" are the residual stream after block K (from 0; -1 the
            last), without a norm.
        size: input side in pixels, or (height, width), multiples of the patch size; by default
            what the model's own preprocessing gives. Position tables are resampled as the model's
            upstream does.
        channels: C source channels.
        channel_mode: "inflate" widens an RGB patch kernel to C channels, the extra ones being the
            mean of the RGB kernels (and of their statistics); "replicate" runs each channel as its
            own RGB image.
        channel_pool: with "replicate", "mean" over the C vectors (D) or "concat" (C*D, channel by
            channel).
        normalize: "model" for the checkpoint's own mean and std, "none" for plain 0..1 input.
        batch_size: the fixed batch shape, part of the settings; by default 16 on a CPU, 128 on
            CUDA.
        device: by default "cuda" when there is one, else "cpu".
        seed: of `weights="random"`.

    Raises:
        ValueError: an unknown kind, name or choice; weights that do not fit, naming the tensors; a
            size that is no multiple of the patch; statistics in raw intensities; a precision
            that does not keep the numbers, with the figure.
        FileNotFoundError, RuntimeError: weights that are not there or cannot be fetched.
        ImportError: naming the extra to install.

    Exactness:
        A sample's features have the same bits whatever its batch mates and position, per device,
        runtime, batch_size and precision. In float32 they follow the named upstream model to
        rounding.
    """
    if not isinstance(spec, str):
        raise TypeError(f"spec must be a string KIND:NAME, got {type(spec).__name__}")
    _check_choices(
        runtime=(runtime, RUNTIMES),
        precision=(precision, ("auto", *DTYPES)),
        channel_mode=(channel_mode, CHANNEL_MODES),
        channel_pool=(channel_pool, ("mean", "concat")),
        normalize=(normalize, ("model", "none")),
    )
    _check_counts(channels=channels, batch_size=1 if batch_size is None else batch_size)
    device = _resolve_device(device)
    precision = resolve_precision(precision, device, runtime)
    batch_size = batch_size or _BATCH_SIZES.get(device.type, 16)
    backbone = build(spec, weights, _as_size(size), seed)
    features, contract, facts = assemble(
        spec,
        backbone,
        output=output,
        channels=channels,
        channel_mode=channel_mode,
        channel_pool=channel_pool,
        normalize=normalize,
        precision=precision,
    )
    engine = Engine(
        spec,
        features,
        contract,
        runtime=runtime,
        outputs=dict(zip(map(str, features.outputs), features.result_shapes(), strict=True)),
        dim=features.dims[0],
        precision=precision,
        batch_size=batch_size,
        device=device,
        facts=facts,
    )
    gate = Gate(engine, features) if precision != "fp32" else None
    engine.run = torch_runtime.prepare(features, contract, batch_size, device)
    if gate is not None:
        gate.check()
    return engine


def _as_size(size: int | Size | None) -> Size | None:
    if size is None:
        return None
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        raise ValueError(f"size must be a side or (height, width), got {size!r}")
    _check_counts(size=sides[0])
    _check_counts(size=sides[1])
    return sides


def _resolve_device(device: str | torch.device | None) -> torch.device:
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: this PyTorch finds no CUDA device")
    return device


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def _check_choices(**choices: tuple[str, tuple[str, ...]]) -> None:
    """Raises ValueError for the first argument that is not one of its allowed values."""
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
