"""Attention to keys and values of a reduced grid: pooled, or by a strided convolution (PVT v2).

Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer",
https://arxiv.org/abs/2106.13797, section 3.2: all tokens ask. Of the linear form, the grid is
averaged to `P x P` cells, whatever its size, followed by a 1x1 convolution, layer norm and GELU; of
the convolutional form (that of PVT, https://arxiv.org/abs/2102.12122, equations 2 and 3, with
biases), it is convolved with kernel = stride = r, followed by layer norm. Keys and values come from
what is left, s cells: `P²`, or `⌊rows / r⌋ · ⌊columns / r⌋`. Cost: `2 N (g + s) C`, and
`C² (k² s + 2 N + 2 (g + s))` for convolution and projections, `k` the convolution's kernel, 1 or r.

Deviations: none. Global tokens are an extension of ours, by srformer's rule: they ask, and stand as
they are before the reduced grid. srformer is the convolutional form as published for ViL, with
instance norm and without the convolution's bias.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attentions.contract import Attention, Grid
from attentions.parts import apply, lowered, merge_heads, split_heads
from attentions.registry import register
from attentions.srformer import ReduceSquares

NORM_EPS = 1e-5


@register("pvt_v2")
class PooledAttention(Attention):
    """Attention to a grid averaged to a fixed size, or reduced by a convolution.

    Args:
        linear: the linear form, else the convolutional one.
        size: side of the averaged grid in the linear form; kernel and stride of the convolution in
            the other, which does not see rows and columns beyond the last whole square, and with 1
            reduces nothing.

    Raises:
        ValueError: for a grid smaller than the convolution's kernel.
    """

    arch_option: ClassVar = "size"
    examples: ClassVar = (
        {"size": 3},
        {"size": 2, "linear": False},
        {"size": 1, "linear": False},
    )

    def __init__(self, *, size: int = 7, linear: bool = True, **common: Any) -> None:
        super().__init__(**common)
        if size < 1:
            raise ValueError(f"size {size} is not positive")
        self.size = size
        self.linear = linear
        self.q = nn.Linear(self.dim, self.dim)
        self.kv = nn.Linear(self.dim, 2 * self.dim)
        self.proj = nn.Linear(self.dim, self.dim)
        # Of the convolution; 0 where there is none.
        self.kernel = 1 if linear else size * (size > 1)
        if self.kernel:
            self.sr = nn.Conv2d(self.dim, self.dim, self.kernel, stride=self.kernel)
            self.norm = nn.LayerNorm(self.dim, eps=NORM_EPS)

    def _reduced(self, grid: Grid) -> Grid:
        """Rows and columns of the reduced grid."""
        if self.linear:
            return self.size, self.size
        if min(grid) < self.size:
            raise ValueError(f"grid {grid[0]}x{grid[1]} is smaller than the size {self.size}")
        return grid[0] // self.size, grid[1] // self.size

    def _normal(self, reduced: Tensor) -> Tensor:
        """What follows the convolution: (B, s, C) -> (B, s, C)."""
        normal = self.norm(reduced + self.sr.get_parameter("bias").to(reduced.dtype))
        return nn.functional.gelu(normal) if self.linear else normal

    def reduce(self, x: Tensor, grid: Grid) -> Tensor:
        """Global tokens, then the reduced grid: (B, N, C) -> (B, g + s, C)."""
        sides, g = self._reduced(grid), self.num_global
        if not self.kernel:
            return x
        if self.linear:
            image = x[:, g:].transpose(1, 2).unflatten(2, grid)
            pooled = nn.functional.adaptive_avg_pool2d(image, sides)
            reduced = nn.functional.linear(
                pooled.flatten(2).transpose(1, 2), self.sr.weight.flatten(1)
            )
        else:
            reduced = apply(ReduceSquares, x, self.sr.weight, grid, g)
        return torch.cat([x[:, :g], self._normal(reduced).to(x.dtype)], dim=1)

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        x = lowered(x)
        q = split_heads(self.q(x), self.num_heads)
        keys_values = self.kv(self.reduce(x, grid)).chunk(2, dim=-1)
        k, v = (split_heads(part, self.num_heads) for part in keys_values)
        out = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout_p)
        return self.proj(merge_heads(out))

    def reference(self, x: Tensor, grid: Grid) -> Tensor:
        """Cell by cell of the reduced grid."""
        g, (rows, columns) = self.num_global, self._reduced(grid)
        image, keys = x[:, g:].unflatten(1, grid), x
        if self.kernel:
            reduced = torch.stack(
                [self._plain_cell(image, i, j, grid) for i in range(rows) for j in range(columns)],
                dim=1,
            )
            keys = torch.cat([x[:, :g], self._normal(reduced)], dim=1)
        q = split_heads(self.q(x), self.num_heads)
        k, v = (split_heads(part, self.num_heads) for part in self.kv(keys).chunk(2, dim=-1))
        weights = (self.scale * (q @ k.transpose(-2, -1))).softmax(dim=-1)
        return self.proj(merge_heads(nn.functional.dropout(weights, self.dropout_p) @ v))

    def _plain_cell(self, image: Tensor, i: int, j: int, grid: Grid) -> Tensor:
        """A cell of the convolution's result without bias: (B, rows, columns, C) -> (B, C)."""
        if not self.linear:
            s = self.size
            square = image[:, i * s : (i + 1) * s, j * s : (j + 1) * s]
            return torch.einsum("bhwc,dchw->bd", square, self.sr.weight)
        # The cells that a share of the grid touches.
        down, across = (
            slice(at * side // self.size, -(-(at + 1) * side // self.size))
            for at, side in zip((i, j), grid, strict=True)
        )
        return image[:, down, across].mean(dim=(1, 2)) @ self.sr.weight[:, :, 0, 0].T

    def multiply_adds(self, grid: Grid) -> int:
        tokens, cells = self.num_global + grid[0] * grid[1], math.prod(self._reduced(grid))
        keys = self.num_global + cells
        projections = self.kernel**2 * cells + 2 * tokens + 2 * keys
        return 2 * tokens * keys * self.dim + projections * self.dim**2
