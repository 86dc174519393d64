"""Linear attention whose products, and not their sums, know positions by rotations.

Token i weighs token j by `R_i q_i · R_j k_j w_j / (N q_i · m + ε)`, `m` the mean of `k_j w_j` and
`R` the rotations of pairs of channels by angles that grow with row and column (RoPE, Su et al.,
https://arxiv.org/abs/2104.09864). Queries and keys are `elu(x) + 1`. Global tokens are not rotated.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attentions.contract import Grid
from attentions.depthwise import add_convolution_, convolve_backward
from attentions.parts import full_precision, grid_positions, merge_heads, split_heads
from attentions.pieces import piece, pieces

# Added to sums of weights, as the authors of MLLA and RALA do.
WEIGHT_EPS = 1e-6
BASE = 10_000.0


def positive(x: Tensor) -> Tensor:
    """`elu(x) + 1`."""
    return nn.functional.elu(x).add_(1.0)


def slope(x: Tensor) -> Tensor:
    """The derivative of `positive`, from its result."""
    return x.clamp(max=1.0)


class Rotations:
    """Rotations of pairs of channels by the places of tokens, on a grid behind global tokens.

    Args:
        frequencies: (2, H or 1, M / 2), radians by row and by column of each pair of channels.
        like: a tensor on the device; of its dtype are the rotations.
    """

    def __init__(self, frequencies: Tensor, grid: Grid, num_global: int, like: Tensor) -> None:
        self.grid, self.num_global = grid, num_global
        self.tables = []
        for side, speed in zip(grid, frequencies.to(like.dtype), strict=True):
            steps = torch.arange(side, device=like.device, dtype=like.dtype)
            angles = steps[:, None] * speed[:, None]
            self.tables.append(
                torch.view_as_complex(torch.stack([angles.cos(), angles.sin()], dim=-1))
            )

    def at(self, tokens: slice, count: int) -> Tensor:
        """Rotations of some of the `count` tokens, as complex numbers: (H or 1, T, M / 2)."""
        rows, columns = self.tables
        # Those of global tokens are those of the first place: none.
        places = torch.arange(count, device=rows.device)[tokens].sub_(self.num_global).clamp_(min=0)
        row = places.div(self.grid[1], rounding_mode="floor")
        return rows[:, row] * columns[:, places - row * self.grid[1]]


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn pairs of neighbouring channels: x (B, H, T, M), rotations (H or 1, T, M / 2)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations).flatten(-2)


def plain_rotate(x: Tensor, grid: Grid, frequencies: Tensor) -> Tensor:
    """The oracle of `rotate` for all tokens: x (B, H, N, M), frequencies (2, H or 1, M / 2)."""
    places = grid_positions(grid, x.device).to(x.dtype)
    places = nn.functional.pad(places, (0, 0, x.shape[2] - len(places), 0))
    angles = places @ frequencies.to(x.dtype).transpose(0, 1)
    cosine, sine = angles.cos(), angles.sin()
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = (even * cosine - odd * sine, even * sine + odd * cosine)
    return torch.stack(turned, dim=-1).flatten(-2)


class RotaryLinearAttention(torch.autograd.Function):
    """The attention and a depthwise convolution of the values, with features of a piece at a time.

    Saved for the backward pass are queries, keys and values, and sums over all tokens.

    Shapes: packed (B, N, 2 C or 3 C) holds queries, keys and, where `values` (B, N, C) is None,
    values; weight (C, 1, K, K), bias (C), frequencies (2, H or 1, M / 2) -> (B, N, C).

    Args:
        augment: whether keys are weighed by `N softmax(mean query · key / √M)`, as RALA does, or
            alike.
    """

    @staticmethod
    def forward(
        ctx: Any,
        packed: Tensor,
        values: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        frequencies: Tensor,
        grid: Grid,
        num_heads: int,
        num_global: int,
        augment: bool,
    ) -> Tensor:
        ctx.options = grid, num_heads, num_global
        with full_precision(packed):
            q, k, v = _heads(packed, values, num_heads)
            batch, heads, tokens, width = q.shape
            wide = torch.promote_types(packed.dtype, torch.float32)
            context, total = _sums(q, wide)
            rotations = Rotations(frequencies, grid, num_global, total)
            size = heads * width * total.element_size()
            weights, mean = None, torch.zeros_like(total)
            if augment:
                for part in pieces(packed, size):
                    mean[part[0]] += positive(piece(q, part, wide)).sum(dim=-2)[..., None]
                mean /= tokens
                weights = total.new_empty(batch, heads, tokens, 1)
                for part in pieces(packed, size):
                    key = positive(piece(k, part, wide))
                    weights[part[0], :, part[1]] = key @ mean[part[0]]
                weights = weights.mul_(width**-0.5).softmax(dim=-2).mul_(tokens)
            for part in pieces(packed, size):
                key = positive(piece(k, part, wide))
                if weights is not None:
                    key *= weights[part[0], :, part[1]]
                total[part[0]] += key.sum(dim=-2)[..., None]
                key = rotate(key, rotations.at(part[1], tokens))
                context[part[0]] += key.transpose(-2, -1) @ piece(v, part, wide)
            context /= tokens
            total /= tokens
            out = packed.new_empty(batch, tokens, heads * width)
            for part in pieces(packed, size):
                query = positive(piece(q, part, wide))
                below = (query @ total[part[0]]).add_(WEIGHT_EPS)
                query = rotate(query, rotations.at(part[1], tokens))
                out[part] = merge_heads((query @ context[part[0]]).div_(below))
            add_convolution_(out, v, weight, bias, grid, num_global)
        ctx.save_for_backward(packed, values, weight, frequencies, context, total, weights, mean)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed, values, weight, frequencies, context, total, weights, mean = ctx.saved_tensors
        grid, num_heads, num_global = ctx.options
        with full_precision(packed):
            grads = torch.empty_like(packed)
            grad_values = None if values is None else torch.empty_like(values)
            q, k, v = _heads(packed, values, num_heads)
            grad_q, grad_k, grad_v = _heads(grads, grad_values, num_heads)
            _, heads, tokens, width = q.shape
            wide = total.dtype
            rotations = Rotations(frequencies, grid, num_global, total)
            size = heads * width * total.element_size()
            grad_heads = split_heads(grad, heads)
            grad_context, grad_total = _sums(q, wide)
            for part in pieces(packed, size):
                turns = rotations.at(part[1], tokens)
                query = positive(piece(q, part, wide))
                rotated = rotate(query, turns)
                below = (query @ total[part[0]]).add_(WEIGHT_EPS)
                above = piece(grad_heads, part, wide) / below
                lower = -(above * (rotated @ context[part[0]])).div_(below).sum(-1, keepdim=True)
                grad_context[part[0]] += rotated.transpose(-2, -1) @ above
                grad_total[part[0]] += query.transpose(-2, -1) @ lower
                found = rotate(above @ context[part[0]].transpose(-2, -1), turns.conj())
                found += lower @ total[part[0]].transpose(-2, -1)
                grad_q[part[0], :, part[1]] = found.mul_(slope(query))
            grad_context /= tokens
            grad_total /= tokens
            grad_mean = torch.zeros_like(mean)
            # The mean over tokens of weights times their gradients, by the linearity of the sums.
            shared = (context * grad_context).sum((-2, -1), keepdim=True)
            shared += (total * grad_total).sum((-2, -1), keepdim=True)
            for part in pieces(packed, size):
                turns = rotations.at(part[1], tokens)
                key = positive(piece(k, part, wide))
                used = key
                if weights is not None:
                    used = key * weights[part[0], :, part[1]]
                value = rotate(used, turns) @ grad_context[part[0]]
                grad_v[part[0], :, part[1]] = value
                found = piece(v, part, wide) @ grad_context[part[0]].transpose(-2, -1)
                found = rotate(found, turns.conj())
                found += grad_total[part[0]].transpose(-2, -1)
                if weights is not None:
                    factor = weights[part[0], :, part[1]]
                    logits = (found * key).sum(dim=-1, keepdim=True).sub_(shared[part[0]])
                    logits *= factor * width**-0.5
                    grad_mean[part[0]] += key.transpose(-2, -1) @ logits
                    found = (found * factor).add_(logits @ mean[part[0]].transpose(-2, -1))
                grad_k[part[0], :, part[1]] = found.mul_(slope(key))
            if weights is not None:
                for part in pieces(packed, size):
                    found = slope(positive(piece(q, part, wide)))
                    found *= grad_mean[part[0]].transpose(-2, -1) / tokens
                    grad_q[part[0], :, part[1]] += found
            of_filters = convolve_backward(grad, v, grad_v, weight, grid, num_global)
        return grads, grad_values, *of_filters, *[None] * 5


def _sums(q: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Zeros for keys with values (B, H, M, M), and for keys (B, H, M, 1)."""
    batch, heads, _, width = q.shape
    context = q.new_zeros(batch, heads, width, width, dtype=dtype)
    return context, torch.zeros_like(context[..., :1])


def _heads(packed: Tensor, values: Tensor | None, num_heads: int) -> list[Tensor]:
    """Queries, keys and values as views (B, H, N, M)."""
    parts = packed.chunk(3 if values is None else 2, dim=-1)
    return [split_heads(part, num_heads) for part in (*parts, values) if part is not None]
