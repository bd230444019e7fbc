"""TensorRT: a plan of an exported graph for one GPU, built when it is not there.

`tensorrt` and `tensorrt_rtx` (its edition for GeForce and RTX boards, which compiles its kernels
when it loads) share their API; what one of them lacks is asked for by name.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..cache import cache_folder
from ..contract import InputContract
from ..engine import Run
from .cuda import captured, on_stream
from .export import INPUT
from .folder import EngineFolder

LIBRARIES = ("tensorrt", "tensorrt_rtx")


def prepare(
    folder: EngineFolder, batch_size: int, device: torch.device, cuda_graph: bool = False
) -> tuple[Run, str]:
    """The folder's model for full batches on `device`, and the sha256 of its plan.

    A plan serves one kind of GPU, one version of one library and one batch shape; without that
    one in the folder it is built from the graph, with a warning, and kept there.
    Raises ImportError naming the extra; RuntimeError with TensorRT's own words;
    torch.OutOfMemoryError.
    """
    trt = package()
    description = folder.description
    with torch.cuda.device(device):
        key = plan_key(trt, torch.cuda.get_device_name(device), batch_size)
        stored = folder.plan(key)
        engine = None if stored is None else _load(trt, stored)
        if engine is None:
            _announce(folder, key, stored)
            stored = build(trt, folder.onnx, batch_size, timing_cache=_timing_cache(key))
            folder.keep_plan(key, stored)
            engine = _load(trt, stored)
        if engine is None:
            raise RuntimeError(f"{trt.__name__} cannot load the engine that it has just built")
        run = _bound(trt, engine, description.contract, description.outputs, batch_size)
        stream = torch.cuda.Stream(device)
        if cuda_graph:
            shape = (batch_size, *description.contract.shape)
            run = captured(run, shape, description.contract.dtype, stream)
        else:
            run = on_stream(run, stream)
    return run, hashlib.sha256(stored).hexdigest()


def package() -> ModuleType:
    """`tensorrt`, else `tensorrt_rtx`; FASTEMBED_TENSORRT names one of them.

    Raises ImportError naming the extra, ValueError for another name.
    """
    asked = os.environ.get("FASTEMBED_TENSORRT")
    if asked and asked not in LIBRARIES:
        raise ValueError(f"FASTEMBED_TENSORRT must be one of {', '.join(LIBRARIES)}, got {asked!r}")
    reasons = []
    for name in (asked,) if asked else LIBRARIES:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reasons.append(str(error))
    raise ImportError(
        "runtime='tensorrt' needs tensorrt or tensorrt_rtx: pip install "
        f"'fastembed-vision[tensorrt]' ({'; '.join(reasons)})"
    )


def plan_key(trt: ModuleType, device: str, batch_size: int) -> dict[str, Any]:
    """What a plan is good for."""
    return {
        "device": device,
        "library": trt.__name__,
        "version": trt.__version__,
        "batch_size": batch_size,
    }


def build(
    trt: ModuleType,
    model: Path,
    batch_size: int,
    timing_cache: Path | None = None,
    compute_capability: str | None = None,
) -> bytes:
    """The plan of an ONNX graph for batches of exactly `batch_size`, in the graph's own types.

    `compute_capability` (``SM89``) is for tensorrt_rtx, which builds for a GPU that is not there.
    Raises ValueError for a graph it does not read, RuntimeError for one it cannot build.
    """
    log = _log(trt)
    builder = trt.Builder(log)
    # Strongly typed: every layer computes in the types of the graph, none is lowered on its own.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise ValueError(f"{trt.__name__} cannot read {model}: {'; '.join(errors or log.errors)}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
    shape = (batch_size, *tuple(network.get_input(0).shape)[1:])
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT, shape, shape, shape)
    config.add_optimization_profile(profile)
    if compute_capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, compute_capability), 0)
    if trt.__name__ == "tensorrt_rtx":
        timing_cache = None  # it times nothing, and warns when it is asked to keep that
    timings = _use_timings(config, timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _failure(trt, "cannot build an engine", log)
    if timings:
        _save_timings(config, timing_cache)
    return bytes(plan)


def _load(trt: ModuleType, plan: bytes):
    """(engine, what it lives on, its log), or None where a plan is damaged or not for this GPU."""
    log = _log(trt)
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        warnings.warn(
            f"{trt.__name__} cannot load an engine ({'; '.join(log.errors) or 'no reason given'})",
            stacklevel=3,
        )
        return None
    return engine, runtime, log  # in C++ the engine refers to the others


def _bound(
    trt: ModuleType,
    loaded,
    contract: InputContract,
    outputs: Mapping[str, tuple[int, ...]],
    batch_size: int,
) -> Run:
    """One execution of the engine over the memory of its arguments, on the current stream."""
    engine, _, log = loaded
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    if sorted(names) != sorted([INPUT, *outputs]):
        raise ValueError(
            f"the TensorRT engine has {', '.join(names)}, not {INPUT}, {', '.join(outputs)}"
        )
    context = engine.create_execution_context()
    if context is None:
        raise _failure(trt, "cannot prepare an engine to run", log)
    context.set_input_shape(INPUT, (batch_size, *contract.shape))

    def run(batch: Tensor) -> tuple[Tensor, ...]:
        _owners = loaded  # alive as long as this function
        results = tuple(
            torch.empty(batch_size, *shape, device=batch.device) for shape in outputs.values()
        )
        context.set_tensor_address(INPUT, batch.data_ptr())
        for name, result in zip(outputs, results, strict=True):
            context.set_tensor_address(name, result.data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream(batch.device).cuda_stream):
            raise _failure(trt, "could not run", log)
        return results

    return run


def _announce(folder: EngineFolder, key: Mapping[str, Any], stored: bytes | None) -> None:
    others = [] if stored is not None else folder.plans()
    there = f" ({folder.path} holds one for {'; '.join(others)})" if others else ""
    warnings.warn(
        f"building a {key['library']} {key['version']} engine of {folder.description.spec} for "
        f"{key['device']}, batch {key['batch_size']}{there}; this can take minutes, once",
        stacklevel=4,
    )


def _timing_cache(key: Mapping[str, Any]) -> Path:
    """Measured kernel times, shared by all models on a kind of GPU: winners stay winners."""
    device = "".join(c if c.isalnum() else "-" for c in key["device"].lower())
    return cache_folder() / "timings" / f"{device}-{key['library']}-{key['version']}.bin"


def _use_timings(config, file: Path | None) -> bool:
    """Whether the builder keeps timings, those of `file` to begin with."""
    if file is None:
        return False
    stored = file.read_bytes() if file.is_file() else b""
    cache = config.create_timing_cache(stored) or config.create_timing_cache(b"")
    return cache is not None and bool(config.set_timing_cache(cache, False))


def _save_timings(config, file: Path) -> None:
    cache = config.get_timing_cache()
    if cache is None:
        return
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(bytes(cache.serialize()))
        temporary.replace(file)
    except OSError as error:
        warnings.warn(f"TensorRT's timings could not be kept in {file}: {error}", stacklevel=2)


def _log(trt: ModuleType):
    """A logger that keeps errors, to be raised with their words, and drops the rest."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message.strip())

    return Log()


def _failure(trt: ModuleType, what: str, log) -> Exception:
    words = "; ".join(log.errors) or "no reason given"
    if "out of memory" in words.lower() or "outofmemory" in words.lower():
        return torch.OutOfMemoryError(f"{trt.__name__}: {words}")
    return RuntimeError(f"{trt.__name__} {what}: {words}")
