"""The mean of a token's neighbourhood, less the token: mixing without weights.

Yu et al., "MetaFormer Is Actually What You Need for Vision", https://arxiv.org/abs/2111.11418,
equation 4: the average of the `k x k` cells around each cell of the grid, of those that are inside
the grid alone, less the cell itself, which the residual of the block adds again. It has no
parameters and no multiply-adds (additions are not counted), and keeps nothing for the backward
pass. What attention adds to a backbone is what it has more than this.

Deviations: none. A global token is no part of the grid: it is its own neighbourhood, and its result
is 0; the row has none.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attentions.contract import Attention, Grid
from attentions.parts import apply
from attentions.registry import register


class Pool(torch.autograd.Function):
    """The mean of each cell's neighbourhood less the cell; only shapes are saved.

    Shapes: x (B, N, C) -> (B, N, C).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid, size: int) -> Tensor:
        ctx.place = grid, size
        image = _image(x, grid)
        mean = nn.functional.avg_pool2d(image, size, 1, size // 2, count_include_pad=False)
        return _tokens(mean.sub_(image), x.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grid, size = ctx.place
        # Each cell gives its neighbours one share of as many as it has, and is taken off once.
        inside = _sum(grad.new_ones(1, 1, *grid), size)
        image = _image(grad, grid)
        return _tokens(_sum(image / inside, size).sub_(image), grad.shape[1]), None, None


def _sum(image: Tensor, size: int) -> Tensor:
    """The sum of each cell's neighbourhood."""
    return nn.functional.avg_pool2d(image, size, 1, size // 2, divisor_override=1)


def _image(x: Tensor, grid: Grid) -> Tensor:
    """The grid, a view: (B, N, C) -> (B, C, rows, columns)."""
    return x[:, x.shape[1] - grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)


def _tokens(image: Tensor, count: int) -> Tensor:
    """The inverse of `_image`, with global tokens of zeros."""
    cells = image.flatten(2).transpose(1, 2)
    num_global = count - cells.shape[1]
    return nn.functional.pad(cells, (0, 0, num_global, 0)) if num_global else cells


@register("pooling")
class Pooling(Attention):
    """The mean of a token's neighbourhood on the grid, less the token.

    Args:
        size: side of the neighbourhood.

    Raises:
        ValueError: for a neighbourhood without a centre.
    """

    has_weights: ClassVar = False
    examples: ClassVar = ({"size": 3}, {"size": 5})

    def __init__(self, *, size: int = 3, **common: Any) -> None:
        super().__init__(**common)
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size {size} must be odd and positive")
        self.size = size

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        return apply(Pool, x, grid, self.size)

    def reference(self, x: Tensor, grid: Grid) -> Tensor:
        """Cell by cell, by the definition."""
        reach = self.size // 2
        image = x[:, self.num_global :].unflatten(1, grid)
        means = [
            image[:, max(i - reach, 0) : i + reach + 1, max(j - reach, 0) : j + reach + 1].mean(
                dim=(1, 2)
            )
            for i in range(grid[0])
            for j in range(grid[1])
        ]
        cells = torch.stack(means, dim=1) - x[:, self.num_global :]
        return torch.cat([torch.zeros_like(x[:, : self.num_global]), cells], dim=1)

    def multiply_adds(self, grid: Grid) -> int:
        return 0
