"""Predicts and evaluates one model at one pair of thresholds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..signature import claim
from . import masks
from .cache import FlowCache
from .dataset import Example
from .images import write_tiff
from .metrics import Score, score, summarize_groups
from .network import Network
from .tables import write_json


@dataclass(frozen=True)
class Thresholds:
    """How flows become masks; the defaults are cellpose's."""

    flow: float = masks.FLOW_THRESHOLD
    cellprob: float = masks.CELLPROB_THRESHOLD
    min_size: int = masks.MIN_SIZE


class Predictor:
    """Flows and masks of images by one network, through a cache if there is one.

    Args:
        network: what runs; see `load_network`.
        cache: a folder for flows. Without one, masks are exactly cellpose's; with one, those of
            flows rounded to the cache's float16.
        zero_dapi: whether channel 0 is set to 0.
        announce: on a CPU told once, after the first image: its seconds, and how many there are.
    """

    def __init__(
        self,
        network: Network,
        cache: str | Path | None = None,
        *,
        cache_dtype: str = "float16",
        zero_dapi: bool = False,
        announce: Callable[[float, int], None] | None = None,
    ) -> None:
        self.network, self.zero_dapi = network, zero_dapi
        self.cache = None if cache is None else FlowCache(cache, network, cache_dtype)
        self._announce = announce if network.device.type == "cpu" else None

    def flows(self, examples: Sequence[Example]) -> Iterator[tuple[Example, np.ndarray]]:
        """Each example with its flows [3, H, W]."""
        for number, example in enumerate(examples):
            image = example.image(zero_dapi=self.zero_dapi)
            start = time.perf_counter()
            if self.cache is None:
                flows = self.network.flows(image)
            else:
                flows = self.cache.flows(example.stem, image)
            if number == 0 and self._announce:
                self._announce(time.perf_counter() - start, len(examples))
                self._announce = None
            yield example, flows

    def masks(
        self, examples: Sequence[Example], thresholds: Thresholds
    ) -> Iterator[tuple[Example, np.ndarray]]:
        """Each example with its label mask [H, W]."""
        for example, flows in self.flows(examples):
            yield (
                example,
                masks.compute_masks(
                    flows,
                    flow_threshold=thresholds.flow,
                    cellprob_threshold=thresholds.cellprob,
                    min_size=thresholds.min_size,
                    device=self.network.device,
                ),
            )


def predict(
    predictor: Predictor, examples: Sequence[Example], thresholds: Thresholds, folder: Path
) -> int:
    """Writes ``<stem>_pred.tif`` of every image that has none yet; returns how many.

    Raises:
        SignatureMismatch: the folder holds masks of another network or other thresholds.
    """
    claim(folder, {"kind": "cellpose masks", **origin(predictor, thresholds)})
    left = [e for e in examples if not (folder / f"{e.stem}_pred.tif").exists()]
    for example, labels in predictor.masks(left, thresholds):
        write_tiff(folder / f"{example.stem}_pred.tif", labels)
    return len(left)


def evaluate(
    predictor: Predictor,
    examples: Sequence[Example],
    thresholds: Thresholds,
    folder: Path | None = None,
) -> dict[str, object]:
    """Metrics of a model on annotated images; see `summarize_groups`.

    Args:
        folder: gets ``<stem>_pred.tif`` of every image and ``metrics.json``.
    """
    scores = []
    for example, labels in predictor.masks(examples, thresholds):
        scores.append(score(example.mask(labels), labels))
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_tiff(folder / f"{example.stem}_pred.tif", labels)
    metrics = metrics_of(examples, scores, predictor, thresholds)
    if folder is not None:
        write_json(folder / "metrics.json", metrics)
    return metrics


def metrics_of(
    examples: Sequence[Example],
    scores: Sequence[Score],
    predictor: Predictor,
    thresholds: Thresholds,
) -> dict[str, object]:
    """The content of a ``metrics.json``: `summarize_groups`, and under ``settings`` its origin."""
    groups = summarize_groups(
        [example.stem for example in examples], [example.marker for example in examples], scores
    )
    settings = {"model_name": predictor.network.name, **origin(predictor, thresholds)}
    return {**groups, "settings": settings}


def origin(predictor: Predictor, thresholds: Thresholds) -> dict[str, object]:
    """What masks depend on besides the image."""
    return {
        **predictor.network.settings(),
        "flow_threshold": thresholds.flow,
        "cellprob_threshold": thresholds.cellprob,
        "min_size": thresholds.min_size,
        "zero_dapi": predictor.zero_dapi,
        "flows": "exact" if predictor.cache is None else predictor.cache.dtype,
    }
