"""Attention in windows of the grid that every other block shifts (Swin).

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
https://arxiv.org/abs/2103.14030, section 3.2: the grid is cut into `w x w` windows, and a token
attends to the tokens of its own window; every second block of a stage moves the windows by
`⌊w / 2⌋` rows and columns, by rolling the grid. Relative positions by equation 4. Cost with `P`
grid tokens after padding to whole windows: `2 P (w² + g) C + 2 g N C` for attention and `4 N C²`
for projections.

Deviations: keys that pad the grid are never attended, where they are tokens of the published code.
Global tokens are an extension of ours, by longformer's rule: each grid token attends to them too,
under one softmax, and they attend to all tokens; all share one projection. A stage of a single
block never shifts, such as stages 1 and 4 of every published ViL.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attentions.contract import Attention, Grid
from attentions.full import POSITIONS
from attentions.parts import (
    add_relative_positions,
    gather_bias,
    global_bias,
    grid_positions,
    merge_heads,
    plain_bias,
    relative_index,
    split_heads,
    with_global_keys,
)
from attentions.registry import register
from attentions.windows import SHIFTED, Plan, attend_in_windows


@register("swin")
class ShiftedWindowAttention(Attention):
    """Attention in windows, shifted or not, and to global tokens.

    Along a side of the grid that one window covers nothing is shifted.

    Args:
        window: side of a window.
        shift: rows and columns by which the windows are moved; None alternates between 0 in even
            blocks of a stage and half a window in odd ones.
        block_index: the block of its stage, from 0.
        position: "absolute" (positions are in x already) or "relative" (a learned bias).

    Raises:
        ValueError: for a shift outside the window.
    """

    local_relative_position_bias_table: Tensor
    g2l_relative_position_bias: Tensor
    g2g_relative_position_bias: Tensor
    relative_position_index: Tensor

    arch_option: ClassVar = "window"
    positions: ClassVar = POSITIONS
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"window": 4, "position": "relative", "shift": 2},
        {"window": 3, "position": "relative", "shift": 0},
        {"window": 3, "position": "absolute", "shift": 1},
        {"window": 2, "position": "absolute", "shift": 0},
    )

    def __init__(
        self,
        *,
        window: int = 7,
        shift: int | None = None,
        block_index: int = 0,
        position: str = "absolute",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if window < 1:
            raise ValueError(f"window {window} is not positive")
        if shift is not None and not 0 <= shift < window:
            raise ValueError(f"shift {shift} is outside [0, {window}), the window")
        if position not in POSITIONS:
            raise ValueError(f"unknown position {position!r}; allowed: {', '.join(POSITIONS)}")
        self.window = window
        self.shift = window // 2 * (block_index % 2) if shift is None else shift
        self.position = position
        self.qkv = nn.Linear(self.dim, 3 * self.dim)
        self.proj = nn.Linear(self.dim, self.dim)
        if position == "relative":
            extent = (window, window)
            add_relative_positions(
                self, extent=extent, num_heads=self.num_heads, num_global=self.num_global
            )
            places = grid_positions(extent)
            self.register_buffer("relative_position_index", relative_index(places, places, extent))

    def _shifts(self, grid: Grid) -> Grid:
        """Rows and columns to shift by: none along a side that one window covers."""
        rows, columns = (self.shift if side > self.window else 0 for side in grid)
        return rows, columns

    def _plan(self, grid: Grid) -> Plan:
        shifts = self._shifts(grid)
        return Plan(grid, self.num_heads, self.num_global, SHIFTED, self.window, shifts)

    def _projected(self, x: Tensor) -> Tensor:
        """Queries, keys and values: (B, N, 3 C)."""
        return self.qkv(x)

    def _temperature(self) -> Tensor | None:
        """What scores of normalised queries and keys are multiplied with, where these are."""
        return None

    def _biases(self, cells: int) -> tuple[Tensor | None, Tensor | None]:
        """Additive biases of relative positions in a window, and of what global tokens see.

        Shapes: (H, w², g + w²), and (H, g, N) with global tokens.
        """
        if self.position == "absolute":
            return None, None
        local = gather_bias(self.local_relative_position_bias_table, self.relative_position_index)
        if not self.num_global:
            return local, None
        g2g, g2l = self.g2g_relative_position_bias, self.g2l_relative_position_bias
        return with_global_keys(local, g2l), global_bias(g2g, g2l, cells)

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        local, whole = self._biases(grid[0] * grid[1])
        out = attend_in_windows(
            self._projected(x),
            self._plan(grid),
            local_bias=local,
            whole_bias=whole,
            temperature=self._temperature(),
            dropout=self.dropout_p,
        )
        return self.proj(out)

    def reference(self, x: Tensor, grid: Grid) -> Tensor:
        """Full attention under a mask: shifting the windows is tiling the grid from elsewhere."""
        g, w = self.num_global, self.window
        qkv = self._projected(x).chunk(3, dim=-1)
        q, k, v = (split_heads(part, self.num_heads) for part in qkv)
        places = grid_positions(grid, x.device)
        scores = self._plain_scores(q, k, places)
        tile = (places - torch.tensor(self._shifts(grid), device=x.device)).div(
            w, rounding_mode="floor"
        )
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device)
        visible[g:, g:] = (tile[:, None] == tile).all(dim=-1)
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        return self.proj(merge_heads(nn.functional.dropout(weights, self.dropout_p) @ v))

    def _plain_scores(self, q: Tensor, k: Tensor, places: Tensor) -> Tensor:
        """Scores of all pairs: q, k (B, H, N, M) -> (B, H, N, N)."""
        scores = self.scale * (q @ k.transpose(-2, -1))
        return scores if self.position == "absolute" else scores + self._plain_bias(places)

    def _plain_bias(self, places: Tensor) -> Tensor:
        """The table as an image of differences, read for every pair of `places`: (H, N, N)."""
        side = 2 * self.window - 1
        table = self.local_relative_position_bias_table
        # Pairs further apart see each other in no window.
        differences = (places[:, None] - places).clamp(1 - self.window, self.window - 1)
        dx, dy = (differences + self.window - 1).unbind(-1)
        local = table.unflatten(0, (side, side))[dx, dy].permute(2, 0, 1)
        if not self.num_global:
            return local
        return plain_bias(local, self.g2g_relative_position_bias, self.g2l_relative_position_bias)

    def multiply_adds(self, grid: Grid) -> int:
        """Of what runs: whole windows, the padded rows and columns included."""
        g, tokens = self.num_global, self.num_global + grid[0] * grid[1]
        return 2 * (self._plan(grid).pairs() + g * tokens) * self.dim + 4 * tokens * self.dim**2
