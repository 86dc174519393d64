"""Linear attention by random features of the softmax kernel (FAVOR+).

Choromanski et al., "Rethinking Attention with Performers", https://arxiv.org/abs/2009.14794,
section 2.3, by `performer_pytorch.FastAttention`, whose own normalisation stands for the scale.
Cost: `N F (4 M + 1) H` for features, their normaliser and their products, and `4 N C²` for
projections.

The features are computed in float32 under autocast too: their exponentials span more than half
precision holds.
"""

from typing import Any, ClassVar

import torch
from performer_pytorch import FastAttention
from torch import Tensor, nn

from attentions.contract import Attention, Grid
from attentions.parts import full_precision, merge_heads, split_heads
from attentions.registry import register

KERNEL_EPS = 1e-4


@register("performer")
class PerformerAttention(Attention):
    """Attention through `num_features` random features, redrawn while training.

    Args:
        num_features: random features a head.
        redraw_interval: training steps between two draws of the features; 0 never redraws. Features
            are never redrawn when evaluating.
    """

    arch_option: ClassVar = "num_features"
    has_weights: ClassVar = False
    published_note: ClassVar = (
        "the published formula counts five products of tokens, features and channels where four"
        " run, and elementwise operations"
    )
    examples: ClassVar = ({"num_features": 32}, {"num_features": 7})

    def __init__(
        self, *, num_features: int = 256, redraw_interval: int = 1000, **common: Any
    ) -> None:
        super().__init__(**common)
        if num_features < 1 or redraw_interval < 0:
            raise ValueError(
                f"num_features {num_features} must be positive and"
                f" redraw_interval {redraw_interval} not negative"
            )
        self.num_features = num_features
        self.redraw_interval = redraw_interval
        self.training_step = 0
        self._redrawn_at = 0
        # The library draws by a QR decomposition, which the meta device does not have.
        with torch.device("cpu"):
            fast_attention = FastAttention(self.dim // self.num_heads, num_features)
        self.fast_attention = fast_attention.to(torch.get_default_device())
        self.qkv = nn.Linear(self.dim, 3 * self.dim)
        self.proj = nn.Linear(self.dim, self.dim)

    def set_training_step(self, step: int) -> None:
        """Say which training step comes next, and redraw if that is due and was not done for it."""
        self.training_step = step
        self._redraw_if_due()

    def _redraw_if_due(self) -> None:
        interval, step = self.redraw_interval, self.training_step
        if interval and step % interval == 0 and step not in (0, self._redrawn_at):
            matrix: Tensor = self.fast_attention.projection_matrix
            self.fast_attention.redraw_projection_matrix(matrix.device)
            self._redrawn_at = step

    def _count_call(self) -> None:
        if self.training:
            self._redraw_if_due()
            self.training_step += 1

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        self._count_call()
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        with full_precision(x):
            wide = torch.promote_types(q.dtype, torch.float32)
            out = self.fast_attention(q.to(wide), k.to(wide), v.to(wide))
        return self.proj(merge_heads(out).to(q.dtype))

    def reference(self, x: Tensor, grid: Grid) -> Tensor:
        self._count_call()
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        with full_precision(x):
            wide = torch.promote_types(q.dtype, torch.float32)
            q, k, v = q.to(wide), k.to(wide), v.to(wide)
            features_q = self._features(q, over=(-1,))
            features_k = self._features(k, over=(-2, -1))
            weights = features_q @ features_k.transpose(-2, -1)
            out = (weights / weights.sum(dim=-1, keepdim=True)) @ v
        return self.proj(merge_heads(out).to(x.dtype))

    def _features(self, x: Tensor, *, over: tuple[int, ...]) -> Tensor:
        """Positive features of x, stabilised by the maximum over `over`.

        Shapes: x (B, H, N, M) -> (B, H, N, F).
        """
        x = x * x.shape[-1] ** -0.25
        exponent = x @ self.fast_attention.projection_matrix.to(x.dtype).T
        length = x.square().sum(dim=-1, keepdim=True) / 2
        largest = exponent.amax(dim=over, keepdim=True).detach()
        scale = float(self.num_features) ** -0.5
        return scale * ((exponent - length - largest).exp() + KERNEL_EPS)

    def multiply_adds(self, grid: Grid) -> int:
        tokens = self.num_global + grid[0] * grid[1]
        width = self.dim // self.num_heads
        # Features of queries and keys, their normaliser, the context, and reading the context.
        per_head = tokens * self.num_features * (2 * width + 1 + 2 * width)
        return self.num_heads * per_head + 4 * tokens * self.dim**2

    def published_multiply_adds(self, grid: Grid) -> int:
        tokens = self.num_global + grid[0] * grid[1]
        width, features = self.dim // self.num_heads, self.num_features
        kernel = tokens * features * width + 2 * tokens * width + 2 * tokens * features
        attention = 2 * tokens * features + 3 * tokens * features * width
        linear = (4 * self.dim**2 + 4 * self.dim) * tokens
        return self.num_heads * (2 * kernel + attention) + linear
