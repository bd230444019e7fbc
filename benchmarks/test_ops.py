"""Every op of the case table on every backend, each gated by its oracle.

On a CPU one image, on one thread. On a GPU a batch that fills it, of mixed sizes and in one
call, beside the same in torch's own ops. The automatic backend order (fastembed/dispatch.py) is
read off this benchmark's CSV.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from fastembed import dispatch, testing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [(case, dtype) for case in testing.CASES for dtype in case.dtypes]
# Distinct images, and how often each is in the batch, as a copy of its own: 64 images of five
# channels are 0.5 GB as uint16, ten times the cache of an H200.
SIZES, COPIES = [(1080, 1080), (520, 696)], 32
if DEVICE == "cpu":
    SIZES, COPIES = SIZES[:1], 1
pytestmark = pytest.mark.usefixtures("one_thread")


@functools.lru_cache(maxsize=1)  # the backends of a case come one after the other
def batch_of(case: testing.Case, dtype: str) -> tuple[dict, list[np.ndarray], int]:
    """Arguments on the device, what the op must give for each image, and the bytes it moves.

    pool_crops has a batch axis of its own: as many samples as there would be images' crops. A
    volume is no image of a batch: there is one of it.
    """
    if case.kernels == ("pool_crops",):
        arguments = case.make(dtype, 1024, 1024 * len(SIZES) * COPIES, seed=0)
        moved = case.bytes_moved(arguments)
        return testing.on_device(arguments, DEVICE), [case.oracle(arguments)], moved
    if case.family == "volumes":
        arguments = case.make(dtype, *SIZES[0], seed=0)
        moved = case.bytes_moved(arguments)
        return testing.on_device(arguments, DEVICE), [case.oracle(arguments)], moved
    samples = [case.make(dtype, *size, seed=i) for i, size in enumerate(SIZES)]
    expected = [case.oracle(sample) for sample in samples] * COPIES
    moved = COPIES * sum(case.bytes_moved(sample) for sample in samples)
    if len(expected) == 1:
        return testing.on_device(samples[0], DEVICE), expected, moved
    rows = [testing.on_device(sample, DEVICE) for _ in range(COPIES) for sample in samples]
    batch = {name: [row[name] for row in rows] for name in rows[0]}
    for name, values in batch.items():
        if name == "ramp":
            batch[name] = torch.stack(values)
        elif name == "origins":
            batch[name] = [sample[name] for sample in samples] * COPIES  # in main memory, as made
        elif not isinstance(values[0], (torch.Tensor, SimpleNamespace)):
            batch[name] = values[0]  # one for all: a size, a dtype
    return batch, expected, moved


def close(result: object, expected: np.ndarray, tolerance: float) -> bool:
    difference = abs(testing.as_numpy(result).astype("f8") - expected)
    return bool((difference <= tolerance * abs(expected.astype("f8"))).all())


def check(result: object, expected: list[np.ndarray], tolerance: float) -> None:
    """`result` has an item per image, or is that of a single image, or is of all the crops."""
    if isinstance(result, list) or 1 < len(expected) == len(result):
        for one, other in zip(result, expected, strict=True):
            assert close(one, other, tolerance)
    else:
        assert close(result, np.concatenate(expected), tolerance)


@pytest.mark.parametrize("backend", [*dispatch.BACKENDS, "torch"])
@pytest.mark.parametrize("case,dtype", CASES, ids=[f"{c.op}-{d}" for c, d in CASES])
def test_op(row, case, dtype, backend):
    plain = PLAIN.get(case.op.partition("[")[0]) if DEVICE == "cuda" else None
    if backend == "torch":
        if plain is None:
            pytest.skip("torch's own ops: on a GPU, where they can do this at all")
    elif backend == "triton" and DEVICE == "cpu":
        pytest.skip("interpreted Triton has no speed")
    else:
        for kernel in case.kernels:
            function, reason = dispatch.find(case.family, kernel, DEVICE, backend)
            if function is None:
                pytest.skip(f"{backend} {kernel}: {reason}")
    arguments, expected, moved = batch_of(case, dtype)

    def run():
        result = plain(arguments) if backend == "torch" else case.run(arguments, backend)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    unit = torch.finfo(getattr(torch, dtype)).eps if case.tolerance else 0
    result = run()
    if backend != "torch":  # which has other bits
        check(result, expected, max(case.tolerance, unit))
    exactness = "bits" if not case.tolerance else f"{case.tolerance:g} relative"
    first = arguments["xy"] if case.family == "volumes" else next(iter(arguments.values()))
    shape = "x".join(map(str, (first[0] if isinstance(first, list) else first).shape))
    benchmark = row(
        f"op {case.op}", backend, dtype=dtype,
        shape=f"{len(first)} of {shape} and less" if isinstance(first, list) else shape,
        nbytes=moved, images=len(first) if isinstance(first, list) else 1,
        baseline=backend == ("torch" if plain else "reference"), device=DEVICE,
        exactness="" if backend == "torch" else exactness,
    )  # fmt: skip
    benchmark.pedantic(run, rounds=3 if backend == "reference" else 15, warmup_rounds=1)


# The same work in torch's own ops, image by image, as one would write it for a GPU. The blend's
# is less work: boxes are not padded, values not normalised.


def _levels(image: torch.Tensor) -> torch.Tensor:
    low, high = _bounds(image).T[..., None, None]
    return ((image.float().clamp(low, high) - low) / (high - low) * 255).round().byte()


def _bounds(image: torch.Tensor) -> torch.Tensor:
    # torch.quantile takes 16 million elements at most, and float32.
    at = torch.tensor([0.01, 0.99], device=image.device)
    return torch.quantile(image.float().flatten(1), at, dim=1).T


def _zscore(image: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor([testing.MEAN, testing.STD], device=image.device)[..., None, None]
    return (((image.float() - mean) / std).clamp(-3, 3).add(3).div(6) * 255).round().byte()


def _gather(a: dict) -> torch.Tensor:
    crops = []
    mean, std = torch.tensor(
        [testing.IMAGENET_MEAN, testing.IMAGENET_STD], device=a["ramp"].device
    )[..., None, None]
    for image, origins, ramp in zip(a["image"], a["origins"], a["ramp"], strict=True):
        lo, hi, span = ramp[:, 2:].T[..., None, None]
        for y, x in origins.tolist():
            window = image[:, y : y + a["size"], x : x + a["size"]].float()
            level = ((window.clamp(lo, hi) - lo) / span * 255).round()
            crops.append(((level / 255 - mean) / std).to(getattr(torch, a["dtype"])))
    return torch.stack(crops)


def _blend(a: dict) -> torch.Tensor:
    crops = []
    for image, ids, segments in zip(a["image"], a["ids"], a["segments"], strict=True):
        for name, (y0, x0, y1, x1) in zip(segments.ids, segments.boxes.tolist(), strict=True):
            window = image[y0 : y1 + 1, x0 : x1 + 1].permute(2, 0, 1).float() / 255
            alpha = torch.where(ids[y0 : y1 + 1, x0 : x1 + 1] == int(name), 1.0, 0.3)
            crops.append(
                functional.interpolate(
                    (window * alpha + (1 - alpha) * 0.5)[None], (a["size"], a["size"]),
                    mode="bicubic", antialias=True,
                )
            )  # fmt: skip
    return torch.cat(crops)


def _ids(rgb: torch.Tensor) -> torch.Tensor:
    red, green, blue = rgb.int().unbind(2)
    return red | green << 8 | blue << 16


def _triplane(a: dict) -> torch.Tensor:
    depth, height, width = a["shape"]
    options = {"mode": "bilinear", "align_corners": False}
    total = functional.interpolate(a["xy"].float(), (height, width), **options).transpose(0, 1)
    xz = functional.interpolate(a["xz"].float(), (depth, width), **options)
    yz = functional.interpolate(a["yz"].float(), (depth, height), **options)
    return ((total + xz.permute(1, 2, 0, 3) + yz.permute(1, 2, 3, 0)) / 3).half()


def _each(function: Callable, name: str = "image") -> Callable[[dict], list]:
    return lambda a: [function(image) for image in a[name]]


PLAIN: dict[str, Callable[[dict], object]] = {
    "percentile_bounds": _each(_bounds),
    "percentile_quantize": _each(_levels),
    "zscore_quantize": _each(_zscore),
    "gather_crops": _gather,
    "blend_crops": _blend,
    "decode_panoptic": _each(_ids, "pixels"),
    "triplane_accumulate": _triplane,
}
