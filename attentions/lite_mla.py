"""ReLU linear attention of the tokens and of what is around them (multi-scale, EfficientViT).

Cai et al., "EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction",
https://arxiv.org/abs/2205.14756, section 3.1: token i weighs token j by `ReLU(q_i)·ReLU(k_j)`,
divided by the sum over j. The same is done, with as many heads again, on queries, keys and values
that a depthwise `K x K` convolution and one of 1x1 within each of them have aggregated; the
projection takes both. Keys are multiplied with values first: the cost is linear, `4 N (M + 1) C`
for attention, `3 N M C` and `3 K² C` times the grid's tokens for aggregation, and `5 N C²` for
projections.

Deviations from the authors' code: the projection has a bias instead of a batch norm, which is that
when evaluating, and mixes the images of a batch in training. As there, queries, keys, values and
their aggregation have no bias, and the products over all tokens are float32 under autocast. Global
tokens are an extension of ours: tokens as any other, each a grid of one cell.
"""

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attentions.contract import Attention, Grid
from attentions.depthwise import convolution_of, convolve_backward
from attentions.parts import apply, full_precision, merge_heads, spans, split_heads
from attentions.pieces import budget, pieces
from attentions.registry import register

# Added to the sum of weights, as the authors do: it is 0 for a query without a positive channel.
EPS = 1e-5
_QUERIES, _KEYS_VALUES = slice(0, 1), slice(1, 3)


class MultiScaleAttention(torch.autograd.Function):
    """Both scales and the projection, some heads of some images at a time.

    Saved for the backward pass are queries, keys and values, and the sums over keys: aggregates and
    the projection's input, twice as wide as x, are made again.

    Shapes: qkv (B, N, H 3 M), depthwise (3 C, 1, K, K), pointwise (3 C, M, 1, 1), weight (C, 2 C),
    bias (C) -> (B, N, C).
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        depthwise: Tensor,
        pointwise: Tensor,
        weight: Tensor,
        bias: Tensor,
        grid: Grid,
        num_heads: int,
    ) -> Tensor:
        ctx.place = grid, num_heads
        width = len(bias) // num_heads
        wide = torch.promote_types(qkv.dtype, torch.float32)
        with full_precision(qkv):
            out = bias.to(qkv.dtype).expand(*qkv.shape[:2], -1).clone()
            sums = qkv.new_zeros(2, len(qkv), num_heads, width, width + 1, dtype=wide)
            for group in _groups(qkv, depthwise, pointwise, *ctx.place):
                target = out[group.images]
                for i, scale in enumerate(group.scales()):
                    columns = group.columns(weight, i).to(qkv.dtype)
                    total = sums[i, group.images, group.heads]
                    for part in scale.pieces(wide):
                        k, v = scale.read(part, _KEYS_VALUES, wide)
                        total[part[0]] += k.relu().transpose(-2, -1) @ _with_ones(v)
                    for part in scale.pieces(wide):
                        (q,) = scale.read(part, _QUERIES, wide)
                        value, _ = _value(q.relu(), total[part[0]])
                        target[part] += merge_heads(value).to(qkv.dtype) @ columns.T
        ctx.save_for_backward(qkv, depthwise, pointwise, weight, sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, depthwise, pointwise, weight, sums = ctx.saved_tensors
        grads = [torch.zeros_like(each) for each in (qkv, depthwise, pointwise)]
        grad_weight = torch.zeros_like(weight)
        with full_precision(qkv):
            groups = (_groups(*each, *ctx.place) for each in ([qkv, depthwise, pointwise], grads))
            for group, found in zip(*groups, strict=True):
                for i, scale in enumerate(group.scales()):
                    tokens = torch.zeros_like(scale.tokens) if i else found.tokens
                    of_scale = _Scale(tokens, found.mix if i else None)
                    _add_gradients(
                        grad[group.images],
                        scale,
                        of_scale,
                        sums[i, group.images, group.heads],
                        group.columns(weight, i).to(qkv.dtype),
                        group.columns(grad_weight, i),
                    )
                    if i:
                        group.add_local_gradients(tokens.flatten(2), found)
        grad_bias = grad.sum(dim=(0, 1)).to(weight.dtype)
        return *grads, grad_weight, grad_bias, None, None


class _Scale(NamedTuple):
    """Tokens of one scale, or their gradients.

    Attributes:
        tokens: queries, keys and values (b, N, h, 3, M).
        mix: what mixes the channels of each (h, 3, M, M), which is done piece by piece.
    """

    tokens: Tensor
    mix: Tensor | None

    def pieces(self, wide: torch.dtype) -> Iterator[tuple[slice, slice]]:
        """Parts of images and tokens, small enough for what is made of them."""
        heads, _, width = self.tokens.shape[2:]
        return pieces(self.tokens, 6 * heads * width * wide.itemsize)

    def unmixed(self, part: tuple[slice, slice], which: slice) -> Tensor:
        """A piece of some of the three: (b, h, 1 or 2, n, M)."""
        return self.tokens[part][:, :, :, which].permute(0, 2, 3, 1, 4)

    def read(
        self, part: tuple[slice, slice], which: slice, wide: torch.dtype
    ) -> tuple[Tensor, ...]:
        """A piece of each of some of the three: (b, h, n, M)."""
        x = self.unmixed(part, which)
        mixed = x if self.mix is None else x @ self.mix[:, which].to(x.dtype).transpose(-2, -1)
        return mixed.to(wide).contiguous().unbind(2)

    def add_gradient(
        self, part: tuple[slice, slice], which: slice, grad: Tensor, found: "_Scale"
    ) -> None:
        """Add to `found` what follows of the gradient of what is read, (b, h, 1 or 2, n, M)."""
        grad = grad.to(self.tokens.dtype)
        if self.mix is not None and found.mix is not None:
            of_mix = grad.transpose(-2, -1) @ self.unmixed(part, which)
            found.mix[:, which] += of_mix.sum(dim=0)
            grad = grad @ self.mix[:, which].to(grad.dtype)
        found.unmixed(part, which).add_(grad)


def _add_gradients(
    grad: Tensor, scale: _Scale, found: _Scale, total: Tensor, columns: Tensor, of_columns: Tensor
) -> None:
    """Add the gradients of one scale's tokens and of its columns of the projection."""
    wide, grad_total = total.dtype, torch.zeros_like(total)
    for part in scale.pieces(wide):
        (q,) = scale.read(part, _QUERIES, wide)
        sums, above, positive = total[part[0]], grad[part], q.relu()
        value, weights = _value(positive, sums)
        of_columns += above.flatten(0, 1).T @ merge_heads(value).to(grad.dtype).flatten(0, 1)
        above = split_heads(above @ columns, q.shape[1]).to(wide)
        below = -(above * value).sum(dim=-1, keepdim=True)
        above = torch.cat([above, below], dim=-1).div_(weights)
        grad_total[part[0]] += positive.transpose(-2, -1) @ above
        of_q = (above @ sums.transpose(-2, -1)).mul_(q > 0)
        scale.add_gradient(part, _QUERIES, of_q[:, :, None], found)
    for part in scale.pieces(wide):
        k, v = scale.read(part, _KEYS_VALUES, wide)
        sums = grad_total[part[0]]
        of_k = (_with_ones(v) @ sums.transpose(-2, -1)).mul_(k > 0)
        of_v = k.relu() @ sums[..., :-1]
        scale.add_gradient(part, _KEYS_VALUES, torch.stack([of_k, of_v], dim=2), found)


