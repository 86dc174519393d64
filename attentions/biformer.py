"""Bi-level routing: a region's tokens attend to the regions most alike.

Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention",
https://arxiv.org/abs/2303.08810, equations 3 to 8: the grid is cut into S x S regions; a region is
routed to the k whose mean key has the largest product with its mean query, and its tokens attend to
the tokens of these, with the scale `C ** -0.5` of one head of all channels; a 5x5 depthwise
convolution of the values is added (LePE). No gradient passes the routing. Cost with R regions of P
tokens, padding included: `2 R P (k P + g) C + 2 g N C` for attention, `R² C + 2 R C²` for routing,
25 times the grid's tokens times C for the convolution and `4 N C²` for projections.

Deviations: a side that S does not divide has regions as large as the largest of S would be, and
fewer of them where fewer are enough; the last is smaller, and what pads it is not attended and in
no mean, where it is tokens of the published code. Mean queries and keys are those of the mean
token, in float32 under autocast too, so that rounding does not route. Global tokens are an
extension of ours, by longformer's rule: each grid token attends to them too, under one softmax, and
they attend to all tokens; all share one projection.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attentions.contract import Attention, Grid
from attentions.depthwise import add_convolution_, convolve_backward, plain_local
from attentions.parts import (
    LARGEST_BATCH,
    apply,
    dropout_factors,
    full_precision,
    grid_positions,
    merge_heads,
    qkv_heads,
    split_heads,
)
from attentions.pieces import budget
from attentions.registry import register
from attentions.windows import aligned


@dataclass(frozen=True)
class Regions:
    """Where the regions of a grid are.

    Attributes:
        grid: rows and columns.
        count: rows and columns of regions.
        size: rows and columns of a region.
    """

    grid: Grid
    count: Grid
    size: Grid

    @classmethod
    def of(cls, grid: Grid, most: int) -> "Regions":
        """At most `most` regions along each side."""
        rows, columns = (-(-side // most) for side in grid)
        return cls(grid, (-(-grid[0] // rows), -(-grid[1] // columns)), (rows, columns))

    @property
    def total(self) -> int:
        """Regions of an image."""
        return self.count[0] * self.count[1]

    @property
    def tokens(self) -> int:
        """Tokens of a region, padding included."""
        return self.size[0] * self.size[1]

    @property
    def padded(self) -> bool:
        """Whether the last regions are smaller than others."""
        return self.total * self.tokens != self.grid[0] * self.grid[1]

    def read(self, x: Tensor) -> Tensor:
        """(b, rows * columns, D) -> (b R, P, D), a copy; padding is zero."""
        image = x.unflatten(1, self.grid)
        if self.padded:
            sides = (self.count[i] * self.size[i] - self.grid[i] for i in (1, 0))
            right, bottom = sides
            image = nn.functional.pad(image, (0, 0, 0, right, 0, bottom))
        cut = image.unflatten(2, (-1, self.size[1])).unflatten(1, (-1, self.size[0]))
        return cut.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def write(self, x: Tensor, regions: Tensor) -> None:
        """Put (b R, P, D) where `read` found it in x."""
        cut = regions.unflatten(1, self.size).unflatten(0, (-1, *self.count))
        image = cut.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        x.unflatten(1, self.grid).copy_(image[:, : self.grid[0], : self.grid[1]])

    def hidden(self, like: Tensor) -> Tensor | None:
        """Minus infinity for padding: (R, P)."""
        if not self.padded:
            return None
        seen = self.read(like.new_ones(1, self.grid[0] * self.grid[1], 1))[..., 0]
        return torch.zeros_like(seen).masked_fill(seen == 0, float("-inf"))


@dataclass(frozen=True)
class Block:
    """Some regions of some images, and what their tokens attend to.

    Attributes:
        images: slice of the batch.
        regions: slice of the regions of these images together.
        seen: which of them each is routed to, (b, k).
        image: which of the images each is of, (b).
        index: of the block, for its dropout.
    """

    images: slice
    regions: slice
    seen: Tensor
    image: Tensor
    index: int


class RoutedAttention(torch.autograd.Function):
    """Attention of regions to those they are routed to, and the convolution, block by block.

    Saved for the backward pass are queries, keys and values, and routes.

    Shapes: qkv (B, N, 3 C), weight (C, 1, K, K), bias (C), routes (B, R, k) -> (B, N, C).
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        weight: Tensor,
        bias: Tensor,
        routes: Tensor,
        regions: Regions,
        num_heads: int,
        num_global: int,
        dropout: float,
        seed: Tensor | None,
    ) -> Tensor:
        g, channels = num_global, qkv.shape[2] // 3
        how = (channels**-0.5, dropout, 0 if seed is None else int(seed))
        ctx.options = regions, num_heads, g, how
        with full_precision(qkv):
            out = qkv.new_empty(*qkv.shape[:2], channels)
            for images, blocks in _groups(qkv, routes, regions, num_heads, g):
                tokens = regions.read(qkv[images, g:])
                found = tokens.new_empty(*tokens.shape[:2], channels)
                for block in blocks:
                    q, k, v, mask = _operands(qkv, tokens, block, regions, num_heads, g)
                    found[block.regions] = merge_heads(_attend(q, k, v, mask, how, block.index))
                regions.write(out[images, g:], found)
            q, k, v = qkv_heads(qkv, num_heads)
            add_convolution_(out, v, weight, bias, regions.grid, g)
            if g:
                out[:, :g] = merge_heads(_attend(q[:, :, :g], k, v, None, how, -1))
        ctx.save_for_backward(qkv, weight, routes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, weight, routes = ctx.saved_tensors
        regions, heads, g, how = ctx.options
        wide = torch.promote_types(qkv.dtype, torch.float32)
        channels = grad.shape[2]
        with full_precision(qkv):
            grads = torch.empty_like(qkv)
            firsts = qkv.new_zeros(len(qkv), g, 2 * channels, dtype=wide)
            for images, blocks in _groups(qkv, routes, regions, heads, g):
                tokens, above = regions.read(qkv[images, g:]), regions.read(grad[images, g:])
                found = torch.zeros_like(tokens, dtype=wide)
                for block in blocks:
                    q, k, v, mask = _operands(qkv, tokens, block, regions, heads, g)
                    part = split_heads(above[block.regions], heads)
                    dq, dk, dv = map(
                        merge_heads, _attend_backward(part, q, k, v, mask, how, block.index)
                    )
                    found[block.regions, :, :channels] = dq.to(wide)
                    both = torch.cat([dk, dv], dim=-1).to(wide)
                    firsts[images].index_add_(0, block.image, both[:, :g])
                    found[..., channels:].index_add_(
                        0,
                        block.seen.flatten(),
                        both[:, g:].unflatten(1, (-1, regions.tokens)).flatten(0, 1),
                    )
                regions.write(grads[images, g:], found)
            q, k, v = qkv_heads(qkv, heads)
            grad_q, grad_k, grad_v = qkv_heads(grads, heads)
            of_filters = convolve_backward(grad, v, grad_v, weight, regions.grid, g)
            if g:
                grads[:, :g, :channels] = 0
                grads[:, :g, channels:] = firsts.to(grads.dtype)
                above = split_heads(grad[:, :g], heads)
                found_q, found_k, found_v = _attend_backward(
                    above, q[:, :, :g], k, v, None, how, -1
                )
                grad_q[:, :, :g] = found_q
                grad_k += found_k
                grad_v += found_v
        return grads, *of_filters, *[None] * 6


How = tuple[float, float, int]


def _groups(
    qkv: Tensor, routes: Tensor, regions: Regions, num_heads: int, num_global: int
) -> Iterator[tuple[slice, list[Block]]]:
    """Images that are worked on together, each time with blocks of their regions."""
    keys = num_global + routes.shape[2] * regions.tokens
    widest = keys * max(qkv.shape[2], num_heads * regions.tokens) * qkv.element_size()
    most = min(LARGEST_BATCH, max(1, budget(qkv) // widest))
    images, index = max(1, most // regions.total), 0
    for first in range(0, len(qkv), images):
        some = slice(first, min(len(qkv), first + images))
        count = some.stop - first
        image = torch.arange(count, device=qkv.device).repeat_interleave(regions.total)
        seen = routes[some].flatten(0, 1) + (image * regions.total)[:, None]
        blocks = []
        for start in range(0, count * regions.total, most):
            part = slice(start, start + most)
            blocks.append(Block(some, part, seen[part], image[part], index))
            index += 1
        yield some, blocks


def _operands(
    qkv: Tensor, tokens: Tensor, block: Block, regions: Regions, num_heads: int, num_global: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries (b, H, P, M), keys and values (b, H, g + k P, M), and their mask (b, 1, 1, keys)."""
    channels = qkv.shape[2] // 3
    q = split_heads(tokens[block.regions, :, :channels], num_heads)
    both = tokens[..., channels:].index_select(0, block.seen.flatten())
    both = both.unflatten(0, block.seen.shape).flatten(1, 2)
    if num_global:
        first = qkv[block.images, :num_global, channels:].index_select(0, block.image)
        both = torch.cat([first, both], dim=1)
    k, v = (split_heads(part, num_heads) for part in both.chunk(2, dim=-1))
    hidden = regions.hidden(qkv)
    if hidden is None:
        return q, k, v, None
    mask = hidden.index_select(0, (block.seen % regions.total).flatten())
    mask = mask.unflatten(0, block.seen.shape).flatten(1)
    return q, k, v, aligned(nn.functional.pad(mask, (num_global, 0)))[:, None, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, how: How, index: int) -> Tensor:
    """Fused attention; with dropout in the open."""
    scale, dropout, _ = how
    if not dropout:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    weights, factors = _weights(q, k, mask, how, index)
    return (weights if factors is None else weights * factors) @ v


def _weights(
    q: Tensor, k: Tensor, mask: Tensor | None, how: How, index: int
) -> tuple[Tensor, Tensor | None]:
    """Weights before dropout, and what dropout multiplies them with."""
    scale, dropout, seed = how
    scores = (q * scale) @ k.transpose(-2, -1)
    weights = (scores if mask is None else scores.add_(mask)).softmax(dim=-1)
    if not dropout:
        return weights, None
    return weights, dropout_factors(weights, dropout, seed + 1 + index)


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, how: How, index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, the weights computed again."""
    q, k, v, grad = (x.contiguous() for x in (q, k, v, grad))
    weights, factors = _weights(q, k, mask, how, index)
    scores = grad @ v.transpose(-2, -1)
    used = weights
    if factors is not None:
        used, scores = weights * factors, scores.mul_(factors)
    grad_v = used.transpose(-2, -1) @ grad
    scores = torch._softmax_backward_data(scores, weights, -1, weights.dtype).mul_(how[0])
    return scores @ k, scores.transpose(-2, -1) @ q, grad_v


@register("biformer")
class BiLevelRoutingAttention(Attention):
    """Attention to the tokens of the regions most alike, and to global tokens.

    Args:
        topk: regions that each region attends to, or all where there are fewer.
        regions: of each side of the grid.
        kernel: side of the depthwise convolution's kernel.

    Raises:
        ValueError: for no regions, or a kernel without a centre.
    """

    arch_option: ClassVar = "topk"
    examples: ClassVar = ({"topk": 2, "regions": 3}, {"topk": 1, "regions": 2, "kernel": 3})

    def __init__(self, *, topk: int = 4, regions: int = 7, kernel: int = 5, **common: Any) -> None:
        super().__init__(**common)
        if topk < 1 or regions < 1:
            raise ValueError(f"topk {topk} and regions {regions} must be positive")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel {kernel} must be odd and positive")
        self.topk = topk
        self.regions = regions
        self.kernel = kernel
        self.qkv = nn.Linear(self.dim, 3 * self.dim)
        self.proj = nn.Linear(self.dim, self.dim)
        self.lepe = nn.Conv2d(self.dim, self.dim, kernel, padding=kernel // 2, groups=self.dim)

    @property
    def scale(self) -> float:
        """`C ** -0.5`, of all channels."""
        return float(self.dim**-0.5)

    @torch.no_grad()
    def _routes(self, x: Tensor, regions: Regions) -> Tensor:
        """The regions that each attends to: x (B, N, C) -> (B, R, k)."""
        with full_precision(x):
            wide = torch.promote_types(x.dtype, torch.float32)
            image = x[:, self.num_global :].transpose(1, 2).unflatten(2, regions.grid).to(wide)
            mean = nn.functional.avg_pool2d(
                image, regions.size, ceil_mode=True, count_include_pad=False
            )
            weight, bias = (value[: 2 * self.dim].to(wide) for value in self.qkv.parameters())
            means = nn.functional.linear(mean.flatten(2).transpose(1, 2), weight, bias)
            query, key = means.chunk(2, dim=-1)
            scores = query @ key.transpose(-2, -1)
            return scores.topk(min(self.topk, regions.total), dim=-1, sorted=False).indices

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        regions = Regions.of(grid, self.regions)
        # Drawn on the CPU, so that no device is waited for.
        seed = torch.randint(2**62, (), device="cpu") if self.dropout_p else None
        out = apply(
            RoutedAttention,
            self.qkv(x),
            self.lepe.weight,
            self.lepe.bias,
            self._routes(x, regions),
            regions,
            self.num_heads,
            self.num_global,
            self.dropout_p,
            seed,
        )
        return self.proj(out)

    def reference(self, x: Tensor, grid: Grid) -> Tensor:
        """Full attention under a mask, with means of queries and keys as the paper has them."""
        g, regions = self.num_global, Regions.of(grid, self.regions)
        places = grid_positions(grid, x.device)
        row, column = (places[:, i] // regions.size[i] for i in (0, 1))
        mine = nn.functional.one_hot(row * regions.count[1] + column, regions.total)
        wide = torch.promote_types(x.dtype, torch.float32)
        parts = self.qkv(x).chunk(3, dim=-1)
        with full_precision(x):
            routed = self._plain_routes(x[:, g:].to(wide), mine.to(wide))
            q, k, v = (split_heads(part, self.num_heads).to(wide) for part in parts)
            scores = self.scale * (q @ k.transpose(-2, -1))
            visible = torch.ones(len(x), *scores.shape[-2:], dtype=torch.bool, device=x.device)
            visible[:, g:, g:] = routed
            weights = scores.masked_fill(~visible[:, None], float("-inf")).softmax(dim=-1)
            out = merge_heads(nn.functional.dropout(weights, self.dropout_p) @ v)
            out = out + plain_local(merge_heads(v), self.lepe, grid)
        return self.proj(out.to(x.dtype))

    @torch.no_grad()
    def _plain_routes(self, x: Tensor, mine: Tensor) -> Tensor:
        """Whether a grid token sees another: x (B, P, C), mine (P, R) -> (B, P, P)."""
        parameters = (value.to(x.dtype) for value in self.qkv.parameters())
        of = mine.T / mine.sum(dim=0)[:, None]
        query, key, _ = (of @ nn.functional.linear(x, *parameters)).chunk(3, dim=-1)
        order = (query @ key.mT).argsort(dim=-1, descending=True)[..., : self.topk]
        routed = nn.functional.one_hot(order, mine.shape[1]).sum(dim=-2)
        return (mine @ routed.to(x.dtype) @ mine.T) > 0

    def multiply_adds(self, grid: Grid) -> int:
        """Of what runs: whole regions, the padded rows and columns included."""
        regions, g = Regions.of(grid, self.regions), self.num_global
        cells, count = grid[0] * grid[1], regions.total
        tokens = g + cells
        keys = g + min(self.topk, count) * regions.tokens
        attention = 2 * (count * regions.tokens * keys + g * tokens) * self.dim
        routing = count**2 * self.dim + 2 * count * self.dim**2
        return attention + routing + self.kernel**2 * cells * self.dim + 4 * tokens * self.dim**2
