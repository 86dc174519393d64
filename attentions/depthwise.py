"""Depthwise convolution of the values on the grid, for functions with a backward of their own.

Shapes: values v (B, H, N, M), grid tokens behind global ones; weight (C, 1, K, K), bias (C).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from attentions.contract import Grid
from attentions.parts import spans
from attentions.pieces import budget


def image_of(v: Tensor, grid: Grid, num_global: int) -> Tensor:
    """The values of the grid, a view: (B, H, N, M) -> (B, H, M, rows, columns)."""
    return v[:, :, num_global:].transpose(-2, -1).unflatten(-1, grid)


def add_convolution_(
    out: Tensor, v: Tensor, weight: Tensor, bias: Tensor, grid: Grid, num_global: int
) -> None:
    """Add the depthwise convolution of the grid: out (B, N, C) += that of v (B, H, N, M)."""
    filters, bias = weight.to(v.dtype), bias.to(v.dtype)
    for images in _images(v):
        image = image_of(v[images], grid, num_global).flatten(1, 2)
        local = nn.functional.conv2d(
            image, filters, bias, padding=weight.shape[-1] // 2, groups=len(weight)
        )
        out[images, num_global:] += local.flatten(2).transpose(1, 2)


def convolve_backward(
    grad: Tensor, v: Tensor, grad_v: Tensor, weight: Tensor, grid: Grid, num_global: int
) -> tuple[Tensor, Tensor]:
    """Add the gradient of the values to `grad_v`, and return that of the parameters."""
    filters = weight.to(v.dtype)
    wide = torch.promote_types(v.dtype, torch.float32)
    grad_weight = torch.zeros_like(weight, dtype=wide)
    grad_bias = grad_weight.new_zeros(len(weight))
    for images in _images(v):
        found, of_weight, of_bias = torch.ops.aten.convolution_backward(
            grad[images, num_global:].transpose(1, 2).unflatten(2, grid),
            image_of(v[images], grid, num_global).flatten(1, 2),
            filters,
            [len(weight)],
            [1, 1],
            [weight.shape[-1] // 2] * 2,
            [1, 1],
            False,
            [0, 0],
            len(weight),
            [True, True, True],
        )
        target = image_of(grad_v[images], grid, num_global)
        target += found.unflatten(1, target.shape[1:3])
        grad_weight += of_weight
        grad_bias += of_bias
    return grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _images(v: Tensor) -> Iterator[slice]:
    """Images that are convolved together: copies of channels in planes are made of no more."""
    _, heads, tokens, width = v.shape
    return spans(len(v), budget(v) // (heads * tokens * width * v.element_size()))


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
