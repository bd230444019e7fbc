"""A number format below float32 must keep the model's numbers, or it is refused with the figure."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .cache import cache_folder, installed
from .contract import InputContract
from .engine import Engine

COSINE = 0.999
_IMAGES = 4
_VERSIONS = (
    "torch", "timm", "transformers", "open_clip_torch", "onnxruntime", "onnxruntime-gpu",
    "tensorrt", "tensorrt_rtx",
)  # fmt: skip


class Gate:
    """The cosine between an engine and its own model in float32, on a few synthetic images.

    The verdict is measured once per settings, versions and device, and kept in `cache_folder()`.
    """

    def __init__(self, engine: Engine, expected: Callable[[], Sequence[Tensor]]) -> None:
        """`expected` gives the model's `references`; it is asked here, unless a verdict is kept."""
        versions = [installed(name) for name in _VERSIONS]
        described = json.dumps([engine.settings(), versions, _machine(engine.device)])
        digest = hashlib.sha256(described.encode()).hexdigest()
        self._engine = engine
        self._file = cache_folder() / "gates" / f"{digest}.json"
        self._cosine = self._kept()
        self._expected = expected() if self._cosine is None else ()

    def check(self) -> float:
        """The lowest cosine over images and outputs.

        Raises:
            ValueError: it is below `COSINE`.
        """
        engine = self._engine
        if self._cosine is None:
            images = synthetic_images(engine.contract).to(engine.contract.dtype)
            self._cosine = min(
                lowest_cosine(ours, expected)
                for ours, expected in zip(_in_batches(engine, images), self._expected, strict=True)
            )
            self._keep()
        if not self._cosine >= COSINE:
            raise ValueError(
                f"{engine.spec} in {engine.precision} has a cosine of {self._cosine:.6f} against "
                f"float32 on synthetic images, below {COSINE}; use precision='fp32'"
            )
        return self._cosine

    def _kept(self) -> float | None:
        try:
            return float(json.loads(self._file.read_text())["cosine"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _keep(self) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._file.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps({"cosine": self._cosine, **self._engine.settings()}))
            temporary.replace(self._file)
        except OSError:
            pass  # a cache that cannot be written costs the measurement next time, nothing else


@torch.inference_mode()
def references(
    features: nn.Module, contract: InputContract, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """What a model, still in float32, gives for `synthetic_images`: one tensor per output."""
    features.to(device)
    # One by one: a large model's float32 activations need not fit four times.
    single = [features(image[None].to(device)) for image in synthetic_images(contract)]
    return [torch.cat(parts).cpu() for parts in zip(*single, strict=True)]


def synthetic_images(contract: InputContract, count: int = _IMAGES) -> Tensor:
    """Shapes and texture as a model may see them: float32 [count, P, height, width], normalised."""
    generator = torch.Generator().manual_seed(0)
    shapes = torch.rand(count, contract.channels, 7, 7, generator=generator)
    shapes = nn.functional.interpolate(shapes, contract.shape[1:], mode="bicubic")
    noise = torch.rand(count, contract.channels, *contract.shape[1:], generator=generator)
    levels = (0.85 * shapes + 0.15 * noise).clamp(0, 1)[:, list(contract.channel_map)]
    mean, std = torch.tensor(contract.mean), torch.tensor(contract.std)
    return (levels - mean[:, None, None]) / std[:, None, None]


def lowest_cosine(ours: Tensor, expected: Tensor) -> float:
    """Over the samples of [B, ...], flattened, in float64; NaN counts as -1."""
    pair = (t.detach().cpu().double().flatten(1) for t in (ours, expected))
    return torch.cosine_similarity(*pair, dim=1).nan_to_num(-1.0).min().item()


def _in_batches(engine: Engine, images: Tensor) -> list[Tensor]:
    results = []
    for part in images.split(engine.batch_size):
        result = engine(part)
        results.append(list(result.values()) if isinstance(result, dict) else [result])
    return [torch.cat(parts).cpu() for parts in zip(*results, strict=True)]


def _machine(device: torch.device) -> str:
    """What computes: a verdict in a shared home folder must not stand for another processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform()
    # The flags too: kernels follow them, and virtual machines hide the model's name.
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
