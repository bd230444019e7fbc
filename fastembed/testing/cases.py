"""The table: one row per op, read by tests and by benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .. import ops
from .inputs import colours_of, label_map, microscopy, panoptic_map, scene, segments_of
from .oracles import (
    oracle_blend_crops,
    oracle_bounds,
    oracle_crops,
    oracle_labels,
    oracle_panoptic,
    oracle_percentile_levels,
    oracle_pool,
    oracle_ramp,
    oracle_segments,
    oracle_triplane,
    oracle_zscore_levels,
)

# The ramp of the z-score cases: five channels, typical of CPJUMP1 intensities.
MEAN = (2302.6, 2262.1, 4284.0, 2382.8, 1496.6)
STD = (2389.3, 2974.2, 6384.3, 3640.1, 3056.3)
IMAGENET_MEAN = (0.485, 0.456, 0.406, 0.449, 0.449)
IMAGENET_STD = (0.229, 0.224, 0.225, 0.226, 0.226)


@dataclass(frozen=True)
class Case:
    """One op on one kind of input.

    Attributes:
        op: its name; `backends` are looked up under `family` and `kernels`.
        make: (dtype, height, width, seed) -> the op's arguments.
        run: (arguments as tensors, backend) -> result; for a batch, lists of tensors.
        oracle: arguments -> the expected NumPy array (bfloat16 as float32).
        bytes_moved: arguments -> fewest bytes read plus written.
        dtypes: input dtypes that it is defined for.
        tolerance: largest relative difference; 0 is bit-exact.
    """

    op: str
    family: str
    kernels: tuple[str, ...]
    make: Callable[[str, int, int, int], dict]
    run: Callable[[dict, str | None], object]
    oracle: Callable[[dict], np.ndarray]
    bytes_moved: Callable[[dict], int]
    dtypes: tuple[str, ...]
    tolerance: float = 0.0


def on_device(arguments: dict, device: str | torch.device) -> dict:
    """A case's arguments, arrays and tensors alike as tensors on `device`."""
    return {
        name: torch.as_tensor(value).to(device)
        if isinstance(value, (np.ndarray, torch.Tensor))
        else value
        for name, value in arguments.items()
    }


def as_numpy(result: object) -> np.ndarray:
    """A result as NumPy, bfloat16 widened to float32, for comparison with an oracle."""
    if isinstance(result, torch.Tensor):
        result = result.float() if result.dtype == torch.bfloat16 else result
        return result.cpu().numpy()
    return result


def segment_rows(segments: ops.Segments | list[ops.Segments]) -> np.ndarray | list[np.ndarray]:
    """Segments as the rows that `oracle_segments` gives; a list of them for a list."""
    if isinstance(segments, list):
        return [segment_rows(one) for one in segments]
    ids, boxes, areas = (as_numpy(part).astype(np.int64) for part in segments)
    return np.column_stack([ids, boxes, areas])


def label_rows(
    found: ops.LabelStatistics | list[ops.LabelStatistics],
) -> np.ndarray | list[np.ndarray]:
    """Label statistics as the rows that `oracle_labels` gives; a list of them for a list."""
    if isinstance(found, list):
        return [label_rows(one) for one in found]
    ids, boxes, areas, *statistics = (as_numpy(part).astype(np.float64) for part in found)
    channels = np.stack(
        [part.reshape(len(ids), *part.shape[1:] or (1,)) for part in statistics], -1
    )
    return np.column_stack([ids, boxes, areas, channels.reshape(len(ids), 4 * channels.shape[1])])


def _image(dtype: str, height: int, width: int, seed: int) -> dict:
    return {"image": microscopy(dtype, height, width, seed)}


def _crops(output: str) -> Callable[[str, int, int, int], dict]:
    def make(dtype: str, height: int, width: int, seed: int) -> dict:
        size = min(224, height, width)
        image = microscopy(dtype, height, width, seed)
        origins = ops.crop_origins((height, width), 4, size, seed, "case")
        return {
            "image": image,
            "origins": origins,
            "size": size,
            "ramp": oracle_ramp(image),
            "dtype": output,
        }

    return make


def _run_gather(arguments: dict, backend: str | None) -> torch.Tensor:
    return ops.gather_crops(
        arguments["image"],
        arguments["origins"],
        arguments["size"],
        quantize=arguments["ramp"],
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        dtype=getattr(torch, arguments["dtype"]),
        backend=backend,
    )


def _oracle_gather(arguments: dict) -> np.ndarray:
    return oracle_crops(
        oracle_percentile_levels(arguments["image"], 1.0, 99.0),
        arguments["origins"],
        arguments["size"],
        IMAGENET_MEAN,
        IMAGENET_STD,
        arguments["dtype"],
    )


