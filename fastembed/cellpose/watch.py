"""Looks into `cellpose.train.train_seg` while it runs: losses, checkpoints, and resuming.

train_seg takes a network and gives it back trained; it saves weights alone, never says a loss
before the end, and always starts at epoch 0. What happens at each epoch is told here by what it
does with the network: `train` at an epoch's start, `save_model` at its end.

A resumed training runs train_seg from epoch 0 again, but until the epoch of the checkpoint the
network answers with zeros that no weight depends on, so nothing is computed or changed; then
weights, optimizer and random state come from the checkpoint. So learning rates, seeds and the
order of images are train_seg's own, and the end is that of a training that never stopped: on a CPU
with one thread, where torch repeats itself, to the bit.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from cellpose import train as cellpose_train
from cellpose.vit import BaseModel
from torch.optim.optimizer import register_optimizer_step_pre_hook


@dataclass
class Epoch:
    """What an epoch gave; test_loss is None where train_seg did not measure it."""

    epoch: int
    learning_rate: float
    train_loss: float
    test_loss: float | None


@dataclass
class Watch:
    """State of a training.

    Args:
        net: the network that train_seg gets.
        epochs: in all.
        last, best: model files to write: at the end, and where the test loss is lowest.
        checkpoint: file to resume from; written every `checkpoint_every` epochs.
        progress: called with every epoch that was trained.
    """

    net: BaseModel
    epochs: int
    last: Path
    best: Path
    checkpoint: Path
    checkpoint_every: int = 10
    progress: Callable[[Epoch], None] | None = None
    history: list[Epoch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._epoch = self._saved = -1
        self._losses: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
        self._optimizer: torch.optim.Optimizer | None = None
        self._learning_rate = 0.0
        self._resume: dict | None = None
        if self.checkpoint.exists():
            self._resume = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            self.history = [Epoch(**epoch) for epoch in self._resume["history"]]

    @property
    def resumed_at(self) -> int:
        """The first epoch that this run trains."""
        return len(self._resume["history"]) if self._resume else 0

    @property
    def best_epoch(self) -> int | None:
        """The epoch after which the test loss was lowest, the first of several.

        Epoch 0 does not count: its learning rate is 0, so its weights are the old ones.
        """
        measured = [e for e in self.history if e.test_loss is not None and e.epoch > 0]
        return min(measured, key=lambda e: e.test_loss).epoch if measured else None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """train_seg must run in this block, with ``save_every=1``."""
        forward, loss = self.net.forward, cellpose_train._loss_fn_seg

        def replayed_forward(x: torch.Tensor) -> tuple[torch.Tensor, None]:
            if self._epoch >= self.resumed_at:
                return forward(x)
            shape = (len(x), 3, *x.shape[-2:])
            return torch.zeros(shape, device=x.device, requires_grad=True), None

        def recorded_loss(lbl: torch.Tensor, y: torch.Tensor, device) -> torch.Tensor:
            value = loss(lbl, y, device)
            self._losses[self.net.training].append((value.item(), len(lbl)))
            return value

        hook = register_optimizer_step_pre_hook(self._before_step)
        cellpose_train._loss_fn_seg = recorded_loss
        self.net.forward = replayed_forward
        self.net.train, self.net.save_model = self._train, self._save_model
        try:
            yield
        finally:
            hook.remove()
            cellpose_train._loss_fn_seg = loss
            del self.net.forward, self.net.train, self.net.save_model

    def _train(self, mode: bool = True) -> BaseModel:
        if mode:
            self._end_epoch()  # of epoch 0, which train_seg does not save
            self._epoch += 1
            if self._resume and self._epoch == self.resumed_at:
                self.net.load_state_dict(self._resume["weights"])
                _set_random_state(self._resume["random"], self.net.device)
        return type(self.net).train(self.net, mode)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if optimizer.param_groups[0]["params"][0] is not next(self.net.parameters()):
            return  # somebody else's
        self._optimizer = optimizer
        self._learning_rate = float(optimizer.param_groups[0]["lr"])
        if self._resume and self._epoch >= self.resumed_at and "optimizer" in self._resume:
            optimizer.load_state_dict(self._resume.pop("optimizer"))
            for group in optimizer.param_groups:
                group["lr"] = self._learning_rate

    def _save_model(self, _: object) -> None:
        self._end_epoch()
        if self._epoch < self.resumed_at or self._saved == self._epoch:
            return
        self._saved = self._epoch
        if self.best_epoch == self._epoch:
            save_atomically(self.best, self.net.state_dict())
        if self._epoch == self.epochs - 1:
            save_atomically(self.last, self.net.state_dict())
        elif (self._epoch + 1) % self.checkpoint_every == 0:
            self._save_checkpoint()

    def _end_epoch(self) -> None:
        train, test = self._losses[True], self._losses[False]
        self._losses = {True: [], False: []}
        if not train or self._epoch < self.resumed_at:
            return
        epoch = Epoch(self._epoch, self._learning_rate, _mean(train), _mean(test) if test else None)
        self.history.append(epoch)
        if self.progress:
            self.progress(epoch)

    def _save_checkpoint(self) -> None:
        optimizer = self._optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = float(group["lr"])  # NumPy's own would not be read back as weights
        content = {
            "weights": self.net.state_dict(),
            "optimizer": optimizer,
            "random": _random_state(self.net.device),
            "history": [vars(epoch) for epoch in self.history],
        }
        save_atomically(self.checkpoint, content)


def save_atomically(path: Path, content: object) -> None:
    """torch.save, complete and on disk or not there at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)


def _mean(losses: list[tuple[float, int]]) -> float:
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
