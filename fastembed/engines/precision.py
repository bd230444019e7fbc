"""Number formats: which one a device gets, how a model is cast, whether it keeps its numbers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str, device: torch.device, runtime: str = "torch") -> str:
    """`auto` as the runtime's and device's best that keeps the numbers; the others checked.

    Raises ValueError for a format that the device or the runtime does not compute.
    """
    if runtime == "tensorrt":
        if device.type != "cuda":
            raise ValueError(f"runtime='tensorrt' needs a CUDA device, got {str(device)!r}")
        if precision == "auto":
            return "bf16" if _native_bf16(device) else "fp16"
    if precision == "auto":
        if runtime == "onnx":  # its CPU kernels know no bfloat16
            return "fp16" if device.type == "cuda" else "fp32"
        return "bf16" if _native_bf16(device) else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise ValueError(
            "precision='fp16' is not offered on a CPU, which computes it slowly and overflows at "
            "65504; use 'fp32' or 'bf16'"
        )
    if precision == "bf16" and device.type == "cpu" and runtime == "onnx":
        raise ValueError(
            "precision='bf16' is not offered by ONNX Runtime on a CPU, which has no kernels for "
            "it; use 'fp32', or runtime='torch'"
        )
    return precision


def cast(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
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
