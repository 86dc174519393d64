"""Depthwise convolution of the values on the grid, for functions with a backward of their own.

Shapes: values v (B, H, N, M), grid tokens behind global ones; weight (C, 1, K, K), bias (C).
"""

import torch
from torch import Tensor, nn

from attentions.contract import Grid


def image_of(v: Tensor, grid: Grid, num_global: int) -> Tensor:
    """The values of the grid, a view: (B, H, N, M) -> (B, H, M, rows, columns)."""
    return v[:, :, num_global:].transpose(-2, -1).unflatten(-1, grid)


def convolve(v: Tensor, weight: Tensor, bias: Tensor, grid: Grid, num_global: int) -> Tensor:
    """The depthwise convolution of the grid: v (B, H, N, M) -> (B, rows * columns, C)."""
    image = image_of(v, grid, num_global).flatten(1, 2)
    local = nn.functional.conv2d(
        image,
        weight.to(v.dtype),
        bias.to(v.dtype),
        padding=weight.shape[-1] // 2,
        groups=len(weight),
    )
    return local.flatten(2).transpose(1, 2)


def convolve_backward(
    grad: Tensor, v: Tensor, grad_v: Tensor, weight: Tensor, grid: Grid, num_global: int
) -> tuple[Tensor, Tensor]:
    """Write the gradient of the values, zero for global ones, and return that of the parameters."""
    found, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad[:, num_global:].transpose(1, 2).unflatten(2, grid),
        image_of(v, grid, num_global).flatten(1, 2),
        weight.to(v.dtype),
        [len(weight)],
        [1, 1],
        [weight.shape[-1] // 2] * 2,
        [1, 1],
        False,
        [0, 0],
        len(weight),
        [True, True, True],
    )
    grad_v[:, :, :num_global] = 0
    target = image_of(grad_v, grid, num_global)
    target.copy_(found.unflatten(1, target.shape[1:3]))
    return grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


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
