"""Attention in windows and, in every other block, in lattices over the whole grid (MaxViT).

Tu et al., "MaxViT: Multi-Axis Vision Transformer", https://arxiv.org/abs/2204.01697, section 3.2:
block attention, in `w x w` windows side by side, then grid attention, in which a window is the
tokens at equal distances, `⌈rows / w⌉` rows and `⌈columns / w⌉` columns apart, so that it reaches
over the whole grid. Relative positions as in Swin, between windows' rows and columns. Cost with `P`
grid tokens: `2 P (w² + g) C + 2 g N C` for attention and `4 N C²` for projections.

Deviations: grids that are not whole windows, which published code refuses, are padded in windows,
by keys that are never attended; a lattice has fewer tokens along a side then, and in place of the
alternation of two layers in one block there is that of blocks of a stage. Global tokens are an
extension of ours, by longformer's rule: each grid token attends to them too, under one softmax, and
they attend to all tokens; all share one projection. The scale is `M ** -0.5`, as in the paper;
torchvision's is `C ** -0.5`.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from attentions.contract import Grid
from attentions.registry import register
from attentions.windowed import WindowedAttention
from attentions.windows import LATTICE, SHIFTED, Plan

PARTITIONS = ("window", "grid")


@register("maxvit")
class MultiAxisAttention(WindowedAttention):
    """Attention in windows or in lattices, and to global tokens.

    Args:
        window: side of a window, and tokens along a side of a lattice.
        partition: "window" or "grid"; None alternates between windows in even blocks of a stage
            and lattices in odd ones.
        block_index: the block of its stage, from 0.
        position: "absolute" (positions are in x already) or "relative" (a learned bias).
    """

    arch_option: ClassVar = "window"
    examples: ClassVar = (
        {"window": 3, "position": "relative", "partition": "grid"},
        {"window": 4, "position": "absolute", "partition": "grid"},
        {"window": 4, "position": "relative", "partition": "window"},
    )

    def __init__(
        self,
        *,
        window: int = 7,
        partition: str | None = None,
        block_index: int = 0,
        position: str = "absolute",
        **common: Any,
    ) -> None:
        if window < 1:
            raise ValueError(f"window {window} is not positive")
        if partition not in (None, *PARTITIONS):
            raise ValueError(f"unknown partition {partition!r}; allowed: {', '.join(PARTITIONS)}")
        super().__init__(position=position, **common)
        self.add_positions(window)
        self.window = window
        self.partition = partition or PARTITIONS[block_index % 2]

    def _places(self, places: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Of which window each token is, and where in it: (P, 2) each."""
        if self.partition == "window":
            return places // self.window, places % self.window
        step = torch.tensor([-(-side // self.window) for side in grid], device=places.device)
        return places % step, places // step

    def plan(self, grid: Grid) -> Plan:
        kind, how = (SHIFTED, (0, 0)) if self.partition == "window" else (LATTICE, ())
        return Plan(grid, self.num_heads, self.num_global, kind, self.window, how)

    def seen(self, places: Tensor, grid: Grid) -> Tensor:
        window, _ = self._places(places, grid)
        return (window[:, None] == window).all(dim=-1)

    def difference(self, places: Tensor, grid: Grid) -> Tensor:
        return super().difference(self._places(places, grid)[1], grid)
