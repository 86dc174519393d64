"""Rank-augmented linear attention: weighed keys, and an output modulated channel by channel.

Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", https://arxiv.org/abs/2411.07635,
section 3: with `κ(x) = elu(x) + 1`, keys are weighed by `N softmax(q̄ · κ(k_j) / √M)`, `q̄` the
mean of `κ(q)`, before they are multiplied with values, which raises the rank of their sum; the
output, with a 5x5 depthwise convolution of the values added, is multiplied by a further projection
of the input, which raises that of the features. Positions are rotations of queries and keys
(attentions/rotary.py), half of a head's channels by row and half by column. Cost:
`N (2 M + 2) C` for attention, 25 times the grid's tokens times C for the convolution and `5 N C²`
for projections.

Global tokens are an extension of ours: tokens as any other, without rotation and not part of the
convolution's grid. Kernel features and their products are float32 under autocast too.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attentions.contract import Attention, Grid
from attentions.depthwise import plain_local
from attentions.parts import apply, full_precision, lowered, merge_heads, split_heads
from attentions.registry import register
from attentions.rotary import BASE, WEIGHT_EPS, RotaryLinearAttention, plain_rotate


@register("rala")
class RankAugmentedLinearAttention(Attention):
    """Linear attention of all tokens with weighed keys and a modulated output.

    Args:
        kernel: side of the depthwise convolution's kernel.

    Raises:
        ValueError: for heads whose channels are not a multiple of 4, or a kernel without a centre.
    """

    has_weights: ClassVar = False
    examples: ClassVar = ({"kernel": 5}, {"kernel": 3})

    def __init__(self, *, kernel: int = 5, **common: Any) -> None:
        super().__init__(**common)
        width = self.dim // self.num_heads
        if width % 4:
            raise ValueError(
                f"dim {self.dim} / num_heads {self.num_heads} = {width} channels a head,"
                " which must be a multiple of 4"
            )
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel {kernel} must be odd and positive")
        self.kernel = kernel
        self.qkvo = nn.Linear(self.dim, 4 * self.dim)
        self.lepe = nn.Conv2d(self.dim, self.dim, kernel, padding=kernel // 2, groups=self.dim)
        self.proj = nn.Linear(self.dim, self.dim)

    def frequencies(self, like: Tensor) -> Tensor:
        """Radians by row and by column of each pair of a head's channels: (2, 1, M / 2)."""
        wide = torch.promote_types(like.dtype, torch.float32)
        count = self.dim // self.num_heads // 4
        each = BASE ** -torch.linspace(0, 1, count, device=like.device, dtype=wide)
        still = torch.zeros_like(each)
        return torch.stack([torch.cat([each, still]), torch.cat([still, each])])[:, None]

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        # Two products: the gradients of two parts of one would be copied into one tensor.
        sizes = (3 * self.dim, self.dim)
        x = lowered(x)
        parts = zip(self.qkvo.weight.split(sizes), self.qkvo.bias.split(sizes), strict=True)
        qkv, modulation = (nn.functional.linear(x, *part) for part in parts)
        out = apply(
            RotaryLinearAttention,
            qkv,
            None,
            self.lepe.weight,
            self.lepe.bias,
            self.frequencies(x),
            grid,
            self.num_heads,
            self.num_global,
            True,
        )
        return self.proj(out * modulation)

    def reference(self, x: Tensor, grid: Grid) -> Tensor:
        """All N² weights, and the convolution as a sum over the places of its kernel."""
        *parts, modulation = self.qkvo(x).chunk(4, dim=-1)
        with full_precision(x):
            wide = torch.promote_types(x.dtype, torch.float32)
            q, k, v = (split_heads(part, self.num_heads).to(wide) for part in parts)
            q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
            scores = self.scale * (q.mean(dim=2, keepdim=True) @ k.transpose(-2, -1))
            k = k * (q.shape[2] * scores.softmax(dim=-1).transpose(-2, -1))
            turned = [plain_rotate(y, grid, self.frequencies(x)) for y in (q, k)]
            weights = turned[0] @ turned[1].transpose(-2, -1)
            total = (q @ k.transpose(-2, -1)).mean(dim=-1, keepdim=True) + WEIGHT_EPS
            out = merge_heads(weights / (total * q.shape[2]) @ v)
            out = out + plain_local(merge_heads(v), self.lepe, grid)
        return self.proj(out.to(modulation.dtype) * modulation)

    def multiply_adds(self, grid: Grid) -> int:
        cells = grid[0] * grid[1]
        tokens = self.num_global + cells
        attention = tokens * (2 * self.dim // self.num_heads + 2) * self.dim
        return attention + self.kernel**2 * cells * self.dim + 5 * tokens * self.dim**2
