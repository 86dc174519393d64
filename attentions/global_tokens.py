"""Attention through global tokens alone: longformer without its local part.

Zhang et al., "Multi-Scale Vision Longformer", https://arxiv.org/abs/2103.15358, section 4.3
("Global"). Grid tokens attend to the `g` global tokens, global tokens to all. Cost:
`2 g (2 N - g) C + 6 N C²`.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attentions.contract import Grid
from attentions.longformer import GlobalTokens
from attentions.parts import merge_heads, split_heads
from attentions.registry import register


@register("global")
class GlobalAttention(GlobalTokens):
    """Attention of the grid to global tokens, and of global tokens to everything.

    Args:
        position: "absolute" alone: there are no local differences that a bias could tell apart.

    Raises:
        ValueError: without a global token.
    """

    least_globals: ClassVar = 1
    examples: ClassVar = ({"share_weights": True}, {"share_weights": False})

    def __init__(self, *, position: str = "absolute", **common: Any) -> None:
        super().__init__(**common)
        if position not in self.positions:
            raise ValueError(f"unknown position {position!r}; global allows: absolute")

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        g = self.num_global
        # As published, keys and values are computed of all tokens and read at the global ones.
        keys_values = self.kv(x)[:, :g]
        k, v = (split_heads(part, self.num_heads) for part in keys_values.chunk(2, dim=-1))
        q = split_heads(self.query(x[:, g:]), self.num_heads)
        out = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout_p)
        local = self.proj(merge_heads(out))
        return torch.cat([self.attend_globally(x, None), local], dim=1)

    def reference(self, x: Tensor, grid: Grid) -> Tensor:
        g = self.num_global
        q = split_heads(self.query(x[:, g:]), self.num_heads)
        k, v = (split_heads(part, self.num_heads) for part in self.kv(x[:, :g]).chunk(2, dim=-1))
        weights = (self.scale * (q @ k.transpose(-2, -1))).softmax(dim=-1)
        local = self.proj(merge_heads(nn.functional.dropout(weights, self.dropout_p) @ v))
        return torch.cat([self.attend_globally_plainly(x, None), local], dim=1)

    def multiply_adds(self, grid: Grid) -> int:
        g, cells = self.num_global, grid[0] * grid[1]
        attention = 2 * (cells * g + g * (g + cells)) * self.dim
        return attention + self.projection_multiply_adds(grid)

    def published_multiply_adds(self, grid: Grid) -> int:
        return self.published_global_multiply_adds(grid, 0)
