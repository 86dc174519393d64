"""Attention in windows of a grid, strip by strip: never all windows at once, nor kept for backward.

A window that padding or the shift cuts has a mask of its own; all others share one, so that no mask
is as large as the batch or the grid.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attentions.cache import cached
from attentions.contract import Grid
from attentions.parts import LARGEST_BATCH, merge_heads, split_heads
from attentions.pieces import budget, qkv_heads

# Keys of a mask are aligned as these kernels want them, which would copy it otherwise.
ALIGNMENT = 8
_SEEN, _WRAPPED, _PADDING = range(3)


@dataclass(frozen=True)
class Span:
    """Adjacent windows along one side of the grid.

    Attributes:
        count: of windows.
        places: slices of the windows' tokens, and of the grid where these come from; what is in no
            slice is padding.
        kinds: of the tokens of each window.
    """

    count: int
    places: tuple[tuple[slice, slice], ...]
    kinds: tuple[int, ...]

    @property
    def whole(self) -> bool:
        """Whether the windows are a part of the grid as it lies there."""
        return len(self.places) == 1 and not any(self.kinds)


def spans(side: int, window: int, shift: int, most: int) -> Iterator[Span]:
    """Spans of at most `most` windows that cover a side, shifted; those in a span are alike."""
    count = -(-side // window)
    length, whole = count * window, (side - shift) // window
    starts = [*range(0, whole, most), *range(whole, count)]
    for first, last in zip(starts, [*starts[1:], count], strict=True):
        begin, end = first * window, last * window
        places = []
        for low, high, moved in (
            (0, side - shift, shift),
            (length - shift, length, shift - length),
        ):
            low, high = max(begin, low), min(end, high)
            if low < high:
                places.append((slice(low - begin, high - begin), slice(low + moved, high + moved)))
        at = [begin + shift + i for i in range(window)]
        kinds = [_PADDING if i % length >= side else _WRAPPED * (i >= length) for i in at]
        yield Span(last - first, tuple(places), tuple(kinds))


def hidden(rows: Span, columns: Span, num_global: int, like: Tensor) -> Tensor | None:
    """What is added to scores in windows of two spans: (1, w², g + w²), or None for nothing."""
    if not any(rows.kinds) and not any(columns.kinds):
        return None
    return cached(hidden_keys, rows.kinds, columns.kinds, num_global, like=like)


def hidden_keys(
    rows: tuple[int, ...],
    columns: tuple[int, ...],
    num_global: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Minus infinity for keys that a query does not see: those of another kind than its own.

    Only padding sees padding, so that every query sees a key.
    """
    row, column = (torch.tensor(kinds, device=device) for kinds in (rows, columns))
    kind = (3 * row[:, None] + column).flatten()
    mask = torch.zeros(len(kind), len(kind), device=device, dtype=dtype)
    mask = mask.masked_fill(kind[:, None] != kind, float("-inf"))
    return aligned(nn.functional.pad(mask, (num_global, 0))[None])


def aligned(mask: Tensor) -> Tensor:
    """The same, with rows that begin at multiples of ALIGNMENT."""
    keys = mask.shape[-1]
    return nn.functional.pad(mask, (0, -keys % ALIGNMENT))[..., :keys]


