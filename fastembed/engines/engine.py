"""An engine: a model behind one call, whichever runtime computes it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .contract import InputContract

Run = Callable[[Tensor], tuple[Tensor, ...]]


class Engine:
    """A model ready to embed: `engine(batch)` maps [B, P, height, width] to float32 features.

    1 <= B <= batch_size; every batch is padded to batch_size, so a sample's features have the same
    bits whatever its batch mates or its place among them. `contract` says what the input must be.
    An engine is for one thread at a time.

    Attributes:
        resizable: whether `resized` may change the batch size: eager PyTorch, and nobody asked
            for a size.
        outputs: the shape of one sample's result, by output: {"map": (1024, 14, 14)}.
        dim: D of the first output.
        runtime: "torch", "onnx" or "tensorrt".
    """

    def __init__(
        self,
        spec: str,
        run: Run,
        contract: InputContract,
        *,
        runtime: str,
        outputs: Mapping[str, tuple[int, ...]],
        dim: int,
        precision: str,
        batch_size: int,
        device: torch.device,
        facts: Mapping[str, Any],
        resizable: bool = False,
    ) -> None:
        """`run` takes a full batch on `device`, and gives one float32 tensor per output; `facts`
        are the model's own (architecture, weights_id, patch_size, prefix_tokens, ..)."""
        self.spec = spec
        self.run = run
        self.contract = contract
        self.runtime = runtime
        self.outputs = dict(outputs)
        self.dim = dim
        self.precision = precision
        self.batch_size = batch_size
        self.device = device
        self.facts = dict(facts)
        self.resizable = resizable

    def resized(self, batch_size: int) -> Engine:
        """The same model for batches of another size. Its bits may be others: `autotune` looks.

        Raises:
            ValueError: the engine's batches have one size.
        """
        if not self.resizable:
            raise ValueError(f"batch_size is fixed at {self.batch_size}; got {batch_size}")
        other = copy.copy(self)
        other.batch_size = batch_size
        return other

    @property
    def output(self) -> str:
        """The outputs' names, joined by commas."""
        return ",".join(self.outputs)

    @property
    def patch_size(self) -> int:
        return self.facts["patch_size"]

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches: class token, registers."""
        return self.facts["prefix_tokens"]

    @property
    def weights_id(self) -> str:
        """sha256 of the weight file, or ``random:SEED``."""
        return self.facts["weights_id"]

    @property
    def architecture(self) -> str:
        return self.facts["architecture"]

    @torch.inference_mode()
    def __call__(self, batch: Tensor) -> Tensor | dict[str, Tensor]:
        """Features of [B, P, height, width] in `contract.dtype` from any device, on `self.device`.

        One output gives its tensor, several a dict by their names. A batch in pinned memory is
        copied asynchronously, on the device's current stream.
        Raises TypeError for anything but a tensor of that dtype, ValueError for another shape.
        """
        expected = self.contract.shape
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
        results = [result[: len(batch)] for result in self.run(padded)]
        return results[0] if len(results) == 1 else dict(zip(self.outputs, results, strict=True))

    def settings(self) -> dict[str, Any]:
        """What decides this engine's numbers, JSON-ready, for the signature of its outputs."""
        return {
            "spec": self.spec,
            "runtime": self.runtime,
            **self.facts,
            "precision": self.precision,
            "output": self.output,
            "input": self.contract.settings(),
            "batch_size": self.batch_size,
            "device": self.device.type,
        }

    def __repr__(self) -> str:
        planes, height, width = self.contract.shape
        return (
            f"Engine({self.spec}, {self.output} {self.dim}-d, input {planes}x{height}x{width}, "
            f"{self.precision} on {self.device} by {self.runtime}, batch {self.batch_size}, "
            f"weights {self.weights_id[:16]})"
        )
