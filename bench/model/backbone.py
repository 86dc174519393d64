"""The multi-scale Vision Longformer backbone (ViL) with any attention mechanism in it.

Zhang et al., "Multi-Scale Vision Longformer: A New Vision Transformer for High-Resolution Image
Encoding", https://arxiv.org/abs/2103.15358, sections 3.1 and 3.3. Parameter names are those of the
published checkpoints.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

import attentions
from attentions.contract import Grid, Redrawing
from bench.config.arch import StageSpec, parse
from bench.errors import nearest
from bench.model.checkpointing import checkpointed
from bench.model.initial import INIT_STD, Defaults, initialise_linear
from bench.model.mlp import Mlp, norm_and_mlp

NORM_EPS = 1e-6


@dataclass(frozen=True)
class AttentionPlace:
    """An attention module of a backbone and where it stands."""

    name: str
    attention: str
    module: nn.Module
    stage: StageSpec
    stride: int
    total_stride: int

    def grid(self, image_size: tuple[int, int]) -> Grid:
        """The grid (rows, columns) it sees for an image (height, width), which ViL pads."""
        cells = self.total_stride // self.stride
        rows, columns = (math.ceil(side / self.total_stride) * cells for side in image_size)
        return rows, columns


class PatchEmbed(nn.Module):
    """Image to tokens: convolution, optional norm, global tokens in front, absolute positions."""

    def __init__(self, *, channels: int, stage: StageSpec, grid: Grid, norm_embed: bool) -> None:
        super().__init__()
        self.grid = grid
        self.num_global = stage.num_global
        if stage.num_global:
            self.cls_token = nn.Parameter(torch.zeros(1, stage.num_global, stage.dim))
        self.absolute = stage.absolute
        if stage.absolute:
            # Published state dicts hold the global tokens' table of a stage without any, empty.
            self.cls_pos_embed = nn.Parameter(torch.zeros(1, stage.num_global, stage.dim))
            self.x_pos_embed = nn.Parameter(torch.zeros(1, grid[0], stage.dim // 2))
            self.y_pos_embed = nn.Parameter(torch.zeros(1, grid[1], stage.dim // 2))
        self.proj = nn.Conv2d(channels, stage.dim, stage.patch, stride=stage.patch)
        self.norm_embed = nn.LayerNorm(stage.dim, eps=NORM_EPS) if norm_embed else nn.Identity()

    def positions(self, grid: Grid) -> Tensor:
        """Absolute positions of global tokens and grid: (1, N, dim)."""
        if grid[0] > self.grid[0] or grid[1] > self.grid[1]:
            raise ValueError(
                f"grid {grid[0]}x{grid[1]} needs more absolute positions than the"
                f" {self.grid[0]}x{self.grid[1]} that image_size gives"
            )
        x = self.x_pos_embed[:, : grid[0], None].expand(-1, -1, grid[1], -1)
        y = self.y_pos_embed[:, None, : grid[1]].expand(-1, grid[0], -1, -1)
        return torch.cat([self.cls_pos_embed, torch.cat([x, y], dim=-1).flatten(1, 2)], dim=1)

    def forward(self, image: Tensor) -> tuple[Tensor, Grid]:
        """(B, C, rows, columns) -> tokens (B, N, dim) and their grid."""
        features = self.proj(image)
        grid = (features.shape[2], features.shape[3])
        x = self.norm_embed(features.flatten(2).transpose(1, 2))
        if self.num_global:
            x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        return (x + self.positions(grid) if self.absolute else x), grid


class AttentionBlock(nn.Module):
    """x + drop_path(attention(norm(x)))."""

    def __init__(self, attention: nn.Module, *, dim: int, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = attention
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        residual: Tensor = self.drop_path(self.attn(self.norm(x), grid))
        return x + residual


class MlpBlock(nn.Module):
    """x + drop_path(mlp(norm(x)))."""

    def __init__(self, *, dim: int, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        residual: Tensor = self.drop_path(norm_and_mlp(self.norm, self.mlp, x))
        return x + residual


class ViL(nn.Module):
    """Multi-scale backbone: images to feature maps `layer1`, `layer2`, …

    Args:
        arch: ARCH string of three or four stages.
        attention: mechanism of the stages with `s1`, or one name for each stage. Stages with `s0`
            have full attention.
        dense: blocks that have full attention instead, counted from 0, by stage, counted from 1:
            `{3: [3, 7]}`.
        image_size: largest side, or largest (height, width), of the images to come, in pixels;
            rounded up to the total stride. It sets the length of position tables.
        drop_path: probability of the last block's residuals to be dropped; it rises linearly
            from 0.
        num_classes: outputs of the classification head.
        norm_embed: layer norm after each patch embedding.
        attention_options: options of the mechanisms; each reaches the stages that know it.

    Attributes:
        grad_checkpointing: compute the inside of each block again in the backward pass, which
            takes less memory and more time.

    Raises:
        ValueError: for a malformed ARCH string, an unknown mechanism, a block in `dense` that is
            not there, or an option that no stage knows.
    """

    calls_since_last_redraw: Tensor
    grad_checkpointing: bool = False
    norm: nn.Module
    head: nn.Module

    def __init__(
        self,
        arch: str,
        *,
        attention: str | Sequence[str] = "longformer",
        dense: Mapping[int, Sequence[int]] | None = None,
        image_size: int | tuple[int, int] = 1333,
        drop_path: float = 0.0,
        num_classes: int = 1000,
        norm_embed: bool = True,
        **attention_options: Any,
    ) -> None:
        super().__init__()
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path {drop_path} is outside [0, 1)")
        self.arch = arch
        self.image_size = image_size
        self.stages = parse(arch, attention, dense)
        self.stride = math.prod(stage.patch for stage in self.stages)
        sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"image_size {image_size} must be a positive side or (height, width)")
        self.largest = tuple(math.ceil(side / self.stride) * self.stride for side in sides)
        self._check_options(attention_options)

        depth = sum(stage.blocks for stage in self.stages)
        rates = iter([drop_path * i / max(depth - 1, 1) for i in range(depth)])
        self.channels: dict[str, int] = {}
        self.strides: dict[str, int] = {}
        channels, stride = 3, 1
        defaults = Defaults()
        for stage in self.stages:
            stride *= stage.patch
            grid = (self.largest[0] // stride, self.largest[1] // stride)
            layer = nn.ModuleList(
                [PatchEmbed(channels=channels, stage=stage, grid=grid, norm_embed=norm_embed)]
            )
            for index in range(stage.blocks):
                rate = next(rates)
                with defaults.noted():
                    module = _build_attention(stage, grid, index, attention_options)
                layer.append(AttentionBlock(module, dim=stage.dim, drop_path=rate))
                layer.append(MlpBlock(dim=stage.dim, drop_path=rate))
            name = f"layer{stage.number}"
            self.add_module(name, layer)
            self.channels[name], self.strides[name] = stage.dim, stride
            channels = stage.dim
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)
        self.head = nn.Linear(channels, num_classes)
        self._init_weights(defaults)
        # Kept out of the module tree: these modules are in it already.
        modules = (place.module for place in self.attention_places())
        self._redrawing = tuple(module for module in modules if isinstance(module, Redrawing))
        if self._redrawing:
            # The published name: the step of training, counted from 1.
            self.register_buffer("calls_since_last_redraw", torch.tensor(0))

    def _check_options(self, options: Mapping[str, Any]) -> None:
        names = (name for stage in self.stages for name in stage.mechanisms)
        known = {name: attentions.options(name) for name in names}
        for option in options:
            if not any(option in own for own in known.values()):
                every = {name for own in known.values() for name in own}
                listed = "; ".join(f"{name}: {', '.join(own)}" for name, own in known.items())
                raise ValueError(
                    f"no stage's attention has an option {option!r}{nearest(option, every)};"
                    f" allowed: {listed}"
                )

    @torch.no_grad()
    def _init_weights(self, defaults: Defaults) -> None:
        kept: set[nn.Module] = set()
        for place in self.attention_places():
            if not defaults.hold(place.module):
                kept.update(place.module.modules())
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if module not in kept:
                    initialise_linear(module)
            elif isinstance(module, PatchEmbed):
                tables = ("cls_token", "cls_pos_embed", "x_pos_embed", "y_pos_embed")
                for table in (getattr(module, name, None) for name in tables):
                    if table is not None and table.numel():
                        nn.init.trunc_normal_(table, std=INIT_STD)

    def attention_places(self) -> Iterator[AttentionPlace]:
        """Every attention module with its stage, from the image on."""
        for stage in self.stages:
            name = f"layer{stage.number}"
            blocks = (
                (i, block)
                for i, block in enumerate(self.get_submodule(name).children())
                if isinstance(block, AttentionBlock)
            )
            for index, (i, block) in enumerate(blocks):
                yield AttentionPlace(
                    f"{name}.{i}.attn",
                    stage.mechanism(index),
                    block.attn,
                    stage,
                    self.strides[name],
                    self.stride,
                )

    def start_training_step(self, step: int) -> None:
        """Say which step, from 0, the next training calls belong to, and redraw what is due.

        Without it nothing is redrawn. What is redrawn is drawn now, once, from the random state of
        now, however many calls and processes the step has.
        """
        for module in self._redrawing:
            module.set_training_step(step)
        if self._redrawing:
            self.calls_since_last_redraw.fill_(step + 1)

    def _tokens(self, images: Tensor, count: int | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Feature maps of the first `count` stages, or all, and the tokens of the last of them."""
        height, width = images.shape[-2:]
        image = nn.functional.pad(images, (0, -width % self.stride, 0, -height % self.stride))
        features: dict[str, Tensor] = {}
        for stage in self.stages[:count]:
            name = f"layer{stage.number}"
            tokens, image = self._run_stage(stage, image)
            stride = self.strides[name]
            features[name] = image[..., : -(-height // stride), : -(-width // stride)]
        return features, tokens

    def _run_stage(self, stage: StageSpec, image: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of a stage (B, N, dim), and its grid as the next stage's image."""
        embed, *blocks = self.get_submodule(f"layer{stage.number}").children()
        tokens, grid = embed(image)
        for block in blocks:
            if self.grad_checkpointing:
                tokens = checkpointed(block, tokens, grid)
            else:
                tokens = block(tokens, grid)
        return tokens, tokens[:, stage.num_global :].transpose(1, 2).unflatten(2, grid)

    def run_stage(self, number: int, image: Tensor) -> Tensor:
        """One stage alone, as a profile of the parts needs it.

        Shapes: image (B, channels of the stage before, rows, columns), both multiples of the
        stage's patch -> (B, dim, rows / patch, columns / patch).
        """
        return self._run_stage(self.stages[number - 1], image)[1]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Feature maps.

        Images whose sides are not multiples of the total stride are padded at the bottom and right
        with zeros, and the maps are cropped to the cells that hold a pixel of the image.

        Shapes: images (B, 3, height, width) ->
            layer{s} (B, dim, ⌈height / stride⌉, ⌈width / stride⌉).

        Raises:
            ValueError: for an image larger than the position tables.
        """
        return self._tokens(images)[0]

    def classify(self, images: Tensor) -> Tensor:
        """Class scores from the first global token, or the mean token: (B, num_classes)."""
        tokens = self.norm(self._tokens(images)[1])
        scores: Tensor = self.head(
            tokens[:, 0] if self.stages[-1].num_global else tokens.mean(dim=1)
        )
        return scores


def _build_attention(
    stage: StageSpec, grid: Grid, block_index: int, options: dict[str, Any]
) -> nn.Module:
    name = stage.mechanism(block_index)
    factory = attentions.find(name)
    accepted = attentions.options(name)
    own = {key: value for key, value in options.items() if key in accepted}
    parameter = getattr(factory, "arch_option", None)
    if parameter is not None:
        own.setdefault(parameter, stage.feature)
    position = stage.position
    if position not in getattr(factory, "positions", (position,)):
        warnings.warn(
            f"stage {stage.number}: {name} has no {position} positions, so that a0"
            " leaves the stage without any; use a1",
            stacklevel=2,
        )
        position = "absolute"
    return attentions.build_for(
        name,
        grid=grid,
        position=position,
        block_index=block_index,
        dim=stage.dim,
        num_heads=stage.heads,
        num_global=stage.num_global,
        **own,
    )


__all__ = ["AttentionPlace", "ViL"]
