"""The small models that the probes of mechanisms train: one stage of a mechanism, or a row's two.

A value is asked of each cell, so the last stage gives scores for all cells below each token, and
those of earlier stages are added, as a feature pyramid does.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import attentions
from attentions.contract import Grid
from bench.config.probes import StageConfig
from bench.data.symbols import CHANNELS, SIDE, VALUES

HEADS = 2
MLP_RATIO = 2
# The longest of the wavelengths of the positions, in cells over 2 pi.
_LONGEST = 100.0
# Weights of the embeddings at first, of what PyTorch draws. Where what a cell shows outweighs where
# it is, fewer steps do.
_OF_CELLS, _OF_PLACES = 3.0, 0.5


class ProbeModel(nn.Module):
    """Linear embedding, positions, global tokens, pre-norm blocks, and a linear head a cell.

    Args:
        stages: the first has a token for each cell, each later one a token for 2x2 of the one
            before.
    """

    def __init__(self, stages: Sequence[StageConfig]) -> None:
        super().__init__()
        self.embed = _scaled(nn.Linear(CHANNELS, stages[0].dim), _OF_CELLS)
        grids = [(SIDE >> number, SIDE >> number) for number in range(len(stages))]
        self.stages = nn.ModuleList(map(_Stage, stages, grids))
        dims = [stage.dim for stage in stages]
        self.merges = nn.ModuleList(map(_Merge, dims, dims[1:]))
        self.heads = nn.ModuleList(
            nn.Linear(dim, 4**number * VALUES) for number, dim in enumerate(dims)
        )

    def forward(self, cells: Tensor) -> Tensor:
        """(B, SIDE * SIDE, CHANNELS) -> scores (B, SIDE * SIDE, VALUES)."""
        x = self.stages[0](self.embed(cells))
        scores: Tensor = self.heads[0](x)
        for merge, stage, head in zip(self.merges, self.stages[1:], self.heads[1:], strict=True):
            x = stage(merge(x))
            scores = scores + _to_cells(head(x))
        return scores


class _Stage(nn.Module):
    def __init__(self, spec: StageConfig, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.num_global = spec.num_global
        self.tokens = nn.Parameter(0.02 * torch.randn(1, spec.num_global, spec.dim))
        self.register_buffer("sines", _sines(grid, spec.dim), persistent=False)
        self.place = _scaled(nn.Linear(spec.dim, spec.dim), _OF_PLACES)
        self.blocks = nn.ModuleList(_Block(spec, index, grid) for index in range(spec.blocks))
        self.norm = nn.LayerNorm(spec.dim)

    sines: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(B, rows * columns, dim) -> the same, without the global tokens."""
        x = torch.cat([self.tokens.expand(len(x), -1, -1), x + self.place(self.sines)], dim=1)
        for block in self.blocks:
            x = block(x, self.grid)
        out: Tensor = self.norm(x[:, self.num_global :])
        return out


class _Block(nn.Module):
    def __init__(self, spec: StageConfig, index: int, grid: Grid) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(spec.dim), nn.LayerNorm(spec.dim)
        self.attention = attentions.build_for(
            spec.attention,
            grid=grid,
            block_index=index,
            dim=spec.dim,
            num_heads=HEADS,
            num_global=spec.num_global,
            **spec.options,
        )
        wide = MLP_RATIO * spec.dim
        self.mlp = nn.Sequential(nn.Linear(spec.dim, wide), nn.ReLU(), nn.Linear(wide, spec.dim))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.attention(self.attention_norm(x), grid)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class _Merge(nn.Module):
    """2x2 tokens to one, which starts as a linear map of their average."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(4 * dim, out)
        with torch.no_grad():
            self.proj.weight.copy_(nn.Linear(dim, out).weight.repeat(1, 4) / 4)

    def forward(self, x: Tensor) -> Tensor:
        side = math.isqrt(x.shape[1])
        squares = x.unflatten(1, (side // 2, 2, side // 2, 2)).transpose(2, 3)
        merged: Tensor = self.proj(squares.flatten(3).flatten(1, 2))
        return merged


def _scaled(layer: nn.Linear, factor: float) -> nn.Linear:
    """The same, with its weight times `factor`."""
    with torch.no_grad():
        layer.weight *= factor
    return layer


def _to_cells(scores: Tensor) -> Tensor:
    """(B, tokens, cells of a token * VALUES) -> (B, SIDE * SIDE, VALUES)."""
    side = math.isqrt(scores.shape[1])
    across = SIDE // side
    parts = scores.unflatten(2, (across, across, VALUES)).unflatten(1, (side, side))
    return parts.transpose(2, 3).reshape(len(scores), SIDE * SIDE, VALUES)


def _sines(grid: Grid, dim: int) -> Tensor:
    """Fixed sines and cosines of both places: (rows * columns, dim)."""
    rates = _LONGEST ** -torch.linspace(0, 1, dim // 4)

    def waves(side: int) -> Tensor:
        angles = torch.arange(side)[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    rows, columns = grid
    down = waves(rows)[:, None].expand(-1, columns, -1)
    across = waves(columns)[None].expand(rows, -1, -1)
    return torch.cat([down, across], dim=-1).flatten(0, 1)
