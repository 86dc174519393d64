"""Attention in windows and, in every other block, to a reduced grid (Twins-SVT).

Chu et al., "Twins: Revisiting the Design of Spatial Attention in Vision Transformers",
https://arxiv.org/abs/2104.13840, section 3.2: locally-grouped attention, in `w x w` windows side by
side, then global sub-sampled attention, whose keys and values come from the grid reduced by a
strided convolution and layer-normalised. Cost with `P` grid tokens: `2 P (w² + g) C + 2 g N C` for
attention in windows, `2 N (g + s) C` to `s = ⌊rows / r⌋ · ⌊columns / r⌋` keys; `4 N C²` and
`C² (r² s + 2 N + 2 (g + s))` for convolution and projections.

Deviations: keys that pad the grid are never attended, where they are tokens of the published code.
Global tokens are an extension of ours: in windows by longformer's rule (each grid token attends to
them too, under one softmax, and they attend to all tokens), and beside the reduced grid they are
keys as they are.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attentions.contract import Grid
from attentions.parts import apply, lowered, merge_heads, split_heads
from attentions.registry import register
from attentions.srformer import ReduceSquares
from attentions.windowed import WindowedAttention
from attentions.windows import SHIFTED, Plan

SCOPES = ("local", "global")
# As published, of torch's layer.
NORM_EPS = 1e-5


@register("twins")
class TwinsAttention(WindowedAttention):
    """Attention in windows, or to a grid reduced `reduction` times along both sides.

    Rows and columns beyond the last whole `reduction` square are not seen as keys.

    Args:
        reduction: kernel and stride of the convolution; 1 for none, and no norm.
        window: side of a window.
        scope: "local" or "global"; None alternates between windows in even blocks of a stage and
            the reduced grid in odd ones.
        block_index: the block of its stage, from 0.

    Raises:
        ValueError: for a grid smaller than `reduction`, where it is reduced.
    """

    arch_option: ClassVar = "reduction"
    positions: ClassVar = ("absolute",)
    examples: ClassVar = (
        {"window": 4, "scope": "local"},
        {"reduction": 2, "scope": "global"},
        {"reduction": 1, "scope": "global"},
    )

    def __init__(
        self,
        *,
        reduction: int = 2,
        window: int = 7,
        scope: str | None = None,
        block_index: int = 0,
        **common: Any,
    ) -> None:
        for what, value in (("reduction", reduction), ("window", window)):
            if value < 1:
                raise ValueError(f"{what} {value} is not positive")
        if scope not in (None, *SCOPES):
            raise ValueError(f"unknown scope {scope!r}; allowed: {', '.join(SCOPES)}")
        super().__init__(**common)
        self.window, self.reduction = window, reduction
        self.scope = scope or SCOPES[block_index % 2]
        if self.scope == "global" and reduction > 1:
            self.sr = nn.Conv2d(self.dim, self.dim, reduction, stride=reduction)
            self.norm = nn.LayerNorm(self.dim, eps=NORM_EPS)

    def plan(self, grid: Grid) -> Plan:
        return Plan(grid, self.num_heads, self.num_global, SHIFTED, self.window, (0, 0))

    def seen(self, places: Tensor, grid: Grid) -> Tensor:
        del grid
        window = places // self.window
        return (window[:, None] == window).all(dim=-1)

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        if self.scope == "local":
            return super().attend(x, grid)
        self._check(grid)
        x, keys, g = lowered(x), x, self.num_global
        if self.reduction > 1:
            assert self.sr.bias is not None
            squares = apply(ReduceSquares, x, self.sr.weight, grid, g)
            reduced = self.norm(squares + self.sr.bias.to(squares.dtype))
            keys = torch.cat([x[:, :g], reduced.to(x.dtype)], dim=1)
        q, k, v = self._heads(x, keys)
        out = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout_p)
        return self.proj(merge_heads(out))

    def reference(self, x: Tensor, grid: Grid) -> Tensor:
        if self.scope == "local":
            return super().reference(x, grid)
        self._check(grid)
        keys, g = x, self.num_global
        if self.reduction > 1:
            image = x[:, g:].transpose(1, 2).unflatten(2, grid)
            reduced = self.norm(self.sr(image).flatten(2).transpose(1, 2))
            keys = torch.cat([x[:, :g], reduced], dim=1)
        q, k, v = self._heads(x, keys)
        weights = (self.scale * (q @ k.transpose(-2, -1))).softmax(dim=-1)
        return self.proj(merge_heads(nn.functional.dropout(weights, self.dropout_p) @ v))

    def _check(self, grid: Grid) -> None:
        if min(grid) < self.reduction:
            raise ValueError(
                f"grid {grid[0]}x{grid[1]} is smaller than the reduction {self.reduction}"
            )

    def _heads(self, x: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
        """Queries of x (B, N, C), keys and values of other tokens: (B, H, tokens, M) each."""
        weights, biases = (
            part.split((self.dim, 2 * self.dim)) for part in (self.qkv.weight, self.qkv.bias)
        )
        q = nn.functional.linear(x, weights[0], biases[0])
        both = nn.functional.linear(keys, weights[1], biases[1])
        return tuple(split_heads(part, self.num_heads) for part in (q, *both.chunk(2, dim=-1)))

    def multiply_adds(self, grid: Grid) -> int:
        if self.scope == "local":
            return super().multiply_adds(grid)
        channels, size = self.dim, self.reduction
        reduced = (grid[0] // size) * (grid[1] // size)
        keys, tokens = self.num_global + reduced, self.num_global + grid[0] * grid[1]
        convolution = size**2 * reduced if size > 1 else 0
        linear = (convolution + 2 * tokens + 2 * keys) * channels**2
        return linear + 2 * tokens * keys * channels
