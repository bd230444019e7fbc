"""blend_crops against the resizes that its modes are named after, one crop, one thread.

Pillow and torchvision only resize: the blend that blend_crops does beside it, and the
normalisation, are the part that they are spared.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastembed import dispatch, ops, testing

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
transforms = pytest.importorskip("torchvision.transforms.v2", reason="torchvision is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = 224
SHAPES = [(480, 640), (95, 101)]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def crop(request) -> tuple[np.ndarray, np.ndarray, SimpleNamespace]:
    """An image that is all one crop, its two segments side by side."""
    height, width = request.param
    image, _ = testing.scene(height, width, 4, seed=0)
    ids = np.where(np.arange(width) < width // 2, 1, 2).astype(np.int32)
    box = np.array([[0, 0, height - 1, width - 1]], dtype=np.int32)
    ids = np.ascontiguousarray(np.broadcast_to(ids, (height, width)))
    return image, ids, SimpleNamespace(ids=np.array([1], dtype=np.int32), boxes=box)


def describe(row, image, contender, exactness, **options):
    height, width, _ = image.shape
    return row(
        f"crop {height}x{width} -> {SIZE}", contender, shape=f"{height}x{width}", images=1,
        nbytes=7 * height * width + 3 * SIZE**2 * 4, exactness=exactness, **options,
    )  # fmt: skip


def test_pillow(row, crop):
    picture = Image.fromarray(crop[0])
    benchmark = describe(row, crop[0], "Pillow bicubic, resize only", "bits", baseline=True)
    benchmark(picture.resize, (SIZE, SIZE), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_torchvision(row, crop, mode):
    tensor = torch.from_numpy(crop[0])[None].permute(0, 3, 1, 2)  # channels last: its fast path
    benchmark = describe(row, crop[0], f"torch uint8 {mode}, resize only", f"torch-uint8-{mode}")
    benchmark(
        transforms.functional.resize, tensor, [SIZE, SIZE], transforms.InterpolationMode(mode),
        antialias=True,
    )  # fmt: skip


@pytest.mark.parametrize("resize", ["pillow-bicubic", "torch-uint8-bilinear"])
@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_blend_crops(row, crop, backend, resize):
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("interpreted Triton has no speed")
    function, reason = dispatch.find("masks", "blend_crops", DEVICE, backend)
    if function is None:
        pytest.skip(f"{backend} blend_crops: {reason}")
    image, ids, segments = crop
    pixels, labels = torch.from_numpy(image).to(DEVICE), torch.from_numpy(ids).to(DEVICE)
    out = torch.empty((1, 3, SIZE, SIZE), device=DEVICE)

    def run():
        ops.blend_crops(pixels, labels, segments, SIZE, resize=resize, out=out, backend=backend)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    run()
    expected = testing.oracle_blend_crops(image, ids, segments, SIZE, resize=resize)
    np.testing.assert_array_equal(out.cpu(), expected)
    benchmark = describe(row, image, f"{backend} {resize}", "bits")
    benchmark.pedantic(run, rounds=9 if backend == "reference" else 60, warmup_rounds=2)
