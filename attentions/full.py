"""Softmax attention over all tokens.

Vaswani et al., "Attention Is All You Need", https://arxiv.org/abs/1706.03762, equation 1:
`softmax(q kᵀ / √M) v`. Relative positions as in Zhang et al., "Multi-Scale Vision Longformer",
https://arxiv.org/abs/2103.15358, section 3: a learned bias for each difference of grid positions,
and biases between global tokens and the grid. Cost: `2 N² C + 4 N C²`.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attentions.contract import Attention, Grid
from attentions.parts import (
    LARGEST_INDEX,
    add_relative_positions,
    grid_positions,
    merge_heads,
    plain_bias,
    relative_index,
    split_heads,
)
from attentions.registry import register
from attentions.relative import attend_relatively

POSITIONS = ("absolute", "relative")


@register("full")
class FullAttention(Attention):
    """Full attention, with relative positions on grids up to the one they were made for.

    Args:
        position: "absolute" (positions are in x already) or "relative" (a learned bias).
        grid: with relative positions, the largest grid; a smaller one reads the same table.

    Raises:
        ValueError: relative positions without a grid, or on a grid larger than theirs.
    """

    local_relative_position_bias_table: Tensor
    g2l_relative_position_bias: Tensor
    g2g_relative_position_bias: Tensor
    relative_position_index: Tensor

    positions: ClassVar = POSITIONS
    published_note: ClassVar = "the published formula counts biases"
    examples: ClassVar = ({"position": "absolute"}, {"position": "relative"})

    def __init__(
        self, *, position: str = "absolute", grid: Grid | None = None, **common: Any
    ) -> None:
        super().__init__(**common)
        if position not in POSITIONS:
            raise ValueError(f"unknown position {position!r}; allowed: {', '.join(POSITIONS)}")
        self.qkv = nn.Linear(self.dim, 3 * self.dim)
        self.proj = nn.Linear(self.dim, self.dim)
        self.position = position
        if position == "absolute":
            return
        if grid is None:
            raise ValueError(
                "position 'relative' needs the option grid, the largest (rows, columns)"
            )
        self.extent: Grid = (grid[0], grid[1])
        add_relative_positions(
            self, extent=self.extent, num_heads=self.num_heads, num_global=self.num_global
        )
        if (grid[0] * grid[1]) ** 2 <= LARGEST_INDEX:
            places = grid_positions(self.extent)
            self.register_buffer(
                "relative_position_index", relative_index(places, places, self.extent)
            )

    def _check(self, grid: Grid) -> None:
        if grid[0] > self.extent[0] or grid[1] > self.extent[1]:
            raise ValueError(
                f"grid {grid[0]}x{grid[1]} is larger than {self.extent[0]}x{self.extent[1]},"
                " the grid that the relative positions were made for"
            )

    def plain_bias(self, grid: Grid) -> Tensor:
        """The oracle of `bias`: the table as an image of differences, read for every pair."""
        table = self.local_relative_position_bias_table
        (rows, columns), places = self.extent, grid_positions(grid, table.device)
        dx, dy = (places[:, None] - places).unbind(-1)
        image = table.unflatten(0, (2 * rows - 1, 2 * columns - 1))
        local = image[dx + rows - 1, dy + columns - 1].permute(2, 0, 1)
        if not self.num_global:
            return local
        return plain_bias(local, self.g2g_relative_position_bias, self.g2l_relative_position_bias)

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        if self.position == "relative":
            return self.proj(self._attend_relatively(self.qkv(x), grid))
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        out = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout_p)
        return self.proj(merge_heads(out))

    def _attend_relatively(self, qkv: Tensor, grid: Grid) -> Tensor:
        self._check(grid)
        of_global = None
        if self.num_global:
            to_grid, to_global = self.g2l_relative_position_bias
            columns = (self.g2g_relative_position_bias, to_grid[..., None], to_global[..., None])
            of_global = torch.cat(columns, dim=-1).to(qkv.dtype)
        q, keys_values = qkv.split((self.dim, 2 * self.dim), dim=-1)
        return attend_relatively(
            q,
            keys_values,
            self.local_relative_position_bias_table,
            of_global,
            num_heads=self.num_heads,
            grid=grid,
            extent=self.extent,
            dropout=self.dropout_p,
        )

    def reference(self, x: Tensor, grid: Grid) -> Tensor:
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        scores = self.scale * (q @ k.transpose(-2, -1))
        if self.position == "relative":
            self._check(grid)
            scores = scores + self.plain_bias(grid)
        weights = scores.softmax(dim=-1)
        return self.proj(merge_heads(nn.functional.dropout(weights, self.dropout_p) @ v))

    def multiply_adds(self, grid: Grid) -> int:
        tokens = self.num_global + grid[0] * grid[1]
        return 2 * tokens**2 * self.dim + 4 * tokens * self.dim**2

    def published_multiply_adds(self, grid: Grid) -> int:
        tokens = self.num_global + grid[0] * grid[1]
        return 2 * tokens**2 * self.dim + (4 * self.dim**2 + 4 * self.dim) * tokens
