"""Fine-tunes a Cellpose-SAM network with cellpose's own training."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from cellpose.train import train_seg

from ..signature import claim
from .dataset import Example
from .masks import label_flows
from .network import Network
from .tables import write_json, write_tsv
from .watch import Epoch, Watch


@dataclass(frozen=True)
class TrainSettings:
    """How a network is trained; the defaults are the study's.

    Args:
        epochs: cellpose warms up over 10; from 100 on it also decays the rate at the end.
        learning_rate, weight_decay: of AdamW.
        batch_size: images per step.
        nimg_per_epoch, nimg_test_per_epoch: images drawn per epoch; None is each once.
        min_train_masks: training images with fewer objects are left out, and named.
        scale_range: how far the augmentation resizes: a factor of 1 - s/2 to 1 + s/2. cellpose
            always rotates, flips and crops at random.
        rescale: whether images are resized to one mean diameter first.
        seed: of what torch draws (which layers are dropped). Images and their augmentation are
            drawn by cellpose itself, with the number of the epoch as seed.
        zero_dapi: whether channel 0 is set to 0.
        checkpoint_every: epochs between checkpoints to resume from; not part of the numbers.
    """

    epochs: int = 80
    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    batch_size: int = 2
    nimg_per_epoch: int | None = None
    nimg_test_per_epoch: int | None = None
    min_train_masks: int = 5
    scale_range: float = 0.5
    rescale: bool = False
    seed: int = 2024
    zero_dapi: bool = False
    checkpoint_every: int = 10

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("nimg_per_epoch", "nimg_test_per_epoch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not 0 <= self.scale_range <= 2:
            raise ValueError(f"scale_range must be from 0 to 2; got {self.scale_range}")


@dataclass(frozen=True)
class Trained:
    """What `train` left.

    Args:
        last: model file after the last epoch.
        best: model file at the lowest test loss; None where no epoch after the first measured one
            (cellpose does at epoch 5 and every tenth).
        best_epoch: that epoch, from 0.
        used: stems of the training images.
        dropped: stems of those with fewer objects than min_train_masks, and how many they have.
        resumed_at: the first epoch that this call trained; `epochs` if all was there.
    """

    last: Path
    best: Path | None
    best_epoch: int | None
    used: list[str]
    dropped: dict[str, int]
    resumed_at: int


def train(
    network: Network,
    examples: Sequence[Example],
    test_examples: Sequence[Example],
    folder: str | Path,
    name: str,
    settings: TrainSettings | None = None,
    progress: Callable[[Epoch], None] | None = None,
) -> Trained:
    """Trains `network`, in place, by `cellpose.train.train_seg`.

    Leaves ``models/<name>`` and ``models/<name>_best``, ``losses.tsv``, ``losses.png`` and
    ``train.json`` in `folder`. Run again after a stop, it goes on from the last checkpoint with
    its weights, optimizer and random state, to the weights of a training without stop (to their
    bits where torch repeats itself: on a CPU with one thread); what was finished is not done again.

    Raises:
        SignatureMismatch: the folder holds a training of other settings, weights or images.
        ValueError: all images have fewer objects than min_train_masks; see also `Example`.
    """
    folder, settings = Path(folder), settings or TrainSettings()
    last, best = folder / "models" / name, folder / "models" / f"{name}_best"
    used, dropped = trainable(examples, settings.min_train_masks)
    if not used:
        raise ValueError(
            f"no image has min_train_masks={settings.min_train_masks} objects or more; "
            f"the most is {max(dropped.values(), default=0)}"
        )
    _claim(folder, network, used, test_examples, settings)

    watch = Watch(
        network.model.net, settings.epochs, last, best, folder / "resume.pt",
        settings.checkpoint_every, progress,
    )  # fmt: skip
    done = folder / "train.json"
    if not done.exists():
        _run(watch, used, test_examples, settings)
        _write_losses(folder, watch.history)
        report = {
            "name": name,
            "model": network.name,
            "images": [example.stem for example in used],
            "test_images": [example.stem for example in test_examples],
            "dropped_by_min_train_masks": dropped,
            "best_epoch": watch.best_epoch,
            "settings": asdict(settings),
        }
        write_json(done, report)
        watch.checkpoint.unlink(missing_ok=True)
        best_epoch, resumed_at = watch.best_epoch, watch.resumed_at
    else:
        best_epoch, resumed_at = _best_epoch(done), settings.epochs
    return Trained(
        last,
        None if best_epoch is None else best,
        best_epoch,
        [example.stem for example in used],
        dropped,
        resumed_at,
    )


def _run(
    watch: Watch,
    examples: Sequence[Example],
    test_examples: Sequence[Example],
    settings: TrainSettings,
) -> None:
    images, flows = _load(examples, settings.zero_dapi)
    test_images, test_flows = _load(test_examples, settings.zero_dapi)
    watch.last.parent.mkdir(parents=True, exist_ok=True)
    with _random_state_of_its_own(watch.net.device), watch.watching(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "In CPU autocast")  # it is told float32, and means it
        torch.manual_seed(settings.seed)
        _, train_losses, _ = train_seg(
            watch.net,
            train_data=images,
            train_labels=flows,
            test_data=test_images or None,
            test_labels=test_flows or None,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            n_epochs=settings.epochs,
            nimg_per_epoch=settings.nimg_per_epoch,
            nimg_test_per_epoch=settings.nimg_test_per_epoch,
            rescale=settings.rescale,
            scale_range=settings.scale_range,
            min_train_masks=0,  # what has too few is out already, by name
            save_path=watch.last.parent.parent,
            save_every=1,
            model_name=watch.last.name,
        )
    recorded = [epoch.train_loss for epoch in watch.history]
    start = watch.resumed_at
    if len(recorded) != settings.epochs or not np.allclose(recorded[start:], train_losses[start:]):
        raise RuntimeError(
            "this version of cellpose trains in another way than the one that was looked into: "
            f"losses {train_losses[start:]} there, {recorded[start:]} here"
        )


def _load(
    examples: Sequence[Example], zero_dapi: bool
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    images, flows = [], []
    for example in examples:
        image = example.image(zero_dapi=zero_dapi)
        images.append(np.ascontiguousarray(image.transpose(2, 0, 1)))
        flows.append(label_flows(example.mask(image)))
    return images, flows


def trainable(
    examples: Sequence[Example], min_train_masks: int
) -> tuple[list[Example], dict[str, int]]:
    """Examples with enough objects, and stem and number of objects of the others."""
    counted = {example.stem: _objects(example) for example in examples}
    dropped = {stem: count for stem, count in counted.items() if count < min_train_masks}
    return [example for example in examples if example.stem not in dropped], dropped


def _objects(example: Example) -> int:
    labels = np.unique(example.mask())
    return len(labels) - int(labels[0] == 0)


def _claim(
    folder: Path,
    network: Network,
    examples: Sequence[Example],
    test_examples: Sequence[Example],
    settings: TrainSettings,
) -> None:
    numbers = asdict(settings)
    del numbers["checkpoint_every"]
    images = {
        name: hashlib.sha256(
            b"".join(
                hashlib.sha256(path.read_bytes()).digest()
                for example in members
                for path in (example.image_path, example.mask_path)
            )
        ).hexdigest()
        for name, members in (("train", examples), ("test", test_examples))
    }
    claim(
        folder,
        {"kind": "cellpose training", "model": network.digest, "images": images, **numbers},
    )


def _write_losses(folder: Path, history: Sequence[Epoch]) -> None:
    rows = [
        {**vars(epoch), "test_loss": "" if epoch.test_loss is None else epoch.test_loss}
        for epoch in history
    ]
    write_tsv(folder / "losses.tsv", rows)
    from ..plots.losses import save_losses  # matplotlib takes a second to import

    save_losses(folder / "losses.png", history)


def _best_epoch(report: Path) -> int | None:
    return json.loads(report.read_text())["best_epoch"]


@contextlib.contextmanager
def _random_state_of_its_own(device: torch.device) -> Iterator[None]:
    """cellpose seeds the generators of the whole process; afterwards they are as they were."""
    state = np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            np.random.set_state(state)
