"""Parity: engines against their upstream implementations, from an image file's bytes on."""

from __future__ import annotations

import io
import platform
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .gate import COSINE, lowest_cosine
from .load import load_engine
from .preprocess import model_input
from .upstream import Upstream, upstream

FP32_COSINE = 0.999999
# transformers folds 1/255 into mean and std and DINOv3's filter is a float one: both round, by far
# less than the 0.5 that would change a level.
INPUT_LEVELS = 0.01
BATCHES = (1, 2, 7)

# What a release has to hold for.
MODELS = (
    "openclip:timm/ViT-B-16-SigLIP",
    "transformers:google/siglip-base-patch16-224",
    "openai:ViT-B/32",
    "openai:ViT-L/14",
    "transformers:openai/clip-vit-base-patch32",
    "transformers:openai/clip-vit-large-patch14",
    "transformers:facebook/dinov2-small",
    "transformers:facebook/dinov2-base",
    "transformers:facebook/dinov2-large",
    "transformers:facebook/dinov2-with-registers-small",
    "transformers:facebook/dinov2-with-registers-base",
    "transformers:facebook/dinov2-with-registers-large",
    "dinov2:vits14",
    "dinov2:vits14_reg",
    "transformers:facebook/dinov3-vits16-pretrain-lvd1689m",
    "dinov3:vits16",
    "dinov3:vitb16",
    "dinov3:vitl16",
    "timm:vit_small_patch16_dinov3.lvd1689m",
)


@dataclass(frozen=True)
class Row:
    """One model by one runtime in one precision.

    Attributes:
        input_levels: largest difference of the input tensor from the upstream's, in 8-bit levels.
        cosine: the lowest over the images.
        relative: largest difference of an output value, over the largest value.
        same_bits: whether a sample's bits are the same in batches of 1, 2, 7 and full.
        failed: what misses its gate, in words; empty if nothing does.
    """

    spec: str
    upstream: str
    output: str
    runtime: str
    precision: str
    input_levels: float
    cosine: float
    relative: float
    same_bits: bool
    failed: str


def measure(
    spec: str,
    runtimes: Sequence[str] = ("torch",),
    precisions: Sequence[str] = ("fp32", "bf16"),
    *,
    device: str = "cpu",
    seed: int = 0,
) -> Iterator[Row]:
    """The rows of one model. Combinations that a device or runtime refuses are left out."""
    theirs = upstream(spec, seed)
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in image_files()]
    prepared = torch.stack([theirs.prepare(image) for image in images])
    with torch.inference_mode():
        expected = theirs.embed(prepared).float()
    with tempfile.TemporaryDirectory() as folder:
        weights = theirs.save(Path(folder))
        for runtime in runtimes:
            for precision in precisions:
                try:
                    engine = load_engine(
                        spec, runtime=runtime, weights=weights, precision=precision,
                        output=theirs.output, size=theirs.size, batch_size=len(images),
                        device=device,
                    )  # fmt: skip
                except ValueError as error:
                    if "is not offered" not in str(error):
                        raise
                    continue
                yield _row(spec, theirs, engine, images, prepared, expected)


def _row(spec: str, theirs: Upstream, engine, images, prepared: Tensor, expected: Tensor) -> Row:
    contract = engine.contract
    ours = torch.stack([model_input(image, contract) for image in images])
    exact = replace(contract, dtype=torch.float32)
    uncast = torch.stack([model_input(image, exact) for image in images])
    scale = 255 * torch.tensor(contract.std)[:, None, None]
    features = engine(ours).cpu()
    row = {
        "input_levels": ((uncast - prepared).abs() * scale).max().item(),
        "cosine": lowest_cosine(features, expected),
        "relative": ((features - expected).abs().max() / expected.abs().max()).item(),
        "same_bits": all(
            torch.equal(engine(ours[:count]).cpu(), features[:count]) for count in BATCHES
        ),
    }
    gate = FP32_COSINE if engine.precision == "fp32" else COSINE
    failed = [
        row["input_levels"] > INPUT_LEVELS and f"input differs by {row['input_levels']:.3g} levels",
        row["cosine"] < gate and f"cosine {row['cosine']:.7f} is below {gate}",
        not row["same_bits"] and "bits depend on the batch",
    ]
    return Row(
        spec, theirs.origin, theirs.output, engine.runtime, engine.precision, **row,
        failed="; ".join(reason for reason in failed if reason),
    )  # fmt: skip


def image_files(count: int = 8) -> list[bytes]:
    """JPEG and PNG files of several sizes and shapes, the same bytes on every machine.

    Smooth shapes with texture; drawn from integers, so that no float library has a say.
    """
    rng = np.random.default_rng(7)
    files = []
    for i in range(count):
        height, width = (int(side) for side in rng.integers(180, 700, 2))
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        smooth = np.asarray(
            coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16
        )
        texture = rng.integers(-20, 21, (height, width, 3), dtype=np.int16)
        image = Image.fromarray((smooth + texture).clip(0, 255).astype(np.uint8))
        stream = io.BytesIO()
        image.save(stream, "PNG") if i % 2 else image.save(stream, "JPEG", quality=92)
        files.append(stream.getvalue())
    return files


def environment(device: str) -> dict[str, str]:
    names = ("torch", "torchvision", "transformers", "timm", "open_clip_torch", "pillow", "numpy")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        **{name: version(name) for name in names},
        "fastembed": version("fastembed-vision"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


_COLUMNS = (
    "model", "upstream", "output", "runtime", "precision", "input", "cosine", "relative",
    "same bits",
)  # fmt: skip


def markdown(rows: Sequence[Row], machine: dict[str, str]) -> str:
    """The report that `fastembed parity --out` writes."""
    lines = [
        "# Parity with the upstream implementations",
        "",
        "Written by `fastembed parity`. Real architectures with seeded random weights, scaled so",
        "that activations look like trained ones; eight JPEG and PNG files, from their bytes on.",
        "",
        "- **input**: largest difference of the input tensor, in 8-bit levels "
        f"(gate: {INPUT_LEVELS});",
        "- **cosine**: the lowest over the images "
        f"(gates: fp32 {FP32_COSINE}, below fp32 {COSINE});",
        "- **relative**: largest difference of an output value, over the largest value;",
        "- **same bits**: a sample's bits in batches of 1, 2, 7 and 8 are the same.",
        "",
        ", ".join(f"{name} {value}" for name, value in machine.items()) + ".",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|" + "---|" * len(_COLUMNS),
    ]
    for row in rows:
        lines.append(
            f"| `{row.spec}` | {row.upstream} | {row.output} | {row.runtime} | {row.precision} | "
            f"{row.input_levels:.2g} | {row.cosine:.7f} | {row.relative:.1e} | "
            f"{'yes' if row.same_bits else '**no**'} |"
        )
    failed = [row for row in rows if row.failed]
    lines += ["", f"{len(rows) - len(failed)} of {len(rows)} rows hold every gate."]
    lines += [f"- `{row.spec}` {row.runtime} {row.precision}: {row.failed}" for row in failed]
    return "\n".join(lines) + "\n"


def as_json(rows: Sequence[Row], machine: dict[str, str]) -> dict:
    return {"environment": machine, "rows": [asdict(row) for row in rows]}
