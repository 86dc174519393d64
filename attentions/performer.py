"""Linear attention by random features of the softmax kernel (FAVOR+).

Choromanski et al., "Rethinking Attention with Performers", https://arxiv.org/abs/2009.14794,
section 2.3, by `performer_pytorch.FastAttention`, whose own normalisation stands for the scale.
Cost: `N F (4 M + 1) H` for features, their normaliser and their products, and `4 N C²` for
projections.

The features are computed in float32 under autocast too: their exponentials span more than half
precision holds.
"""

from typing import Any, ClassVar

import torch
from performer_pytorch import FastAttention
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attentions.contract import Attention, Grid
from attentions.parts import apply, full_precision, merge_heads, qkv_heads, split_heads
from attentions.pieces import piece, pieces
from attentions.registry import register

KERNEL_EPS = 1e-4


class RandomFeatureAttention(torch.autograd.Function):
    """What `FastAttention` computes, with features that live for one piece of the tokens at a time.

    Saved for the backward pass are queries, keys, values and the output, as by fused attention, and
    the sums over keys in the same dtype. The features' constant factor cancels and is left out;
    `KERNEL_EPS` is added to sums of features and not to each.

    Shapes: qkv (B, N, 3 C), projection (F, M) -> (B, N, C).
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, projection: Tensor, num_heads: int) -> Tensor:
        with full_precision(qkv):
            q, k, v, projection = _operands(qkv, projection, num_heads)
            batch, heads, tokens, width = q.shape
            sums = projection.new_zeros(batch, heads, len(projection), width + 1)
            largest = projection.new_full((batch, heads, 1, 1), float("-inf"))
            for part in pieces(qkv, heads * projection[:, 0].nbytes):
                exponent, length = _exponent(piece(k, part, projection.dtype), projection)
                before = largest[part[0]]
                now = before.maximum(exponent.amax(dim=(-2, -1), keepdim=True))
                features = exponent.sub_(length + now).exp_()
                value = piece(v, part, projection.dtype)
                rescaled = sums[part[0]].mul_((before - now).exp())
                rescaled[..., :width] += features.transpose(-2, -1) @ value
                rescaled[..., width] += features.sum(dim=-2)
                largest[part[0]] = now
            sums[..., :width] += KERNEL_EPS * v.sum(dim=-2, keepdim=True, dtype=sums.dtype)
            sums[..., width] += KERNEL_EPS * tokens
            context, total = sums.split((width, 1), dim=-1)
            out = qkv.new_empty(batch, tokens, heads * width)
            for part in pieces(qkv, heads * projection[:, 0].nbytes):
                features = _query_features(piece(q, part, projection.dtype), projection)
                least = KERNEL_EPS * sums[part[0]].sum(dim=-2, keepdim=True)
                weights = (features @ total[part[0]]).add_(least[..., width:])
                value = (features @ context[part[0]]).add_(least[..., :width]).div_(weights)
                out[part] = merge_heads(value).to(out.dtype)
        ctx.num_heads = num_heads
        # Within the range of their dtype.
        most = sums.abs().amax(dim=(-2, -1), keepdim=True)
        kept = (sums / most).to(qkv.dtype)
        ctx.save_for_backward(qkv, projection, out, kept, most, largest)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        qkv, projection, out, kept, most, largest = ctx.saved_tensors
        with full_precision(qkv):
            q, k, v, _ = _operands(qkv, projection, ctx.num_heads)
            grads = torch.empty_like(qkv)
            grad_q, grad_k, grad_v = qkv_heads(grads, ctx.num_heads)
            heads, width = q.shape[1], q.shape[3]
            out, grad = (split_heads(x, heads) for x in (out, grad))
            sums = kept.to(most.dtype) * most
            total = sums[..., width:]
            grad_sums = torch.zeros_like(sums)
            for part in pieces(qkv, heads * projection[:, 0].nbytes):
                query = piece(q, part, projection.dtype)
                features = _query_features(query, projection)
                above = piece(grad, part, projection.dtype)
                below = -(above * piece(out, part, projection.dtype)).sum(dim=-1, keepdim=True)
                least = KERNEL_EPS * total[part[0]].sum(dim=-2, keepdim=True)
                weights = (features @ total[part[0]]).add_(least)
                above = torch.cat([above, below], dim=-1).div_(weights)
                grad_sums[part[0]] += features.transpose(-2, -1) @ above
                grad_sums[part[0]] += KERNEL_EPS * above.sum(dim=-2, keepdim=True)
                exponent = (above @ sums[part[0]].transpose(-2, -1)).mul_(features)
                grad_q[part[0], :, part[1]] = _exponent_grad(exponent, query, projection)
            least = KERNEL_EPS * grad_sums[..., :width].sum(dim=-2, keepdim=True)
            for part in pieces(qkv, heads * projection[:, 0].nbytes):
                key, value = (piece(x, part, projection.dtype) for x in (k, v))
                exponent, length = _exponent(key, projection)
                features = exponent.sub_(length + largest[part[0]]).exp_()
                grad_v[part[0], :, part[1]] = (
                    features @ grad_sums[part[0], ..., :width] + least[part[0]]
                )
                value = nn.functional.pad(value, (0, 1), value=1.0)
                exponent = (value @ grad_sums[part[0]].transpose(-2, -1)).mul_(features)
                grad_k[part[0], :, part[1]] = _exponent_grad(exponent, key, projection)
        return grads, None, None


def _operands(qkv: Tensor, projection: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    q, k, v = qkv_heads(qkv, num_heads)
    return q, k, v, projection.to(torch.promote_types(qkv.dtype, torch.float32))


def _exponent(x: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """Projected x (..., F), and half its squared length (..., 1), which is to be subtracted."""
    scale = x.shape[-1] ** -0.25
    return x @ (scale * projection.T), (scale**2 / 2) * x.square().sum(dim=-1, keepdim=True)


def _query_features(query: Tensor, projection: Tensor) -> Tensor:
    exponent, length = _exponent(query, projection)
    return exponent.sub_(length + exponent.amax(dim=-1, keepdim=True)).exp_()


def _exponent_grad(grad: Tensor, x: Tensor, projection: Tensor) -> Tensor:
    """The gradient of x, given that of its exponents less half its squared length."""
    scale = x.shape[-1] ** -0.25
    return grad @ (scale * projection) - scale**2 * x * grad.sum(dim=-1, keepdim=True)


@register("performer")
class PerformerAttention(Attention):
    """Attention through `num_features` random features, redrawn while training.

    Args:
        num_features: random features a head.
        redraw_interval: training steps between two draws of the features; 0 never redraws. Features
            are never redrawn when evaluating.
    """

    arch_option: ClassVar = "num_features"
    has_weights: ClassVar = False
    gradient_note: ClassVar = (
        "performer_pytorch detaches the maximum that it subtracts from exponents, and adds a"
        " constant to what they give"
    )
    published_note: ClassVar = (
        "the published formula counts five products of tokens, features and channels where four"
        " run, and elementwise operations"
    )
    examples: ClassVar = ({"num_features": 32}, {"num_features": 7})

    def __init__(
        self, *, num_features: int = 256, redraw_interval: int = 1000, **common: Any
    ) -> None:
        super().__init__(**common)
        if num_features < 1 or redraw_interval < 0:
            raise ValueError(
                f"num_features {num_features} must be positive and"
                f" redraw_interval {redraw_interval} not negative"
            )
        self.num_features = num_features
        self.redraw_interval = redraw_interval
        self._redrawn_at = 0
        # The library draws by a QR decomposition, which the meta device does not have.
        with torch.device("cpu"):
            fast_attention = FastAttention(self.dim // self.num_heads, num_features)
        self.fast_attention = fast_attention.to(torch.get_default_device())
        self.qkv = nn.Linear(self.dim, 3 * self.dim)
        self.proj = nn.Linear(self.dim, self.dim)

    def set_training_step(self, step: int) -> None:
        """Say which training step comes next, and redraw if that is due and was not done for it."""
        interval = self.redraw_interval
        if interval and step % interval == 0 and step not in (0, self._redrawn_at):
            matrix: Tensor = self.fast_attention.projection_matrix
            self.fast_attention.redraw_projection_matrix(matrix.device)
            self._redrawn_at = step

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        out = apply(
            RandomFeatureAttention,
            self.qkv(x),
            self.fast_attention.projection_matrix,
            self.num_heads,
        )
        return self.proj(out)

    def reference(self, x: Tensor, grid: Grid) -> Tensor:
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        with full_precision(x):
            wide = torch.promote_types(q.dtype, torch.float32)
            q, k, v = q.to(wide), k.to(wide), v.to(wide)
            features_q = self._features(q, over=(-1,))
            features_k = self._features(k, over=(-2, -1))
            weights = features_q @ features_k.transpose(-2, -1)
            out = (weights / weights.sum(dim=-1, keepdim=True)) @ v
        return self.proj(merge_heads(out).to(x.dtype))

    def _features(self, x: Tensor, *, over: tuple[int, ...]) -> Tensor:
        """Positive features of x, stabilised by the maximum over `over`.

        Shapes: x (B, H, N, M) -> (B, H, N, F).
        """
        x = x * x.shape[-1] ** -0.25
        exponent = x @ self.fast_attention.projection_matrix.to(x.dtype).T
        length = x.square().sum(dim=-1, keepdim=True) / 2
        largest = exponent.amax(dim=over, keepdim=True).detach()
        scale = float(self.num_features) ** -0.5
        return scale * ((exponent - length - largest).exp() + KERNEL_EPS)

    def multiply_adds(self, grid: Grid) -> int:
        tokens = self.num_global + grid[0] * grid[1]
        width = self.dim // self.num_heads
        # Features of queries and keys, their normaliser, the context, and reading the context.
        per_head = tokens * self.num_features * (2 * width + 1 + 2 * width)
        return self.num_heads * per_head + 4 * tokens * self.dim**2

    def published_multiply_adds(self, grid: Grid) -> int:
        tokens = self.num_global + grid[0] * grid[1]
        width, features = self.dim // self.num_heads, self.num_features
        kernel = tokens * features * width + 2 * tokens * width + 2 * tokens * features
        attention = 2 * tokens * features + 3 * tokens * features * width
        linear = (4 * self.dim**2 + 4 * self.dim) * tokens
        return self.num_heads * (2 * kernel + attention) + linear
