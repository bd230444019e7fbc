"""`load_engine`: from a spec, or a folder that was exported, to an engine that runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .assemble import assemble
from .engine import Engine, Run
from .gate import Gate, references
from .models.backbone import Size
from .models.channels import CHANNEL_MODES
from .models.zoo import build
from .outputs import Features
from .precision import DTYPES, resolve_precision
from .runtimes import onnx_runtime, tensorrt_runtime, torch_runtime
from .runtimes.cuda import fit_batch
from .runtimes.folder import Description, EngineFolder, exported

RUNTIMES = ("torch", "onnx", "tensorrt")
# Constants, never tuned: the batch shape is part of the settings, because it decides the bits.
_BATCH_SIZES = {"cpu": 16, "cuda": 128}


def load_engine(
    spec: str,
    *,
    runtime: str | None = None,
    weights: str | Path | None = None,
    precision: str = "auto",
    output: str | Sequence[str] = "cls",
    size: int | Size | None = None,
    channels: int = 3,
    channel_mode: str = "inflate",
    channel_pool: str = "mean",
    normalize: str = "model",
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    compile: bool = False,
    cuda_graph: bool = False,
    folder: str | Path | None = None,
    provider: str | None = None,
) -> Engine:
    """Load a model as an engine that maps [B, P, height, width] to float32 features.

    Args:
        spec: `KIND:NAME`, split at the first colon. `openclip:` a model that open_clip knows, as
            MODEL/TAG or hub repository, or a folder of its format; `openai:` CLIP under OpenAI's
            own names (`ViT-L/14`); `transformers:` a hub id or a folder with config.json (DINOv2
            with registers or without, DINOv3 ViT, CLIP, SigLIP); `timm:` a ViT of timm;
            `dinov2:`/`dinov3:` a published name (`vits14_reg`, `vitl16`, ..) with the authors'
            .pth; `dinov3:/path/to/config.yaml` a DINO training configuration. Or a folder that
            `fastembed export` made, which fixes everything but batch_size and device.
        runtime: "torch" (default); "onnx" (ONNX Runtime) and "tensorrt" (CUDA only; tensorrt or
            tensorrt_rtx), which export the model first. Of a folder by default its own.
        weights: None for the published weights, a .pth/.pt/.bin/.safetensors file or a folder, or
            "random" (seeded by `seed`, with a warning: plumbing and speed only).
        precision: "fp32", "bf16", "fp16" (not on a CPU), or "auto": bf16 where the device computes
            it natively, else fp32 (with "onnx" fp16 on CUDA, else fp32; with "tensorrt" bf16 or
            fp16). The whole model is cast; rotation tables stay float32 and so does the output.
            Below fp32 the cosine to fp32 is measured on synthetic images, once per settings,
            versions and device, and must be at least 0.999.
        output: one, or several to be computed in one pass: "cls" [B, D] the class token after the
            final norm; "pooled" [B, D'] the model's own embedding (CLIP: projected); "tokens"
            [B, T, D]; "map" [B, D, g, g'] the patch tokens, one per patch; "processed"
            [B, D', g, g'] CLIP's patch tokens in the space of its embedding, of unit length.
            Tokens and map are after the final norm; CLIP's are the residual stream before it.
            "cls@K", "tokens@K", "map@K" are the residual stream after block K (from 0; -1 the
            last), without a norm.
        size: input side in pixels, or (height, width), multiples of the patch size; by default
            what the model's own preprocessing gives. Position tables are resampled as the model's
            upstream does.
        channels: C source channels.
        channel_mode: "inflate" widens an RGB patch kernel to C channels, the extra ones being the
            mean of the RGB kernels (and of their statistics); "replicate" runs each channel as its
            own RGB image.
        channel_pool: with "replicate", "mean" over the C vectors (D) or "concat" (C*D, channel by
            channel).
        normalize: "model" for the checkpoint's own mean and std, "none" for plain 0..1 input.
        batch_size: the fixed batch shape, part of the settings; by default 16 on a CPU, 128 on
            CUDA. On CUDA one full batch is tried at load; if it does not fit, half of it is the
            batch shape, with a warning.
        device: by default "cuda" when there is one, else "cpu".
        seed: of `weights="random"`.
        compile: with "torch", fuse the model's small steps by torch.compile (other bits, minutes
            at the first batch).
        cuda_graph: with "torch" and "tensorrt" on CUDA, launch a batch as one CUDA graph (the
            same bits; helps where launching is what takes time: small models, small batches).
        folder: with "onnx" and "tensorrt", where the exported model is or will be; by default in
            FASTEMBED_CACHE (~/.cache/fastembed), by a signature of settings and versions.
        provider: with "onnx", which of ONNX Runtime's providers: "cpu", "cuda" or "tensorrt"; by
            default the device's own.

    Raises:
        ValueError: an unknown kind, name or choice; weights that do not fit, naming the tensors; a
            size that is no multiple of the patch; statistics in raw intensities; a damaged folder;
            a precision that does not keep the numbers, with the figure.
        FileNotFoundError, RuntimeError: weights that are not there or cannot be fetched.
        ImportError: naming the extra to install.
        torch.OutOfMemoryError: half a batch does not fit either.

    Exactness:
        A sample's features have the same bits whatever its batch mates and position, per device,
        runtime, batch_size and precision. In float32 they follow the named upstream model to
        rounding. TensorRT may choose other kernels, and so bits, when it builds again: the plan is
        part of the settings.
    """
    if not isinstance(spec, str):
        raise TypeError(f"spec must be a string KIND:NAME, got {type(spec).__name__}")
    _check_choices(
        channel_mode=(channel_mode, CHANNEL_MODES),
        channel_pool=(channel_pool, ("mean", "concat")),
        normalize=(normalize, ("model", "none")),
        precision=(precision, ("auto", *DTYPES)),
    )
    _check_counts(channels=channels, batch_size=1 if batch_size is None else batch_size)
    size = _as_size(size)
    device = _resolve_device(device)
    features, exported_model = None, _exported_model(spec)
    if exported_model is not None:
        own = exported_model.description
        _check_fixed(
            exported_model,
            weights=(weights, None, None),
            precision=(precision, "auto", own.precision),
            output=(_names(output), ["cls"], list(own.outputs)),
            size=(size, None, (own.contract.height, own.contract.width)),
            channels=(channels, 3, own.contract.channels),
            channel_mode=(channel_mode, "inflate", own.facts.get("channel_mode")),
            channel_pool=(channel_pool, "mean", own.facts.get("channel_pool")),
            normalize=(normalize, "model", own.facts.get("normalize")),
            folder=(folder, None, None),
        )
        runtime, precision = runtime or own.runtime, own.precision
        _check_choices(runtime=(runtime, RUNTIMES[1:]))
        description = replace(own, runtime=runtime)
        batch_size = batch_size or exported_model.batch_size
    runtime = runtime or "torch"
    _check_choices(runtime=(runtime, RUNTIMES))
    precision = resolve_precision(precision, device, runtime)
    _check_runtime(runtime, device, compile, cuda_graph, folder, provider)
    resizable = batch_size is None and runtime == "torch" and not (compile or cuda_graph)
    batch_size = batch_size or _BATCH_SIZES.get(device.type, 16)
    if exported_model is None:
        features, description = _describe(
            spec,
            weights=weights,
            size=size,
            seed=seed,
            output=output,
            channels=channels,
            channel_mode=channel_mode,
            channel_pool=channel_pool,
            normalize=normalize,
            precision=precision,
            runtime=runtime,
            compile=compile,
        )
        if runtime != "torch":
            exported_model = exported(features, description, batch_size, folder)

    engine = Engine(
        description.spec,
        features,
        description.contract,
        runtime=runtime,
        outputs=description.outputs,
        dim=description.dim,
        precision=precision,
        batch_size=batch_size,
        device=device,
        facts={**description.facts, **({"provider": provider} if provider else {})},
        resizable=resizable,
    )
    if runtime == "torch":
        _run_on_torch(engine, features, compile, cuda_graph)
    else:
        _run_exported(engine, exported_model, cuda_graph, provider)
    return engine


def export_engine(
    spec: str,
    folder: str | Path,
    *,
    runtime: str,
    precision: str,
    weights: str | Path | None = None,
    output: str | Sequence[str] = "cls",
    size: int | Size | None = None,
    channels: int = 3,
    channel_mode: str = "inflate",
    channel_pool: str = "mean",
    normalize: str = "model",
    batch_size: int = 128,
    seed: int = 0,
) -> EngineFolder:
    """Write the folder of a model that will run elsewhere: nothing is loaded, no GPU is asked.

    The arguments are those of `load_engine`, which does the same and then runs the model; the
    `precision` must be named, since there is no device to choose it for.

    Raises:
        ValueError, ImportError, FileNotFoundError: as `load_engine`.
    """
    _check_choices(
        runtime=(runtime, RUNTIMES[1:]),
        precision=(precision, tuple(DTYPES)),
        channel_mode=(channel_mode, CHANNEL_MODES),
        channel_pool=(channel_pool, ("mean", "concat")),
        normalize=(normalize, ("model", "none")),
    )
    _check_counts(channels=channels, batch_size=batch_size)
    features, description = _describe(
        spec,
        weights=weights,
        size=_as_size(size),
        seed=seed,
        output=output,
        channels=channels,
        channel_mode=channel_mode,
        channel_pool=channel_pool,
        normalize=normalize,
        precision=precision,
        runtime=runtime,
    )
    return exported(features, description, batch_size, folder)


def _describe(
    spec: str,
    *,
    weights: str | Path | None,
    size: Size | None,
    seed: int,
    runtime: str,
    compile: bool = False,
    precision: str,
    **choices,
) -> tuple[Features, Description]:
    """The model of a spec in float32, and what it is."""
    backbone = build(spec, weights, size, seed)
    features, contract, facts = assemble(spec, backbone, precision=precision, **choices)
    return features, Description(
        spec,
        runtime,
        contract,
        outputs=dict(zip(map(str, features.outputs), features.result_shapes(), strict=True)),
        dim=features.dims[0],
        precision=precision,
        facts={**facts, "compile": True} if compile else facts,
    )


def _run_on_torch(engine: Engine, features: Features, compile: bool, cuda_graph: bool) -> None:
    contract, device = engine.contract, engine.device
    gate = None
    if engine.precision != "fp32":  # before the module is cast
        gate = Gate(engine, lambda: references(features, contract, device))

    def prepare(batch_size: int) -> Run:
        return torch_runtime.prepare(features, contract, batch_size, device, compile, cuda_graph)

    engine.run, engine.batch_size = fit_batch(prepare, contract, engine.batch_size, device)
    if gate is not None:
        gate.check()


def _run_exported(
    engine: Engine, folder: EngineFolder, cuda_graph: bool, provider: str | None
) -> None:
    contract, device = engine.contract, engine.device

    def prepare(batch_size: int) -> Run:
        if engine.runtime == "onnx":
            return onnx_runtime.prepare(
                folder.onnx, contract, engine.outputs, batch_size, device, provider
            )
        run, plan = tensorrt_runtime.prepare(folder, batch_size, device, cuda_graph)
        engine.facts["plan"] = plan  # another plan may have other bits
        return run

    engine.run, engine.batch_size = fit_batch(prepare, contract, engine.batch_size, device)
    if engine.precision != "fp32":
        Gate(engine, folder.references).check()


def _exported_model(spec: str) -> EngineFolder | None:
    """The folder that the spec is, if it is one and not a KIND:NAME."""
    path = Path(spec).expanduser()
    if path.is_dir():
        return EngineFolder(path)
    if ":" not in spec and ("/" in spec or spec.startswith(".")):
        raise FileNotFoundError(f"{spec} is neither KIND:NAME nor an engine folder that is there")
    return None


def _check_fixed(folder: EngineFolder, /, **given: tuple) -> None:
    """Raises ValueError for an option with a value that is neither the default nor the folder's."""
    for name, (value, default, own) in given.items():
        if value not in (default, own):
            fixed = f" as {own!r}" if own is not None else ""
            raise ValueError(
                f"{folder.path} is an exported model, which fixes {name}{fixed}; got {value!r}"
            )


def _check_runtime(
    runtime: str,
    device: torch.device,
    compile: bool,
    cuda_graph: bool,
    folder: object,
    provider: str | None,
) -> None:
    if provider is not None:
        fitting = {"cpu": ("cpu",), "cuda": ("cuda", "tensorrt")}.get(device.type, ())
        if runtime != "onnx" or provider not in fitting:
            raise ValueError(
                f"provider is for runtime='onnx', on {device} one of {', '.join(fitting)}; got "
                f"{provider!r} for {runtime!r}"
            )
    if compile and runtime != "torch":
        raise ValueError(f"compile=True is for runtime='torch', got {runtime!r}")
    if cuda_graph and (runtime == "onnx" or device.type != "cuda"):
        raise ValueError(
            "cuda_graph=True is for runtime='torch' or 'tensorrt' on a CUDA device, got "
            f"{runtime!r} on {device}"
        )
    if runtime == "torch":
        if folder is not None:
            raise ValueError("folder is for runtime='onnx' or 'tensorrt', which export the model")
    else:  # before minutes go into an export that nothing could run
        (onnx_runtime if runtime == "onnx" else tensorrt_runtime).package()


def _names(output: str | Sequence[str]) -> list[str]:
    return [output] if isinstance(output, str) else list(output)


def _as_size(size: int | Size | None) -> Size | None:
    if size is None:
        return None
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        raise ValueError(f"size must be a side or (height, width), got {size!r}")
    _check_counts(size=sides[0])
    _check_counts(size=sides[1])
    return sides


def _resolve_device(device: str | torch.device | None) -> torch.device:
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: this PyTorch finds no CUDA device")
    return device


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def _check_choices(**choices: tuple[str, tuple[str, ...]]) -> None:
    """Raises ValueError for the first argument that is not one of its allowed values."""
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
