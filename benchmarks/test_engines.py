"""Models in images per second, beside the upstream library's own way of running them.

"end to end" starts at decoded images of a photograph's size and includes the model's
preprocessing; the other group starts at prepared input. All threads, one batch.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from fastembed import load_engine, testing
from fastembed.engines.gate import COSINE, lowest_cosine
from fastembed.engines.preprocess import model_input
from fastembed.engines.upstream import upstream

BATCH = 16
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
MODELS = ["dinov3:vits16", "openclip:timm/ViT-B-16-SigLIP", "openai:ViT-B/32"] + (
    ["dinov3:vitb16", "dinov3:vitl16", "openai:ViT-L/14", "transformers:facebook/dinov2-base"]
    if CUDA
    else []
)
RUNTIMES = [("torch", "fp32"), ("torch", "bf16"), ("onnx", "fp32")] + (
    [("onnx", "fp16"), ("tensorrt", "bf16"), ("tensorrt", "fp16")] if CUDA else []
)


@pytest.fixture(scope="module", params=MODELS)
def theirs(request):
    """(spec, upstream model, photographs, prepared input, FLOPs of a batch)."""
    model = upstream(request.param)
    model.module.to(DEVICE)
    photographs = [Image.fromarray(testing.scene(480, 640, 12, seed=i)[0]) for i in range(BATCH)]
    prepared = torch.stack([model.prepare(image) for image in photographs])
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.embed(prepared[:1].to(DEVICE))
    return request.param, model, photographs, prepared, BATCH * counter.get_total_flops()


@pytest.fixture(scope="module")
def weights(theirs, tmp_path_factory):
    return theirs[1].save(tmp_path_factory.mktemp("weights"))


@torch.inference_mode()
def embed(model, batch):
    return model.embed(batch.to(DEVICE)).cpu()


@pytest.mark.parametrize("whole", [True, False], ids=["end to end", "prepared"])
@pytest.mark.parametrize("runtime,precision", [(None, "fp32"), *RUNTIMES])
def test_engine(row, theirs, weights, runtime, precision, whole):
    spec, model, photographs, prepared, flops = theirs
    if runtime is None:
        prepare, run = model.prepare, lambda batch: embed(model, batch)
        name = model.origin
    else:
        engine = load(spec, model, runtime, precision, weights)
        contract = engine.contract
        prepare, run = (
            (lambda image: model_input(image, contract)),
            (lambda batch: engine(batch.to(contract.dtype)).cpu()),
        )
        name = f"engine {runtime} {precision}"
    exact = lowest_cosine(run(prepared), embed(model, prepared))
    assert exact >= COSINE, exact
    benchmark = row(
        f"{spec}, {'end to end' if whole else 'prepared input'}", name, dtype=precision,
        shape=f"{BATCH}x3x{model.size[0]}x{model.size[1]}", images=BATCH, flops=flops,
        baseline=runtime is None, exactness=f"cosine {exact:.6f}",
    )  # fmt: skip

    # Ours prepares in threads, as the pipeline does; the libraries' own way is a loop.
    spread = map if runtime is None else ThreadPoolExecutor(torch.get_num_threads()).map

    def work():
        return run(torch.stack(list(spread(prepare, photographs))) if whole else prepared)

    benchmark.pedantic(work, rounds=3, warmup_rounds=1)


def load(spec, model, runtime, precision, weights):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return load_engine(
                spec, runtime=runtime, weights=weights, precision=precision, device=DEVICE,
                output=model.output, size=model.size, batch_size=BATCH,
            )  # fmt: skip
        except (ImportError, ValueError) as error:
            if isinstance(error, ValueError) and "is not offered" not in str(error):
                raise  # an engine that is wrong is no engine that is not there
            pytest.skip(f"{runtime} {precision}: {error}")
