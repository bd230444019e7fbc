"""Weight files: read them safely, unwrap them, hash them, and load them or say exactly why not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .dcp import METADATA, dcp_files, read_dcp

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")

# Wrappers that training codes put around the weights, outermost first. The teacher is the model
# that DINO publishes and evaluates, so it wins over anything beside it.
_WRAPPERS = ("teacher", "model", "state_dict")
_PREFIXES = ("module.", "teacher.", "backbone.")
# torch.compile and activation checkpointing leave these inside names.
_INFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def weight_files(path: str | Path) -> list[Path]:
    """The weight file, or the files of a folder: a distributed checkpoint (DCP), else one file or
    one set of shards, safetensors first.

    Raises FileNotFoundError or ValueError when there is none, or more than one candidate.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"weights: no such file or folder: {path}")
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"weights must end in one of {', '.join(SUFFIXES)}, got {path.name}")
        return [path]
    if files := dcp_files(path):
        return files
    for suffix in SUFFIXES:
        files = sorted(p for p in path.iterdir() if p.suffix == suffix)
        if len(files) == 1 or (files and all("-of-" in p.name for p in files)):
            return files
        if files:
            raise ValueError(
                f"weights: {path} holds {len(files)} {suffix} files "
                f"({', '.join(p.name for p in files[:4])}, ..); "
                f"name one of them"
            )
    raise FileNotFoundError(f"weights: no {', '.join(SUFFIXES)} file in {path}")


def hash_files(files: list[Path]) -> str:
    """sha256 of one file's bytes; of several, sha256 over their sorted `name digest` lines."""
    digests = []
    for path in files:
        with path.open("rb") as stream:
            digests.append((path.name, hashlib.file_digest(stream, "sha256").hexdigest()))
    if len(digests) == 1:
        return digests[0][1]
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a weight file or folder, unwrapped, and the sha256 of its bytes.

    Pickled files are read with `weights_only=True`, always.
    """
    files = weight_files(path)
    if files[0].name == METADATA:
        return unwrap(read_dcp(files[0].parent), path), hash_files(files)
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(unwrap(_read_file(file), file))
    return state, hash_files(files)


def _read_file(path: Path) -> Mapping:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"weights: {path} is not a readable PyTorch weight file: {error}"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"weights: {path} must hold a state dict, got {type(content).__name__}")
    return content


def unwrap(content: Mapping, source: object = "weights") -> dict[str, Tensor]:
    """The plain state dict inside a checkpoint: wrappers opened, wrapper prefixes removed.

    Understands {"teacher" | "model" | "state_dict": {..}} and the prefixes `module.`, `teacher.`
    and `backbone.`. Where `teacher.` or `backbone.` is present, what lies outside it (student,
    projection heads) is not the model and is left out. Raises ValueError when what remains is not
    all tensors.
    """
    while (
        key := next((k for k in _WRAPPERS if isinstance(content.get(k), Mapping)), None)
    ) is not None:
        content = content[key]
    state = {_strip_infixes(str(k)): v for k, v in content.items()}
    for prefix in _PREFIXES:
        inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if inside and (prefix != "module." or len(inside) == len(state)):
            state = inside
    odd = next((k for k, v in state.items() if not isinstance(v, Tensor)), None)
    if odd is not None or not state:
        found = f"{odd!r} is a {type(state[odd]).__name__}" if state else "it is empty"
        raise ValueError(f"{source}: not a state dict of tensors: {found}")
    return state


def _strip_infixes(name: str) -> str:
    for infix in _INFIXES:
        name = name.replace(infix, "")
    return name


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Copy `state` into `module`; every tensor must be there with its shape, and nothing else.

    Raises ValueError naming the first tensors with another shape (both shapes), the first missing
    and the first unexpected ones, and the counts.
    """
    own = module.state_dict()
    report = mismatch_report(
        shapes=[
            (k, tuple(v.shape), tuple(own[k].shape))
            for k, v in state.items()
            if k in own and v.shape != own[k].shape
        ],
        missing=[k for k in own if k not in state],
        unexpected=[k for k in state if k not in own],
    )
    if report:
        raise ValueError(f"{source} does not fit this model: {report}")
    module.load_state_dict(state)


def mismatch_report(
    shapes: list[tuple[str, tuple, tuple]],
    missing: list[str],
    unexpected: list[str],
    first: int = 4,
) -> str:
    """The differences between a checkpoint and a model in words; empty when there are none."""

    def listed(items: list[str]) -> str:
        return ", ".join(items[:first]) + (", .." if len(items) > first else "")

    parts = []
    if shapes:
        told = [f"{k} is {list(a)} in the file and {list(b)} in the model" for k, a, b in shapes]
        parts.append(f"{len(shapes)} with another shape: {listed(told)}")
    if missing:
        parts.append(f"{len(missing)} missing: {listed(missing)}")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected: {listed(unexpected)}")
    return "; ".join(parts)


def hollow(build: Callable[..., nn.Module], *args, **options) -> nn.Module:
    """build(*args, **options) with its weights still to be written, every one of them."""
    try:
        # Without storage nothing is drawn: initial values of a ViT-L take seconds, of a 7B minutes.
        with torch.device("meta"):
            model = build(*args, **options)
        return model.to_empty(device="cpu")
    except RuntimeError:  # an older timm (1.0.20) reads values back while it builds
        return build(*args, **options)


@torch.no_grad()
def randomize(module: nn.Module, seed: int) -> None:
    """Fill every parameter from `seed`, the same bits whatever the state of the global generators.

    Matrices keep variance (std 1/sqrt(fan in)), tokens and position tables get std 0.02, norm
    weights 1. LayerScale gets 1, not the 1e-5 that training starts from: with 1e-5 every block
    vanishes and the class token of any image is the same vector.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        embedding = any(word in leaf for word in ("token", "pos", "class_embedding"))
        if embedding or leaf.endswith("bias") or "position_embedding" in name:
            parameter.normal_(0.0, 0.02, generator=generator)
        elif parameter.ndim >= 2:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(1.0)
