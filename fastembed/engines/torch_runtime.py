"""PyTorch as the runtime: the module as it is, in one precision on one device."""

from __future__ import annotations

import torch

from .contract import InputContract
from .engine import Run
from .outputs import Features
from .precision import cast


def prepare(
    features: Features, contract: InputContract, batch_size: int, device: torch.device
) -> Run:
    """The module cast to the contract's dtype, on `device`."""
    cast(features, device, contract.dtype)
    return features
