"""Attention in shifted windows by cosines, with positions from a small network (Swin v2).

Liu et al., "Swin Transformer V2: Scaling Up Capacity and Resolution",
https://arxiv.org/abs/2111.09883, sections 3.2 and 3.3: windows and shifts are those of Swin; scores
are `cos(q, k) / τ + bias` with a learned temperature `τ >= 0.01` for each head, and the bias of a
difference of positions is `16 sigmoid(MLP(sign(Δ) log2(1 + |8 Δ / (w - 1)|) / 3))`, with 512 hidden
units. Keys have no bias in their projection. Cost: as swin, and `(2w - 1)² 512 (2 + H)` for the
network.

Deviations: those of swin. The bias of global tokens, which have no position, is zero.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attentions.cache import cached
from attentions.contract import Grid
from attentions.full import POSITIONS
from attentions.parts import full_precision, gather_bias
from attentions.registry import register
from attentions.swin import ShiftedWindowAttention
from attentions.windowed import bias_rows
from attentions.windows import Plan

HIDDEN = 512
LARGEST_BIAS = 16
LEAST_TEMPERATURE = 0.01


@register("swin_v2")
class CosineWindowAttention(ShiftedWindowAttention):
    """Attention by cosines in windows, shifted or not, and to global tokens.

    Along a side of the grid that one window covers nothing is shifted.

    Args:
        position: "absolute" or "relative", which change nothing here: the network's bias is a part
            of the mechanism, with positions in x and without.
        options: `window`, `shift` and `block_index` of Swin.

    Raises:
        ValueError: for a shift outside the window.
    """

    examples: ClassVar = ({"window": 4, "shift": 2}, {"window": 3, "shift": 0})

    def __init__(self, *, position: str = "absolute", **options: Any) -> None:
        super().__init__(**options)
        if position not in POSITIONS:
            raise ValueError(f"unknown position {position!r}; allowed: {', '.join(POSITIONS)}")
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, self.num_heads, bias=False)
        )
        # The logarithm of 1 / τ.
        self.logit_scale = nn.Parameter(torch.full((self.num_heads, 1, 1), math.log(10)))

    def projected(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv.bias.chunk(3)
        return nn.functional.linear(x, self.qkv.weight, torch.cat([q, torch.zeros_like(k), v]))

    def temperature(self) -> Tensor:
        return self.logit_scale.clamp(max=-math.log(LEAST_TEMPERATURE)).exp()

    def _table(self) -> Tensor:
        """The bias of every difference of positions in a window: ((2w - 1)², H)."""
        offsets = cached(log_offsets, self.window, like=self.logit_scale)
        with full_precision(offsets):
            return LARGEST_BIAS * self.cpb_mlp(offsets).sigmoid()

    def biases(self, plan: Plan) -> tuple[Tensor, None]:
        index = cached(bias_rows, *self._frame(plan), like=self.logit_scale)
        return nn.functional.pad(gather_bias(self._table(), index), (self.num_global, 0)), None

    def plain_scores(self, q: Tensor, k: Tensor, difference: Tensor) -> Tensor:
        q, k = (nn.functional.normalize(x, dim=-1) for x in (q, k))
        w = self.window
        # Pairs further apart see each other in no window.
        offsets = 8 * difference.clamp(1 - w, w - 1).to(self.logit_scale.dtype) / max(w - 1, 1)
        offsets = offsets.sign() * (1 + offsets.abs()).log2() / 3
        with full_precision(offsets):
            local = LARGEST_BIAS * self.cpb_mlp(offsets).sigmoid().permute(2, 0, 1)
        local = nn.functional.pad(local, (self.num_global, 0) * 2)
        return self.temperature() * (q @ k.transpose(-2, -1)) + local

    def multiply_adds(self, grid: Grid) -> int:
        """Of what runs: whole windows, the padded rows and columns included."""
        network = (2 * self.window - 1) ** 2 * HIDDEN * (2 + self.num_heads)
        return super().multiply_adds(grid) + network


def log_offsets(window: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Differences of positions in a window on a logarithmic scale, -1 to 1: ((2w - 1)², 2)."""
    side = torch.arange(1 - window, window, device=device, dtype=dtype)
    side = side.sign() * torch.log2(1 + 8 * side.abs() / max(window - 1, 1)) / 3
    return torch.cartesian_prod(side, side)
