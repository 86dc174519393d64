"""Focused linear attention: weights by a kernel of queries and keys, and a depthwise convolution.

Han et al., "FLatten Transformer: Vision Transformer using Focused Linear Attention",
https://arxiv.org/abs/2308.00442, section 4: token i weighs token j by `φ(q_i)·φ(k_j)`, divided by
the sum over j, with `φ(x) = f(ReLU(x))` and `f(x) = ‖x‖ / ‖xᵖ‖ · xᵖ` (powers by element), which
keeps the length of x and turns it towards its largest channels; `DWC(v)`, a depthwise convolution
of the values on the grid, is added. Multiplying keys with values first makes the cost linear:
`N (2 M + 1) C` for attention, `K²` times the grid's tokens times C for the convolution with a
`K x K` kernel and `4 N C²` for projections.

Of the linear attentions this one is here because it takes the place of softmax attention with
nothing else changed, and was published so, with Mask R-CNN on COCO. Its plainest form, `power=1,
kernel=0`, is lite_mla without aggregates.

Deviations from the authors' code: no learned scale of each channel and no learned positions of the
keys, which the paper does not have or which fix the image size; lengths are those of a head, not of
all heads together; the sum of weights is not increased by 1e-6, since they are positive. Kernel
features and their products are float32 under autocast too: powers and sums over all tokens span
more than half precision holds. Global tokens are an extension of ours: they attend and are attended
as any token, and are not part of the convolution's grid.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attentions.contract import Attention, Grid
from attentions.depthwise import add_convolution_, convolve_backward
from attentions.parts import apply, full_precision, merge_heads, qkv_heads, split_heads
from attentions.pieces import piece, pieces
from attentions.registry import register

threshold_backward = torch.ops.aten.threshold_backward

# Added to every channel after the ReLU, as the authors do: a token without a positive channel
# weighs all channels alike instead of dividing by zero.
KERNEL_EPS = 1e-6

# Powers of vectors of length 1, and their squares, are float32 numbers up to this one.
LARGEST_POWER = 8.0


def powers(x: Tensor, power: float) -> tuple[Tensor, Tensor, Tensor]:
    """ReLU(x), a little increased, over its length; that length; and the powers of the first."""
    x = x.relu().add_(KERNEL_EPS)
    # The direction does not depend on the length, which would overflow or vanish in the power.
    length = _length(x)
    x.div_(length)
    # High powers are of a largest channel of 1, which takes another pass.
    base = x if power <= LARGEST_POWER else x / x.amax(dim=-1, keepdim=True)
    return x, length, base.pow(power)


def focus(x: Tensor, power: float) -> Tensor:
    """`f(ReLU(x))` of every last dimension: as long as ReLU(x), nearer to its largest channels."""
    _, length, direction = powers(x, power)
    return direction.mul_(length / _length(direction))


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


class LinearAttention(torch.autograd.Function):
    """Linear attention and the convolution, with features that live for a piece of the tokens.

    Saved for the backward pass are queries, keys and values alone. The length of a query cancels
    and is left out of its features.

    Shapes: qkv (B, N, 3 C), weight (M, 1, K, K), bias (M) -> (B, N, C).
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        grid: Grid,
        num_heads: int,
        num_global: int,
        power: float,
    ) -> Tensor:
        ctx.options = grid, num_heads, num_global, power
        with full_precision(qkv):
            q, k, v = qkv_heads(qkv, num_heads)
            batch, heads, tokens, width = q.shape
            out = qkv.new_empty(batch, tokens, heads * width)
            wide = torch.promote_types(qkv.dtype, torch.float32)
            sums = qkv.new_zeros(batch, heads, width, width + 1, dtype=wide)
            context, total = sums.split((width, 1), dim=-1)
            for part in pieces(qkv, heads * width * sums.element_size()):
                features = focus(piece(k, part, wide), power)
                context[part[0]] += features.transpose(-2, -1) @ piece(v, part, wide)
                total[part[0]] += features.sum(dim=-2)[..., None]
            for part in pieces(qkv, heads * width * sums.element_size()):
                *_, direction = powers(piece(q, part, wide), power)
                value = (direction @ context[part[0]]).div_(direction @ total[part[0]])
                out[part] = merge_heads(value)
            if weight is not None and bias is not None:
                filters = weight.repeat(heads, 1, 1, 1)
                add_convolution_(out, v, filters, bias.repeat(heads), grid, num_global)
        ctx.save_for_backward(qkv, weight, sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, weight, sums = ctx.saved_tensors
        grid, num_heads, num_global, power = ctx.options
        grads = torch.empty_like(qkv)
        grad_weight = grad_bias = None
        with full_precision(qkv):
            q, k, v = qkv_heads(qkv, num_heads)
            grad_q, grad_k, grad_v = qkv_heads(grads, num_heads)
            width = q.shape[-1]
            out_grad, grad = grad, split_heads(grad, num_heads)
            wide, grad_sums = sums.dtype, torch.zeros_like(sums)
            context, total = sums.split((width, 1), dim=-1)
            grad_context, grad_total = grad_sums.split((width, 1), dim=-1)
            for part in pieces(qkv, q.shape[1] * width * sums.element_size()):
                query = piece(q, part, wide)
                x, length, direction = powers(query, power)
                weights = direction @ total[part[0]]
                value = (direction @ context[part[0]]).div_(weights)
                above = piece(grad, part, wide)
                below = value.mul_(above).sum(dim=-1, keepdim=True).div_(-weights)
                above = above.div(weights)
                grad_context[part[0]] += direction.transpose(-2, -1) @ above
                grad_total[part[0]] += direction.transpose(-2, -1) @ below
                found = above @ context[part[0]].transpose(-2, -1)
                found.addcmul_(below, total[part[0]].transpose(-2, -1))
                found = threshold_backward(found.mul_(direction).div_(x), query, 0)
                torch.mul(found, power / length, out=grad_q[part[0], :, part[1]])
            for part in pieces(qkv, q.shape[1] * width * sums.element_size()):
                key = piece(k, part, wide)
                x, length, direction = powers(key, power)
                direction /= _length(direction)
                above, below = grad_context[part[0]], power * grad_total[part[0]]
                grad_v[part[0], :, part[1]] = (length * direction) @ above
                found = piece(v, part, wide) @ (power * above).transpose(-2, -1)
                found += below.transpose(-2, -1)
                along = found.mul_(direction).sum(dim=-1, keepdim=True)
                # Of the direction, and of the length.
                found.addcmul_(direction.square_(), along, value=-1).div_(x)
                found.addcmul_(x, along, value=1 / power)
                grad_k[part[0], :, part[1]] = threshold_backward(found, key, 0)
            if weight is not None:
                filters = weight.repeat(num_heads, 1, 1, 1)
                found = convolve_backward(out_grad, v, grad_v, filters, grid, num_global)
                grad_weight, grad_bias = (
                    each.unflatten(0, (num_heads, width)).sum(dim=0) for each in found
                )
        return grads, grad_weight, grad_bias, None, None, None, None


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
        filters = (self.dwc.weight, self.dwc.bias) if self.kernel else (None, None)
        out = apply(
            LinearAttention,
            self.qkv(x),
            *filters,
            grid,
            self.num_heads,
            self.num_global,
            self.power,
        )
        return self.proj(out)

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
