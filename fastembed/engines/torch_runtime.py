"""Run a backbone with PyTorch: fixed batch shape, one precision, float32 out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import Backbone
from .channels import channel_map, inflate_conv, inflate_stats
from .contract import InputContract

OUTPUTS = ("cls", "pooled", "tokens", "map")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Constants, never tuned: the batch shape is part of the settings, because it decides the bits.
_BATCH_SIZES = {"cpu": 16, "cuda": 128}


class Features(nn.Module):
    """[B, P, size, size] to float32: cls/pooled [B, D], tokens [B, T, D] or map [B, D, g, g].

    With `images` C > 1 the P = 3*C planes are C RGB images, whose features are averaged or, channel
    by channel, concatenated (C*D).
    """

    def __init__(self, backbone: Backbone, output: str, images: int, channel_pool: str) -> None:
        super().__init__()
        self.module = backbone.module
        self._forward = backbone.pooled if output == "pooled" else backbone.tokens
        self._output, self._prefix = output, backbone.prefix_tokens
        self._images, self._pool = images, channel_pool

    def forward(self, x: Tensor) -> Tensor:
        batch, planes, height, width = x.shape
        y = self._forward(x.reshape(batch * self._images, planes // self._images, height, width))
        if self._output == "cls":
            y = y[:, 0]
        elif self._output == "map":
            y = y[:, self._prefix :]
        y = y.float()
        if self._images > 1:
            y = y.unflatten(0, (batch, self._images))
            y = y.mean(dim=1) if self._pool == "mean" else y.movedim(1, -2).flatten(-2)
        if self._output == "map":
            side = int(y.shape[1] ** 0.5)
            y = y.transpose(1, 2).unflatten(2, (side, side)).contiguous()
        return y


class Engine:
    """A model ready to embed: `engine(batch)` maps [B, P, size, size] to float32 features.

    1 <= B <= batch_size; every batch is padded to batch_size, so a sample's features have the same
    bits whatever its batch mates or its place among them. `contract` says what the input must be.
    """

    runtime = "torch"

    def __init__(
        self,
        spec: str,
        features: nn.Module,
        contract: InputContract,
        *,
        backbone: Backbone,
        dim: int,
        output: str,
        precision: str,
        batch_size: int,
        device: torch.device,
        choices: dict[str, Any],
    ) -> None:
        self.spec = spec
        self.features = features
        self.contract = contract
        self.dim = dim
        self.output = output
        self.precision = precision
        self.batch_size = batch_size
        self.device = device
        self.patch_size = backbone.patch_size
        self.prefix_tokens = backbone.prefix_tokens
        self.weights_id = backbone.weights_id
        self.architecture = backbone.architecture
        self._choices = choices

    @torch.inference_mode()
    def __call__(self, batch: Tensor) -> Tensor:
        """Features of [B, P, size, size] in `contract.dtype` from any device, on `self.device`.

        A batch in pinned memory is copied asynchronously, on the device's current stream.
        Raises TypeError for anything but a tensor of that dtype, ValueError for another shape.
        """
        expected = (self.contract.planes, self.contract.size, self.contract.size)
        if not isinstance(batch, Tensor):
            raise TypeError(f"batch must be a torch.Tensor, got {type(batch).__name__}")
        if batch.dtype != self.contract.dtype:
            raise TypeError(f"batch must be {self.contract.dtype}, got {batch.dtype}")
        if (
            batch.ndim != 4
            or tuple(batch.shape[1:]) != expected
            or not 1 <= len(batch) <= self.batch_size
        ):
            raise ValueError(
                f"batch must be [B, {', '.join(map(str, expected))}] with "
                f"1 <= B <= {self.batch_size}, got {list(batch.shape)}"
            )
        # A full batch is copied too: the caller's strides would select kernels, and so bits.
        padded = torch.zeros(self.batch_size, *expected, dtype=batch.dtype, device=self.device)
        padded[: len(batch)].copy_(batch, non_blocking=True)
        return self.features(padded)[: len(batch)]

    def settings(self) -> dict[str, Any]:
        """What decides this engine's numbers, JSON-ready, for the signature of its outputs."""
        return {
            "spec": self.spec,
            "runtime": self.runtime,
            "architecture": self.architecture,
            "weights_id": self.weights_id,
            "precision": self.precision,
            "output": self.output,
            "size": self.contract.size,
            "channels": self.contract.channels,
            **self._choices,
            "mean": list(self.contract.mean),
            "std": list(self.contract.std),
            "batch_size": self.batch_size,
            "device": self.device.type,
        }

    def __repr__(self) -> str:
        size = self.contract.size
        return (
            f"Engine({self.spec}, {self.output} {self.dim}-d, "
            f"input {self.contract.planes}x{size}x{size}, {self.precision} on {self.device}, "
            f"batch {self.batch_size}, weights {self.weights_id[:16]})"
        )


def torch_engine(
    spec: str,
    backbone: Backbone,
    *,
    precision: str,
    output: str,
    size: int,
    channels: int,
    channel_mode: str,
    channel_pool: str,
    normalize: str,
    batch_size: int | None,
    device: str | torch.device | None,
) -> Engine:
    """An Engine around a float32 backbone on the CPU; `load_engine` explains the arguments."""
    device = torch.device(
        device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: this PyTorch finds no CUDA device")
    precision = resolve_precision(precision, device)
    if batch_size is None:
        batch_size = _BATCH_SIZES.get(device.type, 16)
    if output != "pooled" and backbone.tokens is None:
        raise ValueError(
            f"{spec} normalises after pooling, so its tokens have no final norm; use "
            "output='pooled'"
        )
    if output == "cls" and not backbone.class_token:
        raise ValueError(f"{spec} has no class token; use output='pooled'")

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
    features = Features(backbone, output, images, channel_pool).eval().requires_grad_(False)
    _cast(features, device, DTYPES[precision])
    contract = InputContract(
        size, channels, planes, mean, std, backbone.interpolation, DTYPES[precision]
    )
    return Engine(
        spec,
        features,
        contract,
        backbone=backbone,
        dim=backbone.dim * (images if channel_pool == "concat" else 1),
        output=output,
        precision=precision,
        batch_size=batch_size,
        device=device,
        choices={
            "channel_mode": channel_mode,
            "channel_pool": channel_pool,
            "normalize": normalize,
        },
    )


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
        if isinstance(getattr(module, "num_channels", None), int):
            module.num_channels = channels


def _cast(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move and cast, rotation tables left in float32: rounded angles are other positions."""
    tables = [
        (owner, name, table)
        for owner in module.modules()
        if any(word in type(owner).__name__.lower() for word in ("rotary", "ropeposition"))
        for name, table in owner.named_buffers(recurse=False)
    ]
    module.to(device=device, dtype=dtype)
    for owner, name, table in tables:
        owner.register_buffer(name, table.to(device), persistent=False)


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` as bf16 where the device computes it natively, else fp32; the others checked."""
    if precision == "auto":
        return "bf16" if _native_bf16(device) else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise ValueError(
            "precision='fp16' is not offered on a CPU, which computes it slowly and overflows at "
            "65504; use 'fp32' or 'bf16'"
        )
    return precision


def _native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":
        return False
    # Private names that come and go between torch releases; the kernel's own list is the fallback.
    probes = [
        getattr(torch.cpu, n, None) for n in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    ]
    if any(probe is not None and probe() for probe in probes):
        return True
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def check_choices(**choices: tuple[str, tuple[str, ...]]) -> None:
    """Raises ValueError for the first argument that is not one of its allowed values."""
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
