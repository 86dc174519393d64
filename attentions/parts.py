"""What several mechanisms share: heads, the grid, relative positions, precision."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from attentions.cache import has_data
from attentions.contract import Grid

# Above this many entries an (N, N) index costs more memory than the attention it serves; it is then
# made at each call and not kept as the buffer of the published state dicts.
LARGEST_INDEX = 2**24
# Batched products and fused kernels on CUDA take at most so many in the batch dimension.
LARGEST_BATCH = 65_535


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) -> (B, H, N, M)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def qkv_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values as views: (B, N, 3 C) -> three of (B, H, N, M)."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, M) -> (B, N, C)."""
    return x.transpose(1, 2).flatten(2)


def grid_positions(grid: Grid, device: torch.device | None = None) -> Tensor:
    """Row and column of every grid token in row-major order: (rows * columns, 2)."""
    rows, columns = grid
    return torch.cartesian_prod(
        torch.arange(rows, device=device), torch.arange(columns, device=device)
    ).reshape(-1, 2)


def relative_index(query: Tensor, key: Tensor, extent: Grid) -> Tensor:
    """Row of the bias table for every pair of positions.

    The table holds differences `query - key` below `extent` in absolute value:
    `(2 * extent[0] - 1) * (2 * extent[1] - 1)` rows.

    Shapes: query (Q, 2), key (K, 2) -> (Q, K).
    """
    difference = query[:, None] - key[None]
    width = 2 * extent[1] - 1
    return (difference[..., 0] + extent[0] - 1) * width + difference[..., 1] + extent[1] - 1


def add_relative_positions(
    module: nn.Module, *, extent: Grid, num_heads: int, num_global: int
) -> None:
    """Give `module` the tables of relative positions under their published names.

    Shapes: local_relative_position_bias_table ((2 ex - 1)(2 ey - 1), H), and, with global tokens,
    g2l_relative_position_bias (2, H, g) and g2g_relative_position_bias (H, g, g).
    """
    rows = (2 * extent[0] - 1) * (2 * extent[1] - 1)
    module.local_relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
    tables = [module.local_relative_position_bias_table]
    if num_global:
        module.g2l_relative_position_bias = nn.Parameter(torch.zeros(2, num_heads, num_global))
        module.g2g_relative_position_bias = nn.Parameter(
            torch.zeros(num_heads, num_global, num_global)
        )
        tables += [module.g2l_relative_position_bias, module.g2g_relative_position_bias]
    for table in tables:
        nn.init.trunc_normal_(table, std=0.02)


def global_bias(g2g: Tensor, g2l: Tensor, cells: int) -> Tensor:
    """Additive bias of what the global tokens see, themselves and then the grid.

    Shapes: g2g (H, g, g), g2l (2, H, g) -> (H, g, g + cells).
    """
    return torch.cat([g2g, g2l[0][..., None].expand(-1, -1, cells)], dim=-1)


def with_global_keys(local: Tensor, g2l: Tensor) -> Tensor:
    """Put the bias of the global tokens as keys before that of the others.

    Shapes: local (..., H, Q, K), g2l (2, H, g) -> (..., H, Q, g + K), in the dtype of `local`.
    """
    to_global = g2l[1][:, None].to(local.dtype)
    return torch.cat([to_global.expand(*local.shape[:-1], -1), local], dim=-1)


def plain_bias(local: Tensor, g2g: Tensor, g2l: Tensor) -> Tensor:
    """The bias of all tokens for oracles, block by block.

    Shapes: local (H, P, P), g2g (H, g, g), g2l (2, H, g) -> (H, g + P, g + P).
    """
    heads, g, _ = g2g.shape
    length = g + local.shape[-1]
    bias = local.new_zeros(heads, length, length)
    bias[:, :g, :g] = g2g
    bias[:, :g, g:] = g2l[0, :, :, None]
    bias[:, g:, :g] = g2l[1, :, None]
    bias[:, g:, g:] = local
    return bias


