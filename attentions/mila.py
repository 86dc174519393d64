"""Linear attention in the block of Mamba: rotary positions, a convolution and a gate.

Han et al., "Demystify Mamba in Vision: A Linear Attention Perspective",
https://arxiv.org/abs/2405.16605, section 5: linear attention with the kernel `elu(x) + 1`, whose
queries and keys are rotated by row in the first half of all channels and by column in the second
(attentions/rotary.py), and a 3x3 depthwise convolution of the values, which together stand for
Mamba's forget gate; the values are the input itself. In the design of its block, what is attended
is a projection of the input, after a 3x3 depthwise convolution and SiLU; its output is multiplied
by SiLU of another projection and projected. Cost: `N (2 M + 1) C + 9 P C` for attention and the
convolution of P grid tokens and `2 N C²` for queries and keys; the block adds `9 P C + 3 N C²`.

Global tokens are an extension of ours: tokens as any other, without rotation, and not part of the
convolutions' grid. Kernel features and their products are float32 under autocast too.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attentions.contract import Attention, Grid
from attentions.depthwise import convolve, plain_local
from attentions.parts import apply, full_precision, lowered, merge_heads, split_heads
from attentions.registry import register
from attentions.rotary import (
    BASE,
    WEIGHT_EPS,
    RotaryLinearAttention,
    plain_rotate,
)


@register("mila")
class MambaLikeLinearAttention(Attention):
    """Linear attention of all tokens and a convolution, in the block of Mamba or alone.

    Args:
        gate: the block's projections, convolution and gate around the attention, which alone has
            neither a projection of its values nor of its output.

    Raises:
        ValueError: for channels that are not a multiple of 4, or an odd number of them a head.
    """

    has_weights: ClassVar = False
    examples: ClassVar = ({"gate": True}, {"gate": False})

    def __init__(self, *, gate: bool = True, **common: Any) -> None:
        super().__init__(**common)
        if self.dim % 4 or self.dim // self.num_heads % 2:
            raise ValueError(
                f"dim {self.dim} must be a multiple of 4, and dim / num_heads"
                f" = {self.dim // self.num_heads} even"
            )
        self.gate = gate
        self.qk = nn.Linear(self.dim, 2 * self.dim)
        self.lepe = nn.Conv2d(self.dim, self.dim, 3, padding=1, groups=self.dim)
        if gate:
            self.in_proj = nn.Linear(self.dim, self.dim)
            self.act_proj = nn.Linear(self.dim, self.dim)
            self.dwc = nn.Conv2d(self.dim, self.dim, 3, padding=1, groups=self.dim)
            self.out_proj = nn.Linear(self.dim, self.dim)

    def frequencies(self, like: Tensor) -> Tensor:
        """Radians by row and by column of each pair of channels: (2, H, M / 2)."""
        wide = torch.promote_types(like.dtype, torch.float32)
        count = self.dim // 4
        each = BASE ** (-torch.arange(count, device=like.device, dtype=wide) / count)
        still = torch.zeros_like(each)
        both = torch.stack([torch.cat([each, still]), torch.cat([still, each])])
        return both.unflatten(1, (self.num_heads, -1))

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        if not self.gate:
            return self._attention(x, grid)
        values = convolve(self.in_proj(x), self.dwc, grid)
        out = self._attention(nn.functional.silu(values), grid)
        return self.out_proj(out * nn.functional.silu(self.act_proj(x)))

    def _attention(self, x: Tensor, grid: Grid) -> Tensor:
        x = lowered(x)
        return apply(
            RotaryLinearAttention,
            self.qk(x),
            x,
            self.lepe.weight,
            self.lepe.bias,
            self.frequencies(x),
            grid,
            self.num_heads,
            self.num_global,
            False,
        )

    def reference(self, x: Tensor, grid: Grid) -> Tensor:
        """All N² weights, and convolutions as sums over the places of their kernels."""
        if not self.gate:
            return self._plain_attention(x, grid)
        values = self.in_proj(x)
        with full_precision(x):
            local = plain_local(values, self.dwc, grid)
            local[:, : self.num_global] = values[:, : self.num_global]
            values = local * local.sigmoid()
        gate = self.act_proj(x)
        return self.out_proj(self._plain_attention(values, grid) * (gate * gate.sigmoid()))

    def _plain_attention(self, x: Tensor, grid: Grid) -> Tensor:
        parts = self.qk(x).chunk(2, dim=-1)
        with full_precision(x):
            wide = torch.promote_types(x.dtype, torch.float32)
            q, k, v = (split_heads(part, self.num_heads).to(wide) for part in (*parts, x))
            q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
            turned = [plain_rotate(y, grid, self.frequencies(x)) for y in (q, k)]
            weights = turned[0] @ turned[1].transpose(-2, -1)
            total = (q @ k.transpose(-2, -1)).mean(dim=-1, keepdim=True) + WEIGHT_EPS
            out = merge_heads(weights / (total * q.shape[2]) @ v)
            return (out + plain_local(merge_heads(v), self.lepe, grid)).to(x.dtype)

    def multiply_adds(self, grid: Grid) -> int:
        cells, convolutions, projections = grid[0] * grid[1], 1, 2
        if self.gate:
            convolutions, projections = 2, 5
        tokens = self.num_global + cells
        attention = tokens * (2 * self.dim // self.num_heads + 1) * self.dim
        return attention + 9 * convolutions * cells * self.dim + projections * tokens * self.dim**2