class WindowAttention(torch.autograd.Function):
    """Attention of grid tokens to their window and the global tokens, and of these to all tokens.

    Saved for the backward pass are queries, keys and values, and what dropout kept.

    Shapes: qkv (B, N, 3 C), local_bias (H, w², g + w²), whole_bias (H, g, N) -> (B, N, C).

    Args:
        shifts: rows and columns by which the windows are moved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        local_bias: Tensor | None,
        whole_bias: Tensor | None,
        grid: Grid,
        num_heads: int,
        num_global: int,
        window: int,
        shifts: Grid,
        dropout: float,
    ) -> Tensor:
        ctx.place = _Place(grid, num_heads, num_global, window, shifts)
        ctx.dropout = dropout
        out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
        kept = []
        for strip in ctx.place.strips(qkv):
            q, k, v = qkv_heads(ctx.place.read(qkv, strip), num_heads)
            mask = ctx.place.mask(strip, local_bias, qkv)
            found, keep = _attend(q[:, :, num_global:], k, v, mask, dropout)
            ctx.place.write(out, strip, merge_heads(found))
            kept += keep
        if num_global:
            q, k, v = qkv_heads(qkv, num_heads)
            mask = None if whole_bias is None else aligned(whole_bias.to(qkv.dtype))
            found, keep = _attend(q[:, :, :num_global], k, v, mask, dropout)
            out[:, :num_global] = merge_heads(found)
            kept += keep
        ctx.save_for_backward(qkv, local_bias, whole_bias, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, local_bias, whole_bias, *kept = ctx.saved_tensors
        place, g, heads = ctx.place, ctx.place.num_global, ctx.place.num_heads
        grads = torch.empty_like(qkv)
        wide = torch.promote_types(qkv.dtype, torch.float32)
        firsts = qkv.new_zeros(len(qkv), g, qkv.shape[2], dtype=wide)
        grad_local = None if local_bias is None else torch.zeros_like(local_bias)
        grad_whole = None if whole_bias is None else torch.zeros_like(whole_bias)
        keep = iter(kept)
        for strip in place.strips(qkv):
            windows = place.read(qkv, strip)
            q, k, v = qkv_heads(windows, heads)
            found = torch.zeros_like(windows)
            grad_q, grad_k, grad_v = qkv_heads(found, heads)
            above = split_heads(place.read(grad, strip, with_globals=False), heads)
            grad_q[:, :, g:], grad_k[:], grad_v[:], grad_scores = _attend_backward(
                above,
                q[:, :, g:],
                k,
                v,
                place.mask(strip, local_bias, qkv),
                next(keep, None),
                ctx.dropout,
            )
            if grad_local is not None:
                grad_local += grad_scores.sum(dim=0, dtype=wide)
            place.write(grads, strip, found[:, g:])
            images = firsts[strip.images]
            images += found[:, :g].unflatten(0, (len(images), -1)).sum(dim=1, dtype=wide)
        grads[:, :g] = firsts
        if g:
            q, k, v = qkv_heads(qkv, heads)
            mask = None if whole_bias is None else whole_bias.to(qkv.dtype)
            above = split_heads(grad[:, :g], heads)
            keeps = next(keep, None)
            grad_q, grad_k, grad_v = qkv_heads(grads, heads)
            # Image by image, since the gradients of keys and values are as large as these.
            for i in range(len(qkv)):
                image = slice(i, i + 1)
                found_q, found_k, found_v, grad_scores = _attend_backward(
                    above[image],
                    q[image, :, :g],
                    k[image],
                    v[image],
                    mask,
                    None if keeps is None else keeps[image],
                    ctx.dropout,
                )
                grad_q[image, :, :g] += found_q
                grad_k[image] += found_k
                grad_v[image] += found_v
                if grad_whole is not None:
                    grad_whole += grad_scores[0]
        return grads, grad_local, grad_whole, *[None] * 6


@dataclass(frozen=True)
class Strip:
    """Windows of some images that see alike."""

    images: slice
    rows: Span
    columns: Span


@dataclass(frozen=True)
class _Place:
    """Where the windows of a grid are."""

    grid: Grid
    num_heads: int
    num_global: int
    window: int
    shifts: Grid

    def strips(self, qkv: Tensor) -> Iterator[Strip]:
        """Strips that cover all windows of all images."""
        queries = self.window**2
        keys = self.num_global + queries
        widest = keys * max(qkv.shape[2], self.num_heads * queries) * qkv.element_size()
        most = min(LARGEST_BATCH, max(1, budget(qkv) // widest))
        for columns in spans(self.grid[1], self.window, self.shifts[1], most):
            left = max(1, most // columns.count)
            for rows in spans(self.grid[0], self.window, self.shifts[0], left):
                images = max(1, left // rows.count)
                for first in range(0, len(qkv), images):
                    yield Strip(slice(first, first + images), rows, columns)

    def mask(self, strip: Strip, bias: Tensor | None, like: Tensor) -> Tensor | None:
        """What is added to the scores of a strip: (H or 1, w², g + w²)."""
        mask = hidden(strip.rows, strip.columns, self.num_global, like)
        if bias is None:
            return mask
        bias = bias.to(like.dtype)
        return aligned(bias if mask is None else bias + mask)

    def read(self, x: Tensor, strip: Strip, *, with_globals: bool = True) -> Tensor:
        """Global tokens and a strip's windows: x (B, N, D) -> (windows, g + w², D), a copy."""
        g, rows, columns = self.num_global, strip.rows, strip.columns
        image = x[strip.images, g:].unflatten(1, self.grid)
        if rows.whole and columns.whole:
            block = image[:, rows.places[0][1], columns.places[0][1]]
        else:
            sides = (rows.count * self.window, columns.count * self.window)
            block = image.new_zeros(len(image), *sides, image.shape[-1])
            for (to_row, row), (to_column, column) in product(rows.places, columns.places):
                block[:, to_row, to_column] = image[:, row, column]
        windows = self._in_windows(block)
        if not (g and with_globals):
            return windows.flatten(3, 4).flatten(0, 2)
        firsts = x[strip.images, None, None, :g].expand(-1, *windows.shape[1:3], -1, -1)
        return torch.cat([firsts, windows.flatten(3, 4)], dim=3).flatten(0, 2)

    def write(self, x: Tensor, strip: Strip, windows: Tensor) -> None:
        """Put a strip's windows (windows, w², D) where they belong in x (B, N, D)."""
        rows, columns, w = strip.rows, strip.columns, self.window
        image = x[strip.images, self.num_global :].unflatten(1, self.grid)
        windows = windows.unflatten(1, (w, w)).unflatten(0, (-1, rows.count, columns.count))
        if rows.whole and columns.whole:
            target = image[:, rows.places[0][1], columns.places[0][1]]
            self._in_windows(target).copy_(windows)
            return
        block = windows.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        for (from_row, row), (from_column, column) in product(rows.places, columns.places):
            image[:, row, column] = block[:, from_row, from_column]

    def _in_windows(self, block: Tensor) -> Tensor:
        """(B, rows, columns, D) -> (B, R, S, w, w, D), a view."""
        w = self.window
        return block.unflatten(2, (-1, w)).unflatten(1, (-1, w)).transpose(2, 3)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, list[Tensor]]:
    """Fused attention; with dropout in the open, and what it kept."""
    if not dropout:
        mask = None if mask is None else mask[None]
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask), []
    weights = _weights(q * q.shape[-1] ** -0.5, k, mask)
    keep = torch.rand(weights.shape, device=weights.device) >= dropout
    return (weights * keep / (1 - dropout)) @ v, [keep]


def _weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    return (scores if mask is None else scores.add_(mask)).softmax(dim=-1)


def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    keep: Tensor | None,
    dropout: float,
) -> tuple[Tensor, ...]:
    """The gradients of q, k, v and the scores, the weights computed again."""
    scale = q.shape[-1] ** -0.5
    q, k, v, grad = (x.contiguous() for x in (q * scale, k, v, grad))
    weights = _weights(q, k, mask)
    grad_weights = grad @ v.transpose(-2, -1)
    used = weights
    if keep is not None:
        used = weights * keep / (1 - dropout)
        grad_weights = grad_weights * keep / (1 - dropout)
    grad_v = used.transpose(-2, -1) @ grad
    grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    grad_q = (grad_scores @ k).mul_(scale)
    return grad_q, grad_scores.transpose(-2, -1) @ q, grad_v, grad_scores
