"""Attention in windows of the grid that every other block shifts (Swin).

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
https://arxiv.org/abs/2103.14030, section 3.2: the grid is cut into `w x w` windows, and a token
attends to the tokens of its own window; every second block of a stage moves the windows by
`⌊w / 2⌋` rows and columns, by rolling the grid. Relative positions by equation 4. Cost with `P`
grid tokens after padding to whole windows: `2 P (w² + g) C + 2 g N C` for attention and `4 N C²`
for projections.

Deviations: keys that pad the grid are never attended, where they are tokens of the published code.
Global tokens are an extension of ours, by longformer's rule: each grid token attends to them too,
under one softmax, and they attend to all tokens; all share one projection. A stage of a single
block never shifts, such as stages 1 and 4 of every published ViL.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from attentions.contract import Grid
from attentions.parts import grid_positions, relative_index
from attentions.registry import register
from attentions.windowed import WindowedAttention
from attentions.windows import SHIFTED, Plan


@register("swin")
class ShiftedWindowAttention(WindowedAttention):
    """Attention in windows, shifted or not, and to global tokens.

    Along a side of the grid that one window covers nothing is shifted.

    Args:
        window: side of a window.
        shift: rows and columns by which the windows are moved; None alternates between 0 in even
            blocks of a stage and half a window in odd ones.
        block_index: the block of its stage, from 0.
        position: "absolute" (positions are in x already) or "relative" (a learned bias).

    Raises:
        ValueError: for a shift outside the window.
    """

    arch_option: ClassVar = "window"
    examples: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"window": 4, "position": "relative", "shift": 2},
        {"window": 3, "position": "relative", "shift": 0},
        {"window": 3, "position": "absolute", "shift": 1},
        {"window": 2, "position": "absolute", "shift": 0},
    )

    def __init__(
        self,
        *,
        window: int = 7,
        shift: int | None = None,
        block_index: int = 0,
        position: str = "absolute",
        **common: Any,
    ) -> None:
        if window < 1:
            raise ValueError(f"window {window} is not positive")
        if shift is not None and not 0 <= shift < window:
            raise ValueError(f"shift {shift} is outside [0, {window}), the window")
        super().__init__(position=position, **common)
        self.add_positions(window)
        self.window = window
        self.shift = window // 2 * (block_index % 2) if shift is None else shift
        if self.position == "relative":
            # Of published state dicts.
            extent = (window, window)
            places = grid_positions(extent)
            self.register_buffer("relative_position_index", relative_index(places, places, extent))

    def _shifts(self, grid: Grid) -> Grid:
        """Rows and columns to shift by: none along a side that one window covers."""
        rows, columns = (self.shift if side > self.window else 0 for side in grid)
        return rows, columns

    def plan(self, grid: Grid) -> Plan:
        shifts = self._shifts(grid)
        return Plan(grid, self.num_heads, self.num_global, SHIFTED, self.window, shifts)

    def seen(self, places: Tensor, grid: Grid) -> Tensor:
        # Shifting the windows is tiling the grid from elsewhere.
        moved = places - torch.tensor(self._shifts(grid), device=places.device)
        tile = moved.div(self.window, rounding_mode="floor")
        return (tile[:, None] == tile).all(dim=-1)
