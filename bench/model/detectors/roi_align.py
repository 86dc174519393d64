"""RoIAlign as a weighted sum of cells.

Each pooled value is a weighted sum of cells: the mean of bilinear samples that lie evenly in its
bin (He et al., Mask R-CNN, https://arxiv.org/abs/1703.06870, section 3). torchvision's operator on
a CPU adds its gradient up sample by sample on one core, a fifth of a training step. torch's sums of
embeddings are the same sums, forward and backward on all cores.
"""

from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

# What each bin takes of the cells, as `cells_of_bins` finds it.
Cells = Callable[[Tensor, int, float, torch.Size], tuple[Tensor, Tensor, Tensor]]


def roi_align(maps: Tensor, rois: Tensor, resolution: int, scale: float) -> Tensor:
    """Pool maps in boxes, shifted by half a pixel, with as many samples a bin as it has cells.

    As `torchvision.ops.roi_align` with `sampling_ratio=0, aligned=True`, which it is elsewhere than
    on a CPU; gradients go to the maps.

    Shapes: maps (B, C, h, w), rois (n, 5) as place in the batch and corners in pixels
    -> (n, C, resolution, resolution).

    Args:
        scale: cells for each pixel.
    """
    plain = type(maps) is Tensor and maps.device.type == "cpu"
    if not plain or torch.compiler.is_compiling():
        return torchvision.ops.roi_align(maps, rois, resolution, scale, 0, True)
    return sum_of_cells(maps, rois, resolution, scale, cells_of_bins)


def sum_of_cells(maps: Tensor, rois: Tensor, resolution: int, scale: float, cells: Cells) -> Tensor:
    """`roi_align` on a CPU."""
    dtype = torch.promote_types(maps.dtype, torch.float32)
    how = resolution, scale, cells
    pooled: Tensor = _Pooled.apply(maps.to(dtype), rois.detach().to(dtype), *how)
    return pooled.to(maps.dtype)


class _Pooled(torch.autograd.Function):
    """Keeps the boxes alone; what their bins take is found again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, rois: Tensor, resolution: int, scale: float, cells: Cells
    ) -> Tensor:
        ctx.save_for_backward(rois)
        ctx.how, ctx.cells = (resolution, scale, maps.shape), cells
        taken, ends, weights = cells(rois, *ctx.how)
        table = maps.movedim(1, -1).flatten(0, -2)
        pooled = functional.embedding_bag(
            taken, table, ends, mode="sum", per_sample_weights=weights, include_last_offset=True
        )
        return pooled.unflatten(0, (len(rois), resolution, resolution)).movedim(-1, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        batch, channels, rows, columns = ctx.how[-1]
        taken, ends, weights = ctx.cells(*ctx.saved_tensors, *ctx.how)
        many = ends.diff()
        bins = torch.arange(len(many), dtype=torch.int32)
        bins = bins.repeat_interleave(many, output_size=len(taken))
        # The gradient of `embedding_bag`; 0 stands for sums, and no place of a maximum is needed.
        cells = torch.ops.aten._embedding_bag_dense_backward(
            *(grad.movedim(1, -1).reshape(-1, channels), taken, bins, many, many[:0]),
            *(batch * rows * columns, False, 0, weights),
        )
        return (cells.view(batch, rows, columns, channels).movedim(-1, 1), *[None] * 4)


def cells_of_bins(
    rois: Tensor, resolution: int, scale: float, shape: torch.Size
) -> tuple[Tensor, Tensor, Tensor]:
    """What each bin takes of the cells (B h w).

    Returns:
        Cells, bin after bin; where those of each bin begin, and at last their number
        (n * resolution² + 1); the weight of each cell.
    """
    rows, columns = shape[2:]
    corners = rois[:, 1:] * scale - 0.5
    down, top, tall = _along(corners[:, 1], corners[:, 3], resolution, rows)
    across, left, wide = _along(corners[:, 0], corners[:, 2], resolution, columns)
    counts = tall[:, :, None] * wide[:, None]
    many = counts.flatten()
    ends = functional.pad(many.cumsum(0), (1, 0)).int()
    # Of each cell its bin, and the row and column among the bin's cells; half as wide as indices
    # are, since there are so many.
    bins = torch.arange(len(many), dtype=torch.int32).repeat_interleave(many)
    place = torch.arange(len(bins), dtype=torch.int32) - ends[bins]
    width = wide[:, None].expand_as(counts).flatten().int()[bins]
    i, j = place // width, place % width
    del place, width
    first = (rois[:, 0].long() * rows)[:, None, None] + top[:, :, None]
    first = first * columns + left[:, None]
    taken = first.int().flatten()[bins] + i * columns + j
    row, column = bins // resolution, bins // resolution**2 * resolution + bins % resolution
    return taken, ends, down.flatten(0, 1)[row, i] * across.flatten(0, 1)[column, j]


def _along(
    start: Tensor, end: Tensor, resolution: int, cells: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What the bins of RoIs from `start` to `end` (n,) take of the cells along one axis.

    Returns:
        Weights (n, resolution, most); of each bin the first cell that they stand for, and how many
        they are (n, resolution).
    """
    bin_size = ((end - start) / resolution)[:, None, None]
    samples = bin_size.ceil()
    sample = torch.arange(max([1, *samples.int().flatten().tolist()]))
    at = start[:, None, None] + torch.arange(resolution)[:, None] * bin_size
    at = at + (sample + 0.5) * bin_size / samples.clamp(min=1)
    at = torch.where(sample < samples, at, at[..., :1])
    # Samples more than a cell outside count as zero.
    seen = (sample < samples) & (at >= -1) & (at <= cells)
    at = at.clamp(0, cells - 1)
    low = at.floor().long()
    share, high = at - low, (low + 1).clamp(max=cells - 1)
    first = low[..., :1]
    many = (high - first).amax(-1) + 1
    weight = seen / samples.clamp(min=1)
    weights = at.new_zeros(*many.shape, len(sample) + 1)
    weights.scatter_add_(2, low - first, weight * (1 - share))
    weights.scatter_add_(2, high - first, weight * share)
    return weights, first[..., 0], many