def _with_ones(v: Tensor) -> Tensor:
    """A channel of ones behind values, which the sum of weights comes from."""
    return nn.functional.pad(v, (0, 1), value=1.0)


def _value(positive: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted values (b, h, n, M), and the sum of their weights (b, h, n, 1)."""
    value, weights = (positive @ sums).split((sums.shape[-1] - 1, 1), dim=-1)
    weights = weights + EPS
    return value / weights, weights


class _Group(NamedTuple):
    """Some heads of some images, or their gradients.

    Attributes:
        tokens: their queries, keys and values, a view (b, N, h, 3, M).
        filters: the depthwise ones of these channels (h 3 M, 1, K, K).
        mix: the 1x1 convolution as matrices, a view (h, 3, M, M).
    """

    images: slice
    heads: slice
    tokens: Tensor
    filters: Tensor
    mix: Tensor
    grid: Grid

    def columns(self, weight: Tensor, scale: int) -> Tensor:
        """What the heads of a scale are projected with, a view: (C, h M)."""
        width, first = self.tokens.shape[-1], scale * len(weight)
        return weight[:, first + self.heads.start * width : first + self.heads.stop * width]

    def scales(self) -> Iterator[_Scale]:
        """Tokens as they are, then what the depthwise convolution makes of them."""
        yield _Scale(self.tokens, None)
        g, tokens = self._num_global, self.tokens.flatten(2)
        cells = convolution_of(tokens[:, None], self.filters, None, self.grid, g)
        cells[:, :g] = tokens[:, :g] * self._centres.to(tokens.dtype)
        yield _Scale(cells.unflatten(2, self.tokens.shape[2:]), self.mix)

    def add_local_gradients(self, grad: Tensor, found: "_Group") -> None:
        """Add to `found` the gradients of what was convolved, and of the filters."""
        g, tokens, target = self._num_global, self.tokens.flatten(2), found.tokens.flatten(2)
        of_filters, _ = convolve_backward(
            grad, tokens[:, None], target[:, None], self.filters, self.grid, g
        )
        found.filters.add_(of_filters)
        found._centres.add_((grad[:, :g] * tokens[:, :g]).sum(dim=(0, 1)))
        target[:, :g] += grad[:, :g] * self._centres.to(grad.dtype)

    @property
    def _num_global(self) -> int:
        return self.tokens.shape[1] - self.grid[0] * self.grid[1]

    @property
    def _centres(self) -> Tensor:
        """What a global token, a grid of one cell, is multiplied with: a view (h 3 M)."""
        reach = self.filters.shape[-1] // 2
        return self.filters[:, 0, reach, reach]


def _groups(
    qkv: Tensor, depthwise: Tensor, pointwise: Tensor, grid: Grid, num_heads: int
) -> Iterator[_Group]:
    tokens = qkv.unflatten(2, (num_heads, 3, -1))
    matrices = pointwise[:, :, 0, 0].unflatten(0, tokens.shape[2:])
    filters = depthwise.unflatten(0, (num_heads, -1))
    fit = budget(qkv) // (qkv.shape[1] * qkv.shape[2] // num_heads * qkv.element_size())
    for images in spans(len(qkv), fit // num_heads):
        for heads in spans(num_heads, fit):
            yield _Group(
                images,
                heads,
                tokens[images, :, heads],
                filters[heads].flatten(0, 1),
                matrices[heads],
                grid,
            )


@register("lite_mla")
class MultiScaleLinearAttention(Attention):
    """Linear attention of all tokens, and of their aggregates on the grid.

    Args:
        kernel: side of the depthwise convolution's kernel.

    Raises:
        ValueError: for a kernel without a centre.
    """

    has_weights: ClassVar = False
    examples: ClassVar = ({"kernel": 5}, {"kernel": 3})

    def __init__(self, *, kernel: int = 5, **common: Any) -> None:
        super().__init__(**common)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel {kernel} must be odd and positive")
        self.kernel = kernel
        channels = 3 * self.dim
        # Of each head queries, keys and values.
        self.qkv = nn.Linear(self.dim, channels, bias=False)
        self.aggreg = nn.Sequential(
            nn.Conv2d(channels, channels, kernel, groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1, groups=3 * self.num_heads, bias=False),
        )
        self.proj = nn.Linear(2 * self.dim, self.dim)

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        weights = (*self.aggreg.parameters(), *self.proj.parameters())
        return apply(MultiScaleAttention, self.qkv(x), *weights, grid, self.num_heads)

    def reference(self, x: Tensor, grid: Grid) -> Tensor:
        """All N² weights at both scales, and the convolution as a sum over its kernel's places."""
        qkv = self.qkv(x)
        found = []
        for tokens in (qkv, self._plain_aggregate(qkv, grid)):
            q, k, v = tokens.unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
            with full_precision(x):
                wide = torch.promote_types(v.dtype, torch.float32)
                weights = q.to(wide).relu() @ k.to(wide).relu().transpose(-2, -1)
                value = weights @ v.to(wide) / (weights.sum(dim=-1, keepdim=True) + EPS)
            found.append(merge_heads(value).to(v.dtype))
        return self.proj(torch.cat(found, dim=-1))

    def _plain_aggregate(self, qkv: Tensor, grid: Grid) -> Tensor:
        g, reach, (rows, columns) = self.num_global, self.kernel // 2, grid
        filters, mix = self.aggreg.parameters()
        padded = nn.functional.pad(
            qkv[:, g:].unflatten(1, grid), (0, 0, reach, reach, reach, reach)
        )
        places = itertools.product(range(self.kernel), repeat=2)
        local = torch.stack(
            [filters[:, 0, a, b] * padded[:, a : a + rows, b : b + columns] for a, b in places]
        ).sum(dim=0)
        alone = filters[:, 0, reach, reach] * qkv[:, :g]
        tokens = torch.cat([alone, local.flatten(1, 2)], dim=1).unflatten(
            -1, (3 * self.num_heads, -1)
        )
        matrices = mix[:, :, 0, 0].unflatten(0, tokens.shape[2:])
        return torch.einsum("bnpi,poi->bnpo", tokens, matrices).flatten(2)

    def multiply_adds(self, grid: Grid) -> int:
        cells, width = grid[0] * grid[1], self.dim // self.num_heads
        tokens = self.num_global + cells
        aggregation = 3 * (self.kernel**2 * cells + width * tokens) * self.dim
        attention = 4 * tokens * (width + 1) * self.dim
        return aggregation + attention + 5 * tokens * self.dim**2
