"""Attention through global tokens alone: longformer without its local part.

Zhang et al., "Multi-Scale Vision Longformer", https://arxiv.org/abs/2103.15358, section 4.3
("Global"). Grid tokens attend to the `g` global tokens, global tokens to all. Cost:
`2 g (2 N - g) C + 6 N C²`.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attentions.contract import Grid
from attentions.longformer import GlobalTokens
from attentions.parts import apply, lowered, merge_heads, split_heads
from attentions.registry import register


class FirstTokens(torch.autograd.Function):
    """A linear layer of all tokens, read at the first ones alone.

    As published, keys and values are computed of all tokens, which the counts of the published
    models hold. The backward pass needs no other tokens than those read, nor keeps them.

    Shapes: x (B, N, C), weight (D, C), bias (D) -> (B, count, D).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(x[:, :count].clone(), weight)
        ctx.tokens = x.shape[1]
        return nn.functional.linear(x, weight, bias)[:, :count].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = nn.functional.pad(grad @ weight.to(grad.dtype), (0, 0, 0, ctx.tokens - x.shape[1]))
        grad, x = grad.flatten(0, 1), x.flatten(0, 1)
        wide = weight.dtype
        return grad_x, (grad.T @ x).to(wide), grad.sum(dim=0, dtype=wide), None


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
        g, x = self.num_global, lowered(x)
        if self.share_weights:
            # One product of all tokens keeps x as it is; one of a part of them keeps a copy.
            first, rest = self.query(x).tensor_split((g,), dim=1)
        else:
            first, rest = self.query_global(x[:, :g]), self.query(x[:, g:])
        first_keys_values = apply(FirstTokens, x, self.kv.weight, self.kv.bias, g)
        local = self.proj(self._fused(rest, first_keys_values))
        whole = self.proj_global(self._fused(first, self.kv_global(x)))
        return torch.cat([whole, local], dim=1)

    def _fused(self, queries: Tensor, keys_values: Tensor) -> Tensor:
        """queries (B, Q, C), keys_values (B, K, 2 C) -> (B, Q, C)."""
        q, k, v = (
            split_heads(part, self.num_heads) for part in (queries, *keys_values.chunk(2, dim=-1))
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout_p)
        return merge_heads(out)

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