def gather_bias(table: Tensor, index: Tensor) -> Tensor:
    """Read a bias table: table (rows, H), index (Q, K) -> (H, Q, K)."""
    # The gradient of `table[index]` adds up entry by entry: hundreds of times slower on a CPU.
    return nn.functional.embedding(index, table).permute(2, 0, 1)


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast; the meta device has none, and needs nothing."""
    # Not `is_autocast_available`, which torch.compile cannot see through.
    if x.is_meta:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def lowered(x: Tensor) -> Tensor:
    """x in the dtype of autocast's matrix products, so that several layers keep one copy of it."""
    # The meta device has no autocast.
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


def at_once(like: Tensor, limits: Mapping[str, int]) -> int:
    """Bytes to make at once for a call with `like`: `limits` for "cpu" and "other" devices.

    Fake tensors count as if they were on a GPU, unless they are `fake_on` a CPU. The meta device
    has no limit: there it is operators that are counted, and few of them are counted faster.
    """
    if like.is_meta:
        return sys.maxsize
    if not has_data(like):
        return limits[_fake_device]
    return limits["cpu" if like.device.type == "cpu" else "other"]


_fake_device = "other"


@contextmanager
def fake_on(device: str) -> Iterator[None]:
    """Let fake tensors, whose memory is predicted, be worked through as on "cpu" or "other"."""
    global _fake_device
    before, _fake_device = _fake_device, device
    try:
        yield
    finally:
        _fake_device = before


def spans(count: int, most: int) -> Iterator[slice]:
    """Cut `range(count)` into spans of nearly one length, of at least 1 and otherwise of `most`."""
    parts = -(-count // max(most, 1))
    for i in range(parts):
        yield slice(i * count // parts, (i + 1) * count // parts)


def add_product_(target: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add batched products to `target`: (n, L, S) += (n, L, M) @ (n, M, S)."""
    return torch.baddbmm(target, a, b, out=target)


def softmax_(scores: Tensor) -> Tensor:
    """Softmax over the last dimension, in place; it has no gradient."""
    result: Tensor = torch.ops.aten._softmax.out(scores, -1, False, out=scores)
    return result


def softmax_gradient_(grad: Tensor, weights: Tensor) -> Tensor:
    """Turn the gradient of a softmax's result into that of its scores, in place."""
    backward = torch.ops.aten._softmax_backward_data.out
    result: Tensor = backward(grad, weights, -1, grad.dtype, grad_input=grad)
    return result


def dropout_factors(weights: Tensor, probability: float, seed: int) -> Tensor:
    """What dropout multiplies weights with: 0, or else 1 / (1 - probability); by the seed alone."""
    factors = torch.empty_like(weights)
    # Tensors without data have no random numbers either.
    generator = None
    if has_data(weights):
        generator = torch.Generator(weights.device).manual_seed(seed)
    return factors.bernoulli_(1 - probability, generator=generator).div_(1 - probability)


def resize_square_table(table: Tensor, rows: int) -> Tensor:
    """Resize a (side², H) table to `rows` rows as a square image, bilinearly."""
    side, target = round(table.shape[0] ** 0.5), round(rows**0.5)
    if side * side != table.shape[0] or target * target != rows:
        raise ValueError(f"tables of {table.shape[0]} and {rows} rows are not both square")
    image = table.T.reshape(1, -1, side, side)
    resized = nn.functional.interpolate(image, (target, target), mode="bilinear")
    return resized.reshape(table.shape[1], rows).T


class _NoContext:
    """Takes what a forward pass keeps for the backward pass, which will not come."""

    def save_for_backward(self, *_: Any) -> None:
        """Keep nothing."""


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """`function.apply`, or its forward pass alone where nothing is differentiated.

    A traced graph then holds the operators, which counters of FLOPs look for.
    """
    if torch.is_grad_enabled():
        applied: Tensor = function.apply(*arguments)
        return applied
    result: Tensor = function.forward(_NoContext(), *arguments)
    return result
