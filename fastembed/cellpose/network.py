"""Cellpose-SAM networks: found by name or file, checked before use, run once per image."""

from __future__ import annotations

import hashlib
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cellpose import models
from cellpose.vit import CPSAM, BaseModel
from segment_anything.modeling.image_encoder import ImageEncoderViT
from torch import nn

TILE, PATCH, OUTPUTS = 256, 8, 3
_RANDOM = re.compile(r"random(?::(?P<depth>\d+)x(?P<width>\d+))?(?:@(?P<seed>\d+))?")


@dataclass(frozen=True)
class Architecture:
    """Size of a CPSAM network; the defaults are those of Cellpose-SAM, a ViT-L."""

    depth: int = 24
    width: int = 1024
    heads: int = 16
    mlp: int = 4096
    neck: int = 256


CELLPOSE_SAM = Architecture()


class SmallCPSAM(CPSAM):
    """Cellpose-SAM's network in another size: its forward pass and readout, other blocks.

    Files of it are read back by their shapes; cellpose itself reads the full size only.
    """

    def __init__(self, size: Architecture, rdrop: float = 0.4) -> None:
        BaseModel.__init__(self)  # not CPSAM's own, which builds a ViT-L
        self.backbone = "sam_vitl"  # what cellpose calls this family: tiles of 256
        self.rdrop, self.ps, self.nout = rdrop, PATCH, OUTPUTS
        self.encoder = ImageEncoderViT(
            img_size=TILE,
            patch_size=PATCH,
            embed_dim=size.width,
            depth=size.depth,
            num_heads=size.heads,
            mlp_ratio=size.mlp / size.width,
            out_chans=size.neck,
            norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6),
            use_rel_pos=True,
        )
        self.out = nn.Conv2d(size.neck, OUTPUTS * PATCH**2, kernel_size=1)
        identity = torch.eye(OUTPUTS * PATCH**2)
        self.W2 = nn.Parameter(identity.reshape(-1, OUTPUTS, PATCH, PATCH), requires_grad=False)


class _Model(models.CellposeModel):
    """cellpose's model around a network that is there already."""

    def __init__(self, net: CPSAM, device: torch.device, path: str) -> None:
        self.net, self.device, self.pretrained_model = net, device, path
        self.gpu = device.type == "cuda"
        self.backbone = net.backbone


@dataclass
class Network:
    """A network ready to run; `load_network` makes it.

    Args:
        model: cellpose's own model.
        name: as it was asked for.
        digest: sha256 of the file, or what the random weights were made from.
        precision: fp32 or bf16.
    """

    model: models.CellposeModel
    name: str
    digest: str
    precision: str

    @property
    def device(self) -> torch.device:
        return self.model.device

    def settings(self) -> dict[str, object]:
        """What the flows depend on besides the image."""
        return {"model": self.digest, "precision": self.precision, "device": self.device.type}

    def flows(self, image: np.ndarray, batch_size: int = 8) -> np.ndarray:
        """One network pass: cellpose's normalisation, tiles, and their average.

        Args:
            image: [H, W, 3].
            batch_size: tiles of 256 per step.

        Returns:
            float32 [3, H, W]: flow in y and x (five times a unit vector), cell probability (logit).

        Raises:
            ValueError: another shape, or output that is not finite.

        Exactness: what `cellpose.models.CellposeModel.eval` (4.2) gives as flows.
        """
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"image must be [H, W, 3]; got shape {list(image.shape)}")
        _, (_, flow, cellprob), _ = self.model.eval(
            np.ascontiguousarray(image.transpose(2, 0, 1)),
            channel_axis=0,
            batch_size=batch_size,
            compute_masks=False,
        )
        shape = image.shape[:2]
        flows = np.concatenate([flow.reshape(2, *shape), cellprob.reshape(1, *shape)])
        if not np.isfinite(flows).all():
            raise ValueError(f"network {self.name} gave flows that are not finite")
        return flows


@dataclass(frozen=True)
class Pretrained:
    """Arguments of `load_network`, for what starts from the same network several times.

    Training changes its network; float32, unlike cellpose's bfloat16, keeps the weights of the
    file to the bit.
    """

    model: str = "cpsam"
    device: str | None = None
    precision: str = "fp32"

    def load(self) -> Network:
        return load_network(self.model, device=self.device, precision=self.precision)


