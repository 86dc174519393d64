"""Attention in windows, and in some blocks to all tokens, with decomposed positions (ViTDet).

Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection",
https://arxiv.org/abs/2203.16527, section 3: blocks attend in `w x w` windows side by side, without
a shift, but for a few, evenly spread ones, which attend to all tokens. Relative positions as in Li
et al., "MViTv2", https://arxiv.org/abs/2112.01526, equation 4: the bias of a query at (i, j) and a
key at (r, s) is `q · R[i - r] + q · S[j - s]`, with tables of rows and of columns that all heads
share. Cost with `P` grid tokens: in windows `2 P (w² + w + g) C + 2 g N C` for attention, to all
tokens `2 N² C + P (rows + columns) C`; and `4 N C²` for projections.

Deviations: keys that pad the grid are never attended, where they are tokens of the published code.
Global tokens are an extension of ours, by longformer's rule: each grid token attends to them too,
under one softmax, and they attend to all tokens; they have no position.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attentions.cache import cached
from attentions.contract import Grid
from attentions.parts import merge_heads, split_heads
from attentions.registry import register
from attentions.relative import attend_decomposed
from attentions.windowed import WindowedAttention
from attentions.windows import SHIFTED, Plan


@register("vitdet")
class PlainBackboneAttention(WindowedAttention):
    """Attention in windows or to all tokens, and to global tokens.

    Args:
        window: side of a window.
        every: the last of so many blocks of a stage attends to all tokens.
        full: whether this one does; None leaves it to `every` and `block_index`.
        block_index: the block of its stage, from 0.
        position: "absolute" (positions are in x already) or "relative" (decomposed).
        grid: with relative positions in a block that attends to all tokens, the grid that their
            tables are for; for another, they are resized linearly, as published.

    Raises:
        ValueError: for such a block without a grid.
    """

    arch_option: ClassVar = "window"
    examples: ClassVar = (
        {"window": 3, "position": "relative"},
        {"position": "relative", "full": True},
        {"position": "absolute", "full": True},
    )

    def __init__(
        self,
        *,
        window: int = 14,
        every: int = 3,
        full: bool | None = None,
        block_index: int = 0,
        grid: Grid | None = None,
        position: str = "absolute",
        **common: Any,
    ) -> None:
        for what, value in (("window", window), ("every", every)):
            if value < 1:
                raise ValueError(f"{what} {value} is not positive")
        super().__init__(position=position, **common)
        self.window = window
        self.full = block_index % every == every - 1 if full is None else full
        if self.position == "absolute":
            return
        if self.full and grid is None:
            raise ValueError("position 'relative' needs the option grid, (rows, columns)")
        sides = grid if self.full and grid is not None else (window, window)
        width = self.dim // self.num_heads
        self.rel_pos_h, self.rel_pos_w = (
            nn.Parameter(torch.zeros(2 * side - 1, width)) for side in sides
        )
        for table in (self.rel_pos_h, self.rel_pos_w):
            nn.init.trunc_normal_(table, std=0.02)

    def plan(self, grid: Grid) -> Plan:
        return Plan(grid, self.num_heads, self.num_global, SHIFTED, self.window, (0, 0))

    def seen(self, places: Tensor, grid: Grid) -> Tensor:
        window = places * 0 if self.full else places // self.window
        return (window[:, None] == window).all(dim=-1)

    def _tables(self, sides: Grid) -> list[Tensor]:
        """The tables of rows and of columns for such sides: (2 side - 1, M)."""
        return [
            table
            if len(table) == 2 * side - 1
            else nn.functional.interpolate(table.T[None], 2 * side - 1, mode="linear")[0].T
            for table, side in zip((self.rel_pos_h, self.rel_pos_w), sides, strict=True)
        ]

    def _by_query(self, sides: Grid) -> list[Tensor]:
        """The same for each pair of rows, or of columns: (side, side, M)."""
        tables = []
        for table, side in zip(self._tables(sides), sides, strict=True):
            tables.append(nn.functional.embedding(cached(pair_rows, side, like=table), table))
        return tables

    def biases(self, plan: Plan) -> tuple[Tensor | None, None]:
        if self.position == "absolute":
            return None, None
        return torch.stack(self._by_query((self.window, self.window))), None

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        if not self.full:
            return super().attend(x, grid)
        if self.position == "relative":
            q, keys_values = self.qkv(x).split((self.dim, 2 * self.dim), dim=-1)
            out = attend_decomposed(
                q,
                keys_values,
                *self._by_query(grid),
                num_heads=self.num_heads,
                grid=grid,
                dropout=self.dropout_p,
            )
            return self.proj(out)
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        out = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout_p)
        return self.proj(merge_heads(out))

    def plain_scores(self, q: Tensor, k: Tensor, difference: Tensor) -> Tensor:
        scores = self.scale * (q @ k.transpose(-2, -1))
        if self.position == "absolute":
            return scores
        local = scores.new_zeros(scores.shape[-2:]).expand_as(scores).clone()
        for axis in (0, 1):
            apart = difference[..., axis]
            side = int(apart.max()) + 1 if self.full else self.window
            table = self._tables((side, side))[axis]
            # Pairs further apart do not see each other.
            products = (
                q[:, :, self.num_global :, None] * table[apart.clamp(1 - side, side - 1) + side - 1]
            )
            local[..., self.num_global :, self.num_global :] += products.sum(dim=-1)
        return scores + local

    def multiply_adds(self, grid: Grid) -> int:
        """Of what runs: whole windows, the padded rows and columns included."""
        g, cells, w = self.num_global, grid[0] * grid[1], self.window
        relative = self.position == "relative"
        if self.full:
            products = relative * cells * sum(grid) * self.dim
            return products + 2 * (g + cells) * (g + cells + 2 * self.dim) * self.dim
        padded = -(-grid[0] // w) * -(-grid[1] // w) * w * w
        return super().multiply_adds(grid) + relative * 2 * padded * w * self.dim


def pair_rows(side: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Row of a table for each pair of places along a side: (side, side), integers."""
    del dtype
    place = torch.arange(side, device=device)
    return place[:, None] - place + side - 1
