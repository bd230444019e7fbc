"""PyTorch as the runtime: the module as it is, in one precision on one device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..contract import InputContract
from ..engine import Run
from ..outputs import Features
from ..precision import cast
from .cuda import captured


def prepare(
    features: Features,
    contract: InputContract,
    batch_size: int,
    device: torch.device,
    compile: bool = False,
    cuda_graph: bool = False,
) -> Run:
    """The module cast to the contract's dtype, on `device`; compiled or captured if asked."""
    cast(features, device, contract.dtype)
    if device.type == "cpu" and contract.dtype == torch.bfloat16:
        _multiply_patches(features)
    run = features
    if compile:
        # Not max-autotune: it picks kernels by a race, so another run may have other bits.
        run = torch.compile(features, dynamic=False, options={"deterministic": True})
    if device.type != "cuda":
        return run
    run = _reproducible(run)
    if cuda_graph:
        shape = (batch_size, *contract.shape)
        run = captured(run, shape, contract.dtype, torch.cuda.Stream(device))
    return run


def _multiply_patches(module: nn.Module) -> None:
    """Computes patch embeddings as the matrix products that they are.

    oneDNN 3.13 (torch 2.15) has a bfloat16 convolution for CPUs with AMX that gives noise: of
    patches of 16 with 4, 6, 8, 10, 12 or 16 channels, among others. The cosine to the right
    result is 0.
    """
    for conv in module.modules():
        if type(conv) is nn.Conv2d and conv.kernel_size == conv.stride and conv.groups == 1:
            conv.__class__ = _PatchProduct


class _PatchProduct(nn.Conv2d):
    """A convolution whose windows do not overlap, without padding."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.kernel_size
        rows, columns = x.shape[2] // height, x.shape[3] // width
        patches = x[:, :, : rows * height, : columns * width]
        patches = patches.unflatten(3, (columns, width)).unflatten(2, (rows, height))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # B, rows, columns, C*height*width
        product = nn.functional.linear(patches, self.weight.flatten(1), self.bias)
        return product.permute(0, 3, 1, 2)


def _reproducible(run: Run) -> Run:
    """`run` with cuDNN's convolution in full float32 and by a fixed choice.

    By default PyTorch lets the patch embedding, a convolution, run in TF32 (10 bits of mantissa).
    """

    def exact(batch: Tensor) -> tuple[Tensor, ...]:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            return run(batch)

    return exact
