"""Spatial-reduction attention.

Wang et al., "Pyramid Vision Transformer", https://arxiv.org/abs/2102.12122, equations 2 and 3: all
tokens ask, and the keys and values come from the grid reduced by a strided convolution. As
published for ViL, the reduced grid is instance-normalised, without affine parameters, instead of
layer-normalised, and global tokens stay as they are. Cost: `2 N (g + s) C` for
`s = ⌊rows / r⌋ · ⌊columns / r⌋` keys, and `C² (r² s + 2 N + 2 (g + s))` for convolution and
projections.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attentions.contract import Attention, Grid
from attentions.parts import apply, lowered, merge_heads, split_heads
from attentions.registry import register

NORM_EPS = 1e-5


class ReduceSquares(torch.autograd.Function):
    """A convolution whose kernel is its stride, as a matrix product, which is faster.

    The squares are a copy of x in another order; it is made again in the backward pass.

    Shapes: x (B, N, C), weight (D, C, r, r) -> (B, s, D).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, grid: Grid, num_global: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.place = grid, num_global, weight.shape[-1]
        return nn.functional.linear(
            _squares(x, *ctx.place).flatten(3).flatten(1, 2), _matrix(weight)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x, squares = torch.zeros_like(x), _squares(x, *ctx.place)
        grad_squares = grad @ _matrix(weight).to(grad.dtype)
        _squares(grad_x, *ctx.place).copy_(grad_squares.view(squares.shape))
        found = grad.flatten(0, 1).T @ squares.reshape(-1, grad_squares.shape[-1])
        kernel = found.to(weight.dtype).unflatten(1, (*weight.shape[2:], -1)).permute(0, 3, 1, 2)
        return grad_x, kernel, None, None


def _squares(x: Tensor, grid: Grid, num_global: int, size: int) -> Tensor:
    """The whole squares of the grid, a view: x (B, N, C) -> (B, R, S, r, r, C)."""
    rows, columns = (side // size for side in grid)
    image = x[:, num_global:].unflatten(1, grid)[:, : rows * size, : columns * size]
    return image.unflatten(2, (columns, size)).unflatten(1, (rows, size)).transpose(2, 3)


def _matrix(weight: Tensor) -> Tensor:
    """(D, C, r, r) -> (D, r r C)."""
    return weight.permute(0, 2, 3, 1).flatten(1)


@register("srformer")
class SpatialReductionAttention(Attention):
    """Attention to a grid reduced `reduction` times along both sides.

    Rows and columns beyond the last whole `reduction` square are not seen as keys.

    Args:
        reduction: kernel and stride of the convolution.

    Raises:
        ValueError: for a grid smaller than `reduction`.
    """

    arch_option: ClassVar = "reduction"
    published_note: ClassVar = (
        "the published formula counts biases, and divides sides of the grid from left to right,"
        " which is not the size of the reduced grid"
    )
    examples: ClassVar = ({"reduction": 1}, {"reduction": 2}, {"reduction": 3})

    def __init__(self, *, reduction: int = 2, **common: Any) -> None:
        super().__init__(**common)
        if reduction < 1:
            raise ValueError(f"reduction {reduction} is not positive")
        self.reduction = reduction
        self.query = nn.Linear(self.dim, self.dim)
        self.kv = nn.Linear(self.dim, 2 * self.dim)
        self.proj = nn.Linear(self.dim, self.dim)
        self.proj_sr = nn.Conv2d(self.dim, self.dim, reduction, stride=reduction, bias=False)

    def _check(self, grid: Grid) -> None:
        if min(grid) < self.reduction:
            raise ValueError(
                f"grid {grid[0]}x{grid[1]} is smaller than the reduction {self.reduction}"
            )

    def reduce(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, C) -> (B, g + s, C): global tokens, then the reduced and normalised grid."""
        self._check(grid)
        reduced = apply(ReduceSquares, x, self.proj_sr.weight, grid, self.num_global)
        # Instance normalisation, which here takes a grid reduced to one token as well. Its squares
        # are more than half precision holds.
        reduced = reduced.to(torch.promote_types(reduced.dtype, torch.float32))
        centred = reduced - reduced.mean(dim=1, keepdim=True)
        normal = centred * (centred.square().mean(dim=1, keepdim=True) + NORM_EPS).rsqrt()
        return torch.cat([x[:, : self.num_global], normal.to(x.dtype)], dim=1)

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        x = lowered(x)
        q = split_heads(self.query(x), self.num_heads)
        keys_values = self.kv(self.reduce(x, grid)).chunk(2, dim=-1)
        k, v = (split_heads(part, self.num_heads) for part in keys_values)
        out = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout_p)
        return self.proj(merge_heads(out))

    def reference(self, x: Tensor, grid: Grid) -> Tensor:
        self._check(grid)
        size, g = self.reduction, self.num_global
        image = x[:, g:].unflatten(1, grid)
        squares = torch.stack(
            [
                image[:, i : i + size, j : j + size].permute(0, 3, 1, 2)
                for i in range(0, grid[0] - size + 1, size)
                for j in range(0, grid[1] - size + 1, size)
            ],
            dim=1,
        )
        reduced = torch.einsum("bschw,dchw->bsd", squares, self.proj_sr.weight)
        mean = reduced.mean(dim=1, keepdim=True)
        variance = (reduced - mean).square().mean(dim=1, keepdim=True)
        keys = torch.cat([x[:, :g], (reduced - mean) / (variance + NORM_EPS).sqrt()], dim=1)
        q = split_heads(self.query(x), self.num_heads)
        k, v = (split_heads(part, self.num_heads) for part in self.kv(keys).chunk(2, dim=-1))
        weights = (self.scale * (q @ k.transpose(-2, -1))).softmax(dim=-1)
        return self.proj(merge_heads(nn.functional.dropout(weights, self.dropout_p) @ v))

    def multiply_adds(self, grid: Grid) -> int:
        return self._count(grid, (grid[0] // self.reduction) * (grid[1] // self.reduction), bias=0)

    def published_multiply_adds(self, grid: Grid) -> int:
        # The published count divides from left to right, which is not the size of the reduced grid.
        return self._count(grid, grid[0] // self.reduction * grid[1] // self.reduction, bias=1)

    def _count(self, grid: Grid, reduced: int, *, bias: int) -> int:
        channels, keys = self.dim, self.num_global + reduced
        tokens = self.num_global + grid[0] * grid[1]
        linear = channels**2 + bias * channels
        return (
            2 * tokens * linear
            + self.reduction**2 * channels**2 * reduced
            + 2 * keys * linear
            + 2 * tokens * keys * channels
        )
