"""One table for tests and benchmarks: each op with its inputs, oracle, tolerance and bytes.

Oracles are plain NumPy and never call the library. A test compares every backend with the
oracle; a benchmark times a backend only on inputs where that comparison holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

from . import ops

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
        run: (arguments as tensors, backend) -> result.
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


def microscopy(dtype: str, height: int, width: int, seed: int, channels: int = 5) -> np.ndarray:
    """Log-normal background with bright spots, [C, H, W]: the histogram of a stained plate."""
    rng = np.random.default_rng(seed)
    image = rng.lognormal(6.0, 0.7, (channels, height, width))
    image *= 1 + 4 * (rng.random(image.shape) > 0.98)
    if dtype == "uint8":
        image = image / 40
    top = 1e9 if dtype == "float32" else np.iinfo(dtype).max
    return np.minimum(image, top).astype(dtype)


def panoptic_map(height: int, width: int, seed: int, segments: int = 24) -> np.ndarray:
    """Discs over stripes over void, [H, W] int32: ids below 2^24, runs as long as COCO's."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((height, width), dtype=np.int32)
    colours = rng.integers(1, 2**24, segments)
    colours[-1] = 2**24 - 1
    y, x = np.ogrid[:height, :width]
    for i, colour in enumerate(colours):
        if i % 3 == 0:
            top = rng.integers(0, height)
            ids[top : top + 1 + height // 6] = colour
        else:
            radius = max(1, min(height, width) * rng.uniform(0.02, 0.25))
            at = rng.integers(0, height), rng.integers(0, width)
            ids[(y - at[0]) ** 2 + (x - at[1]) ** 2 <= radius**2] = colour
    return ids


def colours_of(ids: np.ndarray) -> np.ndarray:
    """The panoptic map [H, W, 3] uint8 of ids 0..2^24 - 1: panopticapi's id2rgb."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)


def oracle_panoptic(rgb: np.ndarray) -> np.ndarray:
    """panopticapi's rgb2id: [H, W] int32."""
    rgb = rgb.astype(np.int32)
    return rgb[:, :, 0] + 256 * rgb[:, :, 1] + 256 * 256 * rgb[:, :, 2]


def oracle_segments(ids: np.ndarray, void: int | None = 0) -> np.ndarray:
    """A mask per id: [S, 6] int64 of (id, y0, x0, y1, x1, area)."""
    rows = []
    for segment in np.unique(ids):
        if segment != void:
            y, x = np.nonzero(ids == segment)
            rows.append((segment, y.min(), x.min(), y.max(), x.max(), len(y)))
    return np.array(rows, dtype=np.int64).reshape(-1, 6)


def segment_rows(segments: ops.Segments) -> np.ndarray:
    """Segments as the rows that `oracle_segments` gives."""
    ids, boxes, areas = (as_numpy(part).astype(np.int64) for part in segments)
    return np.column_stack([ids, boxes, areas])


def oracle_bounds(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Percentiles by a full sort and NumPy 2.4's "linear" rule, written out: [C, 2]."""
    bounds = np.empty((len(image), 2), dtype=np.float32)
    for channel, row in zip(image, bounds, strict=True):
        values = np.sort(channel.astype(np.float32), axis=None)
        for side, q in enumerate((low, high)):
            position = (values.size - 1) * (q / 100)
            k = min(int(np.floor(position)), values.size - 1)
            t = position - k
            a, b = values[k], values[min(k + 1, values.size - 1)]
            gap = b - a
            row[side] = a + gap * np.float32(t) if t < 0.5 else b - gap * np.float32(1 - t)
    return bounds


def oracle_ramp(image: np.ndarray, low: float = 1.0, high: float = 99.0) -> np.ndarray:
    """The ramps of the percentile rule: (shift, scale, lo, hi, span) per channel, [C, 5]."""
    lo, hi = oracle_bounds(image, low, high).T
    return np.stack([np.zeros_like(lo), np.ones_like(lo), lo, hi, hi - lo], axis=1)


def oracle_percentile_levels(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Clip, scale, round to even in float32; a constant channel is a step: [C, H, W] uint8."""
    levels = np.empty(image.shape, dtype=np.uint8)
    for c, (lo, hi) in enumerate(oracle_bounds(image, low, high)):
        x = image[c].astype(np.float32)
        if hi <= lo:
            levels[c] = np.where(x > lo, 255, 0)
        else:
            levels[c] = np.rint((np.clip(x, lo, hi) - lo) / (hi - lo) * np.float32(255))
    return levels


def oracle_zscore_levels(
    image: np.ndarray, mean: Iterable[float], std: Iterable[float], clamp_z: float
) -> np.ndarray:
    levels = np.empty(image.shape, dtype=np.uint8)
    clamp = np.float32(clamp_z)
    for c, (m, s) in enumerate(zip(mean, std, strict=True)):
        s = np.float32(1.0 if np.float32(s) <= np.float32(1e-6) else s)
        z = np.clip((image[c].astype(np.float32) - np.float32(m)) / s, -clamp, clamp)
        levels[c] = np.rint((z + clamp) / (np.float32(2) * clamp) * np.float32(255))
    return levels


def oracle_crops(
    levels: np.ndarray, origins: np.ndarray, size: int, mean: tuple, std: tuple, dtype: str
) -> np.ndarray:
    """Slice, / 255, - mean, / std in float32, one cast: [N, C, size, size]."""
    mean = np.asarray(mean, dtype=np.float32)[:, None, None]
    std = np.asarray(std, dtype=np.float32)[:, None, None]
    crops = np.stack([levels[:, y : y + size, x : x + size] for y, x in origins])
    values = (crops.astype(np.float32) / np.float32(255) - mean) / std
    return round_to_bfloat16(values) if dtype == "bfloat16" else values.astype(dtype)


def oracle_pool(features: np.ndarray, mode: str, l2_normalize: bool, dtype: str) -> np.ndarray:
    """Sum over axis 1 / N, or max, in float32; the norm in float64: [S, D]."""
    features = features.astype(np.float32)
    if mode == "avg":
        pooled = np.add.reduce(features, axis=1) / np.float32(features.shape[1])
    else:
        pooled = features.max(axis=1)
    if l2_normalize:
        norm = np.sqrt((pooled.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
        pooled = (pooled / np.maximum(norm, 1e-12)).astype(np.float32)
    return round_to_bfloat16(pooled) if dtype == "bfloat16" else pooled.astype(dtype)


def scene(height: int, width: int, segments: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A photograph's stand-in and its panoptic map: [H, W, 3] uint8 and [H, W] int32.

    Every pixel belongs to the nearest of some points; colour follows the segment, on a
    gradient, with noise: flat areas, edges and texture.
    """
    rng = np.random.default_rng(seed)
    points = rng.random((segments, 2)) * (height, width)
    rows, columns = np.mgrid[:height, :width]
    distance = [(rows - y) ** 2 + (columns - x) ** 2 for y, x in points]
    nearest = np.argmin(distance, axis=0)
    colours = rng.integers(0, 256, (segments, 3))
    image = colours[nearest] + (60 * rows / height)[..., None] + rng.normal(0, 12, (1, width, 3))
    ids = rng.choice(1 << 24, segments, replace=False).astype(np.int32)
    return np.clip(image, 0, 255).astype(np.uint8), ids[nearest]


def segments_of(ids: np.ndarray) -> SimpleNamespace:
    """Ids, ascending, and inclusive boxes of the segments of a panoptic map [H, W]."""
    names = np.unique(ids)
    boxes = []
    for name in names:
        y, x = np.nonzero(ids == name)
        boxes.append((y.min(), x.min(), y.max(), x.max()))
    return SimpleNamespace(ids=names, boxes=np.array(boxes, dtype=np.int32))


def oracle_blended_crop(
    image: np.ndarray, mask: np.ndarray, box: Iterable[int], bg_alpha: float, pad_ratio: float
) -> np.ndarray:
    """The seed's way: the whole image blended in float64, then cut out: [h, w, 3] uint8."""
    height, width = mask.shape
    alpha = np.where(mask, 1.0, np.float64(np.float32(bg_alpha)))[..., None]
    blended = image.astype(np.float64) / 255 * alpha + (1 - alpha) * 0.5
    y0, x0, y1, x1 = (int(edge) for edge in box)
    pad_y, pad_x = int(pad_ratio * (y1 - y0 + 1)), int(pad_ratio * (x1 - x0 + 1))
    rows = slice(max(0, y0 - pad_y), min(height, y1 + 1 + pad_y))
    columns = slice(max(0, x0 - pad_x), min(width, x1 + 1 + pad_x))
    return (blended[rows, columns] * 255).astype(np.uint8)


def oracle_resize(crop: np.ndarray, size: int, mode: str) -> np.ndarray:
    """[h, w, 3] uint8 to [size, size, 3], by the library that `mode` names."""
    if mode.startswith("pillow"):
        from PIL import Image

        picture = Image.fromarray(crop)
        if mode == "pillow12-bicubic":  # horizontally first, whatever the installed one does
            picture = picture.resize((size, len(crop)), Image.Resampling.BICUBIC)
        return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
    from torchvision.transforms import v2

    tensor = torch.from_numpy(crop).permute(2, 0, 1)  # a batch of one, channels last
    if mode == "float-bilinear":
        tensor = tensor / 255
    interpolation = v2.InterpolationMode(mode.rpartition("-")[2])
    resized = v2.functional.resize(tensor, [size, size], interpolation, antialias=True)
    return resized.permute(1, 2, 0).numpy()


def oracle_blend_crops(
    image: np.ndarray,
    ids: np.ndarray,
    segments: SimpleNamespace,
    size: int = 224,
    bg_alpha: float = 0.3,
    pad_ratio: float = 0.1,
    mean: tuple = (0.5, 0.5, 0.5),
    std: tuple = (0.5, 0.5, 0.5),
    dtype: str = "float32",
    resize: str = "pillow-bicubic",
) -> np.ndarray:
    """Blend, cut, resize, / 255, - mean, / std in float32, one cast: [S, 3, size, size]."""
    crops = np.empty((len(segments.ids), 3, size, size), dtype=np.float32)
    for crop, name, box in zip(crops, segments.ids, segments.boxes, strict=True):
        blended = oracle_blended_crop(image, ids == name, box, bg_alpha, pad_ratio)
        value = oracle_resize(blended, size, resize)
        if value.dtype == np.uint8:
            value = value.astype(np.float32) / np.float32(255)
        value = (value - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
        crop[:] = value.transpose(2, 0, 1)
    return round_to_bfloat16(crops) if dtype == "bfloat16" else crops.astype(dtype)


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 rounded half to even to bfloat16, still as float32. For finite values."""
    bits = values.astype(np.float32).view(np.uint32)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


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
)
