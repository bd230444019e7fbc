"""What an engine gives: the grammar of `output=`, and the module that computes it in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .models.backbone import Backbone

OUTPUTS = ("cls", "pooled", "tokens", "map", "processed")
_OF_A_BLOCK = ("cls", "tokens", "map")


@dataclass(frozen=True)
class Output:
    """One output: as it was asked for, its name, and the block after which the residual stream is
    taken (counted from the first), if not the model's end."""

    text: str
    name: str
    block: int | None

    def __str__(self) -> str:
        return self.text


def parse_outputs(output: str | Sequence[str], backbone: Backbone, spec: str) -> tuple[Output, ...]:
    """``map`` or ``map@BLOCK``, one or several, checked against the model.

    Raises ValueError naming the outputs that there are.
    """
    given = [output] if isinstance(output, str) else list(output)
    if not given or len(set(given)) != len(given):
        raise ValueError(f"output must be one or several different outputs, got {output!r}")
    return tuple(_parse(one, backbone, spec) for one in given)


def _parse(text: str, backbone: Backbone, spec: str) -> Output:
    name, at, number = text.partition("@")
    if name not in OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {text!r}")
    if at:
        depth = len(backbone.blocks)
        try:
            block = int(number)
        except ValueError:
            block = depth
        if name not in _OF_A_BLOCK or not -depth <= block < depth:
            raise ValueError(
                f"output NAME@BLOCK has NAME one of {', '.join(_OF_A_BLOCK)} and BLOCK in "
                f"{-depth}..{depth - 1} for {spec}; got {text!r}"
            )
        block %= depth
    else:
        block = None
    if block is None and name != "pooled" and not backbone.has_tokens:
        raise ValueError(
            f"{spec} normalises after pooling, so its tokens have no final norm; use "
            "output='pooled', or output='map@-1' for the residual stream"
        )
    if name == "cls" and not backbone.class_token:
        raise ValueError(f"{spec} has no class token; use output='pooled'")
    if name == "processed" and backbone.project is None:
        raise ValueError(
            f"output='processed' is for models that project tokens into the space of their "
            f"embedding (CLIP); {spec} does not, use output='map'"
        )
    return Output(text, name, block)


class Features(nn.Module):
    """[B, P, height, width] to one float32 tensor per output, in one pass of the model.

    cls [B, D]; pooled [B, D']; tokens [B, T, D]; map and processed [B, D, g, g'], prefix tokens
    dropped. With `images` C > 1 the P = 3*C planes are C RGB images, whose features are averaged
    or, channel by channel, concatenated (C*D).
    """

    def __init__(
        self, backbone: Backbone, outputs: Sequence[Output], images: int = 1, pool: str = "mean"
    ) -> None:
        super().__init__()
        self.module = backbone.module
        self.outputs = tuple(outputs)
        self.dims = tuple(
            (backbone.pooled_dim if output.name in ("pooled", "processed") else backbone.dim)
            * (images if pool == "concat" else 1)
            for output in outputs
        )
        self._backbone, self._images, self._pool = backbone, images, pool
        self._stream: dict[int, Tensor] = {}
        for block in {output.block for output in outputs} - {None}:
            backbone.blocks[block].register_forward_hook(self._keep(block))

    def _keep(self, block: int):
        def hook(module, args, result):
            self._stream[block] = result[0] if isinstance(result, tuple) else result

        return hook

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        batch, planes, height, width = x.shape
        x = x.reshape(batch * self._images, planes // self._images, height, width)
        tokens, pooled = self._backbone.forward(x)
        stream, self._stream = self._stream, {}
        features = [
            self._feature(output.name, tokens if output.block is None else stream[output.block],
                          pooled, final=output.block is None)
            for output in self.outputs
        ]  # fmt: skip
        return tuple(
            self._shape(output, feature.float())
            for output, feature in zip(self.outputs, features, strict=True)
        )

    def _feature(self, name: str, tokens: Tensor | None, pooled: Tensor, final: bool) -> Tensor:
        """[B*images, D] or [B*images, T, D]."""
        backbone = self._backbone
        if name == "pooled":
            return pooled
        if name == "cls":
            token = tokens[:, :1]
            return (backbone.norm(token) if final and backbone.norm else token)[:, 0]
        if name == "tokens":
            return tokens
        patches = tokens[:, backbone.prefix_tokens :]
        if name == "processed":
            patches = backbone.project(backbone.norm(patches) if backbone.norm else patches)
            patches = torch.nn.functional.normalize(patches.float(), dim=-1)
        return patches

    def _shape(self, output: Output, y: Tensor) -> Tensor:
        if self._images > 1:
            y = y.unflatten(0, (-1, self._images))
            y = y.mean(dim=1) if self._pool == "mean" else y.movedim(1, -2).flatten(-2)
        if output.name in ("map", "processed"):
            y = y.transpose(1, 2).unflatten(2, self._backbone.grid).contiguous()
        return y

    def result_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of each output, the shape of one sample's."""
        grid = self._backbone.grid
        tokens = self._backbone.prefix_tokens + math.prod(grid)
        return tuple(
            {"cls": (dim,), "pooled": (dim,), "tokens": (tokens, dim)}.get(o.name, (dim, *grid))
            for o, dim in zip(self.outputs, self.dims, strict=True)
        )
