"""What mechanisms with attention in windows share: projections, relative positions, the oracle."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attentions.cache import cached
from attentions.contract import Attention, Grid
from attentions.full import POSITIONS
from attentions.parts import (
    add_relative_positions,
    gather_bias,
    global_bias,
    grid_positions,
    merge_heads,
    plain_bias,
    split_heads,
    with_global_keys,
)
from attentions.windows import Plan, attend_in_windows


class WindowedAttention(Attention):
    """Attention of grid tokens to windows and to global tokens, which attend to all tokens.

    A subclass says where the windows are, in `plan`, and again for the oracle, in `seen`; its
    constructor calls `add_positions`.

    Args:
        position: "absolute" (positions are in x already) or "relative" (a learned bias).
    """

    local_relative_position_bias_table: Tensor
    g2l_relative_position_bias: Tensor
    g2g_relative_position_bias: Tensor

    positions: ClassVar[tuple[str, ...]] = POSITIONS

    def __init__(self, *, position: str = "absolute", **common: Any) -> None:
        super().__init__(**common)
        if position not in self.positions:
            raise ValueError(f"unknown position {position!r}; allowed: {', '.join(self.positions)}")
        self.position = position
        self.qkv = nn.Linear(self.dim, 3 * self.dim)
        self.proj = nn.Linear(self.dim, self.dim)

    def add_positions(self, side: int) -> None:
        """Make the table of relative positions for windows of `side` tokens along a side."""
        self.side = side
        if self.position == "relative":
            add_relative_positions(
                self, extent=(side, side), num_heads=self.num_heads, num_global=self.num_global
            )

    def plan(self, grid: Grid) -> Plan:
        """Where the windows are."""
        raise NotImplementedError(f"{type(self).__name__}.plan")

    def seen(self, places: Tensor, grid: Grid) -> Tensor:
        """Which grid tokens each of them sees: rows and columns (P, 2) -> (P, P)."""
        raise NotImplementedError(f"{type(self).__name__}.seen")

    def difference(self, places: Tensor, grid: Grid) -> Tensor:
        """Differences of positions that the table tells apart: (P, 2) -> (P, P, 2)."""
        del grid
        return places[:, None] - places

    def projected(self, x: Tensor) -> Tensor:
        """Queries, keys and values: (B, N, C) -> (B, N, 3 C)."""
        return self.qkv(x)

    def temperature(self) -> Tensor | None:
        """What scores of normalised queries and keys are multiplied with, where these are."""
        return None

    def biases(self, plan: Plan) -> tuple[Tensor | None, Tensor | None]:
        """Additive biases of relative positions in a window, and of what global tokens see.

        Shapes: (H, w², g + frame²), and (H, g, N) with global tokens.
        """
        if self.position == "absolute":
            return None, None
        table = self.local_relative_position_bias_table
        local = gather_bias(table, cached(bias_rows, *self._frame(plan), like=table))
        if not self.num_global:
            return local, None
        g2g, g2l = self.g2g_relative_position_bias, self.g2l_relative_position_bias
        whole = global_bias(g2g, g2l, plan.grid[0] * plan.grid[1])
        return with_global_keys(local, g2l), whole

    def _frame(self, plan: Plan) -> tuple[int, int, int, int]:
        return self.side, plan.window, plan.frame, plan.margin

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        plan = self.plan(grid)
        local, whole = self.biases(plan)
        out = attend_in_windows(
            self.projected(x),
            plan,
            local_bias=local,
            whole_bias=whole,
            temperature=self.temperature(),
            dropout=self.dropout_p,
        )
        return self.proj(out)

    def reference(self, x: Tensor, grid: Grid) -> Tensor:
        """Full attention under a mask."""
        g = self.num_global
        qkv = self.projected(x).chunk(3, dim=-1)
        q, k, v = (split_heads(part, self.num_heads) for part in qkv)
        places = grid_positions(grid, x.device)
        visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        visible[g:, g:] = self.seen(places, grid)
        scores = self.plain_scores(q, k, self.difference(places, grid))
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        return self.proj(merge_heads(nn.functional.dropout(weights, self.dropout_p) @ v))

    def plain_scores(self, q: Tensor, k: Tensor, difference: Tensor) -> Tensor:
        """Scores of all pairs: q, k (B, H, N, M), difference (P, P, 2) -> (B, H, N, N)."""
        scores = self.scale * (q @ k.transpose(-2, -1))
        if self.position == "absolute":
            return scores
        # The table as an image of differences. Pairs further apart do not see each other.
        most = self.side - 1
        image = self.local_relative_position_bias_table.unflatten(0, (2 * most + 1,) * 2)
        dx, dy = (difference.clamp(-most, most) + most).unbind(-1)
        local = image[dx, dy].permute(2, 0, 1)
        if self.num_global:
            g2g, g2l = self.g2g_relative_position_bias, self.g2l_relative_position_bias
            local = plain_bias(local, g2g, g2l)
        return scores + local

    def multiply_adds(self, grid: Grid) -> int:
        """Of what runs: whole windows, the padded rows and columns included."""
        g, tokens = self.num_global, self.num_global + grid[0] * grid[1]
        return 2 * (self.plan(grid).pairs() + g * tokens) * self.dim + 4 * tokens * self.dim**2


def bias_rows(
    side: int, window: int, frame: int, margin: int, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Row of the table of relative positions for each query of a window and each key of its frame.

    Keys that no query sees get any row.

    Shapes: (window², frame²), integers.
    """
    del dtype
    query = grid_positions((window, window), device)[:, None]
    key = grid_positions((frame, frame), device) - margin
    row, column = ((query - key).clamp(1 - side, side - 1) + side - 1).unbind(-1)
    return row * (2 * side - 1) + column
