"""Attention of each token to the tokens around it (NAT, DiNAT).

Hassani et al., "Neighborhood Attention Transformer", https://arxiv.org/abs/2204.07143, equations 2
to 4: a token attends to the `k x k` tokens of a window that is centred on it and kept inside the
grid, so that tokens at the border see as many. `dilation` (Hassani and Shi, "Dilated Neighborhood
Attention Transformer", https://arxiv.org/abs/2209.15001): the same among tokens `d` rows and
columns apart. `stride` (Hassani et al., "Generalized Neighborhood Attention",
https://arxiv.org/abs/2504.16922, section 3.1): tokens in steps of `s` share the window of the
token in their middle. Cost with windows of one size: `2 (P (2k - 1)² + g N + g P) C` at most for
attention, with `P` grid tokens, since a tile of `k x k` queries is multiplied with all keys that
one of them sees; and `4 N C²` for projections.

Deviations: a window is as large as the grid where that is smaller, which published code refuses.
Global tokens are an extension of ours, by longformer's rule: each grid token attends to them too,
under one softmax, and they attend to all tokens; all share one projection.
"""

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
from attentions.registry import register
from attentions.windows import AROUND, Plan, attend_in_windows


@register("neighborhood")
class NeighborhoodAttention(Attention):
    """Attention of each grid token to a window around it, and to global tokens.

    Args:
        kernel: side `k` of a window.
        dilation: rows and columns from one token of a window to the next.
        stride: tokens in a row, and in a column, that share a window; at most `kernel`.
        position: "absolute" (positions are in x already) or "relative" (a learned bias).
    """

    local_relative_position_bias_table: Tensor
    g2l_relative_position_bias: Tensor
    g2g_relative_position_bias: Tensor

    arch_option: ClassVar = "kernel"
    positions: ClassVar = POSITIONS
    examples: ClassVar = (
        {"kernel": 3, "position": "relative"},
        {"kernel": 4, "position": "relative", "dilation": 2, "stride": 3},
        {"kernel": 3, "position": "absolute", "stride": 2},
    )

    def __init__(
        self,
        *,
        kernel: int = 7,
        dilation: int = 1,
        stride: int = 1,
        position: str = "absolute",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        for what, value in (("kernel", kernel), ("dilation", dilation)):
            if value < 1:
                raise ValueError(f"{what} {value} is not positive")
        if not 1 <= stride <= kernel:
            raise ValueError(f"stride {stride} is outside [1, {kernel}], the kernel")
        if position not in POSITIONS:
            raise ValueError(f"unknown position {position!r}; allowed: {', '.join(POSITIONS)}")
        self.kernel, self.dilation, self.stride = kernel, dilation, stride
        self.position = position
        self.qkv = nn.Linear(self.dim, 3 * self.dim)
        self.proj = nn.Linear(self.dim, self.dim)
        if position == "relative":
            add_relative_positions(
                self, extent=(kernel, kernel), num_heads=self.num_heads, num_global=self.num_global
            )

    def _plan(self, grid: Grid) -> Plan:
        # As many queries at a time as there are keys to one of them, in whole strides.
        tile = -(-self.kernel // self.stride) * self.stride
        how = (self.kernel, self.dilation, self.stride)
        return Plan(grid, self.num_heads, self.num_global, AROUND, tile, how)

    def _biases(self, plan: Plan) -> tuple[Tensor | None, Tensor | None]:
        """Additive biases of tiles, and of what global tokens see.

        Shapes: (H, tile², g + frame²), and (H, g, N) with global tokens.
        """
        if self.position == "absolute":
            return None, None
        table = self.local_relative_position_bias_table
        index = cached(bias_rows, self.kernel, plan.window, plan.frame, like=table)
        local = gather_bias(table, index)
        if not self.num_global:
            return local, None
        g2g, g2l = self.g2g_relative_position_bias, self.g2l_relative_position_bias
        cells = plan.grid[0] * plan.grid[1]
        return with_global_keys(local, g2l), global_bias(g2g, g2l, cells)

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        plan = self._plan(grid)
        local, whole = self._biases(plan)
        out = attend_in_windows(
            self.qkv(x), plan, local_bias=local, whole_bias=whole, dropout=self.dropout_p
        )
        return self.proj(out)

    def reference(self, x: Tensor, grid: Grid) -> Tensor:
        """Full attention under a mask, written from the definition."""
        g = self.num_global
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        scores = self.scale * (q @ k.transpose(-2, -1))
        places = grid_positions(grid, x.device)
        if self.position == "relative":
            scores = scores + self._plain_bias(places)
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device)
        visible[g:, g:] = self._seen(places, grid)
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        return self.proj(merge_heads(nn.functional.dropout(weights, self.dropout_p) @ v))

    def _seen(self, places: Tensor, grid: Grid) -> Tensor:
        """Which tokens each grid token sees: (P, P)."""
        k, d, s = self.kernel, self.dilation, self.stride
        sides = torch.tensor(grid, device=places.device)
        # Tokens of one remainder are a grid of their own.
        remainder, place = places % d, places // d
        length = (sides - remainder + d - 1).div(d, rounding_mode="floor")
        leader = (place.div(s, rounding_mode="floor") * s + s // 2).minimum(length - 1)
        first = (leader - k // 2).minimum(length - k).clamp(min=0)[:, None]
        within = (place >= first) & (place < first + k)
        return (within & (remainder == remainder[:, None])).all(dim=-1)

    def _plain_bias(self, places: Tensor) -> Tensor:
        """The table as an image of differences, read for every pair of `places`: (H, N, N)."""
        side, k = 2 * self.kernel - 1, self.kernel
        # Pairs of other remainders, or further apart, do not see each other.
        place = places.div(self.dilation, rounding_mode="floor")
        dx, dy = ((place[:, None] - place).clamp(1 - k, k - 1) + k - 1).unbind(-1)
        table = self.local_relative_position_bias_table
        local = table.unflatten(0, (side, side))[dx, dy].permute(2, 0, 1)
        if not self.num_global:
            return local
        return plain_bias(local, self.g2g_relative_position_bias, self.g2l_relative_position_bias)

    def multiply_adds(self, grid: Grid) -> int:
        """Of what runs: tiles of queries with all keys that one of them sees."""
        g, tokens = self.num_global, self.num_global + grid[0] * grid[1]
        return 2 * (self._plan(grid).pairs() + g * tokens) * self.dim + 4 * tokens * self.dim**2


def bias_rows(
    kernel: int, tile: int, frame: int, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Row of the table of relative positions for each query of a tile and each key around it.

    Keys that no query sees get any row.

    Shapes: (tile², frame²), integers.
    """
    del dtype
    query = grid_positions((tile, tile), device)[:, None]
    key = grid_positions((frame, frame), device) - (kernel - 1)
    row, column = ((query - key).clamp(1 - kernel, kernel - 1) + kernel - 1).unbind(-1)
    return row * (2 * kernel - 1) + column
