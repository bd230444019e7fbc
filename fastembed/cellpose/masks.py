"""Flows and cell probabilities to label masks: cellpose's dynamics, with each step done once.

The network's output depends on no threshold. Where pixels flow to depends on the cell probability
threshold; the flow threshold only drops masks at the end. So one network pass serves all
thresholds, and one run of the dynamics all flow thresholds of a cell probability.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import fastremap
import numpy as np
import torch
from cellpose import dynamics
from scipy.ndimage import find_objects

from .._numba import flows as kernels

FLOW_THRESHOLD, CELLPROB_THRESHOLD = 0.4, 0.0
NITER, MIN_SIZE, MAX_SIZE_FRACTION = 200, 15, 0.4

# torch tells everybody who makes a sparse tensor, as cellpose does, of a check it could do.
warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled")

_SINGLE_ABOVE = 4e7  # pixels from which cellpose diffuses in float32


@dataclass(frozen=True)
class Candidates:
    """Masks of one cell probability threshold, before any is dropped.

    Args:
        labels: uint16 or uint32 [H, W], 1 to n without gaps.
        errors: float64 [n], mean squared difference between the network's flows and those that a
            mask of this shape would have.
    """

    labels: np.ndarray
    errors: np.ndarray


def compute_masks(
    flows: np.ndarray,
    *,
    flow_threshold: float = FLOW_THRESHOLD,
    cellprob_threshold: float = CELLPROB_THRESHOLD,
    min_size: int = MIN_SIZE,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Label masks from what the network says of an image.

    Args:
        flows: [3, H, W]: flow in y and x, cell probability (a logit); float32, or float16 of a
            cache, which counts as its float32.
        flow_threshold: masks whose flow error is above it are dropped; 0 keeps all.
        cellprob_threshold: pixels above it belong to cells.
        min_size: smaller masks are dropped, in pixels.
        device: where the dynamics run.

    Returns:
        uint16 [H, W], uint32 above 65,535 masks; 0 is background.

    Exactness: the pixels of `cellpose.dynamics.resize_and_compute_masks` (4.2) on a CPU; see
    `flow_errors` for what could make a difference.
    """
    return select(candidates(flows, cellprob_threshold, device), flow_threshold, min_size)


def candidates(
    flows: np.ndarray, cellprob_threshold: float, device: torch.device | str = "cpu"
) -> Candidates:
    """Runs the dynamics of `compute_masks` and measures flow errors."""
    flows = np.asarray(flows, dtype=np.float32)
    flow, cells = flows[:2], flows[2] > cellprob_threshold
    labels = np.zeros(cells.shape, np.uint16)
    if cells.any():
        pixels = np.nonzero(cells)
        ends = dynamics.follow_flows(
            flow * cells / 5.0, inds=pixels, niter=NITER, device=torch.device(device)
        )
        labels = dynamics.get_masks_torch(
            ends.int(), pixels, cells.shape, max_size_fraction=MAX_SIZE_FRACTION
        )
    return Candidates(labels, flow_errors(labels, flow))


def select(found: Candidates, flow_threshold: float, min_size: int = MIN_SIZE) -> np.ndarray:
    """Drops masks by flow error, fills holes, drops small masks; see `compute_masks`."""
    labels = found.labels
    if flow_threshold > 0:
        bad = 1 + np.flatnonzero(found.errors > flow_threshold)
        labels = fastremap.mask(labels, bad)
        fastremap.renumber(labels, in_place=True)
    else:
        labels = labels.copy()
    if labels.dtype != np.uint16 and labels.max() < 2**16:
        labels = labels.astype(np.uint16)
    return fill_and_remove_small(labels, min_size)


