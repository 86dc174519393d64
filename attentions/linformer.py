"""Attention to keys and values projected along the sequence.

Wang et al., "Linformer: Self-Attention with Linear Complexity", https://arxiv.org/abs/2006.04768,
equation 7: `softmax(q (E k)ᵀ / √M) F v` with learned `E, F (features, N)`, shared by the heads and,
if wished, by keys and values. It works for one sequence length only. Cost: `4 N F C + 2 N C² +
2 F C²`, and `N F C` less where keys and values share a projection: tokens are mixed before keys and
values are computed of them, which is the same.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attentions.contract import Attention, Grid
from attentions.parts import apply, lowered, merge_heads, split_heads
from attentions.registry import register


class MixTokens(torch.autograd.Function):
    """`projectionᵀ x` image by image, without a transposed copy of x that a batch would need.

    Shapes: x (B, N, C), projection (N, F) -> (B, F, C).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, projection: Tensor) -> Tensor:
        ctx.save_for_backward(x, projection)
        weights = projection.to(x.dtype).T
        return torch.stack([weights @ image for image in x])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, projection = ctx.saved_tensors
        weights = projection.to(x.dtype)
        grad_projection = (x[0] @ grad[0].T).to(projection.dtype)
        for image, above in zip(x[1:], grad[1:], strict=True):
            grad_projection += image @ above.T
        return torch.stack([weights @ above for above in grad]), grad_projection


@register("linformer")
class LinformerAttention(Attention):
    """Attention to `num_features` learned mixtures of all tokens.

    Args:
        seq_len: tokens of the one sequence length it works for, global tokens included.
        num_features: length of the projected sequence.
        share_kv: keys and values share one projection.

    Raises:
        ValueError: for a sequence of another length.
    """

    arch_option: ClassVar = "num_features"
    fixed_size: ClassVar = True
    examples: ClassVar = (
        {"num_features": 16, "share_kv": False},
        {"num_features": 5, "share_kv": True},
    )

    def __init__(
        self, *, seq_len: int, num_features: int = 256, share_kv: bool = False, **common: Any
    ) -> None:
        super().__init__(**common)
        if seq_len < 1 or num_features < 1:
            raise ValueError(f"seq_len {seq_len} and num_features {num_features} must be positive")
        self.seq_len = seq_len
        self.num_features = num_features
        self.query = nn.Linear(self.dim, self.dim)
        self.kv = nn.Linear(self.dim, 2 * self.dim)
        self.proj = nn.Linear(self.dim, self.dim)
        self.proj_k = nn.Parameter(torch.empty(seq_len, num_features))
        self.proj_v = self.proj_k if share_kv else nn.Parameter(torch.empty(seq_len, num_features))
        # Entries of variance 1 / features: the random projection of the paper's theorem 2.
        for projection in {id(p): p for p in (self.proj_k, self.proj_v)}.values():
            nn.init.normal_(projection, std=num_features**-0.5)

    def _check(self, x: Tensor) -> None:
        if x.shape[1] != self.seq_len:
            raise ValueError(
                f"linformer was made for {self.seq_len} tokens and got {x.shape[1]}:"
                " it works for one image size only"
            )

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        self._check(x)
        x = lowered(x)
        weights, biases = self.kv.weight.chunk(2), self.kv.bias.chunk(2)
        # (E x) W + (sum of E) b is E (x W + b), with as many products fewer as the sequence is
        # shorter.
        k, v = (
            split_heads(nn.functional.linear(mixed, weight) + total[:, None] * bias, self.num_heads)
            for (mixed, total), weight, bias in zip(self._mixed(x), weights, biases, strict=True)
        )
        q = split_heads(self.query(x), self.num_heads)
        out = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout_p)
        return self.proj(merge_heads(out))

    def _mixed(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Mixtures of all tokens, (B, F, C), and the sums of their weights, (F), for k and v."""
        shared = self.proj_v is self.proj_k
        mixed = [
            (apply(MixTokens, x, projection), projection.sum(dim=0))
            for projection in ([self.proj_k] if shared else [self.proj_k, self.proj_v])
        ]
        return 2 * mixed if shared else mixed

    def reference(self, x: Tensor, grid: Grid) -> Tensor:
        self._check(x)
        q = split_heads(self.query(x), self.num_heads)
        k, v = (split_heads(part, self.num_heads) for part in self.kv(x).chunk(2, dim=-1))
        k = torch.einsum("bhnm,nf->bhfm", k, self.proj_k)
        v = torch.einsum("bhnm,nf->bhfm", v, self.proj_v)
        weights = (self.scale * (q @ k.transpose(-2, -1))).softmax(dim=-1)
        return self.proj(merge_heads(nn.functional.dropout(weights, self.dropout_p) @ v))

    def multiply_adds(self, grid: Grid) -> int:
        tokens = self.num_global + grid[0] * grid[1]
        features = self.num_features
        mixtures = 1 if self.proj_v is self.proj_k else 2
        attention = (2 + mixtures) * tokens * features * self.dim
        return attention + 2 * (tokens + features) * self.dim**2