def load_network(
    model: str | Path = "cpsam",
    *,
    device: str | None = None,
    precision: str = "bf16",
) -> Network:
    """Loads a Cellpose-SAM network.

    Args:
        model: a name that cellpose knows (``cpsam``, ``cpsam_v2``, ..), which it fetches once; a
            file that training left; or ``random``, ``random:DEPTHxWIDTH``, ``random:2x64@7``:
            random weights of a seed, for plumbing and speed only.
        device: cuda if there is one, else cpu.
        precision: bf16, as cellpose runs its networks, or fp32.

    Raises:
        ValueError: no such name or file; a model of cellpose 3; a file that is not a model.
        OSError: the file cannot be read, or fetched.
    """
    if precision not in ("bf16", "fp32"):
        raise ValueError(f"precision must be bf16 or fp32; got {precision!r}")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: there is no CUDA device here; use --device cpu")
    name = str(model)
    if match := _RANDOM.fullmatch(name):
        net, digest = _random(match), name
    else:
        path = _find(name)
        net, digest = _read(path, where, dtype), _digest(path)
    if isinstance(net, models.CellposeModel):
        return Network(net, name, digest, precision)
    net.to(where).eval()
    net.dtype = dtype
    return Network(_Model(net, where, name), name, digest, precision)


def random_network(size: Architecture = CELLPOSE_SAM, seed: int = 0) -> CPSAM:
    """A network of random weights, float32, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CPSAM() if size == CELLPOSE_SAM else SmallCPSAM(size)


def _random(match: re.Match) -> CPSAM:
    warnings.warn("the network has random weights: for plumbing and speed only", stacklevel=3)
    size = CELLPOSE_SAM
    if match["depth"]:
        depth, width = int(match["depth"]), int(match["width"])
        if depth < 1 or width < 16 or width % 16:
            raise ValueError(f"random:DEPTHxWIDTH: width must be a multiple of 16; got {width}")
        size = Architecture(depth, width, max(width // 64, 1), 4 * width, min(width, 256))
    return random_network(size, int(match["seed"] or 0))


def _find(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    if name not in models.MODEL_NAMES:  # cellpose itself would take its default without a word
        known = ", ".join(models.MODEL_NAMES)
        raise ValueError(f"model must be a file, random, or one of {known}; got {name!r}")
    try:
        return Path(models.cache_model_path(name))
    except Exception as error:
        raise OSError(f"model {name} cannot be fetched: {error}") from error


def _read(path: Path, device: torch.device, dtype: torch.dtype) -> CPSAM | models.CellposeModel:
    state = read_state(path)
    if "encoder.cls_token" in state:  # of the DINOv3 family: cellpose builds it
        bf16 = dtype == torch.bfloat16
        return models.CellposeModel(pretrained_model=str(path), device=device, use_bfloat16=bf16)
    net = random_network(architecture_of(state))
    try:
        net.load_state_dict(state, strict=True)  # cellpose would go on without missing weights
    except RuntimeError as error:
        raise ValueError(f"{path} is not a whole Cellpose-SAM model: {error}") from error
    return net


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights of a cellpose 4 model file, on the CPU.

    Raises:
        ValueError: a model of cellpose 3, or no model at all.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a model file: {error}") from error
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise ValueError(f"{path} is not a model file: it holds no table of weights")
    state = {name.removeprefix("module."): weights for name, weights in state.items()}
    if any(name.startswith(("downsample.", "make_style", "upsample.")) for name in state):
        raise ValueError(
            f"{path} is a model of cellpose 3, a U-Net, which cellpose 4 cannot run: train it anew "
            "from cpsam, or use cellpose 3"
        )
    if "W2" not in state or "encoder.patch_embed.proj.weight" not in state:
        raise ValueError(f"{path} is not a Cellpose-SAM model: it has no weights named W2, encoder")
    return state


def architecture_of(state: dict[str, torch.Tensor]) -> Architecture:
    """The size that the shapes of weights tell."""
    blocks = {name.split(".")[2] for name in state if name.startswith("encoder.blocks.")}
    width = state["encoder.patch_embed.proj.weight"].shape[0]
    return Architecture(
        depth=len(blocks),
        width=width,
        heads=width // state["encoder.blocks.0.attn.rel_pos_h"].shape[1],
        mlp=state["encoder.blocks.0.mlp.lin1.weight"].shape[0],
        neck=state["encoder.neck.0.weight"].shape[0],
    )


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
