"""The losses of a training, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class Losses(Protocol):
    epoch: int
    train_loss: float
    test_loss: float | None


def save_losses(path: Path, history: Sequence[Losses]) -> None:
    """Writes a PNG: training loss of every epoch, test loss where it was measured.

    Raises:
        ImportError: matplotlib is not there; the message names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'fastembed-vision[plots]'") from error
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([e.epoch for e in history], [e.train_loss for e in history], label="train")
    measured = [e for e in history if e.test_loss is not None]
    axes.plot([e.epoch for e in measured], [e.test_loss for e in measured], "o-", label="test")
    axes.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