def _features(dtype: str, height: int, width: int, seed: int) -> dict:
    """[S, N, D] from the same four numbers: D = height, S = width, four crops."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((width, 4, height)).astype(np.float32)
    return {"features": torch.from_numpy(values).to(getattr(torch, dtype)), "dtype": dtype}


def _pool_case(mode: str, l2_normalize: bool) -> Case:
    return Case(
        op=f"pool_crops[{mode}{'-l2' if l2_normalize else ''}]",
        family="crops",
        kernels=("pool_crops",),
        make=_features,
        run=lambda a, backend: ops.pool_crops(
            a["features"], mode, l2_normalize=l2_normalize, backend=backend
        ),
        oracle=lambda a: oracle_pool(as_numpy(a["features"]), mode, l2_normalize, a["dtype"]),
        bytes_moved=lambda a: a["features"].nbytes * 5 // 4,
        dtypes=("float32", "bfloat16", "float16"),
        tolerance=1e-6 if l2_normalize else 0.0,
    )


def _panoptic(dtype: str, height: int, width: int, seed: int) -> dict:
    ids = panoptic_map(height, width, seed)
    return {"pixels": torch.from_numpy(colours_of(ids) if dtype == "uint8" else ids)}


def _oracle_segments(arguments: dict) -> np.ndarray:
    pixels = as_numpy(arguments["pixels"])
    return oracle_segments(oracle_panoptic(pixels) if pixels.ndim == 3 else pixels)


def _labelled(dtype: str, height: int, width: int, seed: int) -> dict:
    labels = label_map(height, width, seed)
    image = microscopy(dtype, height, width, seed, channels=2)
    return {"labels": torch.from_numpy(labels), "image": torch.from_numpy(image)}


def _label_case(dtypes: tuple[str, ...], tolerance: float) -> Case:
    return Case(
        op="label_statistics",
        family="labels",
        kernels=("label_statistics",),
        make=_labelled,
        run=lambda a, backend: label_rows(
            ops.label_statistics(a["labels"], a["image"], backend=backend)
        ),
        oracle=lambda a: oracle_labels(as_numpy(a["labels"]), as_numpy(a["image"])),
        bytes_moved=lambda a: a["labels"].nbytes + a["image"].nbytes,
        dtypes=dtypes,
        tolerance=tolerance,
    )


def _scene(dtype: str, height: int, width: int, seed: int) -> dict:
    """Four segments where there are pixels for them; their boxes in NumPy, the rest in torch."""
    image, ids = scene(height, width, min(4, height * width), seed)
    return {
        "image": torch.from_numpy(image),
        "ids": torch.from_numpy(ids),
        "segments": segments_of(ids),
        # Interpreted Triton takes seconds per crop at 224: that is for the benchmarks.
        "size": 224 if height * width >= 2**18 else 40,
    }


def _blend_case(resize: str, dtype: str) -> Case:
    return Case(
        op=f"blend_crops[{resize}-{dtype}]",
        family="masks",
        kernels=("blend_crops",),
        make=_scene,
        run=lambda a, backend: ops.blend_crops(
            **a,
            mean=IMAGENET_MEAN[:3],
            std=IMAGENET_STD[:3],
            dtype=getattr(torch, dtype),
            resize=resize,
            backend=backend,
        ),
        oracle=lambda a: oracle_blend_crops(
            a["image"].cpu().numpy(),
            a["ids"].cpu().numpy(),
            a["segments"],
            a["size"],
            mean=IMAGENET_MEAN[:3],
            std=IMAGENET_STD[:3],
            dtype=dtype,
            resize=resize,
        ),
        bytes_moved=lambda a: (
            7 * a["ids"].numel()
            + len(a["segments"].ids) * 3 * a["size"] ** 2 * getattr(torch, dtype).itemsize
        ),
        dtypes=("uint8",),
    )


def _tokens(dtype: str, height: int, width: int, seed: int) -> dict:
    """Three planes of a small volume, enlarged along x and y, shrunk along z; or a real one's."""
    rng = np.random.default_rng(seed)
    if height * width >= 2**18:
        channels, shape, grids = 16, (128, 128, 128), ((32, 32),) * 3
    else:
        channels, shape = 2, (1 + height % 3, height, width)
        rows, columns = (height + 2) // 3, (width + 3) // 4
        grids = ((rows, columns), (9, columns), (9, rows))
    arguments = {"shape": shape}
    for name, slices, grid in zip(("xy", "xz", "yz"), shape, grids, strict=True):
        values = rng.standard_normal((slices, channels, *grid)).astype(np.float32)
        arguments[name] = torch.from_numpy(values).to(getattr(torch, dtype))
    return arguments


