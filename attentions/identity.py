"""No mixing of tokens at all: what the backbone does without attention.

Yu et al., "MetaFormer Is Actually What You Need for Vision", https://arxiv.org/abs/2111.11418, the
ablation of their token mixer: `x` itself. Tokens meet in the patch embeddings of the stages alone.
It has no parameters and no multiply-adds, and keeps nothing for the backward pass. What attention
adds to a backbone is what it has more than this.

Deviations: none. A global token learns nothing of the image; the row has none.
"""

from typing import ClassVar

from torch import Tensor

from attentions.contract import Attention, Grid
from attentions.registry import register


@register("identity")
class Identity(Attention):
    """Return every token as it is."""

    has_weights: ClassVar = False

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        return x

    def reference(self, x: Tensor, grid: Grid) -> Tensor:
        """The product with the unit matrix of all tokens."""
        return x.new_ones(x.shape[1]).diag() @ x

    def multiply_adds(self, grid: Grid) -> int:
        return 0
