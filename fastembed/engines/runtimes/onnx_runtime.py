"""ONNX Runtime: an exported graph, over the memory of torch tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ..cache import cache_folder
from ..contract import InputContract
from ..engine import Run
from .cuda import on_stream
from .export import INPUT

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
# The numbers that ONNX gives its element types.
_ELEMENT_TYPES = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}


def prepare(
    model: Path,
    contract: InputContract,
    outputs: Mapping[str, tuple[int, ...]],
    batch_size: int,
    device: torch.device,
    provider: str | None = None,
) -> Run:
    """The graph in `model` for full batches on `device`, bound to torch's memory without a copy.

    `provider` is one of `PROVIDERS`, by default the device's own.

    Raises ImportError naming the extra; ValueError for a file that is no such graph; RuntimeError
    where ONNX Runtime does not run on the device; torch.OutOfMemoryError.
    """
    ort = package()
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    name, options = _provider(provider or device.type, contract, stream)
    session = _session(ort, model, name, options, batch_size)
    names = [output.name for output in session.get_outputs()]
    if [i.name for i in session.get_inputs()] != [INPUT] or names != list(outputs):
        raise ValueError(
            f"{model} is not a graph of this engine: it gives {', '.join(names)}, not "
            f"{', '.join(outputs)}"
        )
    run_options = ort.RunOptions()
    if stream is not None:
        # Streams keep the order; the host need not wait.
        run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    kind, index = device.type, 0 if stream is None else stream.device.index

    def run(batch: Tensor) -> tuple[Tensor, ...]:
        results = tuple(
            torch.empty(batch_size, *shape, device=batch.device) for shape in outputs.values()
        )
        binding = session.io_binding()
        element = _ELEMENT_TYPES[contract.dtype]
        binding.bind_input(INPUT, kind, index, element, list(batch.shape), batch.data_ptr())
        for name, result in zip(outputs, results, strict=True):
            element = _ELEMENT_TYPES[result.dtype]
            binding.bind_output(name, kind, index, element, list(result.shape), result.data_ptr())
        try:
            session.run_with_iobinding(binding, run_options)
        except Exception as error:  # its exceptions share no class of their own
            raise _translated(error) from error
        return results

    return run if stream is None else on_stream(run, stream)


def package() -> ModuleType:
    """onnxruntime, or an ImportError naming the extra."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            "runtime='onnx' needs onnxruntime: pip install 'fastembed-vision[onnx]'"
        ) from error
    return onnxruntime


def _provider(
    provider: str, contract: InputContract, stream: torch.cuda.Stream | None
) -> tuple[str, dict[str, str]]:
    name = PROVIDERS[provider]
    if stream is None:
        return name, {}
    options = {
        "device_id": str(stream.device.index),
        "user_compute_stream": str(stream.cuda_stream),
    }
    if provider == "tensorrt":
        plans = cache_folder() / "onnxruntime"
        return name, {
            **options,
            "trt_fp16_enable": str(int(contract.dtype == torch.float16)),
            "trt_bf16_enable": str(int(contract.dtype == torch.bfloat16)),
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(plans),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(plans),
        }
    return name, {
        **options,
        # float32 means float32, and no kernel is picked by a race.
        "use_tf32": "0",
        "cudnn_conv_algo_search": "DEFAULT",
        # Memory beyond what is asked for would be missing to torch.
        "arena_extend_strategy": "kSameAsRequested",
    }


def _session(ort, model: Path, provider: str, options: dict[str, str], batch_size: int):
    if provider not in ort.get_available_providers():
        raise RuntimeError(
            f"this onnxruntime has no {provider} (it has "
            f"{', '.join(ort.get_available_providers())}): pip install onnxruntime-gpu"
        )
    settings = ort.SessionOptions()
    settings.use_deterministic_compute = True
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3  # errors: also why a provider would not start
    # The one batch shape there is: shapes become constants, and memory is planned ahead.
    settings.add_free_dimension_override_by_name("batch", batch_size)
    try:
        session = ort.InferenceSession(model, settings, providers=[(provider, options)])
    except Exception as error:
        error = _translated(error)
        if isinstance(error, torch.OutOfMemoryError):
            raise error from None
        raise ValueError(f"onnxruntime cannot load {model}: {error}") from error
    if session.get_providers()[0] != provider:  # it goes on with the CPU and only logs that
        raise RuntimeError(
            f"onnxruntime could not start {provider}, for the reason that it printed above (often "
            "CUDA or cuDNN libraries of another version); use runtime='torch' or device='cpu'"
        )
    return session


def _translated(error: Exception) -> Exception:
    """torch's exception for memory that ran out, so that every runtime has the same."""
    text = str(error)
    signs = ("out of memory", "Failed to allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return torch.OutOfMemoryError(text) if any(sign in text for sign in signs) else error