def _planes_of(arguments: dict) -> dict:
    return {name: arguments[name] for name in ("xy", "xz", "yz")}


def _triplane_case(mode: str, output: str) -> Case:
    return Case(
        op=f"triplane_accumulate[{mode}-{output}]",
        family="volumes",
        kernels=("triplane_accumulate",),
        make=_tokens,
        run=lambda a, backend: ops.triplane_accumulate(
            _planes_of(a), a["shape"], mode=mode, dtype=getattr(torch, output), backend=backend
        ),
        oracle=lambda a: oracle_triplane(
            {name: as_numpy(plane) for name, plane in _planes_of(a).items()},
            a["shape"],
            mode,
            output,
        ),
        bytes_moved=lambda a: (
            sum(plane.nbytes for plane in _planes_of(a).values())
            + a["xy"].shape[1] * int(np.prod(a["shape"])) * getattr(torch, output).itemsize
        ),
        dtypes=("float32", "bfloat16", "float16"),
    )


INTENSITIES = ("uint8", "uint16", "float32")


CASES = (
    Case(
        op="percentile_bounds",
        family="quantize",
        kernels=("percentile_bounds",),
        make=_image,
        run=lambda a, backend: ops.percentile_bounds(a["image"], backend=backend),
        oracle=lambda a: oracle_bounds(a["image"], 1.0, 99.0),
        bytes_moved=lambda a: a["image"].nbytes,
        dtypes=INTENSITIES,
    ),
    Case(
        op="percentile_quantize",
        family="quantize",
        kernels=("percentile_bounds", "quantize"),
        make=_image,
        run=lambda a, backend: ops.percentile_quantize(a["image"], backend=backend),
        oracle=lambda a: oracle_percentile_levels(a["image"], 1.0, 99.0),
        bytes_moved=lambda a: 2 * a["image"].nbytes + a["image"].size,
        dtypes=INTENSITIES,
    ),
    Case(
        op="zscore_quantize",
        family="quantize",
        kernels=("quantize",),
        make=_image,
        run=lambda a, backend: ops.zscore_quantize(a["image"], MEAN, STD, 3.0, backend=backend),
        oracle=lambda a: oracle_zscore_levels(a["image"], MEAN, STD, 3.0),
        bytes_moved=lambda a: a["image"].nbytes + a["image"].size,
        dtypes=INTENSITIES,
    ),
    *(
        Case(
            op=f"gather_crops[{output}]",
            family="crops",
            kernels=("gather_crops",),
            make=_crops(output),
            run=_run_gather,
            oracle=_oracle_gather,
            bytes_moved=lambda a: (
                len(a["origins"])
                * len(a["image"])
                * a["size"] ** 2
                * (a["image"].itemsize + getattr(torch, a["dtype"]).itemsize)
            ),
            dtypes=INTENSITIES,
        )
        for output in ("float32", "bfloat16", "float16")
    ),
    _blend_case("pillow-bicubic", "float32"),
    _blend_case("pillow-bicubic", "bfloat16"),
    _blend_case("torch-uint8-bilinear", "float16"),
    *(_pool_case(mode, l2) for mode in ("avg", "max") for l2 in (False, True)),
    _triplane_case("bilinear", "float16"),
    _triplane_case("bilinear", "float32"),
    _triplane_case("nearest", "float16"),
    Case(
        op="decode_panoptic",
        family="panoptic",
        kernels=("decode_panoptic",),
        make=_panoptic,
        run=lambda a, backend: ops.decode_panoptic(a["pixels"], backend=backend),
        oracle=lambda a: oracle_panoptic(as_numpy(a["pixels"])),
        bytes_moved=lambda a: a["pixels"].nbytes * 7 // 3,
        dtypes=("uint8",),
    ),
    Case(
        op="panoptic_segments",
        family="panoptic",
        kernels=("panoptic_segments",),
        make=_panoptic,
        run=lambda a, backend: segment_rows(ops.panoptic_segments(a["pixels"], backend=backend)),
        oracle=_oracle_segments,
        bytes_moved=lambda a: a["pixels"].nbytes,
        dtypes=("uint8", "int32"),
    ),
    _label_case(("uint8", "uint16"), 0.0),
    # To the bit on CPU backends but interpreted Triton (tests/test_labels.py).
    _label_case(("float32",), 1e-12),
)
