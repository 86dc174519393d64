"""Focused linear attention: weights by a kernel of queries and keys, and a depthwise convolution.

Han et al., "FLatten Transformer: Vision Transformer using Focused Linear Attention",
https://arxiv.org/abs/2308.00442, section 4: token i weighs token j by `φ(q_i)·φ(k_j)`, divided by
the sum over j, with `φ(x) = f(ReLU(x))` and `f(x) = ‖x‖ / ‖xᵖ‖ · xᵖ` (powers by element), which
keeps the length of x and turns it towards its largest channels; `DWC(v)`, a depthwise convolution
of the values on the grid, is added. Multiplying keys with values first makes the cost linear:
`N (2 M + 1) C` for attention, `K²` times the grid's tokens times C for the convolution with a
`K x K` kernel and `4 N C²` for projections.

Of the linear attentions this one is here because it takes the place of softmax attention with
nothing else changed, and was published so, with Mask R-CNN on COCO. EfficientViT's ReLU linear
attention (https://arxiv.org/abs/2205.14756) without its multi-scale convolutions is `power=1,
kernel=0`; the whole of it comes with the batch norms and convolutions of its network.

Deviations from the authors' code: no learned scale of each channel and no learned positions of the
keys, which the paper does not have or which fix the image size; lengths are those of a head, not of
all heads together; the sum of weights is not increased by 1e-6, since they are positive. Kernel
features and their products are float32 under autocast too: powers and sums over all tokens span
more than half precision holds. Global tokens are an extension of ours: they attend and are attended
as any token, and are no part of the convolution's grid.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attentions.contract import Attention, Grid
from attentions.parts import full_precision, merge_heads, split_heads
from attentions.registry import register

# Added to every channel after the ReLU, as the authors do: a token without a positive channel
# weighs all channels alike instead of dividing by zero.
KERNEL_EPS = 1e-6


def focus(x: Tensor, power: float) -> Tensor:
    """`f(ReLU(x))` of every last dimension: as long as ReLU(x), nearer to its largest channels."""
    x = x.relu() + KERNEL_EPS
    # The direction does not depend on the length, which would overflow or vanish in the power.
    direction = (x / x.amax(dim=-1, keepdim=True).detach()) ** power
    return x.norm(dim=-1, keepdim=True) * direction / direction.norm(dim=-1, keepdim=True)


@register("focused_linear")
class FocusedLinearAttention(Attention):
    """Linear attention of all tokens, and a convolution of the values on the grid.

    Args:
        power: how far queries and keys are turned towards their largest channels; 1 is not at all.
        kernel: side of the convolution's kernel, which the heads share; 0 leaves it out.

    Raises:
        ValueError: for a power below 1 or a kernel without a centre.
    """

    has_weights: ClassVar = False
    examples: ClassVar = (
        {"power": 3.0, "kernel": 5},
        {"power": 1.0, "kernel": 0},
        {"power": 2.5, "kernel": 3},
    )

    def __init__(self, *, power: float = 3.0, kernel: int = 5, **common: Any) -> None:
        super().__init__(**common)
        if not 1.0 <= power < float("inf"):
            raise ValueError(f"power {power} is below 1 or not finite")
        if kernel < 0 or (kernel and kernel % 2 == 0):
            raise ValueError(f"kernel {kernel} must be odd, or 0 for none")
        self.power = power
        self.kernel = kernel
        self.qkv = nn.Linear(self.dim, 3 * self.dim)
        self.proj = nn.Linear(self.dim, self.dim)
        if kernel:
            width = self.dim // self.num_heads
            self.dwc = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        with full_precision(x):
            wide = torch.promote_types(q.dtype, torch.float32)
            features_q = focus(q.to(wide), self.power)
            features_k = focus(k.to(wide), self.power)
            context = features_k.transpose(-2, -1) @ v.to(wide)
            total = features_q @ features_k.sum(dim=-2)[..., None]
            out = (features_q @ context / total).to(v.dtype)
        return self.proj(merge_heads(out + self._local(v, grid) if self.kernel else out))

    def _local(self, v: Tensor, grid: Grid) -> Tensor:
        """The convolution of the grid's values, 0 for global tokens: (B, H, N, M), as v is."""
        image = v[:, :, self.num_global :].transpose(2, 3).unflatten(3, grid).flatten(0, 1)
        local = self.dwc(image).flatten(2).transpose(1, 2).unflatten(0, v.shape[:2])
        return nn.functional.pad(local, (0, 0, self.num_global, 0))

    def reference(self, x: Tensor, grid: Grid) -> Tensor:
        """All N² weights, and the convolution as a sum over the places of its kernel."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        with full_precision(x):
            weights = self._plain_focus(q) @ self._plain_focus(k).transpose(-2, -1)
            values = v.double()
            out = (weights / weights.sum(dim=-1, keepdim=True)) @ values
            if self.kernel:
                local = self._plain_local(values[:, :, self.num_global :].unflatten(2, grid))
                out = torch.cat(
                    [out[:, :, : self.num_global], out[:, :, self.num_global :] + local], dim=2
                )
        return self.proj(merge_heads(out.to(v.dtype)))

    def _plain_focus(self, x: Tensor) -> Tensor:
        """The oracle of `focus`, as its formula says, in float64 for the powers' sake."""
        x = x.double().clamp(min=0.0) + KERNEL_EPS
        powers = x**self.power
        lengths = [y.square().sum(dim=-1, keepdim=True).sqrt() for y in (x, powers)]
        return lengths[0] / lengths[1] * powers

    def _plain_local(self, image: Tensor) -> Tensor:
        """The oracle of `_local`: image (B, H, rows, columns, M) -> (B, H, rows * columns, M)."""
        rows, columns = image.shape[2:4]
        reach = self.kernel // 2
        padded = nn.functional.pad(image, (0, 0, reach, reach, reach, reach))
        filters, bias = (value.double() for value in self.dwc.parameters())
        local = bias + sum(
            filters[:, 0, a, b] * padded[:, :, a : a + rows, b : b + columns]
            for a in range(self.kernel)
            for b in range(self.kernel)
        )
        return local.flatten(2, 3)

    def multiply_adds(self, grid: Grid) -> int:
        tokens, cells = self.num_global + grid[0] * grid[1], grid[0] * grid[1]
        attention = tokens * (2 * self.dim // self.num_heads + 1) * self.dim
        return attention + self.kernel**2 * cells * self.dim + 4 * tokens * self.dim**2
