"""The stages of ``fastembed multichannel`` beside the plain NumPy way of doing them.

Each group's baseline (ratio 1.0) is what a script would write; where a stronger way is known
(for percentiles: two selects of one rank each), it is a row of its own.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from fastembed import MultiCrop, NpyPerPart, Percentile, dispatch, load_engine, ops, testing
from fastembed.npy import PixelBuffer, read_channels
from fastembed.records import Embedded, Item

SIZE = 1080
SHAPE = f"5x{SIZE}x{SIZE}"
DTYPES = ("uint16", "float32")
one_thread = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=DTYPES)
def image(request):
    return testing.microscopy(request.param, SIZE, SIZE, seed=0)


@pytest.fixture(scope="module")
def origins():
    return ops.crop_origins((SIZE, SIZE), 4, 224, seed=0, key="benchmark")


@one_thread
@pytest.mark.parametrize("contender", ["np.load, first 5 of 8", "read_channels", "memory copy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_read(row, tmp_path, dtype, contender):
    """Twelve files in turn, as in a data set. The copy is what any copying read must take."""
    tensor = testing.microscopy(dtype, SIZE, SIZE, seed=0, channels=8)
    paths = itertools.cycle([tmp_path / f"{i}.npy" for i in range(12)])
    for path in itertools.islice(paths, 12):
        np.save(path, tensor)
    buffer = PixelBuffer()
    target = np.empty_like(tensor[:5])

    def copy():
        np.copyto(target, tensor[:5])
        return target

    readers = {
        "np.load, first 5 of 8": lambda: np.load(next(paths))[:5],
        "read_channels": lambda: read_channels(next(paths), 5, buffer),
        "memory copy": copy,
    }
    np.testing.assert_array_equal(np.asarray(readers[contender]()), tensor[:5])
    benchmark = row(
        "read 5 of 8 channels, page cache", contender, dtype=dtype, shape=f"8x{SIZE}x{SIZE}",
        nbytes=tensor[:5].nbytes, images=1, baseline=contender.startswith("np"), exactness="bits",
    )  # fmt: skip
    benchmark(readers[contender])


def need_native(contender):
    if contender == "native" and dispatch.load_native():
        pytest.skip(dispatch.load_native())


def numpy_bounds(image):
    return np.array(
        [[np.percentile(channel.astype(np.float32), q) for q in (1.0, 99.0)] for channel in image]
    )


def two_partitions(image):
    """The strongest NumPy way: one rank per select, the second on the upper part."""
    result = np.empty((len(image), 2), dtype=np.float32)
    n = image[0].size
    (k_low, t_low), (k_high, t_high) = (divmod((n - 1) * q, 1) for q in (0.01, 0.99))
    k_low, k_high = int(k_low), int(k_high)
    for channel, bounds in zip(image, result, strict=True):
        values = np.partition(channel.ravel(), k_low)
        upper = np.partition(values[k_low + 1 :], k_high - k_low - 1)
        rank = k_high - k_low - 1
        ends = (values[k_low], upper.min(), t_low), (upper[rank], upper[rank + 1 :].min(), t_high)
        for side, (a, b, t) in enumerate(ends):
            a, b = np.float32(a), np.float32(b)
            gap = b - a
            bounds[side] = a + gap * np.float32(t) if t < 0.5 else b - gap * np.float32(1 - t)
    return result


@one_thread
@pytest.mark.parametrize("contender", ["np.percentile", "two np.partition", "numba", "native"])
def test_percentile(row, image, contender):
    need_native(contender)
    run = {
        "np.percentile": numpy_bounds,
        "two np.partition": two_partitions,
    }.get(contender, lambda image: ops.percentile_bounds(image, backend=contender))
    np.testing.assert_array_equal(
        np.asarray(run(image), dtype=np.float32), testing.oracle_bounds(image, 1, 99)
    )
    benchmark = row(
        "percentiles 1 and 99 of 5 channels", contender, dtype=str(image.dtype), shape=SHAPE,
        nbytes=image.nbytes, baseline=contender == "np.percentile", exactness="bits",
    )  # fmt: skip
    benchmark(run, image)


def numpy_levels(image):
    levels = np.empty(image.shape, dtype=np.uint8)
    for channel, out, (lo, hi) in zip(image, levels, numpy_bounds(image), strict=True):
        x = channel.astype(np.float32)
        lo, hi = np.float32(lo), np.float32(hi)
        out[:] = np.rint((np.clip(x, lo, hi) - lo) / (hi - lo) * np.float32(255))
    return levels


def numpy_crops(levels, origins):
    crops = np.stack([levels[:, y : y + 224, x : x + 224] for y, x in origins])
    mean = np.array(testing.IMAGENET_MEAN, dtype=np.float32)[:, None, None]
    std = np.array(testing.IMAGENET_STD, dtype=np.float32)[:, None, None]
    return torch.from_numpy((crops.astype(np.float32) / 255 - mean) / std).to(torch.bfloat16)


def our_crops(image, origins, backend, quantize=None):
    return ops.gather_crops(
        torch.from_numpy(image), torch.from_numpy(origins), 224,
        quantize=quantize if quantize is not None else Percentile(),
        mean=testing.IMAGENET_MEAN, std=testing.IMAGENET_STD, dtype=torch.bfloat16,
        backend=backend,
    )  # fmt: skip


@one_thread
@pytest.mark.parametrize("contender", ["NumPy", "numba", "native"])
def test_percentile_and_crops(row, image, origins, contender):
    need_native(contender)
    run = {
        "NumPy": lambda: numpy_crops(numpy_levels(image), origins),
    }.get(contender, lambda: our_crops(image, origins, contender))
    assert torch.equal(run(), numpy_crops(numpy_levels(image), origins))
    benchmark = row(
        "percentiles + 4 crops of 224 -> bf16", contender, dtype=str(image.dtype), shape=SHAPE,
        nbytes=image.nbytes, images=1, baseline=contender == "NumPy", exactness="bits",
    )  # fmt: skip
    benchmark(run)


@one_thread
@pytest.mark.parametrize("contender", ["NumPy, whole image", "reference", "numba", "native"])
def test_gather(row, image, origins, contender):
    ramp = torch.from_numpy(testing.oracle_ramp(image))

    def numpy_way():
        levels = np.empty(image.shape, dtype=np.uint8)
        for channel, out, (*_, lo, hi, span) in zip(image, levels, ramp.numpy(), strict=True):
            x = channel.astype(np.float32)
            out[:] = np.rint((np.clip(x, lo, hi) - lo) / span * np.float32(255))
        return numpy_crops(levels, origins)

    if contender.startswith("NumPy"):
        run = numpy_way
    else:
        need_native(contender)

        def run():
            return our_crops(image, origins, contender, ramp)

    assert torch.equal(run(), numpy_way())
    pixels = 4 * 5 * 224 * 224
    benchmark = row(
        "gather 4 crops of 224 -> bf16", contender, dtype=str(image.dtype), shape=SHAPE,
        nbytes=pixels * (image.itemsize + 2), images=1, baseline=contender.startswith("NumPy"),
        exactness="bits",
    )  # fmt: skip
    benchmark(run)


@pytest.mark.parametrize("contender", ["timm fp32, a sample a call", "engine fp32", "engine auto"])
def test_engine(row, contender):
    """16 crops of 5 channels (4 samples) through a DINOv3 ViT-S, on all threads."""
    batch = torch.rand(16, 5, 224, 224)
    if contender.startswith("timm"):
        import timm

        model = timm.create_model("vit_small_patch16_dinov3", in_chans=5, num_classes=0).eval()

        @torch.inference_mode()
        def run():
            return [model.forward_features(crops)[:, 0] for crops in batch.split(4)]
    else:
        with pytest.warns(UserWarning, match="RANDOM"):
            engine = load_engine(
                "dinov3:vits16", weights="random", channels=5, precision=contender.split()[1]
            )
        batch = batch.to(engine.contract.dtype)

        def run():
            return engine(batch)

    benchmark = row(
        "DINOv3 ViT-S/16, 5 x 224 x 224, all threads", contender, shape="16 crops", images=16,
        baseline=contender.startswith("timm"),
    )  # fmt: skip
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


@one_thread
@pytest.mark.parametrize(
    "contender", ["np.save", "np.save and fsync, 4 threads", "NpyPerPart, durable"]
)
def test_write(row, tmp_path, contender):
    """The segments of 256 photos, one commit. np.save leaves them to the next power cut."""
    photos, parts = 256, dict.fromkeys(range(11), 0)
    vectors = np.random.default_rng(0).standard_normal((photos, len(parts), 768)).astype("f2")
    samples = [Embedded(Item(f"{i}", "", f"{i}", parts=parts), v) for i, v in enumerate(vectors)]
    names = [f"{i}_{part}.npy" for i in range(photos) for part in parts]
    pool = ThreadPoolExecutor(4)

    def save(folder):
        for name, vector in zip(names, vectors.reshape(-1, 768), strict=True):
            np.save(folder / name, vector)

    def save_synced(path, vector):
        with path.open("wb") as stream:
            np.save(stream, vector)
            stream.flush()
            os.fsync(stream.fileno())

    def save_all_synced(folder):
        paths = [folder / name for name in names]
        list(pool.map(save_synced, paths, vectors.reshape(-1, 768)))

    def ours(folder):  # as the pipeline does
        sink = NpyPerPart(folder)
        list(pool.map(sink.write, samples))
        sink.flush()

    write = {"np.save": save, "np.save and fsync, 4 threads": save_all_synced}.get(contender, ours)

    def afresh():  # ext4 is slow to take inodes that were freed a moment ago: nothing is deleted
        return (Path(tempfile.mkdtemp(dir=tmp_path)),), {}

    (folder,), _ = afresh()
    write(folder)
    np.testing.assert_array_equal(np.load(folder / names[-1]), vectors[-1, -1])
    benchmark = row(
        "write 2816 vectors of 768 float16", contender, dtype="float16", shape="2816x768",
        nbytes=vectors.nbytes, images=photos, baseline=contender == "np.save", exactness="bits",
    )  # fmt: skip
    benchmark.pedantic(write, setup=afresh, rounds=5)


@one_thread
@pytest.mark.parametrize("contender", ["NumPy", "recipe"])
def test_prepare_one_sample(row, image, contender):
    """The recipe as the pipeline calls it, contract and all, beside the NumPy way."""
    from fastembed.engines import InputContract, Resize

    contract = InputContract(
        224, 224, 5, (0, 1, 2, 3, 4), testing.IMAGENET_MEAN, testing.IMAGENET_STD,
        Resize("float-bilinear"), torch.bfloat16,
    )  # fmt: skip
    recipe = MultiCrop(Percentile())
    tensor = torch.from_numpy(image)
    out = torch.empty(4, 5, 224, 224, dtype=torch.bfloat16)
    origins = ops.crop_origins((SIZE, SIZE), 4, 224, 0, "key")

    def ours():
        recipe.prepare(tensor, "key", contract).fill(0, out)
        return out

    run = ours if contender == "recipe" else lambda: numpy_crops(numpy_levels(image), origins)
    assert torch.equal(run(), numpy_crops(numpy_levels(image), origins))
    benchmark = row(
        "one sample into the batch, as the pipeline does", contender, dtype=str(image.dtype),
        shape=SHAPE, nbytes=image.nbytes, images=1, baseline=contender == "NumPy",
        exactness="bits",
    )  # fmt: skip
    benchmark(run)


@one_thread
@pytest.mark.parametrize("contender", ["one image, one thread", "two images, two threads"])
def test_two_threads(row, contender):
    """Kernels hold no lock: on two free cores two images take the time of one."""
    images = [testing.microscopy("float32", SIZE, SIZE, seed=i) for i in range(2)]
    count = 1 if contender.startswith("one") else 2
    pool = ThreadPoolExecutor(count)

    def run():
        return list(pool.map(ops.percentile_quantize, images[:count]))

    np.testing.assert_array_equal(
        run()[-1], testing.oracle_percentile_levels(images[count - 1], 1, 99)
    )
    benchmark = row(
        "percentile_quantize in threads", contender, dtype="float32", shape=SHAPE,
        nbytes=count * images[0].nbytes, images=count, baseline=count == 1, exactness="bits",
    )  # fmt: skip
    benchmark(run)