def flow_errors(labels: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """The flow error of each mask: float64 [n].

    Args:
        labels: [H, W], 1 to n without gaps.
        flow: float32 [2, H, W], as the network gives it.

    Exactness: `cellpose.dynamics.flow_error` within 1e-12 of the value, mostly to the bit. Its own
    last bits depend on the number of threads: where torch splits an array it adds the nine
    neighbours of a few pixels in another order. A mask would be kept by one and dropped by the
    other only if its error were that close to the threshold.
    """
    y, x = np.nonzero(labels)
    if len(y) == 0:
        return np.zeros(0)
    # Sorted by object, each object's pixels lie side by side, in the order of the image.
    order = np.argsort(labels[y, x], kind="stable")
    y, x = y[order], x[order]
    squares = ((_unit_flows(labels, y, x) - flow[:, y, x] / 5.0) ** 2).sum(axis=0)
    ends = np.cumsum(np.bincount(labels[y, x])[1:])
    return np.array([part.mean() for part in np.split(squares, ends[:-1])])


def label_flows(labels: np.ndarray) -> np.ndarray:
    """What a network learns from a mask: float32 [4, H, W].

    Args:
        labels: [H, W], 0 is background; gaps are closed.

    Returns:
        labels from 1 on, whether a pixel is in an object, unit flow in y and in x.

    Exactness: `cellpose.dynamics.labels_to_flows` within one float32 step; see `flow_errors`.
    """
    labels = fastremap.renumber(labels, in_place=False)[0]
    flows = np.zeros((4, *labels.shape), np.float32)
    flows[0], flows[1] = labels, labels > 0
    y, x = np.nonzero(labels)
    if len(y):
        flows[2:, y, x] = _unit_flows(labels, y, x)
    return flows


def _unit_flows(labels: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Direction towards the object's centre, at pixels of objects: float64 [2, N].

    The gradient of heat that spreads from the centre. cellpose spreads it over all objects at
    once, nine gathers per pixel and step; here each object's box stays in the cache and neighbours
    lie next to each other.
    """
    height, width = labels.shape
    single = (height + 2) * (width + 2) > _SINGLE_ABOVE
    heat = np.zeros((height + 2, width + 2), np.float32 if single else np.float64)
    boxes = _boxes(labels)
    # Every object's heat spreads for as long as the largest needs.
    steps = 2 * int((boxes[:, 2] - boxes[:, 0] + boxes[:, 3] - boxes[:, 1] + 2).max())
    kernels.diffuse(labels, boxes, kernels.centers(labels, boxes), steps, heat)
    gradient = np.stack(
        [heat[y + 2, x + 1] - heat[y, x + 1], heat[y + 1, x + 2] - heat[y + 1, x]]
    ).astype(np.float64)
    return gradient / (1e-60 + (gradient**2).sum(axis=0) ** 0.5)


def fill_and_remove_small(labels: np.ndarray, min_size: int) -> np.ndarray:
    """Fills holes of masks, and drops those below `min_size` pixels, before and after.

    Args:
        labels: [H, W], 1 to n without gaps.

    Exactness: the pixels of `cellpose.utils.fill_holes_and_remove_small_masks`.
    """
    labels = _remove_small(labels, min_size)
    if kernels.fill_holes(labels, _boxes(labels)) == 0:
        return labels
    return _remove_small(labels, min_size)  # of masks that another one has swallowed


def _remove_small(labels: np.ndarray, min_size: int) -> np.ndarray:
    there, sizes = fastremap.unique(labels, return_counts=True)
    labels = fastremap.mask(labels, there[(there > 0) & (sizes < min_size)])
    fastremap.renumber(labels, in_place=True)
    return labels


def _boxes(labels: np.ndarray) -> np.ndarray:
    """int64 [n, 4]: y0, x0, y1, x1 of every object, ends exclusive; empty for a label not there."""
    return np.array(
        [
            (0, 0, 0, 0) if box is None else (box[0].start, box[1].start, box[0].stop, box[1].stop)
            for box in find_objects(labels)
        ],
        dtype=np.int64,
    ).reshape(-1, 4)
