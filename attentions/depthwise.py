"""Depthwise convolution of tokens on the grid, in strips of its rows.

`convolve` is a layer; the others are for functions with a backward of their own. Shapes: values v
(B, H, N, M), grid tokens behind global ones; weight (C, 1, K, K), bias (C).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attentions.contract import Grid
from attentions.parts import apply, full_precision, lowered, merge_heads, spans
from attentions.pieces import budget


def convolve(x: Tensor, convolution: nn.Conv2d, grid: Grid) -> Tensor:
    """Convolve the tokens of the grid and leave the global ones as they are: (B, N, C)."""
    return apply(_Convolution, lowered(x), *convolution.parameters(), grid)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.grid, g = grid, x.shape[1] - grid[0] * grid[1]
        with full_precision(x):
            out = convolution_of(x[:, None], weight, bias, grid, g)
        out[:, :g] = x[:, :g]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        g = x.shape[1] - ctx.grid[0] * ctx.grid[1]
        grad_x = x.new_zeros(x.shape)
        grad_x[:, :g] = grad[:, :g]
        with full_precision(x):
            found = convolve_backward(grad, x[:, None], grad_x[:, None], weight, ctx.grid, g)
        return grad_x, *found, None


def convolution_of(
    v: Tensor, weight: Tensor, bias: Tensor | None, grid: Grid, num_global: int
) -> Tensor:
    """The depthwise convolution of the grid, (B, N, C); its global tokens are not set."""
    v = merge_heads(v)
    out = v.new_empty(v.shape)
    target = image_of(out, grid, num_global)
    for part, local in _convolved(image_of(v, grid, num_global), weight, bias):
        target[part] = local
    return out


def add_convolution_(
    out: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, grid: Grid, num_global: int
) -> None:
    """Add the depthwise convolution of the grid: out (B, N, C) += that of v (B, H, N, M)."""
    target = image_of(out, grid, num_global)
    for part, local in _convolved(image_of(merge_heads(v), grid, num_global), weight, bias):
        target[part] += local


def convolve_backward(
    grad: Tensor, v: Tensor, grad_v: Tensor, weight: Tensor, grid: Grid, num_global: int
) -> tuple[Tensor, Tensor]:
    """Add the gradient of the values to `grad_v`, and return that of the parameters."""
    filters = weight.to(v.dtype)
    wide = torch.promote_types(v.dtype, torch.float32)
    above, image, target = (
        image_of(x, grid, num_global) for x in (grad, merge_heads(v), merge_heads(grad_v))
    )
    for part, local in _convolved(above, weight.flip(2, 3), None):
        target[part] += local
    grad_weight = torch.zeros_like(weight, dtype=wide)
    for part, around in _strips(image, weight):
        grad_weight += _of_filters(above[part], around, filters)
    grad_bias = above.sum(dim=(0, 1, 2), dtype=wide)
    return grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _convolved(
    image: Tensor, weight: Tensor, bias: Tensor | None
) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Strips of images and rows, and their convolution (b, r, columns, C)."""
    filters, bias = weight.to(image.dtype), None if bias is None else bias.to(image.dtype)
    for part, around in _strips(image, weight):
        local = nn.functional.conv2d(around, filters, bias, groups=len(weight))
        yield part, local.movedim(1, -1)


def _of_filters(grad: Tensor, around: Tensor, filters: Tensor) -> Tensor:
    """The gradient of filters: grad (b, r, S, C), around (b, C, r + K - 1, S + K - 1)."""
    if grad.device.type != "cpu":
        found: Tensor = torch.ops.aten.convolution_backward(
            *(grad.movedim(-1, 1), around, filters, None),
            *([1, 1], [0, 0], [1, 1], False, [0, 0], len(filters)),
            [False, True, False],
        )[1]
        return found
    # oneDNN multiplies blocks of 16 x 16 channels here, of which the diagonal is used.
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad, around = grad.to(wide), around.movedim(1, -1).to(wide)
    (_, rows, columns, _), side = grad.shape, filters.shape[-1]
    places = [
        (grad * around[:, i : i + rows, j : j + columns]).flatten(0, 2).sum(dim=0)
        for i in range(side)
        for j in range(side)
    ]
    return torch.stack(places, dim=-1).view(filters.shape)


def image_of(x: Tensor, grid: Grid, num_global: int) -> Tensor:
    """The tokens of the grid, a view: (B, N, C) -> (B, rows, columns, C)."""
    return x[:, num_global:].unflatten(1, grid)


def _strips(image: Tensor, weight: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Strips of images and rows, and what a convolution sees there, padded by zeros.

    Shapes: image (B, rows, columns, C) -> (b, C, r + K - 1, columns + K - 1), a copy with channels
    last in memory, which the next strip is written over.
    """
    batch, rows, columns, channels = image.shape
    row, reach = columns * channels * image.element_size(), weight.shape[-1] // 2
    for images in spans(batch, budget(image) // (rows * row)):
        strips = list(spans(rows, budget(image) // ((images.stop - images.start) * row)))
        longest = max(strip.stop - strip.start for strip in strips)
        # The one buffer of all strips: what lies outside of the grid stays zero.
        window = image.new_zeros(
            images.stop - images.start, longest + 2 * reach, columns + 2 * reach, channels
        )
        for strip in strips:
            first, last = max(0, strip.start - reach), strip.stop + reach
            seen = image[images, first:last]
            around = window[:, : last - strip.start + reach]
            top = first - (strip.start - reach)
            around[:, top : top + seen.shape[1], reach : reach + columns] = seen
            around[:, top + seen.shape[1] :] = 0
            yield (images, strip), around.movedim(-1, 1)


def plain_local(x: Tensor, convolution: nn.Conv2d, grid: Grid) -> Tensor:
    """The oracle of a depthwise convolution of the grid: x (B, N, C) -> (B, N, C), globals zero."""
    weight, bias = (value.to(x.dtype) for value in convolution.parameters())
    (rows, columns), side = grid, weight.shape[-1]
    image = x[:, x.shape[1] - rows * columns :].unflatten(1, grid)
    padded = nn.functional.pad(image, (0, 0, *[side // 2] * 4))
    local = bias + sum(
        weight[:, 0, a, b] * padded[:, a : a + rows, b : b + columns]
        for a in range(side)
        for b in range(side)
    )
    return nn.functional.pad(local.flatten(1, 2), (0, 0, x.shape[1] - rows * columns, 0))
