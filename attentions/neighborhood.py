"""Attention of each token to the tokens around it (NAT, DiNAT).

Hassani et al., "Neighborhood Attention Transformer", https://arxiv.org/abs/2204.07143, equations 2
to 4: a token attends to the `k x k` tokens of a window that is centred on it and kept inside the
grid, so that tokens at the border see as many. `dilation` (Hassani and Shi, "Dilated Neighborhood
Attention Transformer", https://arxiv.org/abs/2209.15001): the same among tokens `d` rows and
columns apart. `stride` (Hassani et al., "Generalized Neighborhood Attention",
https://arxiv.org/abs/2504.16922, section 3.1): tokens in steps of `s` share the window of the
token in their middle. Cost with windows of one size: `2 (P (2k - 1)² + g N + g P) C` at most for
attention, with `P` grid tokens, since a tile of `k x k` queries is multiplied with all keys that
one of them sees (or `8 x 8` queries on grids of at most 16 tokens a side); and `4 N C²` for
projections.

Deviations: a window is as large as the grid where that is smaller, which published code refuses.
Global tokens are an extension of ours, by longformer's rule: each grid token attends to them too,
under one softmax, and they attend to all tokens; all share one projection.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from attentions.contract import Grid
from attentions.registry import register
from attentions.windowed import WindowedAttention
from attentions.windows import AROUND, Plan

# Tokens along a tile's side that are worth its products.
_SMALL = 8


@register("neighborhood")
class NeighborhoodAttention(WindowedAttention):
    """Attention of each grid token to a window around it, and to global tokens.

    Args:
        kernel: side `k` of a window.
        dilation: rows and columns from one token of a window to the next.
        stride: tokens in a row, and in a column, that share a window; at most `kernel`.
        position: "absolute" (positions are in x already) or "relative" (a learned bias).
    """

    arch_option: ClassVar = "kernel"
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
        for what, value in (("kernel", kernel), ("dilation", dilation)):
            if value < 1:
                raise ValueError(f"{what} {value} is not positive")
        if not 1 <= stride <= kernel:
            raise ValueError(f"stride {stride} is outside [1, {kernel}], the kernel")
        super().__init__(position=position, **common)
        self.add_positions(kernel)
        self.kernel, self.dilation, self.stride = kernel, dilation, stride

    def plan(self, grid: Grid) -> Plan:
        # As many queries at a time as there are keys to one of them, in whole strides; a small grid
        # in two tiles a side, since those at a border and inside need products of their own.
        half = -(-max(grid) // self.dilation // 2)
        tokens = max(half, self.kernel) if half <= _SMALL else self.kernel
        tile = -(-tokens // self.stride) * self.stride
        how = (self.kernel, self.dilation, self.stride)
        return Plan(grid, self.num_heads, self.num_global, AROUND, tile, how)

    def seen(self, places: Tensor, grid: Grid) -> Tensor:
        k, d, s = self.kernel, self.dilation, self.stride
        sides = torch.tensor(grid, device=places.device)
        # Tokens of one remainder are a grid of their own.
        remainder, place = places % d, places // d
        length = (sides - remainder + d - 1).div(d, rounding_mode="floor")
        leader = (place.div(s, rounding_mode="floor") * s + s // 2).minimum(length - 1)
        first = (leader - k // 2).minimum(length - k).clamp(min=0)[:, None]
        within = (place >= first) & (place < first + k)
        return (within & (remainder == remainder[:, None])).all(dim=-1)

    def difference(self, places: Tensor, grid: Grid) -> Tensor:
        # Tokens of other remainders do not see each other.
        return super().difference(places.div(self.dilation, rounding_mode="floor"), grid)
