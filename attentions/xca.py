"""Attention between channels instead of tokens (cross-covariance attention of XCiT).

El-Nouby et al., "XCiT: Cross-Covariance Image Transformers", https://arxiv.org/abs/2106.09681,
section 3.2: `v softmax(τ k̂ᵀ q̂)` by head, over the `M x M` products of channels, where each channel
of queries and keys has the length 1 over all tokens and `τ` is learned. The cost is linear in the
tokens: `2 N M C` for attention and `4 N C²` for projections.

Global tokens are tokens as any other. Lengths and products are sums over all tokens: they are
float32 under autocast too. Deviations: none; the local patch interaction is another layer of XCiT's
block, and the backbone's block stays as it is.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attentions.contract import Attention, Grid
from attentions.parts import apply, full_precision, merge_heads, qkv_heads, split_heads
from attentions.pieces import piece, pieces
from attentions.registry import register

# The least length, of a channel that is 0 in all tokens.
NORM_EPS = 1e-12


class ChannelAttention(torch.autograd.Function):
    """Products of channels, and the mixture of values, a piece of the tokens at a time.

    Saved for the backward pass are queries, keys and values, and what is as small as the weights.
    Queries and keys are divided by their lengths where they are multiplied already, in (M, M).

    Shapes: qkv (B, N, 3 C), temperature (H, 1, 1), kept (B, H, M, M) -> (B, N, C).

    Args:
        kept: what dropout multiplies weights with, or None.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, temperature: Tensor, kept: Tensor | None, num_heads: int
    ) -> Tensor:
        with full_precision(qkv):
            q, k, v = qkv_heads(qkv, num_heads)
            batch, heads, tokens, width = q.shape
            wide = torch.promote_types(qkv.dtype, torch.float32)
            products = qkv.new_zeros(batch, heads, width, width, dtype=wide)
            squares = qkv.new_zeros(2, batch, heads, width, dtype=wide)
            for part in _pieces(qkv, wide):
                query, key = piece(q, part, wide), piece(k, part, wide)
                products[part[0]] += query.transpose(-2, -1) @ key
                squares[0, part[0]] += query.square().sum(dim=-2)
                squares[1, part[0]] += key.square().sum(dim=-2)
            inverse = squares.sqrt_().clamp_(min=NORM_EPS).reciprocal_()
            cosines = products.mul_(inverse[0, ..., None]).mul_(inverse[1, ..., None, :])
            weights = (cosines * temperature).softmax(dim=-1)
            mixture = weights if kept is None else weights * kept
            out = qkv.new_empty(batch, tokens, heads * width)
            for part in _pieces(qkv, wide):
                mixed = piece(v, part, wide) @ mixture[part[0]].transpose(-2, -1)
                out[part] = merge_heads(mixed).to(out.dtype)
        ctx.save_for_backward(qkv, temperature, kept, cosines, inverse, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, temperature, kept, cosines, inverse, weights = ctx.saved_tensors
        wide, heads = weights.dtype, weights.shape[1]
        with full_precision(qkv):
            q, k, v = qkv_heads(qkv, heads)
            grads = torch.empty_like(qkv)
            grad_q, grad_k, grad_v = qkv_heads(grads, heads)
            grad = split_heads(grad, heads)
            mixture = weights if kept is None else weights * kept
            found = torch.zeros_like(weights)
            for part in _pieces(qkv, wide):
                above = piece(grad, part, wide)
                found[part[0]] += above.transpose(-2, -1) @ piece(v, part, wide)
                grad_v[part[0], :, part[1]] = above @ mixture[part[0]]
            found = found if kept is None else found.mul_(kept)
            scores = torch._softmax_backward_data(found, weights, -1, wide)
            grad_temperature = (scores * cosines).sum(dim=(0, 2, 3)).view_as(temperature)
            scores = scores * temperature
            # Of the products, and of the lengths, which each channel has a share in.
            along = scores * cosines
            products = scores.mul_(inverse[0, ..., None]).mul_(inverse[1, ..., None, :])
            of_q = along.sum(dim=-1).mul_(inverse[0].square())[..., None, :]
            of_k = along.sum(dim=-2).mul_(inverse[1].square())[..., None, :]
            for part in _pieces(qkv, wide):
                query, key = piece(q, part, wide), piece(k, part, wide)
                images, tokens = part
                turned = key @ products[images].transpose(-2, -1)
                grad_q[images, :, tokens] = turned.sub_(query * of_q[images])
                turned = query @ products[images]
                grad_k[images, :, tokens] = turned.sub_(key * of_k[images])
        return grads, grad_temperature.to(temperature.dtype), None, None


def _pieces(qkv: Tensor, wide: torch.dtype) -> Iterator[tuple[slice, slice]]:
    # Queries, keys, and what becomes of them.
    return pieces(qkv, 4 * qkv.shape[2] // 3 * wide.itemsize)


@register("xca")
class CrossCovarianceAttention(Attention):
    """Softmax attention of each channel of a head to the channels of its head."""

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        self.temperature = nn.Parameter(torch.ones(self.num_heads, 1, 1))
        self.qkv = nn.Linear(self.dim, 3 * self.dim)
        self.proj = nn.Linear(self.dim, self.dim)

    def _kept(self, x: Tensor) -> Tensor | None:
        """What dropout multiplies weights with: (B, H, M, M)."""
        if not self.dropout_p:
            return None
        width = self.dim // self.num_heads
        ones = x.new_ones(len(x), self.num_heads, width, width)
        return nn.functional.dropout(ones, self.dropout_p)

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        qkv, kept = self.qkv(x), self._kept(x)
        return self.proj(apply(ChannelAttention, qkv, self.temperature, kept, self.num_heads))

    def reference(self, x: Tensor, grid: Grid) -> Tensor:
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        with full_precision(x):
            wide = torch.promote_types(q.dtype, torch.float32)
            q, k, v = (part.to(wide) for part in (q, k, v))
            q, k = (part / part.norm(dim=-2, keepdim=True).clamp(min=NORM_EPS) for part in (q, k))
            weights = (self.temperature * (q.transpose(-2, -1) @ k)).softmax(dim=-1)
            weights = nn.functional.dropout(weights, self.dropout_p)
            out = (weights @ v.transpose(-2, -1)).transpose(-2, -1)
        return self.proj(merge_heads(out).to(x.dtype))

    def multiply_adds(self, grid: Grid) -> int:
        tokens = self.num_global + grid[0] * grid[1]
        return 2 * tokens * self.dim**2 // self.num_heads + 4 * tokens * self.dim**2
